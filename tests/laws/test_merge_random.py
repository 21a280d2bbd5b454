"""Merged equals unmerged over random layers: sizes, strides, paddings, dilations, groups."""

from typing import Any

import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from law_cases import LEAVES, WRAPPED
from torch import nn
from transformers.pytorch_utils import Conv1D

import rankwise as rw
from rankwise.testing import randomise

EXAMPLES = 620
CONV = {
    False: {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d},
    True: {1: nn.ConvTranspose1d, 2: nn.ConvTranspose2d, 3: nn.ConvTranspose3d},
}
seen: dict[str, int] = {}


@st.composite
def convolutions(draw: Any) -> tuple[str, nn.Module, tuple[int, ...]]:
    """Its label, a convolution and the shape of one row that fits it."""
    dims, transposed = draw(st.sampled_from([1, 1, 2, 2, 3])), draw(st.booleans())
    groups = draw(st.sampled_from([1, 2, 4]))
    in_, out = groups * draw(st.sampled_from([2, 3, 4])), groups * draw(st.sampled_from([2, 3, 4]))
    size = st.integers(1, 3)
    kernel = tuple(draw(size) for _ in range(dims))
    stride = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    dilation = tuple(draw(st.integers(1, 2)) for _ in range(dims))
    padding: Any = tuple(draw(st.integers(0, 2)) for _ in range(dims))
    options: dict[str, Any] = {"groups": groups, "bias": draw(st.booleans())}
    if transposed:
        padding = tuple(min(p, d * (k - 1)) for p, d, k in zip(padding, dilation, kernel, strict=True))
        limits = [max(s, d) - 1 for s, d in zip(stride, dilation, strict=True)]
        options["output_padding"] = tuple(draw(st.integers(0, n)) for n in limits)
    else:
        modes = ["zeros", "reflect", "replicate", "circular"]
        options["padding_mode"] = draw(st.sampled_from(modes))
        if all(s == 1 for s in stride) and draw(st.booleans()):
            padding = draw(st.sampled_from(["same", "valid"]))
    layer = CONV[transposed][dims](in_, out, kernel, stride, padding=padding, dilation=dilation, **options)
    shape = (in_, *(draw(st.integers(5, 7)) for _ in range(dims)))
    label = f"{'transposed ' if transposed else ''}{options.get('padding_mode', '')}"
    return label, layer, shape


@st.composite
def layers(draw: Any) -> Any:
    """Any kind of layer: (label, module, shape of one row, or None for token ids)."""
    kind = draw(st.sampled_from(["conv", "conv", "conv", "linear", "Conv1D", "embedding"]))
    if kind == "conv":
        return draw(convolutions())
    n, m = draw(st.integers(2, 13)), draw(st.integers(2, 13))
    lead = draw(st.sampled_from([(), (3,)]))
    if kind == "linear":
        return kind, nn.Linear(n, m, bias=draw(st.booleans())), (*lead, n)
    if kind == "Conv1D":
        return kind, Conv1D(m, n), (*lead, n)
    return kind, nn.Embedding(13, m, padding_idx=draw(st.sampled_from([None, 2]))), None


@settings(
    max_examples=EXAMPLES, deadline=None, derandomize=True, database=None, suppress_health_check=list(HealthCheck)
)
@given(layer=layers(), structure=st.sampled_from([*LEAVES, *WRAPPED]), single=st.booleans())
def check(layer, structure, single):
    label, module, shape = layer
    torch.manual_seed(0)
    for p in module.parameters():  # Conv1D starts as small as 0.02
        nn.init.normal_(p, std=0.5)
    dtype = torch.float32 if single else torch.float64
    model = nn.Sequential(module).to(dtype).eval()
    x = torch.arange(26).reshape(2, 13) % 13 if shape is None else torch.randn(2, *shape).to(dtype)
    try:
        adapter = rw.attach(model, rw.Recipe(structure, sites=rw.Sites("0")))
    except (rw.errors.RankError, rw.errors.IncompatibleAxes):  # sizes that do not divide
        return
    randomise(adapter, lambda: model(x))
    with torch.no_grad():
        y = model(x)
        with rw.merged(model):
            inside = model(x)
        after = model(x)
        rw.merge(model)
        z = model(x)
    assert torch.equal(after, y)
    assert torch.equal(inside, z)
    assert float((z - y).abs().max() / y.abs().max()) <= 1e-5
    seen[label] = seen.get(label, 0) + 1


def test_merged_is_unmerged():
    """At least 500 configurations, every padding mode and transposition among them."""
    seen.clear()
    check()
    kinds = {"transposed ", "zeros", "reflect", "replicate", "circular"}
    assert sum(seen.values()) >= 500, seen
    assert all(seen.get(kind, 0) >= 10 for kind in (*kinds, "linear", "Conv1D", "embedding")), seen
