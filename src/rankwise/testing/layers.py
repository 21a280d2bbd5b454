"""What the laws are tried on: kinds of layer for a structure, sample structures for the other axes."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from rankwise.sites import Sites
from rankwise.structures import (
    Anchored,
    Chain,
    Core,
    Delta,
    InputSide,
    LoHa,
    LoKr,
    LoRA,
    LoRAFA,
    Magnitude,
    Replace,
    Rising,
    SVDForm,
    Switched,
    ThreeFactor,
)


@final
@dataclass(frozen=True)
class Layer:
    """One kind of layer, inside a model that maps one tensor to one tensor.

    Attributes:
        name: of the kind.
        make: builds the model.
        inputs: a batch of so many rows.
        sites: where its layer is.
        rowwise: whether every row of a batch can have an adapter of its own.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    sites: Sites
    rowwise: bool = True


class SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` of x with itself, or with part of it as keys and values."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(12, 2, **options)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        return self.mha(x, x[..., : self.mha.kdim], x[..., : self.mha.vdim], need_weights=False)[0]


class Experts(nn.Module):
    """Two stacked matrices a token is sent through, in transformers' layout or transposed."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        up, down = torch.randn(3, 16, 12) / 3, torch.randn(3, 12, 16) / 3
        self.up, self.down = (nn.Parameter(w.mT.contiguous() if transposed else w) for w in (up, down))

    def forward(self, x: Tensor) -> Tensor:
        """Every third token to its expert."""
        up, down = (w if self.is_transposed else w.mT for w in (self.up, self.down))
        return torch.cat([torch.tanh(x[:, e::3] @ up[e]) @ down[e] for e in range(3)], dim=1)


class Tied(nn.Module):
    """An embedding and an output head of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid = nn.Embedding(20, 12), nn.Linear(12, 12)
        self.lm_head = nn.Linear(12, 20, bias=False)
        self.lm_head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        """The head, as transformers calls it."""
        return self.lm_head

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.lm_head(torch.tanh(self.mid(self.embed(x))))


def _alone(kind: type[nn.Module], *sizes: int, **options: int) -> Callable[[], nn.Module]:
    return lambda: nn.Sequential(kind(*sizes, **options))


def _tokens(rows: int) -> Tensor:
    return torch.arange(rows * 7).reshape(rows, 7) % 20  # every token in the first three rows


def _normal(*shape: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.randn(rows, *shape, dtype=torch.float64)


_FUSED = Sites("0", parts={"0": (("v", 16, 24), ("q", 0, 8))})
LAYERS: tuple[Layer, ...] = (
    Layer("Linear", _alone(nn.Linear, 12, 16), _normal(5, 12), Sites()),
    Layer("Conv2d", _alone(nn.Conv2d, 8, 12, 3, 2, padding=1, groups=2), _normal(8, 6, 5), Sites("0")),
    Layer("ConvTranspose1d", _alone(nn.ConvTranspose1d, 8, 12, 3, 2, padding=1, groups=2), _normal(8, 6), Sites("0")),
    Layer("Embedding", _alone(nn.Embedding, 20, 12, padding_idx=3), _tokens, Sites("0")),
    Layer("tied head", Tied, _tokens, Sites(nn.Embedding, tied="tie")),
    Layer("MultiheadAttention", SelfAttention, _normal(5, 12), Sites(), rowwise=False),
    Layer("experts", lambda: Experts(False), _normal(6, 12), Sites(), rowwise=False),
    Layer("transposed experts", lambda: Experts(True), _normal(6, 12), Sites(), rowwise=False),
    Layer("fused rows", _alone(nn.Linear, 12, 24), _normal(5, 12), _FUSED),
)
SAMPLES = (
    *(LoRA(4), LoRAFA(4), SVDForm(4), LoKr(4), LoHa(4), Replace(), Core(4), InputSide(4)),
    *(Magnitude(LoRA(4)), Anchored(LoRA(4)), Anchored(SVDForm(4))),
    ThreeFactor(4),
    *(Rising(4), Switched(4), Chain(LoRA(4)), Chain(LoRA(4), 2), Delta(LoRA(4))),
)
