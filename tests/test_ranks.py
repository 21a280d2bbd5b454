"""Rank over time: AdaLoRA's masks are PEFT's, restarts keep the map, ScaLoRA's scales are the best ones."""

import copy
import math
from collections.abc import Callable
from typing import Any

import peft
import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise import ranks
from rankwise.errors import AttachError, IncompatibleAxes, RankError, UnknownName
from rankwise.ranks import Budget, Following, Pruning, Rescaling, Restarts, Sampled, Shrinking
from rankwise.steps import STEPS, accompany
from rankwise.structures import Chain, Delta, Gated, LoRA, Magnitude, Rising, SVDForm, Switched
from rankwise.testing import LAYERS


class Blocks(nn.Module):
    """Four layers in numbered blocks."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(12, 12), nn.Tanh()) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = layer(x)
        return x


def two() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)).double()


def attached(structure: Any, plan: Any = None, model: nn.Module | None = None, **axes: Any) -> rw.Adapter:
    torch.manual_seed(1)
    recipe = rw.Recipe(structure, ranks=ranks.Constant() if plan is None else plan, **axes)
    return rw.attach(two() if model is None else model.double(), recipe)


def x(rows: int = 20) -> Tensor:
    return torch.randn(rows, 12, generator=torch.Generator().manual_seed(7)).double()


def train(adapter: rw.Adapter, optimizer: Any, steps: int, each: Callable[[], None] = lambda: None) -> None:
    adapter.model.train()
    for _ in range(steps):
        optimizer.zero_grad()
        (adapter.model(x()) - 1).square().mean().backward()
        optimizer.step()
        each()


def moved(adapter: rw.Adapter, size: float = 0.3) -> rw.Adapter:
    for p in adapter.parameters():
        p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(p.numel())).to(p) * size)
    return adapter


# -- AdaLoRA ------------------------------------------------------------------------------------


def theirs(**options: Any) -> Any:
    config = peft.AdaLoraConfig(init_r=8, target_r=3, target_modules=["0", "2"], lora_alpha=8, **options)
    return peft.get_peft_model(two(), config)


def test_the_budget_follows_the_rank_unless_it_is_given():
    budgets = [rw.recipe("adalora", **given).ranks.budget for given in ({}, {"rank": 3}, {"rank": 3, "budget": 1.0})]
    assert budgets == [8.0, 2.0, 1.0]


def test_the_budget_falls_as_in_peft():
    plan = Budget(50, budget=3, warmup=7, final=11)
    allocator = theirs(tinit=7, tfinal=11, total_step=50).base_model.rankallocator
    assert [plan.left(t, 16, 6) for t in range(1, 51)] == [allocator.budget_schedule(t)[0] for t in range(1, 51)]
    assert plan.left(20, 16, 6) == int(10 * (1 - 13 / 32) ** 3 + 6)  # the paper's formula


def test_a_site_may_learn_nothing_at_first():
    """As one of an expert that no token reaches; a run resumed meanwhile is the same run."""
    adapter = moved(attached(SVDForm(4, 4), Budget(8, budget=2)))
    again = copy.deepcopy(adapter.model)
    optimizer, other = adapter.optimizer(), rw.adapters(again)["default"].optimizer()
    for step in range(6):
        if step == 3:
            other.load_state_dict(copy.deepcopy(optimizer.state_dict()))
            again.load_state_dict(adapter.model.state_dict())
        for model, mine in [(adapter.model, optimizer), (again, other)][: 1 + (step > 2)]:
            (model if step > 3 else model[0])(x()).square().sum().backward()  # the second layer from step 4 on
            mine.step()
            mine.zero_grad()
    for p, q in zip(adapter.model.parameters(), again.parameters(), strict=True):
        assert torch.equal(p, q)


@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("seed", range(4))
def test_the_masks_are_those_of_pefts_allocator(every, seed):
    """The same values and gradients for 30 steps: the singular values agree after each of them."""
    other = theirs(tinit=4, tfinal=8, total_step=30, deltaT=every)
    adapter = attached(SVDForm(8, 8), Budget(30, budget=3, warmup=4, final=8, every=every))
    names = {"a": "lora_A", "b": "lora_B", "e": "lora_E"}
    pairs = []
    for site, factors in adapter.items():
        layer = getattr(other.base_model.model, site)
        for name, p in factors.items():
            q = getattr(layer, names[name])["default"]
            p.data.copy_(torch.randn(q.shape, generator=torch.Generator().manual_seed(q.numel())).reshape(p.shape))
            q.data = p.detach().clone().reshape(q.shape)
            pairs.append((p, q))
    mine = accompany(torch.optim.SGD([p for p, _ in pairs], 0.1), [adapter])
    draw = torch.Generator().manual_seed(seed)
    their = torch.optim.SGD([q for _, q in pairs], 0.1)
    alive = []
    for step in range(1, 31):
        for p, q in pairs:
            p.grad = torch.randn(p.shape, generator=draw).double()
            q.grad = p.grad.reshape(q.shape).clone()
        mine.step()
        their.step()
        other.base_model.update_and_allocate(step)
        assert all(torch.equal(p, q.reshape(p.shape)) for p, q in pairs), step
        alive.append(sum(int(f["e"].count_nonzero()) for f in adapter.values()))
    assert alive[:4] == [16] * 4
    assert alive[21:] == [6] * 9  # three a site on average, whichever site they are of


def test_a_gradient_brings_a_masked_triplet_back():
    adapter = attached(SVDForm(4, 4), Budget(20, budget=1, warmup=1, final=2, every=4))
    moved(adapter)
    optimizer, closed = adapter.optimizer(1e-2), []
    train(adapter, optimizer, 15, lambda: closed.append(sum(int(f["e"].eq(0).sum()) for f in adapter.values())))
    assert closed[3] > 0
    assert closed[4] == 0


# -- DyLoRA and SoRA ----------------------------------------------------------------------------


def test_dylora_at_a_rank_is_lora_of_that_rank():
    adapter = moved(attached(Switched(4, 8.0)))
    for b in (1, 3, 4):
        ranks.carry_out(adapter.sites.values(), ranks.at_rank(adapter.sites.values(), b))
        for site, f in adapter.items():
            wanted = 8.0 / b * f["b"][:, :b] @ f["a"][:b]
            structure = adapter.sites[site].structure
            torch.testing.assert_close(structure.weight(f, torch.zeros(len(f["b"]), f["a"].shape[1])), wanted)
    with pytest.raises(RankError, match="between 1 and that of the adapter, here 4; found 5"):
        ranks.at_rank(adapter.sites.values(), 5)


def test_dylora_draws_every_rank_alike_and_trains_no_other_component():
    adapter = attached(Switched(4, 4.0), Sampled(2))
    optimizer, drawn = adapter.optimizer(1e-3), []
    train(adapter, optimizer, 300, lambda: drawn.append(int(adapter["0"]["e"].count_nonzero())))
    counts = [drawn.count(b) for b in range(5)]
    assert counts[:2] == [0, 0]
    assert min(counts[2:]) > 70  # of 100; six standard deviations would be 51
    adapter.model.zero_grad()
    adapter.model(x()).square().mean().backward()
    cut = adapter["0"]["e"] == 0
    assert torch.equal(adapter["0"]["a"].grad.any(1), ~cut)


def test_sora_shrinks_its_gates_as_the_reference_does():
    adapter = attached(Gated(6, 6.0), Shrinking(0.05))
    twin = attached(Gated(6, 6.0))
    one, two_ = adapter.optimizer(1e-2), twin.optimizer(1e-2)
    for _ in range(12):
        train(adapter, one, 1)
        train(twin, two_, 1)
        for f in twin.values():  # SparseAdamW of the paper's code, after Adam's step
            e = f["e"].data
            above, below = e > 0.05, e < -0.05
            e[above] -= 0.05
            e[below] += 0.05
            e[~above & ~below] = 0
    for mine, want in zip(adapter.values(), twin.values(), strict=True):
        assert torch.equal(mine["e"], want["e"])
    closed = [int(f["e"].eq(0).sum()) for f in adapter.values()]
    assert 0 < sum(closed) < 12


# -- restarts -----------------------------------------------------------------------------------

CHAINS = (Chain(LoRA(2, 4.0), 3), Chain(LoRA(2, 4.0)), Magnitude(Chain(LoRA(2, 4.0), 3)))


@pytest.mark.parametrize("structure", CHAINS, ids=repr)
@pytest.mark.parametrize("keep", [0.0, 0.25])
def test_a_restart_leaves_the_map_as_it_is(structure, keep):
    """Beside the same run without restarts: the same map at the step of the restart, another factorisation."""
    adapter, twin = attached(structure, Restarts(4, keep)), attached(structure)
    train(adapter, adapter.optimizer(1e-2), 4)
    train(twin, twin.optimizer(1e-2), 4)
    torch.testing.assert_close(adapter.model(x()), twin.model(x()), rtol=0, atol=1e-12)
    for mine, was in zip(adapter.values(), twin.values(), strict=True):
        assert not torch.equal(mine["a"], was["a"]) or keep
        torch.testing.assert_close(mine["b"], keep * was["b"])


@pytest.mark.parametrize("links", [3, None])
def test_the_update_is_the_sum_of_its_pairs(links):
    adapter = attached(Chain(LoRA(2, 4.0), links), Restarts(3))
    optimizer, pairs = adapter.optimizer(1e-2), []
    before = copy.deepcopy(adapter.recipe.ranks)
    for _ in range(3):
        train(adapter, optimizer, 2)
        twin = copy.deepcopy(adapter.model)  # the third step of the stage, without its restart
        state = copy.deepcopy(optimizer.state_dict())
        copied = next(iter(rw.adapters(twin).values()))
        plain = copied.recipe.solver(copied.sites.values(), 1e-2)
        plain.load_state_dict(state)
        train(copied, plain, 1)
        pairs.append({s: 2.0 * f["b"].detach() @ f["a"].detach() for s, f in copied.items()})
        train(adapter, optimizer, 1)
    assert adapter.recipe.ranks == before
    for site, f in adapter.items():
        total = sum(p[site] for p in pairs)
        structure = adapter.sites[site].structure
        torch.testing.assert_close(structure.weight(f, torch.zeros_like(total)), total, rtol=0, atol=1e-12)
        assert torch.linalg.matrix_rank(total) == 6


def test_a_full_chain_goes_on_without_restarts():
    adapter = attached(Chain(LoRA(2), 1), Restarts(2))
    optimizer = adapter.optimizer(1e-2)
    train(adapter, optimizer, 3)
    past = adapter["0"]["past_b"].clone()
    train(adapter, optimizer, 5)
    assert torch.equal(adapter["0"]["past_b"], past)
    assert adapter["0"]["b"].any()


@pytest.mark.parametrize("prune", [1.0, 0.9, 0.0])
def test_the_smallest_moments_are_forgotten(prune):
    adapter, twin = (attached(Chain(LoRA(2)), plan) for plan in (Restarts(3, prune=prune), None))
    one, two_ = adapter.optimizer(1e-2), twin.optimizer(1e-2)
    train(adapter, one, 3)
    train(twin, two_, 3)
    for mine, was in zip(adapter.parameters(), twin.parameters(), strict=True):
        kept = one.state[mine]["exp_avg"] != 0
        assert int(kept.sum()) == mine.numel() - int(prune * mine.numel())
        if 0 < prune < 1:
            size = two_.state[was]["exp_avg"].abs()
            assert size[kept].min() >= size[~kept].max()
        for key in ("exp_avg", "exp_avg_sq"):
            assert torch.equal(one.state[mine][key], two_.state[was][key] * kept)
        assert one.state[mine]["step"] == (0 if prune == 1 else 3)


def test_no_step_after_a_restart_is_much_larger_than_the_rate():
    adapter = attached(Chain(LoRA(2, 2.0)), Restarts(20, prune=0.9))
    optimizer = adapter.optimizer(1e-3)
    train(adapter, optimizer, 20)
    before = [p.detach().clone() for p in adapter.parameters()]
    train(adapter, optimizer, 1)
    assert max((p - b).abs().max() for p, b in zip(adapter.parameters(), before, strict=True)) < 4e-3


def test_boosting_trains_some_blocks_at_a_time():
    adapter = attached(Chain(LoRA(1), 8), Restarts(3, blocks=2), Blocks())
    optimizer, seen = adapter.optimizer(1e-2), set()
    train(adapter, optimizer, 3)
    for _ in range(7):
        before = {site: f["b"].detach() @ f["a"].detach() for site, f in adapter.items()}
        assert not any(p.any() for p in before.values())
        train(adapter, optimizer, 2)
        now = frozenset(site for site, f in adapter.items() if (f["b"] @ f["a"]).any())
        assert len(now) == 2
        seen.add(now)
        train(adapter, optimizer, 1)
    assert len(seen) > 1


def test_dropout_does_not_reach_the_past():
    adapter = attached(Chain(LoRA(2, 4.0), 1), dropout=0.5)
    for f in adapter.values():
        f["past_b"].data.normal_()
        f["past_a"].data.normal_()
    adapter.model.train()
    assert torch.equal(adapter.model(x()), adapter.model(x()))
    want = adapter.model.eval()(x())
    torch.testing.assert_close(adapter.model.train()(x()), want)
    adapter["0"]["b"].data.normal_()
    assert not torch.equal(adapter.model(x()), adapter.model(x()))


def test_the_jagged_cosine():
    rate = ranks.jagged_cosine(1000, 200, warmup=50, again=20, floor=0.1)
    cosine = lambda t: 0.1 + 0.45 * (1 + math.cos(math.pi * (t - 50) / 950))  # noqa: E731
    assert [rate(t) for t in (0, 200, 400, 800)] == [0, 0, 0, 0]
    assert rate(25) == 0.5
    assert rate(50) == 1.0
    assert rate(1000) == pytest.approx(0.0)
    for t in (60, 199, 220, 399, 999):
        assert rate(t) == pytest.approx(cosine(t))
    assert rate(210) == pytest.approx(cosine(220) / 2)


# -- Delta-LoRA ---------------------------------------------------------------------------------


def test_delta_lora_is_the_papers_loop():
    """By hand: W <- W + ratio s (B'A' - BA) after each step t > K, no gradient through it."""
    adapter = attached(Delta(LoRA(2, 4.0), ratio=1.5), Following(2), nn.Sequential(nn.Linear(12, 12)))
    f = adapter["0"]
    w, bias = (p.detach().clone() for p in adapter.model[0]._parameters.values())
    a, b = (f[n].detach().clone().requires_grad_() for n in "ab")
    by_hand, optimizer = torch.optim.AdamW([a, b], 1e-2, weight_decay=0.0), adapter.optimizer(1e-2)
    for t in range(8):
        by_hand.zero_grad()
        (x() @ (w + 2.0 * b @ a).mT + bias - 1).square().mean().backward()
        product = (b @ a).detach()
        by_hand.step()
        if t > 2:
            w = w + 1.5 * 2.0 * ((b @ a).detach() - product)
        train(adapter, optimizer, 1)
        torch.testing.assert_close(f["b"], b, rtol=0, atol=1e-10)
        weight = adapter.sites["0"].structure.weight(f, adapter.model[0].weight)
        torch.testing.assert_close(weight, w + 2.0 * b @ a, rtol=0, atol=1e-10)
    assert (w - adapter.model[0].weight).abs().max() > 1e-2


# -- ScaLoRA ------------------------------------------------------------------------------------


def quadratic(b: Tensor, a: Tensor, g: Tensor, v: Tensor, bound: float) -> Tensor:
    """<G, D> + L/2 |D|^2 of the step D = -(sum_i v_i b_i b_i^T G + v_{r+i} G a_i a_i^T), dense; times the rate."""
    p, q = v.chunk(2)
    d = -(b * p @ b.mT @ g + g @ a.mT * q @ a)
    return (g * d).sum() + bound / 2 * d.square().sum()


def test_the_best_scales_are_stationary():
    torch.manual_seed(0)
    for _ in range(20):
        b, a, g = (torch.randn(s, dtype=torch.float64) for s in ((9, 3), (3, 11), (9, 11)))
        p, q = ranks.best_scales(b, a, g @ a.mT, b.mT @ g, 0.7)
        v = torch.cat([p, q]).square().requires_grad_()
        value = quadratic(b, a, g, v, 0.7)
        (slope,) = torch.autograd.grad(value, v)
        if len(set(p.tolist())) > 1:
            assert slope.abs().max() < 1e-8
        else:  # one scale for all columns, one for all rows
            assert slope.reshape(2, 3).sum(1).abs().max() < 1e-8
        assert value < quadratic(b, a, g, torch.ones(6, dtype=torch.float64), 0.7)


def test_a_single_scale_for_each_side_where_some_would_be_negative():
    torch.manual_seed(3)
    kinds = set()
    for _ in range(60):
        b, a, g = (torch.randn(s, dtype=torch.float64) for s in ((4, 3), (3, 5), (4, 5)))
        p, q = ranks.best_scales(b, a, g @ a.mT, b.mT @ g, 1.0)
        assert (torch.cat([p, q]) > 0).all()
        kinds.add(len(set(p.tolist())) == 1)
    assert kinds == {True, False}
    p, q = ranks.best_scales(torch.zeros(4, 3), torch.randn(3, 5), torch.randn(4, 3), torch.zeros(3, 5), 1.0)
    assert torch.equal(p, torch.ones(3))  # B = 0, at the start
    assert torch.equal(q, torch.ones(3))


def test_a_scaling_leaves_the_map_and_moves_the_moments_with_the_partner():
    adapter, twin = attached(Chain(LoRA(3, 6.0)), Rescaling(5, 0.3)), attached(Chain(LoRA(3, 6.0)))
    one, two_ = adapter.optimizer(1e-2), twin.optimizer(1e-2)
    train(adapter, one, 5)
    train(twin, two_, 5)
    torch.testing.assert_close(adapter.model(x()), twin.model(x()), rtol=0, atol=1e-12)
    for mine, was in zip(adapter.values(), twin.values(), strict=True):
        p, q = (mine["b"] / was["b"])[0], (mine["a"] / was["a"])[:, 0]
        assert (p - 1).abs().max() > 1e-3
        for name, scale in (("b", q), ("a", p.unsqueeze(-1))):
            got, before = one.state[mine[name]], two_.state[was[name]]
            torch.testing.assert_close(got["exp_avg"], before["exp_avg"] * scale)
            torch.testing.assert_close(got["exp_avg_sq"], before["exp_avg_sq"] * scale**2)
    for model in (adapter.model, twin.model):
        model.zero_grad()
        (model(x()) - 1).square().mean().backward()
    for mine, was in zip(adapter.values(), twin.values(), strict=True):  # why: a factor's gradient scales so
        gradient: Any = was["b"].grad
        torch.testing.assert_close(mine["b"].grad, gradient * (mine["a"] / was["a"])[:, 0])


# -- compact ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("structure", "plan"),
    [
        (SVDForm(4, 4), Budget(12, budget=2, warmup=2, final=3)),
        (Magnitude(SVDForm(4, 4)), Budget(12, budget=2, warmup=2, final=3)),
        (Gated(4, 4), Shrinking(0.05)),
        (Switched(4, 4), Sampled()),
        (Chain(LoRA(2, 4.0), 4), Restarts(3)),
        (Delta(LoRA(2, 4.0)), Following(3)),
    ],
    ids=repr,
)
def test_compacting_cuts_what_is_masked_and_keeps_the_outputs(structure, plan, tmp_path, capsys):
    adapter = attached(structure, plan)
    train(moved(adapter, 0.1), adapter.optimizer(1e-2), 12)
    y = adapter.model.eval()(x())
    closed = sum(int(f["e"].eq(0).sum()) for f in adapter.values() if "e" in f)
    before = sum(p.numel() for p in adapter.parameters(trainable=False))
    made = rw.compact(adapter.model)
    assert rw.adapters(adapter.model) == {"default": made}
    torch.testing.assert_close(made.model(x()), y, rtol=0, atol=1e-10)
    found = [s.structure.inner if isinstance(s.structure, Magnitude) else s.structure for s in made.sites.values()]
    assert {type(s) for s in found} == {LoRA}
    if isinstance(plan, Budget):
        assert closed == 4
        assert sorted(s.rank for s in found) != [4, 4]
        assert sum(s.rank for s in found) == 4
    if closed or isinstance(structure, Chain):
        assert sum(p.numel() for p in made.parameters(trainable=False)) < before
    made.save(tmp_path)
    other = two()
    rw.load(other, tmp_path)
    assert torch.equal(other(x()), made.model(x()))
    again = rw.attach(two(), made.recipe)  # the ranks that were found, trained anew
    assert [s.structure for s in again.sites.values()] == [s.structure for s in made.sites.values()]
    assert rw.compact(made) is made


def test_compacting_says_what_it_cannot():
    model = two()
    with pytest.raises(AttachError, match="No adapter is attached"):
        rw.compact(model)
    first = rw.attach(model, rw.recipe("lora", rank=2))
    second = rw.attach(model, rw.recipe("lora", rank=2), "second")
    with pytest.raises(UnknownName, match=r"\['default', 'second'\]"):
        rw.compact(model)
    rw.set_active(model, ["default", "second"])
    y = moved(second).model(x())
    made = rw.compact(first)  # B = 0: a single component of zeros is left
    assert made.sites["0"].structure == LoRA(1, None)
    torch.testing.assert_close(model(x()), y)
    whole = attached(Chain(LoRA(4), 3))
    for p in whole.parameters(trainable=False):
        p.data.normal_()
    assert rw.compact(whole) is whole  # sixteen ranks fit no layer of eight rows


# -- every kind of layer --------------------------------------------------------------------------

PLANS = (
    (SVDForm(2, 2.0), Budget(5, budget=1, warmup=1, final=1)),
    (Switched(2, 2.0), Sampled()),
    (Gated(2, 2.0), Shrinking(0.01)),
    (Chain(LoRA(2, 2.0), 1), Restarts(4)),
    (Chain(LoRA(2, 2.0)), Restarts(4, keep=0.5)),
    (Chain(LoRA(2, 2.0)), Rescaling(4)),
    (Delta(LoRA(2, 2.0)), Following(2)),
    (Rising(2, 2.0), Pruning(4)),
)


@pytest.mark.parametrize("layer", LAYERS, ids=lambda layer: layer.name)
@pytest.mark.parametrize(("structure", "plan"), PLANS, ids=repr)
def test_plans_on_every_kind_of_layer(layer, structure, plan):
    """Four steps beside the same run whose plan stops before the last one: restarts leave the map, masks are there."""

    def run(stop: bool) -> tuple[rw.Adapter, Tensor]:
        torch.manual_seed(0)
        adapter = rw.attach(layer.make().double(), rw.Recipe(structure, ranks=plan, sites=layer.sites))
        optimizer, inputs = adapter.optimizer(1e-2), layer.inputs(3)
        for step in range(4):
            optimizer.zero_grad()
            (adapter.model(inputs) - 1).square().mean().backward()
            if stop and step == 3:
                optimizer._optimizer_step_post_hooks.clear()
            optimizer.step()
        with torch.no_grad():
            return adapter, adapter.model(inputs)

    (adapter, y), (other, z) = run(False), run(True)
    if "chain" in structure.traits:
        torch.testing.assert_close(y, z, rtol=0, atol=1e-12)
        moved = sum(not torch.equal(p, q) for p, q in zip(adapter.parameters(), other.parameters(), strict=True))
        assert moved or isinstance(plan, Rescaling)
    if isinstance(plan, Budget):
        alive = [int(p.count_nonzero()) for n, p in adapter.named_parameters() if n.endswith(("/e", "_e"))]
        total = sum(p.numel() for n, p in adapter.named_parameters() if n.endswith(("/e", "_e")))
        assert sum(alive) == total // 2
    assert y.isfinite().all()


# -- errors -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: rw.recipe("adalora", rank=4, budget=6), RankError, "at most the structure's rank.*Lower the"),
        (lambda: rw.recipe("dylora", rank=4, least=5), RankError, "at most the structure's rank"),
        (lambda: rw.Recipe(Magnitude(SVDForm(4)), ranks=Budget(9)), RankError, "budget=8.0"),
        (lambda: Budget(10, budget=0), RankError, "above 0; found 0"),
        (lambda: Sampled(0), RankError, "at least 1"),
        (lambda: Budget(10, warmup=5, final=5), IncompatibleAxes, "steps of the whole training"),
        (lambda: Budget(10, every=0), IncompatibleAxes, "every=0"),
        (lambda: Restarts(0), IncompatibleAxes, "every 1 or more"),
        (lambda: Restarts(5, keep=1.0), IncompatibleAxes, "keep=1.0"),
        (lambda: Restarts(5, prune=1.1), IncompatibleAxes, "prune=1.1"),
        (lambda: Restarts(5, blocks=0), IncompatibleAxes, "blocks=0"),
        (lambda: Rescaling(5, 0.0), IncompatibleAxes, "bound=0.0"),
        (lambda: Chain(SVDForm(2)), IncompatibleAxes, "made of pairs"),
        (lambda: Chain(LoRA(2), 0), IncompatibleAxes, "links=0"),
        (lambda: Delta(SVDForm(2)), IncompatibleAxes, "follows a pair"),
        (lambda: rw.Recipe(LoRA(2), ranks=Restarts(5)), IncompatibleAxes, "base may not be written.*Chain"),
        (lambda: rw.Recipe(LoRA(2), ranks=Following(5)), IncompatibleAxes, "base may not be written.*Delta"),
        (lambda: rw.Recipe(Chain(LoRA(2), 3), ranks=Rescaling()), IncompatibleAxes, "Chain.*None"),
        (lambda: rw.Recipe(LoRA(2), ranks=Shrinking()), IncompatibleAxes, "SVDForm or Gated"),
        (lambda: rw.Recipe(Gated(2), ranks=Sampled()), IncompatibleAxes, "Switched"),
    ],
)
def test_bad_input_is_refused_when_it_is_made(make, error, match):
    with pytest.raises(error, match=match):
        make()


def test_plans_are_carried_out_once_a_step_and_not_where_the_step_was_skipped():
    adapter = attached(Gated(4), Shrinking(0.01))
    optimizer = accompany(adapter.optimizer(1e-2), [adapter])
    train(adapter, optimizer, 3)
    assert optimizer.param_groups[0][STEPS] == 3
    before = adapter["0"]["e"].detach().clone()
    optimizer.found_inf, optimizer.grad_scale = torch.tensor(1.0), torch.tensor(1.0)  # as GradScaler says it
    train(adapter, optimizer, 1)
    assert torch.equal(adapter["0"]["e"], before)
    assert optimizer.param_groups[0][STEPS] == 3
