"""Kinds of layer to check a method on, each inside a model that maps one tensor to one tensor."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from rankwise.sites import Sites


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
        self.widths = (options.get("kdim") or 12, options.get("vdim") or 12)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        k, v = self.widths
        return self.mha(x, x[..., :k], x[..., :v], need_weights=False)[0]


class Experts(nn.Module):
    """Two stacked matrices a token is sent through, in transformers' layout or transposed."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        up, down = (3, 16, 12), (3, 12, 16)
        self.up = nn.Parameter(torch.randn(up if not transposed else (3, 12, 16)) / 3)
        self.down = nn.Parameter(torch.randn(down if not transposed else (3, 16, 12)) / 3)

    def forward(self, x: Tensor) -> Tensor:
        """Every third token to its expert."""
        parts = []
        for e in range(3):
            up, down = self.up[e], self.down[e]
            if not self.is_transposed:
                up, down = up.mT, down.mT
            parts.append(torch.tanh(x[:, e::3] @ up) @ down)
        return torch.cat(parts, dim=1)


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


def _tokens(rows: int) -> Tensor:
    return torch.arange(rows * 7).reshape(rows, 7) % 20  # every token in the first three rows


def _normal(*shape: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.randn(rows, *shape, dtype=torch.float64)


LAYERS: tuple[Layer, ...] = (
    Layer("Linear", lambda: nn.Sequential(nn.Linear(12, 16)), _normal(5, 12), Sites()),
    Layer(
        "Conv2d", lambda: nn.Sequential(nn.Conv2d(8, 12, 3, 2, padding=1, groups=2)), _normal(8, 6, 5), Sites(nn.Conv2d)
    ),
    Layer(
        "ConvTranspose1d",
        lambda: nn.Sequential(nn.ConvTranspose1d(8, 12, 3, 2, padding=1, groups=2)),
        _normal(8, 6),
        Sites(nn.ConvTranspose1d),
    ),
    Layer("Embedding", lambda: nn.Sequential(nn.Embedding(20, 12, padding_idx=3)), _tokens, Sites(nn.Embedding)),
    Layer("tied head", Tied, _tokens, Sites(nn.Embedding, tied="tie")),
    Layer("MultiheadAttention", SelfAttention, _normal(5, 12), Sites(), rowwise=False),
    Layer("experts", lambda: Experts(False), _normal(6, 12), Sites(), rowwise=False),
    Layer("transposed experts", lambda: Experts(True), _normal(6, 12), Sites(), rowwise=False),
    Layer(
        "fused rows",
        lambda: nn.Sequential(nn.Linear(12, 24)),
        _normal(5, 12),
        Sites("0", parts={"0": (("v", 16, 24), ("q", 0, 8))}),
    ),
)
