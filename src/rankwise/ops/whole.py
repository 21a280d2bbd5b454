"""``x (W + op)^T`` by the matrix of op, as one autograd node that keeps x and the small tensors, never a matrix.

For operators that are neither low rank nor cheap to apply: op is formed in forward, and again in backward, where its
gradient ``g^T x`` is a full product. In float32 and above W + op is one weight; below, the sum would round a small
update away, and each has its own product. Shapes: x (*batch, T, N), W (M, N).
"""

from typing import Any, final

import torch
from torch import Tensor
from torch.autograd import Function

from rankwise.ops.operator import LinearOperator, leaves, with_leaves


def run(x: Tensor, weight: Tensor | None, op: LinearOperator) -> Tensor:
    """``x (W + op)^T``, differentiable twice.

    Args:
        x: (*batch, T, N), of W's dtype.
        weight: W (M, N); None for zero.
        op: (M, N), without a batch.

    Returns:
        (*batch, T, M).
    """
    return _Whole.apply(op, x, weight, *leaves(op))


def together(x: Tensor) -> bool:
    """Whether W and an update may be one weight for x."""
    return torch.finfo(x.dtype).bits >= 32


def _sum(weight: Tensor | None, update: Tensor) -> Tensor:
    return update if weight is None else weight + update


@final
class _Whole(Function):
    @staticmethod
    def forward(ctx: Any, op: LinearOperator, x: Tensor, weight: Tensor | None, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, *tensors)
        ctx.op = op
        with torch.autocast(x.device.type, enabled=False):  # formed as backward forms it
            update = op.dense().to(x.dtype)
        if weight is None or together(x):
            return x @ _sum(weight, update).mT
        y = x @ update.mT
        y.view(-1, y.shape[-1]).addmm_(x.reshape(-1, x.shape[-1]), weight.mT)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight, *tensors = ctx.saved_tensors
        g, op = grads[0], with_leaves(ctx.op, iter(tensors))
        dx = None
        if ctx.needs_input_grad[1]:
            update = op.dense().to(g.dtype)
            if weight is None or together(g):
                dx = g @ _sum(weight, update)
            else:
                dx = g @ update
                dx.view(-1, dx.shape[-1]).addmm_(g.reshape(-1, g.shape[-1]), weight)
        dense = g.reshape(-1, g.shape[-1]).mT @ x.reshape(-1, x.shape[-1])
        found = op.gradients(dense.to(tensors[-1].dtype))
        dw = dense if ctx.needs_input_grad[2] else None
        return None, dx, dw, *(f if need else None for f, need in zip(found, ctx.needs_input_grad[3:], strict=True))
