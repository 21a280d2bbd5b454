"""Atoms and combinators of the algebra; compose them with constructors.

Dynamo cannot trace ``@`` on user objects, hence ``Product(l, r)`` and not ``l @ r``.
Letters: M rows, N columns, r rank, T tokens, k blocks, b block size; (*batch) everywhere.
"""

import copy
from collections.abc import Sequence
from math import prod
from typing import final

import torch
from torch import Tensor, nn

from rankwise.ops.form import VECTOR
from rankwise.ops.operator import Cost, LinearOperator, LowRank, gradients_of, trained


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
        right, least = self.right, self.rank  # on a tie the last factor stays alone: if it is frozen, x is not kept
        if isinstance(right, Product) and not isinstance(right.right, Product) and right.left.shape[1] == least:
            return LowRank(Product(self.left, right.left).dense(), right.right.dense())
        if right.rank == least and (pair := right.lower()):
            return LowRank(self.left.mm(pair.left), pair.right)
        if self.left.shape[1] == least or not (pair := self.left.lower()):
            return LowRank(self.left.dense(), right.dense())
        return LowRank(pair.left, right.T.mv(pair.right))

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
        return None if pair is None else LowRank(pair.left * self.scale, pair.right)

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


@final
class Kronecker(LinearOperator):
    """``left (x) right``: (m1 n1) and (m2 n2) give (m1 m2, n1 n2), applied by reshaping; left is formed."""

    def __init__(self, left: LinearOperator, right: LinearOperator) -> None:
        self.left, self.right = left, right
        (m1, n1), (m2, n2) = self.left.shape, self.right.shape
        self.shape = m1 * m2, n1 * n2

    def _orders(self) -> dict[bool, int]:
        """Multiply-adds a token, by whether left comes first."""
        (m1, n1), (m2, n2), each = self.left.shape, self.right.shape, self.right.cost.apply
        return {True: m1 * n1 * n2 + m1 * each, False: n1 * each + m1 * n1 * m2}

    def mv(self, x: Tensor) -> Tensor:
        # tokens lie between the two indices: whole rows are copied, not entries, and left is one product
        left, orders = self.left.dense().to(x.dtype), self._orders()
        rows = x if left.dim() == 3 else x.flatten(0, -2)
        y = rows.unflatten(-1, (left.shape[-1], -1)).transpose(-3, -2)  # (*batch, n1, T, n2)
        for first in (True, False) if orders[True] < orders[False] else (False, True):
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
        return Cost(min(self._orders().values()), one.form + two.form + self.shape[0] * self.shape[1])


@final
class Hadamard(LinearOperator):
    """``first * second`` elementwise; two low-rank terms give rank r1 r2 (row-wise Khatri-Rao)."""

    held: tuple[Tensor, ...] = ()  # the matrices of both, where they are formed once

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

    def added(self, weight: Tensor, scale: float = 1.0) -> Tensor:
        one, two = (self._matrix(i).to(weight.dtype) for i in (0, 1))
        return torch.addcmul(weight, one, two, value=scale)

    def gradients(self, g: Tensor) -> list[Tensor | None]:
        first = gradients_of(self.first, lambda: g * self._matrix(1))
        return first + gradients_of(self.second, lambda: g * self._matrix(0))

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
class BlockDiagonal(LinearOperator):
    """Blocks (*batch, k, c, b) on the diagonal of a (k c, k b) matrix."""

    def __init__(self, blocks: Tensor) -> None:
        self.blocks = blocks
        k, c, b = self.blocks.shape[-3:]
        self.shape = k * c, k * b

    def mv(self, x: Tensor) -> Tensor:
        k, b = self.blocks.shape[-3], self.blocks.shape[-1]
        batched = self.blocks.dim() == 4
        lead, x = x.shape[:-1], x if batched else x.flatten(0, -2)  # fewer, larger products
        parts = x.unflatten(-1, (k, b)).transpose(-2, -3)  # (*batch, k, T, b)
        y = (parts @ self.blocks.to(x.dtype).mT).transpose(-2, -3)
        return y.flatten(-2) if batched else y.reshape(*lead, self.shape[0])

    def dense(self) -> Tensor:
        k = self.blocks.shape[-3]
        eye = torch.eye(k, dtype=self.blocks.dtype, device=self.blocks.device)
        full = self.blocks.unsqueeze(-2) * eye[:, None, :, None]  # (*batch, k, c, k, b)
        return full.reshape(*self.blocks.shape[:-3], *self.shape)

    @property
    def T(self) -> LinearOperator:
        return BlockDiagonal(self.blocks.mT)

    @property
    def cost(self) -> Cost:
        (m, n), k = self.shape, self.blocks.shape[-3]
        return Cost(m * n // k, m * n)


@final
class Circuit(LinearOperator):
    r"""Gates on pairs of axes, as in a quantum circuit: rows are padded to ``modes``, each gate acts, rows are cut.

    Args:
        gates: matrices (\*batch, d_i d_j, d_i d_j), the first acts first.
        axes: the pair (i, j) of each, as axes of ``modes``.
        modes: d_1, ..., d_N; their product is at least M and N.
        shape: M and N.
    """

    def __init__(
        self, gates: Sequence[Tensor], axes: Sequence[tuple[int, int]], modes: Sequence[int], shape: tuple[int, int]
    ) -> None:
        self.axes, self.modes, self.shape = tuple(axes), tuple(modes), shape
        for i, gate in enumerate(gates):
            setattr(self, f"gate{i}", gate)  # where leaves() finds them

    @property
    def gates(self) -> list[Tensor]:
        """The gates in order."""
        return [getattr(self, f"gate{i}") for i in range(len(self.axes))]

    def mv(self, x: Tensor) -> Tensor:
        m, n = self.shape
        x = nn.functional.pad(x, (0, prod(self.modes) - n)).unflatten(-1, self.modes)
        for gate, (i, j) in zip(self.gates, self.axes, strict=True):
            at = i - len(self.modes), j - len(self.modes)
            x = x.movedim(at, (-2, -1))
            y = x.reshape(*gate.shape[:-2], -1, gate.shape[-1]) @ gate.to(x.dtype).mT
            x = y.reshape(x.shape).movedim((-2, -1), at)
        return x.flatten(-len(self.modes))[..., :m]

    def dense(self) -> Tensor:
        first, n = self.gates[0], self.shape[1]
        eye = torch.eye(n, dtype=first.dtype, device=first.device)
        return self.mv(eye.expand(*first.shape[:-2], n, n)).mT

    @property
    def T(self) -> LinearOperator:
        m, n = self.shape
        return Circuit([gate.mT for gate in reversed(self.gates)], self.axes[::-1], self.modes, (n, m))

    @property
    def cost(self) -> Cost:
        apply = prod(self.modes) * sum(self.modes[i] * self.modes[j] for i, j in self.axes)
        return Cost(apply, self.shape[1] * apply)
