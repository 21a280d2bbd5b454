"""``x (W + op)^T`` by the matrix of op, as one autograd node that keeps x and the small tensors, never a matrix.

For operators that are neither low rank nor cheap to apply: op is formed in forward, and again in backward, where its
gradient ``g^T x`` is a full product. In float32 and above W + op is one weight; below, the sum would round a small
update away, and each has its own product. Shapes: x (*batch, T, N), W (M, N).
"""

from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.autograd import Function

from rankwise.ops.linalg import without_autocast
from rankwise.ops.operator import LinearOperator, leaves, refilled


class Whole(NamedTuple):
    """A weight and an update made ready to run, again and again while their tensors are the same.

    Attributes:
        weight: W (M, N); None for zero.
        op: (M, N), without a batch.
        tensors: those of op.
    """

    weight: Tensor | None
    op: LinearOperator
    tensors: list[Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """``x (W + op)^T``, x of W's dtype, differentiable twice: (*batch, T, N) to (*batch, T, M)."""
        return _Whole.apply(self.op, x, self.weight, *self.tensors)


def run(x: Tensor, weight: Tensor | None, op: LinearOperator) -> Tensor:
    """``x (W + op)^T``: a :class:`Whole` that runs once."""
    return Whole(weight, op, leaves(op))(x)


def together(x: Tensor) -> bool:
    """Whether W and an update may be one weight for x."""
    return torch.finfo(x.dtype).bits >= 32


def _matrices(op: LinearOperator, weight: Tensor | None, like: Tensor) -> list[Tensor]:
    """Matrices (M, N) that add up to W + op, each for a product of its own; formed in forward as in backward."""
    with without_autocast(like):
        if weight is not None and together(like):
            return [op.added(weight)]
        update = op.dense().to(like.dtype)
    return [update] if weight is None else [update, weight]


def _through(x: Tensor, first: Tensor, *others: Tensor) -> Tensor:
    y = x @ first
    for matrix in others:
        y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), matrix)
    return y


@final
class _Whole(Function):
    @staticmethod
    def forward(ctx: Any, op: LinearOperator, x: Tensor, weight: Tensor | None, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, *tensors)
        ctx.op = op
        return _through(x, *(matrix.mT for matrix in _matrices(op, weight, x)))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight, *tensors = ctx.saved_tensors
        g, op = grads[0], refilled(ctx.op, tensors).formed()
        dx = _through(g, *_matrices(op, weight, g)) if ctx.needs_input_grad[1] else None
        dense = g.reshape(-1, g.shape[-1]).mT @ x.reshape(-1, x.shape[-1])
        found = op.gradients(dense.to(tensors[-1].dtype))
        dw = dense if ctx.needs_input_grad[2] else None
        return None, dx, dw, *(f if need else None for f, need in zip(found, ctx.needs_input_grad[3:], strict=True))
