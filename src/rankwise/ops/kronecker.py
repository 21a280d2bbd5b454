"""Kronecker products, applied by reshaping: alone, or beside a frozen weight as one autograd node that keeps x.

Letters: M = m1 m2 rows, N = n1 n2 columns, T tokens; (*batch) everywhere but in the node.
"""

from typing import Any, NamedTuple, final

import torch
from torch import Tensor
from torch.autograd import Function

from rankwise.ops.fused import Frozen
from rankwise.ops.operator import Cost, LinearOperator, gradients_of, leaves, refilled


@final
class Kronecker(LinearOperator):
    """``left (x) right``: (m1 n1) and (m2 n2) give (m1 m2, n1 n2), applied by reshaping; left is formed."""

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        self.left, self.right = left, right
        (m1, n1), (m2, n2) = self.left.shape, self.right.shape
        self.shape = m1 * m2, n1 * n2

    def _orders(self, each: int) -> dict[bool, int]:
        """Multiply-adds a token, by whether left comes first; right takes so many a row."""
        (m1, n1), (m2, n2) = self.left.shape, self.right.shape
        return {True: m1 * n1 * n2 + m1 * each, False: n1 * each + m1 * n1 * m2}

    def _is_left_first(self, each: int) -> bool:
        orders = self._orders(each)
        return orders[True] < orders[False]

    def mv(self, x: Tensor) -> Tensor:
        # tokens lie between the two indices: whole rows are copied, not entries, and left is one product
        left = self.left.dense().to(x.dtype)
        rows = x if left.dim() == 3 else x.flatten(0, -2)
        y = rows.unflatten(-1, (left.shape[-1], -1)).transpose(-3, -2)  # (*batch, n1, T, n2)
        for first in (True, False) if self._is_left_first(self.right.cost.apply) else (False, True):
            if first:
                y = (left @ y.flatten(-2)).unflatten(-1, (rows.shape[-2], -1))
            else:
                y = self.right.mv(y.flatten(-3, -2)).unflatten(-2, (-1, rows.shape[-2]))
        return y.transpose(-3, -2).reshape(*x.shape[:-1], self.shape[0])

    def dense(self) -> Tensor:
        a, b = self.left.dense(), self.right.dense()
        out = a[..., :, None, :, None] * b[..., None, :, None, :]
        return out.reshape(*out.shape[:-4], *self.shape)

    @property
    def T(self) -> LinearOperator:
        return Kronecker(self.left.T, self.right.T)

    @property
    def cost(self) -> Cost:
        one, two = self.left.cost, self.right.cost
        return Cost(min(self._orders(two.apply).values()), one.form + two.form + self.shape[0] * self.shape[1])

    def _formed(self, scale: float, like: Tensor) -> tuple[Tensor, Tensor, bool]:
        """Left, ``scale * right``, and whether left comes first."""
        left, right = (op.dense().to(like.dtype) for op in (self.left, self.right))
        return left, right if scale == 1 else right * scale, self._is_left_first(right.numel())

    def add(self, y: Tensor, x: Tensor, scale: float) -> None:
        """Add ``scale * mv(x)`` of x (T, N) to y (T, M), in place and with nothing copied; without a batch."""
        (left, right, first), t = self._formed(scale, x), len(x)
        (m1, n1), (m2, n2), every = left.shape, right.shape, left.expand(t, -1, -1)
        if first:
            seen = torch.bmm(every, x.reshape(t, n1, n2))
            y.view(t * m1, m2).addmm_(seen.view(t * m1, n2), right.mT)
        else:
            seen = x.reshape(t * n1, n2) @ right.mT
            y.view(t, m1, m2).baddbmm_(every, seen.view(t, n1, m2))

    def pull(self, x: Tensor, g: Tensor, scale: float, dx: Tensor | None) -> list[Tensor | None]:
        """The gradients of :func:`leaves` where ``add`` was given x (T, N) and g (T, M) is that of y.

        That of x is added to dx (T, N) in place, if one is given.
        """
        (left, right, first), t = self._formed(scale, x), len(x)
        (m1, n1), (m2, n2), every = left.shape, right.shape, left.expand(t, -1, -1)
        if first:
            x = x.reshape(t, n1, n2)
            back = (g.reshape(t * m1, m2) @ right).view(t, m1, n2)
            if dx is not None:
                dx.view(t, n1, n2).baddbmm_(every.mT, back)
            of_left, of_right = (back, x), (g.reshape(t * m1, m2), torch.bmm(every, x).view(t * m1, n2))
        else:
            x, g = x.reshape(t * n1, n2), g.reshape(t, m1, m2)
            back = torch.bmm(every.mT, g).view(t * n1, m2)
            if dx is not None:
                dx.view(t * n1, n2).addmm_(back, right)
            of_left, of_right = (g, (x @ right.mT).view(t, n1, m2)), (back, x)
        return [
            *gradients_of(self.left, lambda: _cast(torch.bmm(of_left[0], of_left[1].mT).sum(0), self.left)),
            *gradients_of(self.right, lambda: _cast(of_right[0].mT @ of_right[1] * scale, self.right)),
        ]


def _cast(g: Tensor, op: LinearOperator) -> Tensor:
    return g.to(leaves(op)[0].dtype)


class Beside(NamedTuple):
    """A weight and ``scale * op`` made ready to run, again and again while their tensors are the same.

    Attributes:
        weight: W (M, N).
        op: (M, N), without a batch.
        scale: s.
        tensors: those of op.
    """

    weight: Tensor | Frozen
    op: Kronecker
    scale: float
    tensors: list[Tensor]

    def __call__(self, x: Tensor) -> Tensor:
        """``x (W + s op)^T``, x of W's dtype, differentiable twice: (*batch, T, N) to (*batch, T, M)."""
        plain = isinstance(self.weight, Tensor)
        how = self.op, self.scale, None if plain else self.weight
        return _Beside.apply(how, x, self.weight if plain else None, *self.tensors)


@final
class _Beside(Function):
    @staticmethod
    def forward(ctx: Any, how: Any, x: Tensor, weight: Tensor | None, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight, *tensors)
        ctx.how = op, scale, frozen = how
        y = x @ weight.mT if weight is not None else frozen.matmul(x)
        if y._is_view() or not y.is_contiguous():  # an output that is a view could not be written on by the model
            y = y.clone(memory_format=torch.contiguous_format)
        op.add(y.view(-1, y.shape[-1]), x.reshape(-1, x.shape[-1]), scale)
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        x, weight, *tensors = ctx.saved_tensors
        op, scale, frozen = ctx.how
        rows, g = (t.reshape(-1, t.shape[-1]) for t in (x, grads[0]))
        dx = None
        if ctx.needs_input_grad[1]:
            dx = grads[0] @ (weight if weight is not None else frozen.dense().to(g.dtype))
        found = refilled(op, tensors).pull(rows, g, scale, None if dx is None else dx.view(rows.shape))
        dw = g.mT @ rows if ctx.needs_input_grad[2] else None
        return None, dx, dw, *found
