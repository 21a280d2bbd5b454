"""Penalties and dropout on factors: each against its formula, written densely."""

from __future__ import annotations

import copy
import json
from dataclasses import is_dataclass, replace
from typing import Any

import pytest
import torch
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rankwise as rw
from rankwise import penalties
from rankwise.adapter import SiteFactors
from rankwise.errors import IncompatibleAxes
from rankwise.host import Site
from rankwise.penalties import (
    Alternation,
    Ascent,
    Balance,
    Dropout,
    ExpectedRank,
    HiddenKey,
    MaxNorm,
    Noise,
    Orthogonality,
    OrthonormalPull,
    Penalty,
    Sharpness,
    SingularValues,
    backward,
)
from rankwise.penalties.flatness import Noisy
from rankwise.registry import decode, encode, known_classes
from rankwise.structures import OFT, Anchored, HardConcrete, HiRA, LoRA, Magnitude, Selection, SVDForm
from rankwise.structures.adversary import Adversary
from rankwise.testing.compare import truth
from rankwise.testing.laws import accepts
from rankwise.testing.layers import LAYERS, SAMPLES

SIZES = (12, 16, 10)


class Net(nn.Module):
    """Two layers that can be checkpointed."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two = (nn.Linear(a, b, dtype=dtype) for a, b in zip(SIZES, SIZES[1:], strict=False))
        self.checkpointed = False

    def forward(self, x: Tensor) -> Tensor:
        run = lambda x: self.two(torch.tanh(self.one(x)))  # noqa: E731
        return checkpoint(run, x, use_reentrant=False) if self.checkpointed else run(x)


def made(recipe: rw.Recipe, moved: bool = True, dtype: torch.dtype = torch.float64) -> tuple[Net, rw.Adapter]:
    """A net with an adapter; ``moved``: off its start, so that every factor has a gradient."""
    model = Net(dtype).train()
    adapter = rw.attach(model, recipe)
    if moved:
        with torch.no_grad():
            for p in adapter.parameters():
                p.add_(torch.randn_like(p) / 3)
    return model, adapter


def batch(n: int = 7) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(5)
    x, y = (torch.randn(n, SIZES[i], generator=generator, dtype=torch.float64) for i in (0, -1))
    return x, y


def loss_of(model: nn.Module) -> Tensor:
    x, y = batch()
    return (model(x) - y).square().mean()


def values(adapter: Any) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in adapter.named_parameters()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def still(adapter: rw.Adapter) -> torch.optim.Optimizer:
    """An optimizer whose own step is nothing: gradients are zero."""
    for p in adapter.parameters():
        p.grad = torch.zeros_like(p)
    return adapter.optimizer(lr=0.1)


def close(got: Tensor, want: Tensor, tolerance: float = 1e-10) -> None:
    torch.testing.assert_close(got, want, rtol=tolerance, atol=tolerance)


# -- terms of the loss ----------------------------------------------------------------------------


def test_orthogonality_is_its_formula_and_makes_factors_orthonormal():
    _, adapter = made(rw.recipe("svd", rank=3, penalties=(Orthogonality(0.3),)))
    wanted = []
    for f in adapter.values():
        eye = torch.eye(3, dtype=torch.float64)
        wanted += [(f["a"] @ f["a"].T - eye).norm() ** 2, (f["b"].T @ f["b"] - eye).norm() ** 2]
    close(torch.as_tensor(adapter.penalty(0)), 0.3 * sum(wanted) / 4)
    optimizer = torch.optim.SGD(adapter.parameters(), lr=0.3)
    for _ in range(400):
        optimizer.zero_grad()
        adapter.penalty(0).backward()  # type: ignore[union-attr]
        optimizer.step()
    for f in adapter.values():
        close(f["b"].T @ f["b"], torch.eye(3, dtype=torch.float64), 1e-3)
        assert f["e"].grad is None


# -- around a step --------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["gradient", "size"])
def test_balance_is_the_algorithm_of_the_paper(by):
    _, adapter = made(rw.recipe("bar", rank=3, by=by, strength=2.0))
    optimizer, before = still(adapter), values(adapter)
    torch.manual_seed(1)
    for site, grow in zip(adapter.values(), (1.0, 30.0), strict=True):  # b's gradient the smaller, then the larger
        site["b"].grad = torch.randn_like(site["b"]) * grow / site["b"].norm()
        site["a"].grad = torch.randn_like(site["a"]) * 10 / grow
    grads = {name: p.grad.clone() for name, p in adapter.named_parameters()}
    signs = []

    def look(*_: Any) -> None:  # before the optimizer's own step, after the penalty's
        for site in adapter:
            x, y = before[f"{site}/b"], before[f"{site}/a"]
            gx, gy = grads[f"{site}/b"].norm(), grads[f"{site}/a"].norm()
            sign = 1 if (gx >= gy if by == "gradient" else x.norm() < y.norm()) else -1
            signs.append(sign)
            close(adapter[site]["b"], (1 + sign * 2.0 * 0.1) * x)
            close(adapter[site]["a"], (1 - sign * 2.0 * 0.1) * y)
            close(adapter[site]["b"] @ adapter[site]["a"], (1 - 0.2**2) * x @ y)

    optimizer.register_step_pre_hook(look)
    optimizer.step()
    assert len(signs) == 2
    assert by == "size" or signs == [-1, 1]


def test_balance_by_size_brings_the_norms_together():
    _, adapter = made(rw.recipe("bar", rank=3, by="size", strength=0.2))
    f = next(iter(adapter.values()))
    with torch.no_grad():
        f["b"].mul_(4)
    optimizer = still(adapter)
    gaps = []
    for _ in range(80):
        gaps.append(abs(f["b"].norm() ** 2 - f["a"].norm() ** 2).item())
        optimizer.step()
    met = next(t for t, gap in enumerate(gaps) if gap < 0.1 * gaps[0])
    assert all(later < sooner for sooner, later in zip(gaps[:met], gaps[1 : met + 1], strict=True))
    assert met > 5
    assert max(gaps[met:]) < 0.15 * gaps[0]  # then to and fro, by the last step


@pytest.mark.parametrize(
    ("schedule", "shares"), [("linear", [1.0, 0.75, 0.5, 0.25, 0.0]), ("cosine", [1.0, None, 0.5, None, 0.0])]
)
def test_balance_falls_to_zero_and_counts_steps_in_the_optimizers_state(schedule, shares):
    rule = Balance("size", 2.0, 4, schedule)
    assert all(want is None or rule.coefficient(t) == pytest.approx(2 * want) for t, want in enumerate(shares))
    assert rule.coefficient(9) == 0
    _, adapter = made(rw.recipe("bar", rank=3).with_(penalties=(rule,)))
    first = still(adapter)
    for _ in range(2):
        first.step()
    saved, then = copy.deepcopy(first.state_dict()), values(adapter)
    first.step()
    wanted = values(adapter)
    _, other = made(rw.recipe("bar", rank=3).with_(penalties=(rule,)))
    second = still(other)
    second.load_state_dict(saved)
    with torch.no_grad():
        for name, p in other.named_parameters():
            p.copy_(then[name])
    second.step()
    assert same(values(other), wanted)
    assert not same(then, wanted)


def test_max_norm_scales_both_factors_by_the_root():
    _, adapter = made(rw.recipe("lora", rank=3, alpha=6, penalties=(MaxNorm(0.5),)))
    small, large = adapter.values()
    with torch.no_grad():
        small["b"].mul_(1e-3)
    before = values(adapter)
    still(adapter).step()
    assert all(torch.equal(before[f"one/{k}"], v) for k, v in small.items())
    close((2 * large["b"] @ large["a"]).norm(), torch.tensor(0.5, dtype=torch.float64))
    root = (0.5 / (2 * before["two/b"] @ before["two/a"]).norm()).sqrt()
    close(large["b"], root * before["two/b"])
    close(large["a"], root * before["two/a"])


# -- SAM ------------------------------------------------------------------------------------------


@pytest.mark.parametrize("checkpointed", [False, True])
def test_sam_takes_the_gradient_at_the_perturbed_point(checkpointed):
    model, adapter = made(rw.recipe("lora_sam", rank=3, rho=0.5))
    model.checkpointed = checkpointed
    twin, other = made(rw.recipe("lora", rank=3))
    with torch.no_grad():
        for p, q in zip(other.parameters(), adapter.parameters(), strict=True):
            p.copy_(q)
    plain = torch.autograd.grad(loss_of(twin), list(other.parameters()))
    length = torch.cat([g.flatten() for g in plain]).norm()
    with torch.no_grad():
        for p, g in zip(other.parameters(), plain, strict=True):
            p.add_(0.5 * g / length)
    there = loss_of(twin)
    wanted = torch.autograd.grad(there, list(other.parameters()))
    before = values(adapter)
    for p in adapter.parameters():
        p.grad = torch.ones_like(p)  # of a micro-batch before
    loss = backward(adapter, lambda: loss_of(model), 0)
    close(loss, there.detach())
    for p, want, old in zip(adapter.parameters(), wanted, plain, strict=True):
        close(p.grad - 1, want)  # type: ignore[operator]
        assert (want - old).abs().max() > 1e-4
    assert same(values(adapter), before)


def test_sam_restores_the_factors_where_the_second_run_fails():
    model, adapter = made(rw.recipe("lora_sam", rank=3))
    before, runs = values(adapter), []

    def fails() -> Tensor:
        runs.append(values(adapter))
        if len(runs) == 2:
            raise RuntimeError("no")
        return loss_of(model)

    with pytest.raises(RuntimeError, match="no"):
        backward(adapter, fails, 0)
    assert not same(runs[1], before)
    assert same(values(adapter), before)


# -- noise ----------------------------------------------------------------------------------------


def seen_weight(model: nn.Module, cols: int) -> Tensor:
    """The weight behind a linear layer's outputs."""
    x = torch.eye(cols, dtype=torch.float64)
    return (model(x) - model(0 * x)).T


def test_noise_has_the_variance_of_the_formula_and_leaves_the_base():
    torch.manual_seed(0)
    layer = nn.Linear(200, 100).double()
    with torch.no_grad():
        layer.weight.mul_(torch.linspace(0.1, 3, 100).unsqueeze(-1))
    model = nn.Sequential(layer)
    adapter = rw.attach(model, rw.recipe("flat_lora", rank=4, sigma=0.3))
    with torch.no_grad():
        adapter["0"]["b"].normal_()
    bits, plain = layer.weight.clone(), seen_weight(model, 200)
    draws = []

    def look() -> Tensor:
        draws.append(seen_weight(model, 200).detach())
        return model(torch.ones(1, 200, dtype=torch.float64)).sum()

    for step in (3, 3, 4):
        backward(adapter, look, step)
    unit = ((draws[0] - plain) / (0.3 * plain.norm(dim=1, keepdim=True) / 200**0.5)).detach()
    assert abs(float(unit.mean())) < 0.03
    assert abs(float(unit.var()) - 1) < 0.05
    assert float((unit.var(1) - 1).abs().max()) < 0.5  # in every row
    assert torch.equal(draws[0], draws[1])
    assert (draws[0] - draws[2]).abs().max() > 0.1
    assert torch.equal(layer.weight, bits)
    assert torch.equal(seen_weight(model, 200), plain)


@pytest.mark.parametrize("structure", [LoRA(3), Magnitude(LoRA(3)), OFT(4), Anchored(LoRA(2))], ids=repr)
@pytest.mark.parametrize("layer", [layer for layer in LAYERS if layer.name != "experts"], ids=lambda layer: layer.name)
def test_a_noisy_map_means_its_weight(structure, layer):
    """L1 of the structure that training runs on, with the gradients of a dense weight."""
    if not accepts(structure, layer):
        pytest.skip("refuses this layer")
    torch.manual_seed(0)
    base, x = layer.make().double().eval(), layer.inputs(3)
    model = copy.deepcopy(base)
    adapter = rw.attach(model, rw.Recipe(structure, sites=layer.sites))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p) / 5)
    plain = model(x)
    placements = [replace(p, structure=Noisy(p.structure, 0.4, 11)) for p in adapter.placements]
    for p in placements:
        adapter.sites[p.site.name].structure = p.structure
    dense = truth(base, rw.Adapter("noisy", model, adapter.recipe, placements, adapter.sites))
    close(model(x), dense(x), 1e-9)
    assert (model(x) - plain).abs().max() > 1e-3
    if x.is_floating_point():
        z = x.clone().requires_grad_()
        outputs = model(z), dense(z)
        along = torch.randn_like(outputs[0])
        got, want = (torch.autograd.grad(y, z, along)[0] for y in outputs)
        close(got, want, 1e-9)


def test_noise_rises_from_zero_and_reaches_gradients():
    grads = {}
    for step in (0, 5, 10, 99):
        model, adapter = made(rw.recipe("flat_lora", rank=3, steps=10, sigma=0.5))
        backward(adapter, lambda model=model: loss_of(model), step)
        grads[step] = [p.grad for p in adapter.parameters()]
    model, adapter = made(rw.recipe("lora", rank=3))
    loss_of(model).backward()
    plain = [p.grad for p in adapter.parameters()]
    for got, want in zip(grads[0], plain, strict=True):
        close(got, want)  # type: ignore[arg-type]
    distance = {t: sum(float((g - w).norm()) for g, w in zip(grads[t], plain, strict=True)) for t in grads}
    assert distance[0] < 1e-9 < 1e-3 < distance[5] < distance[10]


def test_noise_is_kept_out_of_a_bfloat16_base():
    model, adapter = made(rw.recipe("flat_lora", rank=3), dtype=torch.bfloat16)
    bits = {name: p.clone() for name, p in model.named_parameters() if "adapters" not in name}
    x = batch()[0].bfloat16()
    for step in range(20):
        backward(adapter, lambda: model(x).float().square().mean(), step)
    now = dict(model.named_parameters())
    assert all(torch.equal(p, now[name]) for name, p in bits.items())


# -- a second pair that climbs --------------------------------------------------------------------


def second(adapter: Any) -> dict[str, Tensor]:
    return {name: p for name, p in adapter.named_parameters() if "adversary" in name}


def test_the_second_pair_starts_silent_climbs_and_is_clipped():
    model, adapter = made(rw.recipe("bi_lora", rank=3, alpha=6, rho=0.2, second=2), moved=False)
    assert {tuple(p.shape) for p in second(adapter).values()} == {(2, 12), (16, 2), (2, 16), (10, 2)}
    close(loss_of(model), loss_of(Net()))
    loss_of(model).backward()
    grads = {name: p.grad.clone() for name, p in adapter.named_parameters() if name.endswith("b")}
    before, optimizer = values(adapter), adapter.optimizer(lr=1e-3)
    optimizer.step()
    for name, g in grads.items():  # Adam's first step is lr times the sign
        moved = dict(adapter.named_parameters())[name].detach() - before[name]
        assert torch.equal(moved.sign(), g.sign() if "adversary" in name else -g.sign()), name
        assert g.abs().max() > 0
    optimizer = adapter.optimizer(lr=0.1)
    for _ in range(5):
        optimizer.zero_grad()
        backward(adapter, lambda: loss_of(model), 0)
        optimizer.step()
    products = [2 * f["adversary_b"] @ f["adversary_a"] for f in adapter.values()]
    close(torch.stack([p.norm() for p in products]).norm().detach(), torch.tensor(0.2, dtype=torch.float64))


def test_training_sees_the_sum_and_its_gradients():
    model, adapter = made(rw.recipe("bi_lora", rank=3, alpha=6))
    f = adapter["one"]
    x = batch()[0]
    with torch.no_grad():
        wanted = model.one.weight + 2 * (f["b"] @ f["a"] + f["adversary_b"] @ f["adversary_a"])
    close(model.one(x), x @ wanted.T + model.one.bias)
    g = torch.randn(7, 16, dtype=torch.float64)
    model.one(x).backward(g)
    full = 2 * g.T @ x
    close(f["adversary_b"].grad, full @ f["adversary_a"].T)  # type: ignore[arg-type]
    close(f["adversary_a"].grad, f["adversary_b"].T @ full)  # type: ignore[arg-type]
    close(f["a"].grad, f["b"].T @ full)  # type: ignore[arg-type]


def test_what_is_evaluated_saved_exported_and_merged_is_the_first_pair(tmp_path):
    pytest.importorskip("peft")
    model, adapter = made(rw.recipe("bi_lora", rank=3))
    x = batch()[0]
    training = model(x)
    y = model.eval()(x)
    assert (training - y).abs().max() > 1e-2
    adapter.save(tmp_path)
    with safe_open(tmp_path / "adapter.safetensors", framework="pt") as archive:
        assert sorted(archive.keys()) == ["one/a", "one/b", "two/a", "two/b"]
        assert "dversary" not in json.dumps(archive.metadata())
    base = Net().eval()
    loaded = rw.load(base, tmp_path)
    assert loaded.recipe == adapter.recipe
    assert torch.equal(base(x), y)
    rw.export(adapter, tmp_path / "peft")
    with safe_open(tmp_path / "peft" / "adapter_model.safetensors", framework="pt") as archive:
        assert len(list(archive.keys())) == 4
        assert torch.equal(archive.get_tensor("base_model.model.one.lora_A.weight"), adapter["one"]["a"])
    rw.merge(model)
    close(model(x), y)


def test_second_pairs_stand_beside_magnitudes_parts_and_stacks():
    site = Site("x", "linear", 8, 6)
    f = Adversary(Magnitude(LoRA(2))).factors(site)
    assert set(f) == {"a", "b", "magnitude", "adversary_a", "adversary_b"}
    anchored = Adversary(Anchored(LoRA(2))).factors(site)
    assert {k for k in anchored if k.startswith("adversary")} == {"adversary_a", "adversary_b"}
    model, adapter = made(rw.Recipe(Magnitude(LoRA(2)), penalties=(Ascent(),)))
    f = adapter["one"]
    direction = model.one.weight + 8 * (f["b"] @ f["a"] + f["adversary_b"] @ f["adversary_a"])
    wanted = f["magnitude"].unsqueeze(-1) * direction / direction.norm(dim=1, keepdim=True)
    close(seen_weight(model.one, 12), wanted, 1e-9)
    structure = Adversary(LoRA(2))
    leaf = lambda s, site, w: {k: torch.randn(4, *v.shape) for k, v in s.factors(site).items()}  # noqa: E731
    start = structure.start(Site("x", "parameter", 8, 6, stack=4), lambda: torch.zeros(4, 8, 6), leaf)
    assert start["adversary_a"].shape == (4, 2, 6)
    assert not start["adversary_b"].any()
    with pytest.raises(IncompatibleAxes, match="Take LoRA"):
        Adversary(SVDForm(2))


@pytest.mark.parametrize("implementation", [None, "eager"])
def test_experts_have_second_pairs_and_noise_too(implementation):
    transformers = pytest.importorskip("transformers")
    torch.manual_seed(0)
    config = transformers.MixtralConfig(
        vocab_size=32,
        hidden_size=16,
        intermediate_size=24,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=4,
        max_position_embeddings=32,
    )
    base = transformers.MixtralForCausalLM(config).train()
    if implementation:
        base.set_experts_implementation(implementation)
    model, ids = copy.deepcopy(base), torch.randint(0, 32, (2, 8))
    sites = rw.Sites(targets=["*experts.gate_up_proj", "*experts.down_proj"])
    adapter = rw.attach(model, rw.recipe("bi_lora", rank=2, sites=sites))
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.3)
        for name, f in adapter.items():
            path, _, stack = name.rpartition(".")
            base.get_submodule(path)._parameters[stack] += f["b"] @ f["a"] + f["adversary_b"] @ f["adversary_a"]
        close(model(ids).logits, base(ids).logits, 1e-5)
        assert (model.eval()(ids).logits - base.eval()(ids).logits).abs().max() > 1e-3
        before = model(ids).logits
        for factors in adapter.sites.values():
            factors.structure = Noisy(LoRA(2, 2), 0.3, 1)
        assert (model(ids).logits - before).abs().max() > 1e-3


# -- dropout on factors ---------------------------------------------------------------------------


@pytest.mark.parametrize("on", ["rank", "sides", "site"])
def test_dropout_masks_what_it_says_and_is_right_in_the_mean(on):
    model, adapter = made(rw.recipe("lora", rank=4, dropout=Dropout(0.4, on)))
    f, layer = adapter["one"], model.one
    with torch.no_grad():
        served = layer.weight + f["b"] @ f["a"]
        draws = torch.stack([seen_weight(layer, 12) for _ in range(3000)]) - layer.weight
        for update in draws[:40]:
            if on == "rank":
                kept = torch.linalg.lstsq(f["b"], update).solution @ torch.linalg.pinv(f["a"])
                close(kept, torch.diag(kept.diagonal()), 1e-8)
                kept = kept.diagonal() * 0.6
            elif on == "site":
                kept = (update * 0.6 / (f["b"] @ f["a"])).flatten()
                assert kept.std() < 1e-8
            else:
                kept = update * 0.6**2 / (f["b"] @ f["a"])
                close(kept, kept.amax(1, keepdim=True) * kept.amax(0, keepdim=True), 1e-8)
            close(kept, kept.round(), 1e-8)
            assert set(kept.round().abs().unique().tolist()) <= {0.0, 1.0}
        error = (draws.mean(0) + layer.weight - served).norm() / (served - layer.weight).norm()
        spread = draws.std(0).norm() / (served - layer.weight).norm()
        assert error < 4 * spread / 3000**0.5
        assert spread > 0.3
        close(seen_weight(layer.eval(), 12), served)
        assert torch.equal(model.eval()(batch()[0]), model(batch()[0]))


def test_dropout_keeps_the_start_of_an_anchor():
    torch.manual_seed(0)
    model = Net().train()
    rw.attach(model, rw.recipe("pissa", rank=4, dropout=Dropout(0.5)))
    close(model(batch()[0]), Net()(batch()[0]), 1e-9)


def test_experts_have_a_mask_each():
    f = {"a": torch.ones(6, 4, 7), "b": torch.ones(6, 5, 4)}
    torch.manual_seed(0)
    found = Dropout(0.5)(f, LoRA(4).factors(Site("x", "parameter", 5, 7, stack=6)))
    assert torch.equal(found["b"], f["b"])
    assert found["a"].shape == f["a"].shape
    assert len({tuple(row.tolist()) for row in found["a"][..., 0]}) > 2
    assert torch.equal(found["a"], found["a"][..., :1].expand(6, 4, 7))


KINDS = (0.3, Dropout(0.3), Dropout(0.3, "sides"), Dropout(0.5, "site"))


@pytest.mark.parametrize("autocast", [False, True], ids=["fused", "alone"])
@pytest.mark.parametrize("dropout", KINDS, ids=repr)
def test_checkpointing_draws_the_same_masks(autocast, dropout):
    """Under autocast nothing is fused, and each layer runs by itself."""
    grads, (x, y) = [], (t.float() for t in batch())
    for checkpointed in (False, True):
        model, adapter = made(rw.recipe("lora", rank=3, dropout=dropout), dtype=torch.float32)
        model.checkpointed = checkpointed
        torch.manual_seed(7)
        for _ in range(2):
            with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
                loss = (model(x) - y).square().mean()
            loss.backward()
        grads.append({name: p.grad.clone() for name, p in adapter.named_parameters()})
    assert same(*grads)
    model, adapter = made(rw.recipe("lora", rank=3), dtype=torch.float32)
    (model(x) - y).square().mean().backward()
    assert any((p.grad - grads[0][name] / 2).abs().max() > 0.1 for name, p in adapter.named_parameters())


def test_routed_rows_have_masks_of_their_own():
    model, _ = made(rw.recipe("lora", rank=4, dropout=Dropout(0.5)))
    rw.attach(model, rw.recipe("lora", rank=4, dropout=Dropout(0.5)), "other")
    holder: Any = model.one._modules["adapters"]
    levels: list[SiteFactors] = [holder.get(name, "layer") for name in ("default", "other")]
    with torch.no_grad():
        for level in levels:
            level.b.fill_(1.0)
            level.a.fill_(1.0)
    x = torch.ones(2, 1, 12, dtype=torch.float64)
    with rw.route(model, ["default", "other"]), torch.no_grad():
        update = (
            torch.stack([model.one(x)[..., 0, 0] for _ in range(60)]) - model.one.weight[0].sum() - model.one.bias[0]
        )
    assert (update[:, 0] != update[:, 1]).any()
    close(update / 24, (update / 24).round())  # 12 inputs, kept components doubled


def test_both_compile_in_one_graph():
    model, adapter = made(rw.recipe("bi_lora", rank=3, dropout=Dropout(0.5, "site")))
    f, x = adapter["one"], batch()[0]
    compiled: Any = torch.compile(model.one, fullgraph=True, backend="aot_eager")
    with torch.no_grad():
        base = nn.functional.linear(x, model.one.weight, model.one.bias)
        update = x @ (f["b"] @ f["a"] + f["adversary_b"] @ f["adversary_a"]).T
    kept = []
    for _ in range(20):
        y = compiled(x).detach()
        kept.append(bool((y - base).abs().max() > 1e-6))
        close(y, base + 2 * update * kept[-1])
    assert 0 < sum(kept) < 20
    compiled(x).sum().backward()
    assert f["adversary_b"].grad.abs().max() > 0  # type: ignore[union-attr]


# -- recipes --------------------------------------------------------------------------------------

EVERY = (Orthogonality(), Balance("size", steps=5), MaxNorm(2.0), Sharpness(0.1), Noise(0.1, 7, 2), Ascent(0.1, 2))
EVERY += (OrthonormalPull(), SingularValues())
OF_GATES = (ExpectedRank(1.5), Alternation())  # not for LoRA
OF_TRANSFORMERS = (HiddenKey(0.2, 0.3, 0.4, "mlp"),)  # tests/test_hidden_key.py


def test_every_penalty_is_here():
    found = (getattr(penalties, name) for name in penalties.__all__)
    assert {c for c in found if isinstance(c, type) and issubclass(c, Penalty) and is_dataclass(c)} == set(
        map(type, (*EVERY, *OF_GATES, *OF_TRANSFORMERS))
    )


@pytest.mark.parametrize("penalty", (*EVERY, *OF_GATES), ids=lambda p: type(p).__name__)
def test_a_penalty_lives_with_every_structure_that_it_accepts(penalty, tmp_path):
    """It trains through a perturbation and a step, leaves the base, saves, loads and merges; or is refused."""
    recipes, x = [], batch()[0]
    for structure in (*SAMPLES, HardConcrete(4), Selection(4)):
        if penalty.requires <= structure.traits:
            recipes.append(rw.Recipe(structure, penalties=(penalty,)))
        else:
            with pytest.raises(IncompatibleAxes, match=r";.+\."):
                rw.Recipe(structure, penalties=(penalty,))
    assert recipes
    for recipe in recipes:
        model, adapter = made(recipe)
        bits = {name: p.clone() for name, p in model.named_parameters() if "adapters" not in name}
        before, optimizer = values(adapter), adapter.optimizer(lr=1e-2)
        backward(adapter, lambda model=model: loss_of(model), 3)
        optimizer.step()
        assert not same(values(adapter), before), recipe
        assert all(torch.equal(p, dict(model.named_parameters())[name]) for name, p in bits.items()), recipe
        y, other = model.eval()(x), Net().eval()
        adapter.save(tmp_path)
        assert rw.load(other, tmp_path).recipe == recipe
        assert torch.equal(other(x), y), recipe
        rw.merge(other)
        close(other(x), y, 1e-9)


def test_a_recipe_is_saved_with_its_penalties_but_for_functions(tmp_path):
    recipe = rw.Recipe(LoRA(2), penalties=(*EVERY, *OF_TRANSFORMERS), dropout=Dropout(0.2, "site"))
    back = decode(json.loads(json.dumps(encode(recipe))), known_classes())
    assert back == recipe
    assert back != recipe.with_(penalties=EVERY[1:])
    own = recipe.with_(penalties=(*recipe.penalties, lambda adapter, step: torch.zeros(())))
    assert decode(json.loads(json.dumps(encode(own))), known_classes()) == recipe
    _, adapter = made(recipe)
    adapter.save(tmp_path)
    assert rw.load(Net(), tmp_path).recipe == recipe


@pytest.mark.parametrize(
    ("structure", "axes", "remedy"),
    [
        (OFT(4), {"dropout": Dropout(0.1)}, "Take LoRA"),
        (HiRA(2), {"penalties": (Balance(),)}, "product"),
        (OFT(4), {"penalties": (Orthogonality(),)}, "low-rank"),
        (SVDForm(2), {"penalties": (Ascent(),)}, "product"),
        (LoRA(2), {"penalties": (0.1,)}, "rankwise.penalties"),
    ],
)
def test_what_clashes_is_refused_when_it_is_made(structure, axes, remedy):
    with pytest.raises(IncompatibleAxes, match=remedy):
        rw.Recipe(structure, **axes)


@pytest.mark.parametrize(
    ("make", "found"),
    [(lambda: Dropout(1.0), "1.0"), (lambda: Dropout(0.1, "x"), "'x'"), (lambda: Balance("b"), "'b'")],
)  # type: ignore[arg-type]
def test_options_are_checked(make, found):
    with pytest.raises(IncompatibleAxes, match=found):
        make()


def test_all_penalties_work_together():
    model, adapter = made(rw.Recipe(LoRA(2), penalties=(*EVERY, Sharpness(0.05)), dropout=Dropout(0.2)), moved=False)
    optimizer, losses = adapter.optimizer(lr=1e-2), []
    for step in range(40):
        optimizer.zero_grad()
        losses.append(float(backward(adapter, lambda: loss_of(model), step)))
        optimizer.step()
    assert loss_of(model.eval()) < 0.7 * loss_of(Net())
