"""Structures that are the weight, and LORO's steps, against NumPy in float64 and the papers' formulas."""

import copy

import numpy as np
import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.errors import IncompatibleAxes, NotMergeable, RankError, TargetError
from rankwise.inits import Orthogonal, Xavier
from rankwise.ops import Scattered
from rankwise.solvers import LORO
from rankwise.structures import LoRA, LowRankActivation, LowRankWeight, SparseLowRank

NAMES = ("sltrain", "loro", "cola_act")


def on(structure, rows=12, cols=20, **axes):
    """A float64 layer under the structure, its adapter, the factors as NumPy."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(cols, rows)).double()
    adapter = rw.attach(model, rw.Recipe(structure, **axes))
    return model, adapter, {name: value.detach().numpy() for name, value in adapter["0"].items()}


def moved(model, adapter):
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p) / 3)
    return model


# -- what they are ------------------------------------------------------------------------------


def test_an_activation_between_factors():
    model, adapter, f = on(LowRankActivation(3))
    moved(model, adapter)
    x = torch.randn(2, 5, 20, dtype=torch.float64)
    h = np.einsum("kn,btn->btk", f["a"], x.numpy())
    y = np.einsum("mk,btk->btm", f["b"], h / (1 + np.exp(-h))) + model[0].bias.detach().numpy()
    assert np.abs(model(x).detach().numpy() - y).max() <= 1e-12
    assert not np.allclose(model(2 * x).detach().numpy(), 2 * model(x).detach().numpy())
    with pytest.raises(NotMergeable):
        rw.merge(model)


@pytest.mark.parametrize("structure", [LowRankWeight(4), SparseLowRank(4), LowRankActivation(4)], ids=repr)
def test_the_base_has_no_part_in_the_map(structure):
    model, _, _ = on(structure)
    x = torch.randn(3, 20, dtype=torch.float64)
    y = model(x)
    with torch.no_grad():
        model[0].weight.fill_(torch.nan)
    assert torch.equal(model(x), y)
    model(x).sum().backward()
    assert model[0].weight.grad is None


def test_a_merged_layer_is_the_factors():
    model, adapter, f = on(LowRankWeight(3))
    rw.merge(model)
    w = model[0].weight.detach().numpy()
    assert np.abs(w - f["b"] @ f["a"]).max() <= 1e-12
    assert np.linalg.matrix_rank(w) == 3
    model, adapter, f = on(SparseLowRank(2, 4.0, 0.1))
    moved(model, adapter)
    rw.merge(model)
    rest = model[0].weight.detach().numpy() - 2 * f["b"] @ f["a"]
    at = np.flatnonzero(np.abs(rest) > 1e-12)
    assert at.tolist() == f["places"].tolist() and len(at) == 24
    assert np.abs(rest.ravel()[at] - f["values"]).max() <= 1e-12


def test_where_they_start():
    """SLTrain: B = 0, S uniform within 1/sqrt(in); LORO: Xavier; CoLA: variance 1/sqrt(r (m + n))."""
    _, _, f = on(SparseLowRank(8, density=0.3), 128, 96)
    assert not f["b"].any() and len(f["values"]) == int(0.3 * 128 * 96)
    assert np.abs(f["values"]).max() <= 96**-0.5 and f["values"].std() == pytest.approx((96 * 3) ** -0.5, rel=0.05)
    assert np.abs(f["a"]).max() <= 96**-0.5
    rows = f["places"] // 96
    assert np.all(np.diff(f["places"]) > 0) and np.bincount(rows, minlength=128).min() > 10  # over all of W
    _, _, f = on(LowRankWeight(32), 128, 96, init=Xavier())
    assert f["b"].std() == pytest.approx((2 / 160) ** 0.5, rel=0.05)
    assert f["a"].std() == pytest.approx((2 / 128) ** 0.5, rel=0.05)
    _, _, f = on(LowRankWeight(8), 128, 96, init=Orthogonal())
    assert np.abs(f["b"].T @ f["b"] - np.eye(8)).max() <= 1e-5
    _, _, f = on(LowRankActivation(32), 128, 96)
    assert all(f[k].std() == pytest.approx((32 * 224) ** -0.25, rel=0.05) for k in "ab")


def test_experts_have_supports_of_their_own():
    class Experts(nn.Module):
        def __init__(self):
            super().__init__()
            self.up = nn.Parameter(torch.randn(3, 16, 12))

        def forward(self, x):
            return x @ self.up.mT

    torch.manual_seed(0)
    model = Experts()
    places = rw.attach(model, rw.Recipe(SparseLowRank(2, density=0.1), sites=rw.Sites("up")))["up"]["places"]
    assert places.shape == (3, 19) and places.dtype == torch.int64
    assert len({tuple(row) for row in places.tolist()}) == 3


def test_a_sparse_matrix_keeps_no_matrix_for_backward():
    places, values = torch.tensor([1, 7, 62]), torch.randn(3, requires_grad=True)
    x = torch.randn(4, 9, requires_grad=True)
    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        y = Scattered(places, values, (7, 9)).mv(x)
    assert torch.Size((7, 9)) not in kept and torch.Size((4, 9)) in kept
    dense = torch.zeros(63)
    dense[places] = values.detach()
    torch.testing.assert_close(y, x @ dense.view(7, 9).T)
    torch.testing.assert_close(Scattered(places, values, (7, 9)).T.dense(), dense.view(7, 9).T)
    compiled = torch.compile(lambda x: Scattered(places, values, (7, 9)).mv(x), backend="eager", fullgraph=True)
    torch.testing.assert_close(compiled(x), y)
    with torch.autocast("cpu", torch.bfloat16):
        assert Scattered(places, values, (7, 9)).mv(x).dtype == torch.bfloat16


def test_what_does_not_fit_is_refused():
    for density in (0.0, 1.0, -0.1):
        with pytest.raises(IncompatibleAxes, match="between 0 and 1"):
            SparseLowRank(density=density)
    for name in NAMES:
        with pytest.raises(RankError, match="smaller side"):
            rw.attach(nn.Sequential(nn.Linear(20, 12)), rw.recipe(name))
    conv = nn.Sequential(nn.Conv2d(4, 8, 3))
    with pytest.raises(TargetError, match="Take LowRankWeight"):
        rw.attach(conv, rw.Recipe(LowRankActivation(2), sites=rw.Sites("0")))
    with pytest.raises(IncompatibleAxes, match="every 1 step"):
        LORO(0)
    with pytest.raises(IncompatibleAxes):
        rw.recipe("sltrain", solver=LORO())


# -- LORO's steps -------------------------------------------------------------------------------


def quadratic(structure, solver, lr, rows=10, cols=14, steps=1):
    """W' after steps on |W' - T|^2 / 2 from a random point, beside the point, T and the optimizer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(cols, rows, bias=False)).double()
    target = torch.randn(rows, cols, dtype=torch.float64)
    adapter = rw.attach(model, rw.Recipe(structure, solver=solver, init=Xavier()))
    f = adapter["0"]
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn_like(p))
    start = {k: v.detach().clone() for k, v in f.items()}
    optimizer = adapter.optimizer(lr)
    for _ in range(steps):
        optimizer.zero_grad()
        (model(torch.eye(cols, dtype=torch.float64)).mT - target).square().sum().div(2).backward()
        optimizer.step()
    return {k: v.detach() for k, v in f.items()}, start, target, optimizer


def test_an_exact_step_is_the_retracted_riemannian_gradient():
    """The truncated SVD of W - lr (P_u G + G P_v - P_u G P_v), formed densely in NumPy."""
    f, start, target, _ = quadratic(LowRankWeight(3), LORO(1, betas=None, damping=0.0), 0.1)
    b, a = start["b"].numpy(), start["a"].numpy()
    u, v = (np.linalg.qr(t)[0] for t in (b, a.T))
    g = b @ a - target.numpy()
    pu, pv = u @ u.T, v @ v.T
    x, s, y = np.linalg.svd(b @ a - 0.1 * (pu @ g + g @ pv - pu @ g @ pv))
    want = x[:, :3] * s[:3] @ y[:3]
    assert np.abs((f["b"] @ f["a"]).numpy() - want).max() <= 1e-10 * np.abs(want).max()
    assert np.allclose((f["b"].T @ f["b"]).numpy(), (f["a"] @ f["a"].T).numpy())  # balanced


def test_the_steps_between_are_adams_times_rank_over_side():
    f, start, target, _ = quadratic(LowRankWeight(3), LORO(5), 0.1)
    g = start["b"] @ start["a"] - target
    for name, grad, side in (("b", g @ start["a"].T, 10), ("a", start["b"].T @ g, 14)):
        want = start[name] - 0.1 * 3 / side * grad / (grad.abs() + 1e-6)
        torch.testing.assert_close(f[name], want, rtol=0, atol=1e-10)


def test_moments_start_anew_after_an_exact_step():
    for steps, count in ((1, 1), (2, 2), (3, 0)):
        *_, optimizer = quadratic(LowRankWeight(3), LORO(3), 1e-3, steps=steps)
        (state,) = optimizer.state.values()
        moved = any(value.any() for name, value in state.items() if "mean" in name)
        assert moved is bool(count) and state["step"] == steps


def test_it_resumes_to_the_bit_and_serves_lora_too():
    torch.manual_seed(0)
    base, x = nn.Sequential(nn.Linear(14, 10)).double(), torch.randn(6, 8, 14).double()
    recipe = rw.Recipe(LoRA(3, 6.0), solver=LORO(4, lazy=1.0))

    def train(adapter, optimizer, batches):
        for batch in batches:
            optimizer.zero_grad()
            (adapter.model(batch) - batch[:, :10]).square().mean().backward()
            optimizer.step()
        return {n: p.detach().clone() for n, p in adapter.named_parameters()}

    def begin():
        torch.manual_seed(1)
        adapter = rw.attach(copy.deepcopy(base), recipe)
        return adapter, adapter.optimizer(0.05)

    whole = train(*begin(), x)
    one, first = begin()
    half = train(one, first, x[:2])
    two, second = begin()
    for name, p in two.named_parameters():
        p.data.copy_(half[name])
    second.load_state_dict(copy.deepcopy(first.state_dict()))
    again = train(two, second, x[2:])
    assert all(torch.equal(whole[name], again[name]) for name in whole)
