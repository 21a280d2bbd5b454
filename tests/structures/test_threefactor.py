"""Three factors: ranks of the update, starts, solvers that keep columns orthonormal, penalties against autograd."""

from typing import Any, cast

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.errors import IncompatibleAxes, RankError
from rankwise.penalties import OrthonormalPull, SingularValues
from rankwise.solvers import AdamW, Landing, StelLA
from rankwise.solvers.chain import ChainOptimizer
from rankwise.solvers.stiefel import Land
from rankwise.structures import OFT, SVFT, Anchored, Gated, LoRA, Magnitude, SVDForm, ThreeFactor, TinyLoRA, Truncated
from rankwise.testing import randomise


def drawn(*shapes: tuple[int, ...], dtype: torch.dtype = torch.float64) -> list[Tensor]:
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(*shape, generator=generator, dtype=dtype) for shape in shapes]


def net(dtype: torch.dtype = torch.float64) -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 12), nn.Linear(12, 16), nn.Linear(16, 9)).to(dtype)


def train(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    generator = torch.Generator().manual_seed(1)
    for _ in range(steps):
        x = torch.randn(16, 12, generator=generator).to(model[0].weight)
        optimizer.zero_grad()
        (model(x) - 3 * x[:, :9]).square().mean().backward()
        optimizer.step()


def frames(adapter: rw.Adapter) -> list[Tensor]:
    return [t for f in adapter.values() for t in (f["b"].detach(), f["a"].detach().mT)]


def excess(x: Tensor) -> float:
    return float((x.mT @ x - torch.eye(x.shape[-1], dtype=x.dtype)).norm())


# -- structures -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("structure", "rank"),
    [
        (ThreeFactor(3), 3),
        (ThreeFactor(4, diagonal=True), 4),
        (TinyLoRA(2, size=9), 2),
        (Truncated(Gated(3), 2), 5),
        (Truncated(LoRA(3), 3), 6),
    ],
    ids=repr,
)
def test_the_update_has_the_rank_that_it_lowers_to(structure, rank):
    model = nn.Sequential(nn.Linear(12, 16)).double()
    w = model[0].weight.detach().clone()
    adapter = rw.attach(model, rw.Recipe(structure))
    randomise(adapter, lambda: model(torch.eye(12).double()))
    pair = structure.delta(adapter["0"]).lower()
    assert pair.left.shape == (16, rank) and pair.right.shape == (rank, 12)
    update = structure.weight(adapter["0"], w) - w
    assert int(torch.linalg.matrix_rank(update)) == rank
    torch.testing.assert_close(pair.left @ pair.right, update)


def test_an_update_of_full_rank_is_no_lora():
    model = nn.Sequential(nn.Linear(12, 16)).double()
    adapter = rw.attach(model, rw.Recipe(SVFT("banded", 1)))
    randomise(adapter, lambda: model(torch.eye(12).double()))
    update = SVFT("banded", 1).delta(adapter["0"])
    assert int(torch.linalg.matrix_rank(update.dense())) == 12
    assert update.lower() is None


def test_what_is_dropped_is_the_end_of_the_spectrum():
    model = nn.Sequential(nn.Linear(12, 16, bias=False)).double()
    spectrum = torch.linalg.svdvals(model[0].weight)
    rw.attach(model, rw.recipe("kasa", rank=3))
    now = torch.linalg.svdvals(model(torch.eye(12).double()).detach())
    torch.testing.assert_close(now[:9], spectrum[:9].detach())
    assert now[9:].max() < 1e-12


def test_the_most_aligned_places_are_those_of_the_largest_products():
    model = nn.Sequential(nn.Linear(8, 8)).double()
    adapter = rw.attach(model, rw.Recipe(SVFT("top_k", 1)))
    f = adapter["0"]
    aligned = (f["u"].mT @ f["v"].mT).abs()
    chosen = torch.zeros(8, 8, dtype=torch.bool)
    chosen[f["row"], f["col"]] = True
    assert int(chosen.sum()) == 8 * 3 - 2 == f["m"].numel()
    assert aligned[chosen].min() > aligned[~chosen].max()


def test_random_places_are_stored_and_not_drawn_again(tmp_path):
    def made() -> nn.Module:
        torch.manual_seed(3)
        return nn.Sequential(nn.Linear(8, 8))

    adapter = rw.attach(made(), rw.Recipe(SVFT("random", 1)))
    adapter.save(tmp_path)
    loaded = rw.load(made(), tmp_path)
    assert torch.equal(loaded["0"]["row"], adapter["0"]["row"])
    assert loaded["0"]["row"].dtype == torch.int64
    model = made()
    torch.manual_seed(4)
    other = rw.attach(model, rw.Recipe(SVFT("random", 1)))
    assert not torch.equal(other["0"]["row"], adapter["0"]["row"])


def test_bad_input():
    model = nn.Sequential(nn.Linear(6, 4))
    with pytest.raises(IncompatibleAxes, match="one of"):
        SVFT(cast(Any, "plain"))
    for wide in (SVFT(width=4), SVFT(width=-1)):
        with pytest.raises(RankError, match="between 0 and k - 1.*override"):
            rw.attach(model, rw.Recipe(wide))
    with pytest.raises(RankError, match="one number or more"):
        rw.attach(model, rw.Recipe(TinyLoRA(2, size=0)))
    with pytest.raises(RankError, match="here 3"):  # something of W has to stay
        rw.attach(model, rw.Recipe(Truncated(LoRA(2), 4)))
    with pytest.raises(IncompatibleAxes, match="Truncate under"):
        Truncated(OFT(2))
    for solver in (Landing(), StelLA()):
        with pytest.raises(IncompatibleAxes, match="take ThreeFactor"):
            rw.Recipe(LoRA(2), solver=solver)


# -- solvers --------------------------------------------------------------------------------------


def test_the_landing_field_is_the_papers():
    """With the m x m matrix that the code never forms."""
    (x, g) = drawn((9, 3), (9, 3))
    model = nn.Sequential(nn.Linear(7, 9)).double()
    adapter = rw.attach(model, rw.Recipe(ThreeFactor(3)))
    b = adapter["0"]["b"]
    b.data.copy_(x)
    b.grad = g.clone()
    field = (g @ x.mT - x @ g.mT) @ x + 0.3 * x @ (x.mT @ x - torch.eye(3).double())
    optimizer = ChainOptimizer(Landing().groups(adapter.sites.values(), 0.1), (Land(0.3),), ())
    optimizer.step()
    torch.testing.assert_close(b.detach(), x - 0.1 * field)


@pytest.mark.parametrize("width", [None, 16.0])
def test_stella_is_adam_in_the_tangent_space_and_the_svd(width):
    """Three steps against the formulas, with torch's Adam and the polar factor of an SVD."""
    (x, *grads) = drawn((9, 3), (9, 3), (9, 3), (9, 3))
    x = torch.linalg.qr(x).Q
    adapter = rw.attach(nn.Sequential(nn.Linear(7, 9)).double(), rw.Recipe(ThreeFactor(3), solver=StelLA(width)))
    b = adapter["0"]["b"]
    b.data.copy_(x)
    optimizer = adapter.optimizer(lr=0.1)
    own = nn.Parameter(x.clone())
    adam = torch.optim.Adam([own], lr=0.1)
    for g in grads:
        own.grad = g - x @ (g.mT @ x)
        adam.step()
        d = own.detach() - x
        d = d if width is None else d / (9 / width) ** 0.5
        d = d - x @ (x.mT @ d + d.mT @ x) / 2
        u, _, v = torch.linalg.svd(x + d, full_matrices=False)
        x = u @ v
        own.data.copy_(x)
        b.grad = g.clone()
        optimizer.step()
        torch.testing.assert_close(b.detach(), x)


@pytest.mark.parametrize("wrap", [lambda s: s, Magnitude, Anchored], ids=["plain", "Magnitude", "Anchored"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_stella_keeps_columns_orthonormal_to_rounding(dtype, wrap):
    model = net(dtype)
    adapter = rw.attach(model, rw.Recipe(wrap(ThreeFactor(3)), solver=StelLA()))
    before = [x.clone() for x in frames(adapter)]
    train(model, adapter.optimizer(lr=1e-2), 200)
    assert max(map(excess, frames(adapter))) <= 20 * torch.finfo(dtype).eps
    assert min(float((x - y).norm()) for x, y in zip(before, frames(adapter), strict=True)) > 0.1


def test_landing_stays_near_and_adamw_does_not():
    """Its pull counts beside the gradient, which is of the order of 1 here: 0.5 holds what 0.005 lets go."""
    found = []
    for solver in (AdamW(), Landing(), Landing(0.5)):
        model = net()
        adapter = rw.attach(model, rw.Recipe(ThreeFactor(3), solver=solver))
        before = [x.clone() for x in frames(adapter)]
        train(model, adapter.optimizer(lr=4e-3), 200)
        moved = min(float((x - y).norm()) for x, y in zip(before, frames(adapter), strict=True))
        assert moved > 0.1
        found.append(max(map(excess, frames(adapter))))
    free, paper, strong = found
    assert strong < 0.1
    assert 3 * paper < free
    assert 20 * strong < free


@pytest.mark.parametrize("solver", [Landing(), StelLA()], ids=repr)
def test_frames_of_a_shape_are_one_stack(solver):
    model = net()
    adapter = rw.attach(model, rw.Recipe(Magnitude(ThreeFactor(3)), solver=solver))
    optimizer = adapter.optimizer(lr=1e-3)
    names = [group["name"] for group in optimizer.param_groups]
    assert names == ["frames", "others"]
    train(model, optimizer, 1)
    shapes = {tuple(t.shape) for f in adapter.values() for t in (f["b"], f["a"])}
    stacks = optimizer._stacks[names.index("frames")]
    assert len(stacks) == len(shapes) == 5
    assert sum(len(stack.units) for stack in stacks) == 2 * len(adapter)


# -- penalties ------------------------------------------------------------------------------------


def test_the_pull_is_the_gradient_of_the_mean_over_the_rate():
    model = net()
    adapter = rw.attach(model, rw.Recipe(Anchored(SVDForm(3)), penalties=(OrthonormalPull(0.2),)))
    randomise(adapter, lambda: model(torch.ones(1, 12).double()))
    sides = [p for f in adapter.values() for p in (f["a"], f["b"])]
    for p in adapter.parameters():
        p.grad = torch.zeros_like(p)
    eye = torch.eye(3).double()
    sizes = [torch.linalg.matrix_norm((p @ p.mT if i % 2 == 0 else p.mT @ p) - eye) for i, p in enumerate(sides)]
    wanted = torch.autograd.grad(torch.stack(sizes).mean() * 0.2 / 0.05, sides)
    OrthonormalPull(0.2).before([*adapter.sites.values()], dict.fromkeys(adapter.parameters(), 0.05), 0)
    for p, w in zip(sides, wanted, strict=True):
        torch.testing.assert_close(p.grad, w)
    gates = [f["e"].grad for f in adapter.values()]
    assert all(g is not None and not g.any() for g in gates)


def test_the_pull_leaves_orthonormal_factors_and_a_rate_of_zero_alone():
    model = net()
    adapter = rw.attach(model, rw.recipe("sorsa", rank=3))
    for p in adapter.parameters():
        p.grad = torch.zeros_like(p)
    pull, sites = OrthonormalPull(1.0), [*adapter.sites.values()]
    pull.before(sites, dict.fromkeys(adapter.parameters(), 0.0), 0)
    assert all(p.grad is not None and not p.grad.any() for p in adapter.parameters())


def test_sorsa_starts_orthonormal_and_stays_nearer_with_its_pull():
    found = {}
    for gamma in (0.0, 4e-4):
        model = net()
        adapter = rw.attach(model, rw.recipe("sorsa", rank=3, gamma=gamma))
        assert max(map(excess, frames(adapter))) < 1e-12
        train(model, adapter.optimizer(), 200)
        found[gamma] = max(map(excess, frames(adapter)))
    assert 50 * found[4e-4] < found[0.0]


def test_the_penalty_of_kasa_is_the_sum_over_layers():
    model = net()
    adapter = rw.attach(model, rw.recipe("kasa", rank=3))
    randomise(adapter, lambda: model(torch.ones(1, 12).double()))
    wanted, eye = 0.0, torch.eye(3).double()
    for f in adapter.values():
        a, b, e = (f[name].detach() for name in "abe")
        wanted += 0.5 * float((e**2).sum())
        wanted += 0.25 * float(torch.sqrt(((a @ a.mT - eye) ** 2).sum()) + torch.sqrt(((b.mT @ b - eye) ** 2).sum()))
    assert SingularValues(0.5, 0.25)(adapter, 0).item() == pytest.approx(wanted, rel=1e-12)
