"""Every method of the catalogue on every format of the base, against the same method on dequantised weights.

The reference is the same recipe on ``nn.Linear`` layers that hold what the format's own library dequantises, in
float64. A format rounds W once, when it is stored; what the comparisons allow for is the rounding of products in the
layer's compute dtype.
"""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise.errors import NotMergeable, TargetError, WeightFormatError
from rankwise.testing import randomise
from rankwise.weights import FORMATS as STORED
from rankwise.weights import format_of
from tiny_models import small

bnb = pytest.importorskip("bitsandbytes")

# -- the table ------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Format:
    """A format of the base.

    Attributes:
        name: of the format.
        stored: a layer in the format that holds a dense layer's weight.
        dtype: of activations and products.
        served: how far products in evaluation may be off, where that is another way of computing them.
    """

    name: str
    stored: Callable[[nn.Linear], nn.Module]
    dtype: torch.dtype = torch.float32
    served: float | None = None

    @property
    def tolerance(self) -> float:
        """In units of the largest value.

        In float32 it is sums that round, of up to 64 products; in half precision each tensor between input and output
        is rounded once, of which there are 8 at most, and the factors are in float32.
        """
        return torch.finfo(self.dtype).eps * (64 if self.dtype == torch.float32 else 8)


def four(kind: str, dtype: torch.dtype = torch.float32, **options: Any) -> Callable[[nn.Linear], nn.Module]:
    def stored(layer: nn.Linear) -> nn.Module:
        sizes = layer.in_features, layer.out_features
        new = bnb.nn.Linear4bit(*sizes, quant_type=kind, compute_dtype=dtype, **options)
        new.load_state_dict(layer.state_dict())
        return new.to(dtype)

    return stored


def eight(layer: nn.Linear, trained: bool = False) -> nn.Module:
    new = bnb.nn.Linear8bitLt(layer.in_features, layer.out_features, has_fp16_weights=trained)
    new.load_state_dict(layer.state_dict())
    return new


FORMATS = (
    Format("float32", copy.deepcopy),
    Format("bfloat16", lambda layer: copy.deepcopy(layer).bfloat16(), torch.bfloat16),
    Format("float16", lambda layer: copy.deepcopy(layer).half(), torch.float16),
    Format("nf4", four("nf4", compress_statistics=False)),
    Format("nf4-double", four("nf4", compress_statistics=True)),
    Format("nf4-bfloat16", four("nf4", torch.bfloat16), torch.bfloat16),  # as QLoRA's models are loaded
    Format("nf4-stored-bfloat16", four("nf4", quant_storage=torch.bfloat16)),  # as FSDP asks
    Format("fp4", four("fp4")),
    # in evaluation the 64 inputs are rounded to int8 too, each by at most 1/254 of the largest
    Format("int8", eight, served=1 / 32),
)


def foreign(dtype: torch.dtype) -> Callable[[nn.Linear], nn.Module]:
    def stored(layer: nn.Linear) -> nn.Module:
        layer.weight = nn.Parameter(layer.weight.data.to(dtype), requires_grad=False)
        return layer

    return stored


class Subclass(Tensor):
    """A quantised weight as other libraries write it: a tensor subclass that says it is float."""


def subclass(layer: nn.Linear) -> nn.Module:
    layer.weight = nn.Parameter(layer.weight.data.as_subclass(Subclass), requires_grad=False)
    return layer


class Packed(nn.Module):
    """A layer of its own class with packed weights, as GPTQ's and AWQ's kernels have."""

    def __init__(self, layer: nn.Linear) -> None:
        super().__init__()
        self.register_buffer("qweight", torch.zeros(layer.in_features // 8, layer.out_features, dtype=torch.int32))


# format -> how it is made, what every method says of it, and why no method can be on it
REFUSED: dict[str, tuple[Callable[[nn.Linear], nn.Module], type[Exception], str, str]] = {
    "float8": (
        *(foreign(torch.float8_e4m3fn), WeightFormatError, "16 bits or more.*float8_e4m3fn"),
        "its scales lie where its own kernel knows them, and torch has no product with it",
    ),
    "float8-wide": (foreign(torch.float8_e5m2), WeightFormatError, "16 bits or more.*float8_e5m2", "as float8"),
    "int8 tensor": (foreign(torch.int8), WeightFormatError, "16 bits or more.*int8", "its scales are not known"),
    "subclass": (subclass, WeightFormatError, "16 bits or more", "nothing says that it gives x a gradient"),
    "packed": (Packed, TargetError, "matches nothing", "a class that is no linear layer says nothing of its weight"),
    "nf4, not quantised": (
        *(four("nf4"), WeightFormatError, r"is not quantised.*model.to\(\"cpu\"\)"),
        "there is no W yet that a start could read",
    ),
    "int8, not quantised": (
        *(eight, WeightFormatError, r"is not quantised.*model.to\(\"cpu\"\)"),
        "there is no W yet that a start could read",
    ),
    "int8, trained": (
        *(lambda layer: eight(layer, trained=True).to("cpu"), WeightFormatError, "has_fp16_weights=False"),
        "its int8 weight is that of the last forward, not W",
    ),
}

# method -> why it merges into no format
UNMERGED = {"cola_act": "a nonlinearity stands between its two factors, so no matrix of the layer's shape is its map"}

METHODS = rw.catalogue()
CELLS = [(name, base) for name in METHODS for base in FORMATS]


# -- a cell ---------------------------------------------------------------------------------------


def base_of(stored: Callable[[nn.Linear], nn.Module], device: str | None = "cpu") -> nn.Sequential:
    """Two layers of unlike sides, the second narrower than a block of 4-bit codes; the same at every call."""
    torch.manual_seed(5)
    model = nn.Sequential(stored(nn.Linear(64, 32)), nn.SiLU(), stored(nn.Linear(32, 64)))
    return model if device is None else model.to(device)


def dequantised(layer: Any) -> Tensor:
    """W in float32: of 4 bits by bitsandbytes itself, of int8 by its definition."""
    if isinstance(layer, bnb.nn.Linear4bit):
        return bnb.functional.dequantize_4bit(layer.weight.data, layer.weight.quant_state).float()
    if isinstance(layer, bnb.nn.Linear8bitLt):
        state = layer.state if layer.state.CB is not None else layer.weight
        return state.CB.float() * (state.SCB.float() / 127).unsqueeze(-1)
    return layer.weight.detach().float()


def dense(model: nn.Sequential) -> nn.Sequential:
    """The same model of float32 layers."""
    twin = nn.Sequential(nn.Linear(64, 32), nn.SiLU(), nn.Linear(32, 64))
    for one, two in zip((twin[0], twin[2]), (model[0], model[2]), strict=True):
        one.load_state_dict({"weight": dequantised(two), "bias": two.bias.float()})
    return twin


def attached(model: nn.Module, name: str, x: Tensor) -> rw.Adapter:
    """A method on a model, by the same draws at every call."""
    recipe = small(name)
    stats = rw.collect(model, [x], recipe, lambda model, x: model(x).square().mean()) if recipe.init.needs else None
    torch.manual_seed(1)
    return rw.attach(model, recipe, stats=stats)


def passes(adapter: rw.Adapter, x: Tensor, along: Tensor) -> tuple[Tensor, Tensor | None]:
    """The outputs of x in training, and the gradient of x."""
    x = x.clone().requires_grad_()
    adapter.model.train()
    for site in adapter.sites.values():  # torch draws other noise in other dtypes
        site.train("samples" not in adapter.recipe.structure.traits)
    torch.manual_seed(2)  # of dropout
    y = adapter.model(x)
    y.backward(along.to(y))
    return y.detach(), x.grad


def off(got: Tensor | None, want: Tensor | None) -> float:
    """How far a tensor is from the wanted one, relative to the largest value wanted."""
    assert got is not None and want is not None and got.shape == want.shape and got.isfinite().all()
    if not want.numel():
        return 0.0
    return float((got.double() - want.double()).abs().max() / want.double().abs().max().clamp_min(1e-30))


def bits(model: nn.Module) -> dict[str, Tensor]:
    """Everything that is stored of the base, as the layers themselves save it."""
    return {k: v.clone() for k, v in model.state_dict().items() if "adapters" not in k}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    raw = [{k: v.reshape(-1).view(torch.uint8) for k, v in each.items()} for each in (one, two)]  # NaN is no number
    return one.keys() == two.keys() and all(torch.equal(v, raw[1][k]) for k, v in raw[0].items())


@pytest.mark.parametrize(("name", "base"), CELLS, ids=lambda v: getattr(v, "name", v))
def test_a_method_on_a_format(name: str, base: Format) -> None:
    generator = torch.Generator().manual_seed(7)
    x, along = torch.randn(2, 3, 64, generator=generator).to(base.dtype), torch.randn(2, 3, 64, generator=generator)
    model = base_of(base.stored)
    twin, before = dense(model), bits(model)
    adapter, wanted = attached(model, name, x), attached(twin, name, x.float())
    if not adapter.recipe.init.needs:  # what is read of data is rounded in another way
        assert all(torch.equal(f, wanted[site][k]) for site in adapter for k, f in adapter[site].items())
    twin.double()
    with torch.no_grad():
        randomise(wanted, lambda: twin.eval()(x.double()), least=0.3)
        for ours, theirs in zip(adapter.parameters(False), wanted.parameters(False), strict=True):
            theirs.copy_(ours.copy_(theirs))

    got, want = passes(adapter, x, along), passes(wanted, x.double(), along)
    assert off(got[0], want[0]) <= base.tolerance
    assert off(got[1], want[1]) <= base.tolerance
    for (key, ours), (_, theirs) in zip(adapter.named_parameters(True), wanted.named_parameters(True), strict=True):
        assert off(ours.grad, theirs.grad) <= base.tolerance, key
    with torch.no_grad():
        assert off(model.eval()(x), twin.eval()(x.double())) <= (base.served or base.tolerance)

    adapter.optimizer().step()
    assert same(bits(model), before)
    for ours, theirs in zip(adapter.parameters(False), wanted.parameters(False), strict=True):
        theirs.data.copy_(ours.data)
    merges(model, twin, base, name)
    assert same(bits(model), before)


def merges(model: nn.Sequential, twin: nn.Sequential, base: Format, name: str) -> None:
    """Merging stores what the format's own library makes of the dense model's merged weight, or is refused."""
    if name in UNMERGED:
        for m in (model, twin):
            with pytest.raises(NotMergeable, match="Serve them unmerged"), rw.merged(m):
                raise AssertionError("it merged")
        return
    with warnings.catch_warnings(), torch.no_grad():
        warnings.filterwarnings("ignore", message="Merging loses")
        with rw.merged(twin), rw.merged(model):
            for ours, theirs in zip((model[0], model[2]), (twin[0], twin[2]), strict=True):
                copied = nn.Linear(theirs.in_features, theirs.out_features)
                copied.weight, copied.bias = theirs.weight, theirs.bias
                fresh = dequantised(base.stored(copied).to("cpu"))
                # in the mean, since a value halfway between two codes may go to either
                assert (dequantised(ours) - fresh).abs().mean() <= 1e-4 * fresh.abs().max()


def test_the_grid_is_wide() -> None:
    assert len(METHODS) >= 112 and len(FORMATS) >= 9
    assert len(CELLS) == len(METHODS) * len(FORMATS) >= 1008
    assert {format_of(base_of(base.stored)[0]) for base in FORMATS} == set(STORED)  # no format of ours is left out


def test_what_does_not_merge_is_in_the_table() -> None:
    assert {n for n, entry in METHODS.items() if "not_mergeable" in entry.recipe.structure.traits} == UNMERGED.keys()


# -- cells that cannot be -------------------------------------------------------------------------


@pytest.mark.parametrize("base", REFUSED)
def test_no_method_is_on_a_format_that_cannot_be_trained_through(base: str) -> None:
    stored, error, message, _ = REFUSED[base]
    model = base_of(stored, device=None)
    classes = [type(m) for m in model]
    for name in METHODS:
        recipe = small(name)
        with pytest.raises(error, match=message):
            rw.attach(model, recipe, stats={} if recipe.init.needs else None)
    assert [type(m) for m in model] == classes and not rw.adapters(model)
