"""Functions of other operators' entries, of higher rank than those, and formed to be applied."""

import copy
from typing import final

import torch
from torch import Tensor

from rankwise.ops.operator import Cost, LinearOperator, LowRank, gradients_of, leaves, trained


@final
class Hadamard(LinearOperator):
    """``first * second`` elementwise; two low-rank terms give rank r1 r2 (row-wise Khatri-Rao)."""

    held: tuple[Tensor, ...] = ()  # the matrices of both, where they are formed once; the gradients write on them

    def __init__(self, first: LinearOperator, second: LinearOperator) -> None:
        self.first, self.second = first, second
        self.shape = first.shape

    def mv(self, x: Tensor) -> Tensor:
        return x @ self.dense().to(x.dtype).mT

    def _matrix(self, i: int) -> Tensor:
        return self.held[i] if self.held else (self.first, self.second)[i].dense()

    def dense(self) -> Tensor:
        return self._matrix(0) * self._matrix(1)

    @property
    def T(self) -> LinearOperator:
        return Hadamard(self.first.T, self.second.T)

    def lower(self) -> LowRank | None:
        one, two = self.first.lower(), self.second.lower()
        if one is None or two is None:
            return None
        left = (one.left.unsqueeze(-1) * two.left.unsqueeze(-2)).flatten(-2)
        right = (one.right.unsqueeze(-2) * two.right.unsqueeze(-3)).flatten(-3, -2)
        return LowRank(left, right)

    def _is_spare(self, matrix: Tensor) -> bool:
        """Whether a matrix was made here, and nobody else reads it: memory just written is cheaper than fresh."""
        mine = not matrix._is_view() and all(matrix is not leaf for leaf in leaves(self))
        return mine and not torch.is_grad_enabled() and not torch.compiler.is_compiling()

    def added(self, weight: Tensor, scale: float = 1.0) -> Tensor:
        made = [self._matrix(i).to(weight.dtype) for i in (0, 1)]
        spare = [t for t in made if t.shape == weight.shape and self._is_spare(t)]
        out = spare[0] if spare and not self.held and made[0].shape == made[1].shape else None
        return torch.addcmul(weight, *made, value=scale, out=out)

    def gradients(self, g: Tensor) -> list[Tensor | None]:
        def through(i: int) -> Tensor:
            other = self._matrix(i)
            return other.mul_(g) if other.dtype == g.dtype and self._is_spare(other) else g * other

        return gradients_of(self.first, lambda: through(1)) + gradients_of(self.second, lambda: through(0))

    def formed(self) -> LinearOperator:
        other = copy.copy(self)
        if trained(self.first) and trained(self.second):  # else only one of them is asked for again
            other.held = self.first.dense(), self.second.dense()
        return other

    @property
    def rank(self) -> int | None:
        one, two = self.first.rank, self.second.rank
        return None if one is None or two is None else one * two

    @property
    def cost(self) -> Cost:
        one, two, (m, n) = self.first.cost, self.second.cost, self.shape
        return Cost(m * n, one.form + two.form + m * n)  # and formed at every application


@final
class Sine(LinearOperator):
    """``sin(op)`` elementwise, which is of higher rank than op."""

    def __init__(self, op: LinearOperator) -> None:
        self.op = op
        self.shape = op.shape

    def mv(self, x: Tensor) -> Tensor:
        return x @ self.dense().to(x.dtype).mT

    def dense(self) -> Tensor:
        return self.op.dense().sin()

    @property
    def T(self) -> LinearOperator:
        return Sine(self.op.T)

    def gradients(self, g: Tensor) -> list[Tensor | None]:
        return gradients_of(self.op, lambda: g * self.op.dense().cos())

    @property
    def cost(self) -> Cost:
        m, n = self.shape
        return Cost(m * n, self.op.cost.form + m * n)  # and formed at every application
