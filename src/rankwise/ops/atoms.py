"""Atoms and combinators of the algebra; compose them with constructors.

Dynamo cannot trace ``@`` on user objects, hence ``Product(l, r)`` and not ``l @ r``.
Letters: M rows, N columns, r rank, T tokens; (*batch) everywhere.
"""

from functools import reduce
from typing import final

import torch
from torch import Tensor

from rankwise.ops.form import VECTOR
from rankwise.ops.operator import Cost, LinearOperator, LowRank, gradients_of


@final
class Dense(LinearOperator):
    """A matrix (*batch, M, N)."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.shape = matrix.shape[-2], matrix.shape[-1]

    def mv(self, x: Tensor) -> Tensor:
        return x @ self.matrix.to(x.dtype).mT

    def mm(self, x: Tensor) -> Tensor:
        return self.matrix.to(x.dtype) @ x

    def dense(self) -> Tensor:
        return self.matrix

    @property
    def T(self) -> LinearOperator:
        return Dense(self.matrix.mT)

    def gradients(self, g: Tensor) -> list[Tensor | None]:
        return [g]

    @property
    def cost(self) -> Cost:
        m, n = self.shape
        return Cost(m * n, 0)


@final
class Diagonal(LinearOperator):
    """``diag(entries)``, entries (*batch, N)."""

    def __init__(self, entries: Tensor) -> None:
        self.entries = entries
        self.shape = entries.shape[-1], entries.shape[-1]

    def mv(self, x: Tensor) -> Tensor:
        return x * self.entries.to(x.dtype).unsqueeze(-2)

    def dense(self) -> Tensor:
        return torch.diag_embed(self.entries)

    @property
    def T(self) -> LinearOperator:
        return self

    @property
    def cost(self) -> Cost:
        n = self.shape[0]
        return Cost(n, n * n)


@final
class Product(LinearOperator):
    """``left right``: the right factor acts first. Always lowers, to its inner size."""

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        self.left, self.right = left, right
        self.shape = left.shape[0], right.shape[1]

    def mv(self, x: Tensor) -> Tensor:
        return self.left.mv(self.right.mv(x))

    def _by_rows(self) -> bool:
        """Whether it is formed by applying right to left's rows, which are there; else left to right's columns."""
        return isinstance(self.left, Dense) and not isinstance(self.right, Dense)

    def dense(self) -> Tensor:
        return self.right.T.mv(self.left.dense()) if self._by_rows() else self.left.mm(self.right.dense())

    @property
    def T(self) -> LinearOperator:
        return Product(self.right.T, self.left.T)

    def lower(self) -> LowRank | None:
        chain, least = _chain(self), self.rank
        cuts = [i for i, op in enumerate(chain) if i and op.shape[0] == least]
        if cuts:  # at the last one the last factor stays alone: if it is frozen, x is not kept
            left, right = chain[: cuts[-1]], chain[cuts[-1] :]
        else:
            i, pair = next((i, op.lower()) for i, op in enumerate(chain) if op.rank == least)
            assert pair is not None
            left, right = [*chain[:i], Dense(pair.left)], [Dense(pair.right), *chain[i + 1 :]]
        return LowRank(reduce(Product, left).dense(), reduce(Product, right).dense())

    def gradients(self, g: Tensor) -> list[Tensor | None]:
        if isinstance(self.left, Diagonal) or isinstance(self.right, Diagonal):
            return super().gradients(g)  # of few entries, where the product's would be a square
        full = self.left.shape[1] % VECTOR == 0  # else a thin g right^T is faster lying
        left = gradients_of(self.left, lambda: self.right.mv(g) if full else self.right.mm(g.mT).mT)
        return left + gradients_of(self.right, lambda: self.left.T.mm(g))

    @property
    def rank(self) -> int | None:
        return min(r for r in (self.left.shape[1], self.left.rank, self.right.rank) if r is not None)

    @property
    def cost(self) -> Cost:
        one, two, (m, n) = self.left.cost, self.right.cost, self.shape
        return Cost(one.apply + two.apply, one.form + m * two.apply if self._by_rows() else two.form + n * one.apply)


def _chain(op: LinearOperator) -> list[LinearOperator]:
    """The factors of a product that are no products themselves, in order."""
    return [*_chain(op.left), *_chain(op.right)] if isinstance(op, Product) else [op]


@final
class Scaled(LinearOperator):
    """``scale * op`` with a Python number."""

    def __init__(self, op: LinearOperator, scale: float) -> None:
        self.op, self.scale = op, scale
        self.shape = op.shape

    def mv(self, x: Tensor) -> Tensor:
        return self._times(self.op.mv(x))

    def _times(self, x: Tensor) -> Tensor:
        return x if self.scale == 1 else x * self.scale

    def dense(self) -> Tensor:
        return self._times(self.op.dense())

    @property
    def T(self) -> LinearOperator:
        return Scaled(self.op.T, self.scale)

    def lower(self) -> LowRank | None:
        pair = self.op.lower()
        return None if pair is None else LowRank(self._times(pair.left), pair.right)

    def added(self, weight: Tensor, scale: float = 1.0) -> Tensor:
        return self.op.added(weight, scale * self.scale)

    def gradients(self, g: Tensor) -> list[Tensor | None]:
        return self.op.gradients(self._times(g))

    def formed(self) -> LinearOperator:
        return Scaled(self.op.formed(), self.scale)

    @property
    def rank(self) -> int | None:
        return self.op.rank

    @property
    def cost(self) -> Cost:
        apply, form = self.op.cost
        return Cost(apply + self.shape[0], form + self.shape[0] * self.shape[1])


@final
class Sum(LinearOperator):
    """``first + second``; two low-rank terms stay low rank (their factors are concatenated)."""

    def __init__(self, first: LinearOperator, second: LinearOperator) -> None:
        self.first, self.second = first, second
        self.shape = first.shape

    def mv(self, x: Tensor) -> Tensor:
        return self.first.mv(x) + self.second.mv(x)

    def dense(self) -> Tensor:
        return self.first.dense() + self.second.dense()

    @property
    def T(self) -> LinearOperator:
        return Sum(self.first.T, self.second.T)

    def lower(self) -> LowRank | None:
        one, two = self.first.lower(), self.second.lower()
        if one is None or two is None:
            return None
        return LowRank(torch.cat([one.left, two.left], dim=-1), torch.cat([one.right, two.right], dim=-2))

    @property
    def rank(self) -> int | None:
        one, two = self.first.rank, self.second.rank
        return None if one is None or two is None else one + two

    @property
    def cost(self) -> Cost:
        one, two, (m, n) = self.first.cost, self.second.cost, self.shape
        return Cost(one.apply + two.apply + m, one.form + two.form + m * n)
