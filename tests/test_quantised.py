"""bitsandbytes bases on a CPU: every structure trains, saves, loads and merges on them."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn

import rankwise as rw
from rankwise.errors import TargetError, WeightFormatError
from rankwise.host import LAYER, host_of
from rankwise.host.norms import norm_of_rows
from rankwise.ops import Dense, Product
from tiny_models import METHODS, llama, shake, tokens

bnb = pytest.importorskip("bitsandbytes")

FORMATS = ("nf4", "nf4-double", "fp4", "int8")


def quantised(format_: str, wide: int = 96, narrow: int = 80) -> nn.Sequential:
    """Three quantised layers of unlike sides, the same bits at every call."""
    torch.manual_seed(5)
    sides = [(64, wide), (wide, narrow), (narrow, 64)]
    dense = [nn.Linear(i, o) for i, o in sides]
    layers: list[nn.Module] = []
    for layer in dense:
        i, o = layer.in_features, layer.out_features
        if format_ == "int8":
            new: Any = bnb.nn.Linear8bitLt(i, o, has_fp16_weights=False)
        else:
            new = bnb.nn.Linear4bit(
                i,
                o,
                quant_type=format_[:3],
                compute_dtype=torch.float32,
                compress_statistics=format_.endswith("double"),
            )
        new.load_state_dict(layer.state_dict())
        layers += [new, nn.Tanh()]
    return nn.Sequential(*layers[:-1]).to("cpu")


def dense_view(module: Any) -> Tensor:
    """The dequantised weight, by bitsandbytes itself."""
    if isinstance(module, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(module.weight.data, module.weight.quant_state)
    state = module.state if module.state.CB is not None else module.weight
    return state.CB.float() * (state.SCB.float() / 127).unsqueeze(-1)


def bits(model: nn.Module) -> list[Tensor]:
    """Everything that is stored of the quantised weights."""
    found: list[Tensor] = []
    for module in model.modules():
        if isinstance(module, bnb.nn.Linear4bit):
            state = module.weight.quant_state
            found += [module.weight.data.clone(), state.absmax.clone(), state.code.clone()]
            if state.nested:
                found += [state.state2.absmax.clone(), torch.as_tensor(state.offset).clone()]
        elif isinstance(module, bnb.nn.Linear8bitLt):
            state = module.state if module.state.CB is not None else module.weight
            found += [state.CB.clone(), state.SCB.clone(), module.weight.data.clone()]
    return found


def same(one: list[Tensor], two: list[Tensor]) -> bool:
    return len(one) == len(two) and all(torch.equal(a, b) for a, b in zip(one, two, strict=True))


def inputs() -> Tensor:
    return torch.randn(6, 64, generator=torch.Generator().manual_seed(7))


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("format_", FORMATS)
def test_a_whole_life_on_a_quantised_base(format_: str, method: str, tmp_path: Path) -> None:
    model = quantised(format_)
    adapter = rw.attach(model, rw.recipe(method, **METHODS[method]))
    for layer, site in zip((model[0], model[2], model[4]), adapter.sites.values(), strict=True):
        assert (site.site.rows, site.site.cols) == (layer.out_features, layer.in_features)
    before = bits(model)
    optimizer = adapter.optimizer()
    for _ in range(2):  # LoRA's a has a gradient from the second step on
        optimizer.zero_grad()
        model(inputs()).square().mean().backward()
        optimizer.step()
    for name in adapter:
        grads = [p.grad for p in adapter.sites[name].parameters() if p.requires_grad]
        assert all(g is not None and g.isfinite().all() for g in grads), name
        assert any(g is not None and g.abs().sum() > 0 for g in grads), name
    assert same(before, bits(model))

    shake(adapter, 0.3)
    model.eval()
    with torch.no_grad():
        y = model(inputs())
    adapter.save(tmp_path)
    other = quantised(format_)
    rw.load(other, tmp_path)
    other.eval()
    with torch.no_grad():
        assert torch.equal(other(inputs()), y)

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        with rw.merged(model) as report, torch.no_grad():
            assert not same(before, bits(model))
            model(inputs())
    assert all(0.3 < s.kept < 1.3 and s.change > 0 for s in report.sites), str(report)
    assert same(before, bits(model))
    with torch.no_grad():
        assert torch.equal(model(inputs()), y)


@pytest.mark.parametrize("format_", FORMATS)
def test_merging_writes_what_the_report_says(format_: str) -> None:
    model = quantised(format_)
    adapter = rw.attach(model, rw.recipe("lora", rank=4))
    shake(adapter, 0.3)
    start = {n: dense_view(m) for n, m in model.named_modules() if isinstance(m, nn.Linear)}
    structures: dict[str, Any] = {n: site.structure for n, site in adapter.sites.items()}
    delta = {n: structures[n].delta(adapter[n]).dense().detach() for n in adapter}
    with rw.merged(model):
        held = bits(model)
    report = rw.merge(model, max_loss=1.0)
    assert same(held, bits(model))
    assert type(model[0]).__name__.startswith("Linear") and not rw.adapters(model)
    for site in report.sites:
        d = delta[site.site]
        now = dense_view(model.get_submodule(site.site))
        kept = ((now - start[site.site]) * d).sum() / d.square().sum()
        assert abs(float(kept) - site.kept) < 1e-3
        assert abs(float((now - start[site.site] - d).abs().max()) - site.error) < 1e-3


def test_an_update_too_small_for_the_format_is_reported() -> None:
    model = quantised("nf4")
    adapter = rw.attach(model, rw.recipe("lora", rank=4))
    shake(adapter, 1e-4)
    before = [m.weight.data.clone() for m in model if isinstance(m, nn.Linear)]
    with pytest.warns(UserWarning, match="loses more than 10% of the update at 3 of 3 sites"):
        report = rw.merge(model)
    assert report.worst.kept < 0.1
    after = [m.weight.data for m in model if isinstance(m, nn.Linear)]
    assert same(before, after)  # the tiny update vanished, and no code moved


@contextmanager
def repacked(model: nn.Module, early: bool) -> Iterator[None]:
    """Expect the warning that an early evaluation has rounded the scales, on CPUs where it does."""
    packs = early and any(
        getattr(m.weight.quant_state, "packing_format_for_cpu", False)
        for m in model.modules()
        if isinstance(m, bnb.nn.Linear4bit)
    )
    if packs:
        with pytest.warns(UserWarning, match="repacked it for inference"):
            yield
    else:
        yield


@pytest.mark.parametrize("format_", FORMATS[:3])
@pytest.mark.parametrize("method", ["lora", "dora", "pissa"])
@pytest.mark.parametrize("when", ["before", "after", "before load"])
def test_evaluate_then_train(format_: str, method: str, when: str, tmp_path: Path) -> None:
    # bitsandbytes 0.50 repacks a 4-bit weight in place at the first forward without gradient in
    # eval mode, on a CPU with AVX512-BF16; other CPUs pass this test either way
    recipe = rw.recipe(method, **METHODS[method])
    untouched = quantised(format_, 128, 64)
    truth = [dense_view(m) for m in untouched.modules() if isinstance(m, nn.Linear)]
    expected = rw.attach(copy.deepcopy(untouched), recipe)
    model = quantised(format_, 128, 64)
    early = when != "after"
    if early:
        model.eval()
        with torch.no_grad():
            model(inputs())
    if when == "before load":
        expected.save(tmp_path)
    with repacked(model, early):
        if when == "before load":
            adapter = rw.load(model, tmp_path, trainable=True)
        else:
            adapter = rw.attach(model, recipe)
    base = [dense_view(m) for m in model.modules() if isinstance(m, nn.Linear)]
    for then, now in zip(truth, base, strict=True):
        # an early evaluation rounds the scales to bfloat16, for good
        assert (then - now).abs().max() <= (2**-8 * then.abs().max() if early else 0)
    if method == "dora":
        assert torch.allclose(adapter["0"]["magnitude"], expected["0"]["magnitude"], rtol=4e-3)
    if method == "pissa":
        ours, theirs = (a["0"]["anchor_b"] @ a["0"]["anchor_a"] for a in (adapter, expected))
        assert (ours - theirs).norm() < 0.05 * theirs.norm()
    model.eval()
    with torch.no_grad():
        model(inputs())
    model.train()
    shake(adapter)
    model(inputs()).square().mean().backward()
    for name, parameter in adapter.named_parameters(trainable=True):
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    now = [dense_view(m) for m in model.modules() if isinstance(m, nn.Linear)]
    assert same(base, now)


def test_layers_without_an_adapter_keep_passing_gradients_after_evaluation() -> None:
    model = quantised("nf4", 128, 64)
    adapter = rw.attach(model, rw.recipe("lora", rank=2, sites=rw.Sites(targets=rw.Target("0"))))
    model.eval()
    with torch.no_grad():
        model(inputs())
    model.train()
    shake(adapter)
    model(inputs()).square().mean().backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())


@pytest.mark.parametrize("bits_", [4, 8])
def test_a_transformers_model_loaded_with_quantization(bits_: int, tmp_path: Path) -> None:
    llama(hidden_size=64, intermediate_size=128).save_pretrained(tmp_path / "base")

    def base() -> Any:
        config = (
            transformers.BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")
            if bits_ == 4
            else transformers.BitsAndBytesConfig(load_in_8bit=True)
        )
        return transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "base", quantization_config=config)

    model = base()
    adapter = rw.attach(model, rw.recipe("dora", rank=4))
    assert len(adapter) == 14
    model.train()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    shake(adapter)
    model.zero_grad()
    model(input_ids=tokens(), labels=tokens()).loss.backward()
    assert all(p.grad is not None and p.grad.abs().sum() > 0 for p in adapter.parameters())
    model.eval()
    adapter.save(tmp_path / "adapter")
    other = base()
    with torch.no_grad():
        rw.load(other, tmp_path / "adapter")
        assert torch.equal(other(tokens()).logits, model(tokens()).logits)


def test_an_unquantised_4_bit_layer_is_refused() -> None:
    model = nn.Sequential(bnb.nn.Linear4bit(64, 64))
    with pytest.raises(WeightFormatError, match='model.to\\("cpu"\\)'):
        rw.attach(model, rw.recipe("lora", rank=2))
    assert type(model[0]) is bnb.nn.Linear4bit


@pytest.mark.parametrize("format_", FORMATS)
def test_new_bits_where_the_old_ones_lay_have_new_norms(format_: str) -> None:
    layer, other = quantised(format_)[0], quantised(format_)[0]
    one, two = host_of(layer, LAYER), host_of(other, LAYER)
    two.write(2 * two.weight())
    op = Product(Dense(torch.zeros(96, 2)), Dense(torch.zeros(2, 64)))
    before = one.row_norm(op)
    code, scale = two.storage.snapshot()
    one.storage.put((one.storage.bits[0].copy_(code), scale))
    torch.testing.assert_close(one.row_norm(op), norm_of_rows(dense_view(layer)))
    assert not torch.allclose(one.row_norm(op), before, rtol=0.1)


def test_a_packed_weight_that_says_it_is_float_is_not_trained_whole() -> None:
    layer = bnb.nn.Linear4bit(64, 64, quant_type="nf4", compute_dtype=torch.float32, quant_storage=torch.bfloat16)
    model = nn.Sequential(layer).to("cpu")
    with pytest.raises(TargetError, match="0.weight is stored as torch.bfloat16. Leave the module unquantised"):
        rw.attach(model, rw.recipe("lora", rank=2, sites=rw.Sites(targets=(), train="0")))
    assert rw.attach(model, rw.recipe("lora", rank=2, sites=rw.Sites("0", train="0.bias")))["0.bias"]


class Foreign(Tensor):
    """A quantised format as others write it: a tensor subclass that says it is float."""


def test_a_weight_format_that_gives_no_gradient_is_refused() -> None:
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8))
    model[1].weight = nn.Parameter(model[1].weight.data.as_subclass(Foreign), requires_grad=False)
    with pytest.raises(WeightFormatError, match="floating point of 16 bits or more"):
        rw.attach(model, rw.recipe("lora", rank=2))
    assert all(type(m) is nn.Linear for m in model)
    integer = nn.Linear(8, 8)
    integer.weight = nn.Parameter(torch.ones(8, 8, dtype=torch.int8), requires_grad=False)
    with pytest.raises(WeightFormatError, match="int8"):
        rw.attach(nn.Sequential(integer), rw.recipe("lora", rank=2))


@pytest.mark.parametrize("method", ["lora", "dora", "oft"])
def test_dense_bf16_bits_come_back(method: str) -> None:
    model = llama().bfloat16()
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    adapter = rw.attach(model, rw.recipe(method, **METHODS[method]))
    shake(adapter, 0.3)
    with torch.no_grad():
        y = model(tokens()).logits
        with rw.merged(model):
            near = model(tokens()).logits
        base = {n: p for n, p in model.named_parameters() if ".adapters." not in n}
        assert base.keys() == before.keys()
        assert all(torch.equal(p, before[n]) for n, p in base.items())
        assert torch.equal(model(tokens()).logits, y)
        with rw.disabled(model):
            away = model(tokens()).logits
    assert (near - y).float().norm() < 0.2 * (away - y).float().norm()


def test_merging_a_tiny_update_into_bf16_says_what_is_lost() -> None:
    model = llama().bfloat16()
    adapter = rw.attach(model, rw.recipe("lora", rank=4))
    with torch.no_grad():
        for site in adapter.values():
            site["b"].fill_(1e-5)
    with pytest.warns(UserWarning, match="Merge into a float32 copy"):
        report = rw.merge(model)
    assert report.worst.kept < 0.9 and "kept" in str(report)
    assert all(type(m) is nn.Linear for m in model.modules() if isinstance(m, nn.Linear))
