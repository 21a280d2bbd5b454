"""Solvers on factors: whether the split of b a matters, theorems against dense references, restarts."""

import copy
import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import final

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise import solvers
from rankwise.errors import IncompatibleAxes, SolverError
from rankwise.solvers import (
    ALS,
    LORO,
    SGD,
    AdamW,
    AltLoRA,
    AltLoRAPlus,
    Chained,
    Landing,
    LoFT,
    LoRAPlus,
    LoRAPro,
    LoRARITE,
    Muon,
    RefLoRA,
    RefLoRAS,
    Riemannion,
    RoLoRA,
    ScaledAdamW,
    ScaledGD,
    Solver,
    StelLA,
)
from rankwise.solvers.tangent import retract
from rankwise.structures import LoRA, LoRAFA, Magnitude, Structure, ThreeFactor
from rankwise.testing import gauge_error
from test_chain import model, run

INVARIANT = (
    *(ScaledGD(0.0), AltLoRA(0.0), AltLoRA(0.0, beta=0.0), RefLoRA(0.0, warmup=0, betas=None), ALS(0.0), LoFT(0.0)),
    *(LoRARITE(betas=(0.0, 0.0)), LoRARITE(), Riemannion(), Riemannion(orthogonal=False), Riemannion(0.0)),
    LORO(1, betas=None, damping=0.0),
    *(LoRAPro("zero", 0.0, betas=None), Muon(whiten=True, momentum=0.0, damping=0.0)),
)
VARIANT = (
    *(AdamW(), LoRAPlus(), ScaledGD(), ScaledAdamW(), RefLoRA(warmup=0), RefLoRAS(warmup=0), AltLoRAPlus()),
    *(LoRAPro(), RoLoRA(), Muon(), LoRAPro(damping=0.0, betas=None), LORO(), LORO(1)),
)


# -- the gauge table ------------------------------------------------------------------------------


@pytest.mark.parametrize("solver", INVARIANT, ids=repr)
def test_an_invariant_step_does_not_know_how_the_product_is_split(solver):
    assert "gauge_invariant" in solver.traits
    for steps in (1, 3):
        first, finite = gauge_error(solver, steps=steps)
        assert first <= 1e-8
        assert finite <= 1e-8


@pytest.mark.parametrize("solver", VARIANT, ids=repr)
def test_all_others_know_and_do_not_claim_otherwise(solver):
    assert "gauge_invariant" not in solver.traits
    assert gauge_error(solver)[1] > 1e-8


def test_lora_pro_is_invariant_to_first_order_with_the_x_of_the_paper():
    first, finite = gauge_error(LoRAPro(damping=0.0, betas=None))
    assert first <= 1e-8
    assert finite > 1e-6


@final
@dataclass(frozen=True)
class Descent(Chained):
    """Gradient descent on the factors."""

    def chain(self):
        return ()


def test_the_figure_shows_what_depends_on_the_split():
    """Gradient descent depends on Q through Q Q^T: not on a rotation."""
    assert max(gauge_error(Descent(), condition=1.0)) <= 1e-8
    assert min(gauge_error(Descent(), condition=100.0)) > 0.1


# -- steps against dense references -----------------------------------------------------------------


SCALE = 2.0


def optimized(solver: Solver, b: Tensor, a: Tensor, lr: float) -> tuple[Callable[[Tensor], None], nn.Module]:
    """One site with these factors, s = 2, and its step for a full gradient G."""
    r, n = a.shape
    adapter = rw.attach(
        nn.Sequential(nn.Linear(n, len(b), bias=False)).double(), rw.Recipe(LoRA(r, SCALE * r), solver=solver)
    )
    (site,) = adapter.sites.values()
    with torch.no_grad():
        site.get_parameter("b").copy_(b)
        site.get_parameter("a").copy_(a)
    optimizer = adapter.optimizer(lr=lr)

    def step(full: Tensor) -> None:
        b, a = site.get_parameter("b"), site.get_parameter("a")
        b.grad, a.grad = SCALE * full @ a.detach().mT, SCALE * b.detach().mT @ full
        optimizer.step()

    return step, site


def drawn(*shapes: tuple[int, ...], seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


def onto(x: Tensor) -> Tensor:
    """The projection on the columns of x."""
    return x @ torch.linalg.pinv(x)


def tangent(b: Tensor, a: Tensor, full: Tensor) -> Tensor:
    left, right = onto(b), onto(a.mT)
    return left @ full + full @ right - left @ full @ right


def truncated(w: Tensor, r: int) -> Tensor:
    u, s, v = torch.linalg.svd(w)
    return u[:, :r] * s[:r] @ v[:r]


def now(site: nn.Module) -> tuple[Tensor, Tensor]:
    return site.get_parameter("b").detach().clone(), site.get_parameter("a").detach().clone()


def close(got: Tensor, want: Tensor, tolerance: float = 1e-9) -> None:
    assert (got - want).norm() <= tolerance * want.norm(), (got - want).norm() / want.norm()


@pytest.mark.parametrize("x", ["sylvester", "zero"])
def test_lora_pro_moves_along_the_projection_of_the_full_gradient(x):
    b, a, full = drawn((9, 3), (3, 7), (9, 7))
    step, site = optimized(LoRAPro(x, 0.0, betas=None), b, a, 1.0)
    step(full)
    h_b, h_a = b - now(site)[0], a - now(site)[1]
    close(SCALE * (h_b @ a + b @ h_a), tangent(b, a, full))
    nearest = h_a @ a.mT - b.mT @ h_b  # zero where no X is nearer to the factors' own gradients
    assert (nearest.norm() < 1e-9) == (x == "sylvester")


def test_reflora_steps_from_the_split_with_the_least_norms():
    b, a, g = drawn((9, 3), (3, 7), (9, 7))
    step, site = optimized(RefLoRA(0.0, warmup=0, betas=None), b, a, 1.0)
    step(g)
    moved_b, moved_a = b - now(site)[0], a - now(site)[1]
    shape = torch.linalg.pinv(SCALE * g @ a.mT) @ moved_b
    close(shape @ moved_a, SCALE * b.mT @ g)  # a moves by S^-1 g_a
    close(shape, shape.mT)
    at = shape.clone().requires_grad_()
    bound = torch.trace(at @ a @ a.mT) + torch.trace(torch.linalg.inv(at) @ b.mT @ b)
    (slope,) = torch.autograd.grad(bound, at)
    assert slope.norm() < 1e-9 * bound.detach()


def test_reflora_s_keeps_the_norms_equal_and_ignores_their_ratio():
    b, a, *grads = drawn((9, 3), (3, 7), (9, 7), (9, 7), (9, 7))
    products = []
    for ratio in (1.0, 30.0):
        step, site = optimized(RefLoRAS(warmup=0), b * ratio, a / ratio, 1e-2)
        for full in grads:
            step(full)
        products.append(now(site)[0] @ now(site)[1])
        assert 0.9 < now(site)[0].norm() / now(site)[1].norm() < 1.1
    close(*products)


def test_the_adaptive_invariant_step_is_the_one_written_with_qr():
    """LoRA-RITE as in its paper, in the bases of a QR decomposition."""
    b, a, *grads = drawn((9, 3), (3, 7), (9, 7), (9, 7), (9, 7))
    betas, lr, eps = (0.9, 0.999), 1e-2, 1e-6
    step, site = optimized(LoRARITE(betas, eps), b, a, lr)
    kept: dict[str, tuple[Tensor, Tensor, Tensor]] = {}

    def direction(name: str, partner: Tensor, g: Tensor, t: int) -> Tensor:
        """For a factor (q, r) whose partner is (p, r)."""
        basis, root = torch.linalg.qr(partner)
        u = g @ torch.linalg.inv(root)
        first, second = (beta * (1 - beta ** (t - 1)) / (1 - beta**t) for beta in betas)
        old, mean, square = kept.get(name, (torch.zeros_like(partner), torch.zeros_like(u), torch.zeros(3, 3).double()))
        turn = basis.mT @ old
        square = second * turn @ square @ turn.mT + (1 - second) * u.mT @ u / len(u)
        values, vectors = torch.linalg.eigh(square)
        root_inverse = vectors @ torch.diag(1 / (values.clamp_min(0).sqrt() + eps)) @ vectors.mT
        mean = first * mean @ turn.mT + (1 - first) * u @ root_inverse
        kept[name] = basis, mean, square
        return mean @ torch.linalg.inv(root).mT / SCALE

    for t, full in enumerate(grads, 1):
        move_b = direction("b", a.mT, SCALE * full @ a.mT, t)
        move_a = direction("a", b, SCALE * full.mT @ b, t).mT
        b, a = b - lr * move_b, a - lr * move_a
        step(full)
        close(now(site)[0], b)
        close(now(site)[1], a)


@pytest.mark.parametrize("betas", [(0.9, None), (0.9, 0.99)], ids=["AltLoRA", "AltLoRA+"])
def test_alternating_projections_follow_the_formulas_of_the_paper(betas):
    b, a, *grads = drawn((9, 3), (3, 7), (9, 7), (9, 7), (9, 7))
    lr, (first, second) = 1e-2, betas
    solver = AltLoRA(0.0, first) if second is None else AltLoRAPlus(0.0, betas)
    step, site = optimized(solver, b, a, lr)
    m_a, m_b, v_a, v_b = torch.zeros_like(a), torch.zeros_like(b), torch.zeros_like(a), torch.zeros_like(b)
    b_old = b
    for t, full in enumerate(grads, 1):
        inner = torch.linalg.inv(b.mT @ b)
        hat = inner @ b.mT @ full / SCALE
        m_a = first * inner @ b.mT @ b_old @ m_a + (1 - first) * hat
        v_a = 0 if second is None else second * v_a + (1 - second) * hat**2
        root = 1 if second is None else (v_a / (1 - second**t)).sqrt() + 1e-8
        new = a - lr * m_a / (1 - first**t) / root
        inner = torch.linalg.inv(new @ new.mT)
        hat = full @ a.mT @ inner / SCALE
        m_b = first * m_b @ a @ new.mT @ inner + (1 - first) * hat
        v_b = 0 if second is None else second * v_b + (1 - second) * hat**2
        root = 1 if second is None else (v_b / (1 - second**t)).sqrt() + 1e-8
        b_old, b, a = b, b - lr * m_b / (1 - first**t) / root, new
        step(full)
        close(now(site)[0], b)
        close(now(site)[1], a)


def test_alternating_least_squares_solves_each_block():
    b, a, target = drawn((9, 3), (3, 7), (9, 7))
    step, site = optimized(ALS(0.0), b, a, 1.0)
    step(SCALE * b @ a - target)  # the gradient of |s b a - T|^2 / 2
    b = now(site)[0]
    close(b, target @ torch.linalg.pinv(SCALE * a))
    assert torch.equal(now(site)[1], a)
    step(SCALE * b @ a - target)
    assert torch.equal(now(site)[0], b)
    close(now(site)[1], torch.linalg.pinv(SCALE * b) @ target)


# -- full fine-tuning's Adam ------------------------------------------------------------------------


def test_loft_is_adam_on_w_where_the_rank_is_full():
    b, a, *grads = drawn((9, 6), (6, 6), *[(9, 6)] * 5)
    step, site = optimized(LoFT(0.0, eps=1e-4), a, b[:6].mT.contiguous(), 1e-2)  # 6 x 6, of rank 6
    w = nn.Parameter(SCALE * now(site)[0] @ now(site)[1])
    adam = torch.optim.Adam([w], lr=1e-2, eps=1e-4)
    for full in grads:
        w.grad = full[:6]
        adam.step()
        step(full[:6])
        close(SCALE * now(site)[0] @ now(site)[1], w.detach(), 1e-8)


def test_loft_is_adam_of_the_projected_gradients_held_in_full():
    """Moments m x n and, for the second, m x m a column: no coordinates of factors."""
    m, n, lr, eps, (first, second) = 9, 7, 1e-2, 1e-4, (0.9, 0.99)
    b, a, *grads = drawn((m, 3), (3, n), *[(m, n)] * 5)
    step, site = optimized(LoFT(0.0, (first, second), eps), b, a, lr)
    mean = {"a": torch.zeros(m, n).double(), "b": torch.zeros(n, m).double()}
    square = {"a": torch.zeros(n, m, m).double(), "b": torch.zeros(m, n, n).double()}
    for t, full in enumerate(grads, 1):
        moves = {}
        for name, partner, g in (("a", b, full), ("b", a.mT, full.mT)):
            on = onto(partner)
            seen = on @ g
            mean[name] = first * on @ mean[name] + (1 - first) * seen
            square[name] = second * on @ square[name] @ on + (1 - second) * torch.einsum("ij,kj->jik", seen, seen)
            root = (square[name].diagonal(dim1=1, dim2=2).mT / (1 - second**t)).sqrt()
            moves[name] = torch.linalg.pinv(partner) @ (mean[name] / (1 - first**t) / (root + eps)) / SCALE
        a, b = (a, b - lr * moves["b"].mT) if t % 2 else (a - lr * moves["a"], b)
        step(full)
        close(now(site)[0], b)
        close(now(site)[1], a)


# -- the manifold -----------------------------------------------------------------------------------


@pytest.mark.parametrize(("m", "n", "r"), [(9, 7, 3), (9, 7, 5), (5, 5, 5)], ids=["2r below", "2r above", "r full"])
def test_the_retraction_is_the_truncated_svd(m, n, r):
    b, a, h_b, h_a = drawn((m, r), (r, n), (m, r), (r, n))
    for size in (1.0, 1e-3):
        new_b, new_a = retract(b, a, size * h_b, size * h_a)
        close(new_b @ new_a, truncated(b @ a + size * (h_b @ a + b @ h_a), r))
        close(new_b.mT @ new_b, new_a @ new_a.mT)


def test_riemannian_descent_is_a_truncated_step_along_the_projected_gradient():
    b, a, full = drawn((9, 3), (3, 7), (9, 7))
    step, site = optimized(Riemannion(0.0, orthogonal=False), b, a, 0.1)
    step(full)
    close(SCALE * now(site)[0] @ now(site)[1], truncated(SCALE * b @ a - 0.1 * tangent(b, a, full), 3))


@pytest.mark.parametrize("start", ["two factors", "b = 0"])
def test_riemannion_is_muon_on_the_tangent_spaces(start):
    """The momentum is held as a dense matrix, and projected on each new tangent space."""
    b, a, *grads = drawn((9, 3), (3, 7), *[(9, 7)] * 4)
    b = b if start == "two factors" else torch.zeros_like(b)
    step, site = optimized(Riemannion(0.9, weight_decay=0.5), b, a, 0.1)
    w, mean = SCALE * b @ a, torch.zeros(9, 7).double()
    left, right = b, a
    for full in grads:
        mean = 0.9 * tangent(left, right, mean) + 0.1 * tangent(left, right, full)
        u, s, v = torch.linalg.svd(mean, full_matrices=False)
        move = tangent(left, right, u[:, s > 1e-9 * s[0]] @ v[s > 1e-9 * s[0]])
        w = truncated((1 - 0.1 * 0.5) * w - 0.1 * move, 3)
        left, right = (t.mT if i else t for i, t in enumerate((w[:, :3], w[:3].mT)))  # bases of its columns and rows
        step(full)
        close(SCALE * now(site)[0] @ now(site)[1], w, 1e-7)


def test_muon_moves_by_equal_singular_values():
    b, a, full = drawn((9, 3), (3, 7), (9, 7))
    step, site = optimized(Muon(), b, a, 1.0)
    step(full)
    sizes = torch.linalg.svdvals(b - now(site)[0]), torch.linalg.svdvals(a - now(site)[1])
    close(torch.cat(sizes), 0.2 * torch.tensor([9.0] * 3 + [7.0] * 3).double().sqrt())
    step, site = optimized(Muon(whiten=True, damping=0.0), b, a, 1.0)
    step(full)
    close(torch.linalg.svdvals(SCALE * (b - now(site)[0]) @ a)[:3], torch.ones(3).double())
    close(torch.linalg.svdvals(SCALE * b @ (a - now(site)[1]))[:3], torch.ones(3).double())


# -- every solver -----------------------------------------------------------------------------------


EVERY = (*INVARIANT, *VARIANT, Muon(whiten=True), RefLoRA(warmup=4), RefLoRAS(warmup=4), RoLoRA(every=3), SGD(0.9))
EVERY += (Landing(), StelLA(), StelLA(16.0), StelLA(betas=None))


def test_every_solver_is_tried():
    exported = (getattr(solvers, name) for name in solvers.__all__)
    concrete = {c for c in exported if issubclass(c, Solver) and not inspect.isabstract(c)}
    assert {c for c in concrete if "whole" not in c.requires} == set(map(type, EVERY))


def trained(solver: Solver, structure: Structure) -> tuple[nn.Module, rw.Adapter]:
    net = model()
    adapter = rw.attach(net, rw.Recipe(structure, solver=solver))
    generator = torch.Generator().manual_seed(5)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn(p.shape, generator=generator).to(p), alpha=0.3)
    return net, adapter


def resumed(solver: Solver, structure: Structure) -> Sequence[tuple[Tensor, Tensor]]:
    """Factors of a run of six steps beside those of one that was stopped after three."""
    net, adapter = trained(solver, structure)
    optimizer = adapter.optimizer(lr=1e-2)
    run(net, optimizer, 3)
    other, again = trained(solver, structure)
    with torch.no_grad():
        for p, q in zip(again.parameters(trainable=False), adapter.parameters(trainable=False), strict=True):
            p.copy_(q)
    second = again.optimizer(lr=1e-2)
    second.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    run(net, optimizer, 3, seed=1)
    run(other, second, 3, seed=1)
    return list(zip(adapter.parameters(), again.parameters(), strict=True))


@pytest.mark.parametrize("solver", EVERY, ids=repr)
def test_stop_and_resume_is_the_same_run(solver):
    structure = ThreeFactor(3) if "frames" in solver.requires else LoRA(3)
    assert all(torch.equal(p, q) for p, q in resumed(solver, Magnitude(structure)))


def test_a_frozen_factor_is_a_partner_that_stands_still():
    assert all(torch.equal(p, q) for p, q in resumed(ScaledAdamW(), LoRAFA(3)))
    net, adapter = trained(ScaledGD(0.0), LoRAFA(3, 6.0))
    before = {site: (f["b"].detach().clone(), f["a"].detach().clone()) for site, f in adapter.items()}
    run(net, optimizer := adapter.optimizer(lr=0.1), 1)
    assert [group["name"] for group in optimizer.param_groups] == ["pairs with a frozen"]
    for site, f in adapter.items():
        (b, a), g = before[site], f["b"].grad
        assert g is not None
        assert torch.equal(f["a"], a)
        close(f["b"].detach(), b - 0.1 * g @ torch.linalg.inv(a @ a.mT) / 4)
    for refused in (Riemannion(), LoRAPro(), RefLoRAS()):
        with pytest.raises(IncompatibleAxes, match="trains the two factors"):
            rw.recipe("lora_fa", solver=refused)


@pytest.mark.parametrize("solver", [RefLoRA(0.0, warmup=0), AltLoRA(0.0), LoFT(0.0), LoRAPro(damping=0.0)], ids=repr)
def test_a_singular_start_is_refused_with_its_remedy(solver):
    step, _ = optimized(solver, torch.zeros(9, 3).double(), *drawn((3, 7)), 1e-2)
    with pytest.raises(SolverError, match="singular 3 x 3 Gram matrix.*damping above"):
        step(*drawn((9, 7)))


def test_an_unknown_x_is_refused():
    with pytest.raises(IncompatibleAxes, match='"sylvester" or "zero"'):
        LoRAPro("nought")
