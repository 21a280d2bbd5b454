"""The table of cases: structures, kinds of layer, and the pairs that cannot be."""

from collections.abc import Callable
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

from rankwise.errors import IncompatibleAxes, RankError
from rankwise.placement import resolve
from rankwise.sites import Sites
from rankwise.structures import (
    ABBA,
    BOFT,
    C3A,
    HRA,
    IA3,
    NOLA,
    OFT,
    PSOFT,
    SVFT,
    Anchored,
    Bat,
    BlockLoRA,
    BoRA,
    BSLoRA,
    CaRA,
    Chain,
    Core,
    CrossGroup,
    DeLoRA,
    Delta,
    FacTTK,
    FacTTT,
    FouRA,
    FourierFT,
    Gated,
    GLoRA,
    GraLoRA,
    HardConcrete,
    HiRA,
    InputSide,
    LoHa,
    LoKr,
    LoRA,
    LoRAFA,
    LoRETTA,
    LoRTA,
    LoTR,
    LowRankActivation,
    LowRankWeight,
    Magnitude,
    MELoRA,
    MetaTT,
    MiSS,
    MoRA,
    PatchOFT,
    PRoLoRA,
    PVeRA,
    QuanTA,
    RandLoRA,
    RaSA,
    Replace,
    Rising,
    RoAd,
    Rows,
    Selection,
    ShareLoRA,
    SHiRA,
    SineLoRA,
    SparseLowRank,
    Stack,
    Structure,
    SVDForm,
    Switched,
    ThreeFactor,
    TiedLoRA,
    TinyLoRA,
    TokenRows,
    Truncated,
    TTLoRA,
    UniLoRA,
    VBLoRA,
    VeRA,
    WaveFT,
)
from rankwise.testing import LAYERS as BASIC
from rankwise.testing import Layer
from rankwise.testing.layers import SelfAttention

PARTS = (("late", 5, 8), ("early", 1, 4))

LEAVES: tuple[Structure, ...] = (
    LoRA(3),
    LoRA(3, None, "alpha/sqrt(r)"),
    LoRAFA(3, 6.0),
    SVDForm(3),
    InputSide(3),
    Core(3),
    Gated(3),
    Switched(3),
    LoKr(2, 4),
    LoKr(1, factor=2, decompose_both=True),
    LoKr(None, None),
    LoHa(2),
    HiRA(3),
    OFT(4),
    OFT(4, terms=5),
    ABBA(2, 4.0),
    MoRA(3),
    MoRA(3, "sharing"),
    SineLoRA(2, frequency=5.0),
    MELoRA(2, blocks=2),
    BoRA(2, blocks=2),
    GraLoRA(4, blocks=2),
    GraLoRA(2, blocks=2, hybrid=1),
    GLoRA(2),
    GLoRA(2, "constant", "vector"),
    GLoRA(2, "none"),
    PRoLoRA(4),
    LowRankWeight(3),
    SparseLowRank(3, 6.0, 0.2),
    *(ShareLoRA(3), ShareLoRA(3, share="both"), TiedLoRA(3), VeRA(3), VeRA(20), VeRA(3, widths=(40, 40))),
    *(RaSA(3), BSLoRA(1, 2, 1), BSLoRA(0, 1, 2, widths=(40, 40)), VBLoRA(2, 5, 4), RandLoRA(3), UniLoRA(2, 7)),
    NOLA(2, bases=3),
    *(TTLoRA(2), TTLoRA(3, 2.0, 1, 2), LoRETTA(3, 2, 4.0), LoRETTA(2, 3, 2.0, 2, 1), QuanTA(3), QuanTA(2)),
    *(FacTTT(3), FacTTK(2, 2.0), LoTR(3, 6.0), LoRTA(3, heads=4), CaRA(2), CaRA(2, attention=("0", "mid"))),
    *(MetaTT(3), MetaTT(2, 2.0, heads=4), MetaTT(2, heads=3, tasks=2)),
    ThreeFactor(3),
    ThreeFactor(2, 5.0, diagonal=True),
    TinyLoRA(2, size=5),
    SVFT(),
    SVFT("random", 1),
    SVFT("top_k", 2),
    BOFT(4),
    BOFT(2, scaled=True),
    HRA(4),
    PSOFT(3),
    PSOFT(3, 5, relaxed=False),
    IA3(),
    IA3("in"),
    RoAd(),
    RoAd(2, 4),
    RoAd(4, 2),
    DeLoRA(3),
    DeLoRA(3, from_zero=False),
    MiSS(5),
    MiSS(4, 2),
    Bat(2),
    BlockLoRA(4),
    BlockLoRA(4, None, 2, "a", "alpha/sqrt(r)"),
    FourierFT(12),
    FourierFT(2),
    WaveFT(12),
    SHiRA(1),
    SHiRA(1, "wm"),
    C3A(4),
    FouRA(3),
    Switched(4, open=2),
    Selection(3),
    Rising(3),
)
WRAPPED: tuple[Structure, ...] = (
    Magnitude(LoRA(3)),
    Magnitude(LoKr(2)),
    Magnitude(SVDForm(3)),
    Magnitude(LoHa(2)),
    Magnitude(HiRA(2)),
    Magnitude(OFT(4)),
    Magnitude(Anchored(LoRA(3))),
    Anchored(LoRA(3)),
    Chain(LoRA(3), 2),
    Chain(LoRA(2)),
    Delta(LoRA(3)),
    Magnitude(Chain(LoRA(2), 1)),
    Anchored(SVDForm(2)),
    Anchored(LoKr(2)),
    Anchored(QuanTA(3)),
    Magnitude(Core(3)),
    Magnitude(ThreeFactor(3)),
    Anchored(ThreeFactor(2)),
    Truncated(Gated(3), 2),
    Magnitude(Truncated(LoRA(2), 1)),
    Magnitude(LowRankWeight(3)),
    Anchored(Anchored(LoRA(2))),
    Stack(LoRA(3), OFT(4)),
    Stack(OFT(4), LoRA(3)),
    Stack(HiRA(2), Magnitude(LoRA(3))),
    Stack(Magnitude(OFT(4)), Anchored(LoRA(2))),
    Stack(Stack(LoRA(2), HiRA(2)), OFT(4)),
    Stack(LoRA(2), Stack(OFT(4), LoHa(2))),
    Stack(IA3(), LoRA(2)),
    Stack(LoRA(2), IA3()),
    Magnitude(IA3("in")),
    Anchored(DeLoRA(3, from_zero=False)),
    Magnitude(Stack(LoRA(2), OFT(4))),
    Replace(),
    Stack(Replace(), LoRA(2)),
    Magnitude(Replace()),
)
ROWS: tuple[Structure, ...] = (
    *(Rows(leaf, PARTS) for leaf in (LoRA(2), OFT(4), HiRA(2), LoKr(1), LoHa(2))),
    Rows(Magnitude(LoRA(2)), PARTS),
    Rows(Magnitude(Anchored(SVDForm(2))), PARTS),
    Rows(Stack(LoRA(2), OFT(4)), PARTS),
    Rows(IA3(), PARTS),
    Rows(Replace(), PARTS),
    Magnitude(Rows(LoRA(2), PARTS)),
    Stack(Rows(Magnitude(OFT(4)), PARTS), LoRA(2)),
    Stack(LoRA(2), Rows(OFT(4), PARTS)),
    Stack(LoRA(2), Rows(Magnitude(LoRA(2)), PARTS)),
)
TOKENS: tuple[Structure, ...] = (
    TokenRows((3, 5, 11)),
    Stack(LoRA(3), TokenRows((3, 5, 11))),
    Stack(OFT(4), TokenRows((0, 19))),
    Stack(Magnitude(LoRA(3)), TokenRows((11,))),
    Stack(TokenRows((4, 6)), LoRA(2)),
    Stack(TokenRows((4, 6)), OFT(4)),
    Magnitude(TokenRows((0, 11))),
)
ACROSS: tuple[Structure, ...] = (CrossGroup(6), CrossGroup(8, None), Stack(OFT(4), CrossGroup(6, 3.0, "alpha/sqrt(r)")))
PATCHES: tuple[Structure, ...] = (PatchOFT(4), PatchOFT(3, terms=5), Stack(Replace(), PatchOFT(4)))
ACTIVATIONS: tuple[Structure, ...] = (LowRankActivation(3),)
SAMPLED: tuple[Structure, ...] = (PVeRA(3), PVeRA(3, widths=(40, 40)), Magnitude(PVeRA(2)))
SAMPLED += (HardConcrete(3), Magnitude(HardConcrete(2)))
STRUCTURES = (*LEAVES, *SAMPLED, *WRAPPED, *ROWS, *TOKENS, *ACROSS, *PATCHES, *ACTIVATIONS)


def normal(*shape: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.randn(rows, *shape, dtype=torch.float64)


def ids(*shape: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.arange(rows * prod(shape)).reshape(rows, *shape) % 20


def layer(cls: type[nn.Module], *args: Any, inputs: Callable[[int], Tensor], **kw: Any) -> Layer:
    options = [*map(str, args), *(f"{k}={v}" for k, v in kw.items())]
    name = f"{cls.__name__}({', '.join(options)})"
    return Layer(name, lambda: nn.Sequential(cls(*args, **kw)), inputs, Sites(cls))


class Scaled(nn.Embedding):
    """transformers' scaled embedding, in two lines."""

    embed_scale = 3.5

    def forward(self, input):
        return super().forward(input) * self.embed_scale


class EncoderLayer(nn.Module):
    """Its evaluation mode without gradients takes PyTorch's fast path."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.TransformerEncoderLayer(12, 2, 16, dropout=0.0, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        with torch.set_grad_enabled(self.training or x.requires_grad):
            return self.layer(x)


C1, C2, C3 = nn.Conv1d, nn.Conv2d, nn.Conv3d
T1, T2, T3 = nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d
LINEAR = (
    layer(nn.Linear, 12, 16, inputs=normal(5, 12)),
    layer(nn.Linear, 12, 9, bias=False, inputs=normal(12)),
    layer(nn.Linear, 12, 16, inputs=normal(2, 3, 12)),
    layer(Conv1D, 10, 12, inputs=normal(5, 12)),
    layer(Conv1D, 10, 12, inputs=normal(12)),
)
CONV = (
    layer(C1, 4, 9, 3, stride=2, padding=1, inputs=normal(4, 7)),
    layer(C1, 4, 8, 3, padding="same", dilation=2, inputs=normal(4, 7)),
    layer(C1, 4, 8, 2, padding="same", padding_mode="reflect", inputs=normal(4, 7)),
    layer(C1, 4, 8, 3, padding=2, padding_mode="circular", bias=False, inputs=normal(4, 7)),
    layer(C2, 4, 8, (3, 2), stride=(1, 2), padding=(1, 0), inputs=normal(4, 6, 5)),
    layer(C2, 4, 8, 3, padding="same", padding_mode="replicate", inputs=normal(4, 6, 5)),
    layer(C2, 4, 8, 3, padding=1, padding_mode="reflect", dilation=2, inputs=normal(4, 6, 7)),
    layer(C2, 4, 8, 3, padding=1, groups=2, padding_mode="circular", inputs=normal(4, 6, 5)),
    layer(C2, 8, 8, 3, padding=1, groups=8, inputs=normal(8, 6, 5)),
    layer(C2, 4, 8, 1, inputs=normal(4, 6, 5)),
    layer(C3, 4, 8, 2, stride=2, padding="valid", inputs=normal(4, 4, 4, 3)),
    layer(C3, 4, 8, 2, padding=1, groups=2, padding_mode="replicate", inputs=normal(4, 3, 4, 3)),
    layer(T1, 4, 8, 3, stride=2, output_padding=1, inputs=normal(4, 5)),
    layer(T1, 4, 8, 3, groups=2, dilation=2, bias=False, inputs=normal(4, 5)),
    layer(T2, 4, 8, 3, stride=2, padding=1, output_padding=1, inputs=normal(4, 4, 3)),
    layer(T2, 6, 9, 2, groups=3, stride=(2, 1), inputs=normal(6, 4, 3)),
    layer(T3, 4, 8, 2, stride=2, groups=2, inputs=normal(4, 2, 3, 2)),
)
EMBEDDING = (
    layer(nn.Embedding, 20, 12, inputs=ids(7)),
    layer(nn.Embedding, 20, 12, padding_idx=4, inputs=ids(9)),
    layer(nn.Embedding, 20, 12, inputs=lambda rows: torch.tensor([4, 11, 0, 19])[:rows]),
    layer(nn.Embedding, 20, 12, inputs=ids(2, 3)),
    layer(Scaled, 20, 12, inputs=ids(7)),
)
ATTENTION = tuple(
    Layer(
        f"MultiheadAttention({', '.join(f'{k}={v}' for k, v in options.items())})",
        lambda options=options: SelfAttention(**options),
        normal(5, 12),
        Sites(),
        rowwise=False,
    )
    for options in (
        {"bias": True},
        {"bias": False, "batch_first": True},
        {"kdim": 10, "vdim": 8},
        {"kdim": 10, "vdim": 8, "bias": False, "batch_first": True},
        {"add_bias_kv": True},
    )
)
MIXED = (Layer("TransformerEncoderLayer", EncoderLayer, normal(5, 12), Sites(), rowwise=False),)
TABLE = (*BASIC, *LINEAR, *CONV, *EMBEDDING, *ATTENTION, *MIXED)
VOCABULARIES = {layer.name for layer in EMBEDDING} | {"Embedding", "tied head"}
SPATIAL = {layer.name for layer in CONV} | {"Conv2d", "ConvTranspose1d"}


def groups(layer: Layer) -> int:
    """Of the convolution; 1 of other layers."""
    return max(getattr(module, "groups", 1) for module in layer.make().modules())


def refusal(structure: Structure, layer: Layer) -> str | None:
    """Why a leaf's sizes do not go onto a layer, in its own words; None where they do."""
    try:
        resolve(layer.make(), structure, layer.sites)
    except (RankError, IncompatibleAxes) as error:
        return str(error)
    return None


def possible(structure: Structure, layer: Layer) -> bool:
    """Token rows need a vocabulary, row parts a matrix whose rows are output units; some need a convolution."""
    if structure in LEAVES + SAMPLED and refusal(structure, layer):
        return False
    if structure in ACROSS:
        g = groups(layer)
        rank = getattr(structure, "rank", 6)
        return g > 1 and rank % g == 0
    if structure in PATCHES:
        return "2d" in layer.name
    if structure in ACTIVATIONS:
        return layer.name in ("Linear", "fused rows") or layer in LINEAR
    if structure in TOKENS:
        return layer.name in VOCABULARIES
    return structure not in ROWS or layer.name not in VOCABULARIES | SPATIAL


KINDS = (*BASIC, *LINEAR)  # every structure is tried on these; of their variants each is tried with every second one
PAIRS = [(s, layer, i + j) for i, layer in enumerate(TABLE) for j, s in enumerate(STRUCTURES)]
CASES = [(s, layer) for s, layer, n in PAIRS if (layer in KINDS or n % 2 == 0) and possible(s, layer)]
