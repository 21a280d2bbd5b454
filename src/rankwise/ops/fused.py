"""A frozen product and its low-rank correction as one autograd node: ``x W^T + drop(x) right^T left^T``.

Shapes: x (*batch, T, N), W (M, N); left (M, r) and right (r, N), or with one leading batch dim (B, M, r), (B, r, N)
for x (B, T, N). x is saved once, as it came, so that layers that read one tensor keep one; the mask of dropout is
made again from two small vectors, and factors of another dtype are cast again, never kept.
"""

from typing import Any, final

import torch
from torch import Tensor
from torch.autograd import Function

from rankwise.ops.operator import LowRank


def corrected(x: Tensor, weight: Tensor, pair: LowRank, dropout: float = 0.0) -> Tensor:
    """``x W^T + drop(x) right^T left^T`` in x's dtype, differentiable twice.

    Args:
        x: (*batch, T, N), of W's dtype.
        weight: W (M, N).
        pair: left (M, r) and right (r, N), or a batch of them.
        dropout: share of x's entries that the correction does not see; the others are scaled up.

    Returns:
        (*batch, T, M).
    """
    seeds: list[Tensor | None] = [None, None]
    if dropout:
        shapes = (*x.shape[:-1], 1), x.shape[-1:]
        seeds = [torch.randint(-(2**31), 2**31, s, dtype=torch.int32, device=x.device) | 1 for s in shapes]
    return _Corrected.apply(x, weight, pair.left, pair.right, dropout, *seeds)


def _seen(x: Tensor, keep: Tensor | None) -> Tensor:
    return x if keep is None else torch.where(keep, x, 0)


def _keep(rows: Tensor | None, cols: Tensor | None, dropout: float) -> Tensor | None:
    """Which entries the correction sees: where the wrap-around product of two odd integers is large enough."""
    return None if rows is None or cols is None else rows * cols > int(dropout * 2**32) - 2**31


@final
class _Corrected(Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor,
        left: Tensor,
        right: Tensor,
        dropout: float,
        rows: Tensor | None,
        cols: Tensor | None,
    ) -> Tensor:
        h = _seen(x, _keep(rows, cols, dropout)) @ right.to(x.dtype).mT / (1 - dropout)
        y = h @ left.to(x.dtype).mT  # the thin product first, then the large one accumulates on it
        y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.mT)
        ctx.save_for_backward(x, weight, left, right, h, rows, cols)
        ctx.dropout = dropout
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        x, weight, left, right, h, rows, cols = ctx.saved_tensors
        keep, scale, g = _keep(rows, cols, ctx.dropout), 1 / (1 - ctx.dropout), grads[0]
        seen, a = _seen(x, keep), right.to(x.dtype)
        if torch.is_grad_enabled():  # a saved intermediate is a constant to a second backward
            h = seen @ a.mT * scale
        gh = g @ left.to(x.dtype) * scale
        dx = dw = None
        if ctx.needs_input_grad[0]:
            dx = _seen(gh @ a, keep)
            dx = dx.view(-1, dx.shape[-1]).addmm_(g.reshape(-1, g.shape[-1]), weight).view(x.shape)
        if ctx.needs_input_grad[1]:
            dw = g.reshape(-1, g.shape[-1]).mT @ x.reshape(-1, x.shape[-1])
        return dx, dw, _outer(g, h, left), _outer(gh, seen, right), None, None, None


def _outer(g: Tensor, x: Tensor, like: Tensor) -> Tensor:
    """The gradient of a factor, ``g^T x`` summed over tokens (and over a batch that the factor has not)."""
    if like.dim() == 2:
        g, x = g.reshape(-1, g.shape[-1]), x.reshape(-1, x.shape[-1])
    return (g.mT @ x).to(like.dtype)
