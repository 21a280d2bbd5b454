"""Each start against its formula, written from the paper; what the papers promise of it."""

from __future__ import annotations

import copy
import dataclasses
import math
import sys
import types
import warnings
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from peft.tuners.lora.config import CordaConfig
from torch import Tensor, nn

import rankwise as rw
from rankwise.errors import IncompatibleAxes, RankError, StatisticsError
from rankwise.inits import CorDA, eva_sites
from rankwise.ops.linalg import randomised_svd, truncated_svd
from rankwise.stats import GradientSketch, InputSubspace
from rankwise.structures import Anchored, SVDForm
from tiny_models import llama, tokens

R, ROWS, COLS = 3, 10, 12


def layer() -> nn.Sequential:
    state = torch.get_rng_state()
    torch.manual_seed(1)
    model = nn.Sequential(nn.Linear(COLS, ROWS)).double()
    torch.set_rng_state(state)
    return model


def data(rows: int = 30) -> Tensor:
    mix = torch.randn(COLS, COLS, dtype=torch.float64, generator=torch.Generator().manual_seed(6))
    return torch.randn(rows, COLS, dtype=torch.float64, generator=torch.Generator().manual_seed(5)) @ mix


def loss(model: nn.Module, x: Tensor) -> Tensor:
    return (model(x) - x[:, :ROWS].sin()).square().mean()


def full_gradient() -> Tensor:
    model: Any = layer()
    loss(model, data()).backward()
    return model[0].weight.grad


def started(method: str, **options: Any) -> tuple[dict[str, Tensor], Tensor, rw.Recipe]:
    model, recipe = layer(), rw.recipe(method, rank=R, **options)
    stats = rw.collect(model, [data()], recipe, loss)
    return dict(rw.attach(model, recipe, stats=stats)["0"]), model[0].weight.detach(), recipe


def scale(recipe: rw.Recipe) -> float:
    structure: Any = recipe.structure
    return getattr(structure, "inner", structure).scale


def test_minor_is_the_end_of_the_svd():
    f, w, recipe = started("milora", alpha=6)
    svd = torch.linalg.svd(w, full_matrices=False)
    torch.testing.assert_close(scale(recipe) * f["b"] @ f["a"], svd.U[:, -R:] * svd.S[-R:] @ svd.Vh[-R:])
    torch.testing.assert_close(f["b"].mT @ f["b"], f["a"] @ f["a"].mT)  # balanced


def test_qr_is_the_first_columns_and_rows():
    f, w, _ = started("olora")
    q, r = torch.linalg.qr(w)
    torch.testing.assert_close(f["b"], q[:, :R])
    torch.testing.assert_close(f["a"], r[:R])


def test_mica_fixes_the_last_output_directions():
    model, recipe = layer(), rw.recipe("mica", rank=R)
    adapter = rw.attach(model, recipe)
    f, u = adapter["0"], torch.linalg.svd(model[0].weight, full_matrices=False).U[:, -R:]
    torch.testing.assert_close(f["b"] @ f["b"].mT, u @ u.mT)
    assert not f["a"].any()
    assert [name for name, _ in adapter.named_parameters(trainable=True)] == ["0/a"]


def test_nystrom_lies_in_the_range_of_the_weight_and_keeps_its_size():
    torch.manual_seed(0)
    norms, w = [], torch.empty(0)
    for _ in range(200):
        f, w, _ = started("nora")
        assert not f["a"].any()
        norms.append(f["b"].square().sum() / R)
    torch.testing.assert_close(torch.stack(norms).mean(), w.square().sum() / COLS, rtol=0.1, atol=0)
    model = layer()
    with torch.no_grad():
        model[0].weight[4:] = 0
    assert not rw.attach(model, rw.recipe("nora", rank=R))["0"]["b"][4:].any()


def test_non_zero_moves_both_factors():
    torch.manual_seed(0)
    f, _, _ = started("nonzero", gain=0.5)
    bound = COLS**-0.5
    assert 0.9 * bound < f["a"].abs().max() <= bound
    assert 0.4 * bound < f["b"].abs().max() <= 0.5 * bound


def test_orthogonal_rows():
    f, _, _ = started("orthogonal")
    torch.testing.assert_close(f["a"] @ f["a"].mT, torch.eye(R, dtype=torch.float64), rtol=0, atol=1e-6)


@pytest.mark.parametrize(("mode", "method"), [("instruction", "ipm"), ("knowledge", "kpm")])
def test_corda_is_pefts(mode, method, monkeypatch):
    attr: Any = types.ModuleType("attr")
    attr.dataclass = dataclasses.dataclass  # PEFT 0.21 imports it from a package that it does not ask for
    monkeypatch.setitem(sys.modules, "attr", attr)
    from peft.tuners.lora.corda import preprocess_corda

    x = data()
    x /= x.max().abs()  # PEFT divides each batch by its largest value
    model, recipe = layer(), rw.recipe("corda", rank=R, mode=mode, alpha=6)
    ours = rw.attach(model, recipe, stats=rw.collect(model, [x], recipe))["0"]

    class Holder(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.proj = copy.deepcopy(layer()[0]).float()

        def forward(self, x: Tensor) -> Tensor:
            return self.proj(x)

    holder = Holder()
    config = LoraConfig(
        r=R,
        lora_alpha=6,
        target_modules=["proj"],
        init_lora_weights="corda",
        corda_config=CordaConfig(corda_method=method),
    )
    preprocess_corda(holder, config, run_model=lambda: holder(x.float().unsqueeze(0)))
    theirs = get_peft_model(holder, config).base_model.model.proj
    delta = theirs.lora_B["default"].weight @ theirs.lora_A["default"].weight
    # PEFT's covariance is a mean over calls, ours over tokens: the factor cancels between U S and C^-1
    torch.testing.assert_close((ours["b"] @ ours["a"]).float(), delta, rtol=2e-3, atol=2e-4)


def test_cordas_terms_sum_to_the_weight():
    model, recipe = layer(), rw.recipe("corda", rank=ROWS)
    f = rw.attach(model, recipe, stats=rw.collect(model, [data()], recipe))["0"]
    torch.testing.assert_close(f["b"] @ f["a"], model[0].weight)
    with pytest.raises(IncompatibleAxes, match="instruction"):
        CorDA("both")  # type: ignore[arg-type]


def test_eva_starts_at_the_inputs_own_directions():
    f, _, _ = started("eva")
    v = torch.linalg.svd(data(), full_matrices=False).Vh[:R]
    torch.testing.assert_close(f["a"].mT @ f["a"], v.mT @ v, rtol=1e-6, atol=1e-8)
    assert not f["b"].any()


# -- what the papers promise --------------------------------------------------------------------


@pytest.mark.parametrize("alpha", [16.0, 5.0])
@pytest.mark.parametrize("sketched", [False, True])
def test_lora_gas_first_step_is_the_best_of_rank_2r(alpha, sketched):
    """One real step of gradient descent on the factors moves the weight by k^2 s^2 lr G_2r, up to lr^2."""
    model, recipe, lr = layer(), rw.recipe("lora_ga", rank=R, alpha=alpha), 1e-9
    stats = rw.collect(model, [data()], recipe, loss, needs=[GradientSketch()] if sketched else None)
    adapter = rw.attach(model, recipe, stats=stats)
    structure, s, g = adapter.sites["0"].structure, scale(recipe), full_gradient()
    w = model[0].weight.detach()
    before = structure.weight(adapter["0"], w).detach()
    torch.testing.assert_close(before, w, rtol=0, atol=1e-12)
    loss(model, data()).backward()
    with torch.no_grad():
        for p in adapter.parameters():
            p.sub_(p.grad, alpha=lr)  # type: ignore[arg-type]  (it has one)
    moved = (before - structure.weight(adapter["0"], w).detach()) / lr
    u, sigma, vh = torch.linalg.svd(g, full_matrices=False)
    best = u[:, : 2 * R] * sigma[: 2 * R] @ vh[: 2 * R]
    k = ROWS**0.25 / 16**0.5
    torch.testing.assert_close(moved, (k * s) ** 2 * best, rtol=1e-4, atol=1e-6 * float(best.abs().max()))
    error = (moved / (k * s) ** 2 - g).norm()
    torch.testing.assert_close(error, sigma[2 * R :].norm(), rtol=1e-4, atol=0)  # Eckart and Young: none is nearer


def test_lora_ga_needs_2r_directions():
    model, recipe = layer(), rw.recipe("lora_ga", rank=6)
    with pytest.raises(RankError, match="smaller rank"):
        rw.attach(model, recipe, stats=rw.collect(model, [data()], recipe, loss))


def test_lora_one_starts_down_the_gradient():
    f, _, recipe = started("lora_one")
    u, s, vh = torch.linalg.svd(-full_gradient(), full_matrices=False)
    best = u[:, :R] * s[:R] / s[0] @ vh[:R]
    torch.testing.assert_close(f["b"] @ f["a"], ROWS**0.5 / 128 * best)
    assert scale(recipe) == 16 / math.sqrt(R)
    base, model = layer(), layer()
    rw.attach(model, recipe, stats=rw.collect(model, [data()], recipe, loss))
    assert loss(model, data()) < loss(base, data())


def test_lora_sb_is_a_sign_step_and_sees_the_whole_gradient_in_its_span():
    model, recipe = layer(), rw.recipe("lora_sb", rank=R, alpha=6, step=1e-3)
    adapter = rw.attach(model, recipe, stats=rw.collect(model, [data()], recipe, loss))
    f, g = adapter["0"], full_gradient()
    u, s, vh = torch.linalg.svd(-1e-3 * g.sign(), full_matrices=False)
    torch.testing.assert_close(2 * f["b"] @ f["c"] @ f["a"], u[:, :R] * s[:R] @ vh[:R])
    for side in (f["b"].mT @ f["b"], f["a"] @ f["a"].mT):
        torch.testing.assert_close(side.detach(), torch.eye(R, dtype=torch.float64))
    assert [name for name, _ in adapter.named_parameters(trainable=True)] == ["0/c"]
    with pytest.raises(StatisticsError, match="signs"):
        stats = rw.collect(layer(), [data()], recipe, loss, needs=[GradientSketch()])
        rw.attach(layer(), recipe, stats=stats)


def test_lora_xs_trains_the_core_alone_and_starts_at_the_base():
    f, w, _ = started("lora_xs")
    svd = torch.linalg.svd(w, full_matrices=False)
    torch.testing.assert_close(f["b"] @ f["a"], svd.U[:, :R] * svd.S[:R] @ svd.Vh[:R])
    assert not f["c"].any()


def held_out_share(a: Tensor, x: Tensor) -> float:
    q = torch.linalg.qr(a.detach().mT).Q
    return float((x @ q).square().sum() / x.square().sum())


def test_sites_of_one_input_start_alike_and_are_apart():
    """The statistic of an input is gathered once for q, k and v; each has a factor of its own all the same."""
    for method in ("eva", "corda", "lora_ga"):
        model, recipe = llama(), rw.recipe(method, rank=4)
        adapter = rw.attach(
            model, recipe, stats=rw.collect(model, [{"input_ids": tokens(), "labels": tokens()}], recipe)
        )
        stored = [p.untyped_storage().data_ptr() for _, p in adapter.named_parameters()]
        assert len(stored) == len(set(stored)), method


def test_eva_explains_more_of_the_inputs_than_random_on_every_site():
    model, recipe = llama().double(), rw.recipe("eva", rank=4)
    found = [{"input_ids": (tokens() * (i + 3) + i) % 64} for i in range(4)]
    stats = rw.collect(model, found, recipe)
    eva = rw.attach(model, recipe, "eva", stats=stats)
    torch.manual_seed(0)
    drawn = rw.attach(model, rw.recipe("lora", rank=4), "drawn")
    rows: dict[str, list[Tensor]] = {name: [] for name in eva}
    for name in eva:
        model.get_submodule(name).register_forward_pre_hook(
            lambda m, a, name=name: rows[name].append(a[0].flatten(0, 1))
        )
    with torch.no_grad(), rw.disabled(model):
        for batch in found:
            model(**batch)
    for name in eva:
        x = torch.cat(rows[name])
        assert held_out_share(eva[name]["a"], x) > held_out_share(drawn[name]["a"], x), name


def test_evas_redistribution_keeps_the_sum_and_takes_the_largest_shares():
    model, recipe = llama().double(), rw.recipe("eva", rank=4, alpha=8)
    stats = rw.collect(model, [{"input_ids": tokens()}], recipe)
    sites = eva_sites(stats, recipe)
    adapter = rw.attach(model, recipe.with_(sites=sites), stats=stats)
    ranks = {name: f["a"].shape[0] for name, f in adapter.items()}
    assert sum(ranks.values()) == 4 * len(stats)
    assert max(ranks.values()) <= 8
    assert len(set(ranks.values())) > 1
    kept = [float(stats[n]["input_subspace"].explained[k - 1]) for n, k in ranks.items()]
    left = [float(s["input_subspace"].explained[ranks.get(n, 0)]) for n, s in stats.items() if ranks.get(n, 0) < 8]
    assert min(kept) >= max(left)
    assert {factors.structure.scale for factors in adapter.sites.values()} == {2.0}
    assert eva_sites(rw.collect(model, [{"input_ids": tokens()}], recipe), recipe.with_(sites=rw.Sites())) == sites
    with pytest.raises(IncompatibleAxes, match="overrides"):
        eva_sites(stats, recipe.with_(sites=sites))


def test_starts_fit_the_svd_form_too():
    for method in ("milora", "olora", "eva", "lora_ga"):
        model = layer()
        inner = SVDForm(R)
        base = rw.recipe(method, rank=R)
        recipe = base.with_(structure=inner if method == "eva" else Anchored(inner))
        x = data()
        y = model(x).detach()
        f = rw.attach(model, recipe, stats=rw.collect(model, [x], recipe, loss))["0"]
        assert f["e"].all()
        torch.testing.assert_close(model(x).detach(), y, rtol=0, atol=1e-10)


# -- randomised SVD -----------------------------------------------------------------------------


def spectral(values: Tensor) -> Tensor:
    n = len(values)
    generator = torch.Generator().manual_seed(0)
    u, v = (torch.linalg.qr(torch.randn(n, n, generator=generator)).Q for _ in range(2))
    return u * values @ v.mT


@pytest.mark.parametrize("power", [0.5, 1.0])
@pytest.mark.parametrize("rank", [16, 64])
def test_randomised_svd_holds_the_energy_of_the_exact_one(power, rank):
    values = torch.arange(1, 385).float() ** -power
    found = randomised_svd(spectral(values), rank)
    best = float(values[:rank].double().square().sum())
    assert 0.999 * best <= found.held <= best * (1 + 1e-5)
    assert best - found.held <= 1.5 * found.missed + 1e-5 * best


@pytest.mark.parametrize("name", ["mlp.down_proj", "mlp.gate_proj", "mlp.up_proj", "self_attn.q_proj"])
def test_randomised_svd_of_trained_weights(name):
    model, _ = rw.embedded.load()
    w = model.get_submodule(f"model.layers.0.{name}").weight.detach().double()
    for rank in (16, 32, 64):
        best = float(torch.linalg.svdvals(w)[:rank].square().sum())
        found = randomised_svd(w, rank)
        assert 0.999 * best <= found.held <= best * (1 + 1e-9)
        assert best - found.held <= 1.5 * found.missed + 1e-9 * best


@pytest.mark.parametrize("flat", ["normal", "almost flat"])
@pytest.mark.parametrize("iterations", [4, 6])
def test_a_flat_spectrum_is_missed_and_said(flat, iterations):
    n, rank = 1024, 16
    normal = torch.randn(n, n, generator=torch.Generator().manual_seed(1))
    w = normal if flat == "normal" else spectral(torch.arange(1, n + 1).float() ** -0.1)
    found = randomised_svd(w, rank, iterations=iterations)
    missed = float(torch.linalg.svdvals(w.double())[:rank].square().sum()) - found.held
    assert missed > 1e-3 * found.held
    assert missed / 1.5 <= found.missed <= 8 * missed
    with pytest.warns(UserWarning, match="flat"):
        truncated_svd(w, rank, iterations=iterations)


def test_a_steep_spectrum_is_silent():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        truncated_svd(spectral(0.8 ** torch.arange(128).float()), 16, iterations=4)
    stats = rw.collect(layer(), [data()], rw.recipe("eva", rank=R), needs=[InputSubspace(iterations=None)])
    assert stats["0"]["input_subspace"].directions.shape == (2 * R, COLS)
