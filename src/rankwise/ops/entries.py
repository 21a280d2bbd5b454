"""Operators said entry by entry: a function of another's entries, entries that repeat or lie at given places."""

from typing import final

import torch
from torch import Tensor
from torch.nn.functional import pad

from rankwise.ops.atoms import Dense, Product
from rankwise.ops.form import VECTOR
from rankwise.ops.operator import Cost, LinearOperator, LowRank, gradients_of


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


@final
class Repeated(LinearOperator):
    """``[B B ... B]`` (M, N), B (*batch, M, r), the last one cut: what lies r apart is added up first."""

    def __init__(self, block: Tensor, size: int) -> None:
        self.block, self.size = block, size
        self.shape = block.shape[-2], size

    def mv(self, x: Tensor) -> Tensor:
        r = self.block.shape[-1]
        whole = pad(x, (0, -self.size % r)) if self.size % r else x
        return whole.unflatten(-1, (-1, r)).sum(-2) @ self.block.to(x.dtype).mT

    def dense(self) -> Tensor:
        return torch.cat([self.block] * -(-self.size // self.block.shape[-1]), dim=-1)[..., : self.size]

    @property
    def T(self) -> LinearOperator:
        left, right = self.lower()
        return Product(Dense(right.mT), Dense(left.mT))

    def lower(self) -> LowRank:
        r, like = self.block.shape[-1], self.block
        eye = torch.eye(r, dtype=like.dtype, device=like.device).expand(*like.shape[:-2], r, r)
        return LowRank(self.block, Repeated(eye, self.size).dense())

    @property
    def rank(self) -> int | None:
        return self.block.shape[-1]

    @property
    def cost(self) -> Cost:
        m, r = self.block.shape[-2:]
        return Cost(VECTOR * self.size + m * r, m * self.size)  # to read an entry is to multiply it by so many


@final
class Placed(LinearOperator):
    """Values (*batch, K) at the places (rows[k], cols[k]) of an (M, N) matrix; those at one place add up.

    With values of one it picks, repeats, adds up or permutes entries.
    """

    def __init__(self, values: Tensor, rows: Tensor, cols: Tensor, shape: tuple[int, int]) -> None:
        self.values, self.places = values, (rows, cols)
        self.shape = shape

    def mv(self, x: Tensor) -> Tensor:
        rows, cols = self.places
        parts = x[..., cols] * self.values.to(x.dtype).unsqueeze(-2)
        return parts.new_zeros(*parts.shape[:-1], self.shape[0]).index_add(-1, rows, parts)

    def dense(self) -> Tensor:
        (m, n), (rows, cols) = self.shape, self.places
        flat = self.values.new_zeros(*self.values.shape[:-1], m * n)
        return flat.index_add(-1, rows * n + cols, self.values).unflatten(-1, (m, n))

    @property
    def T(self) -> LinearOperator:
        (m, n), (rows, cols) = self.shape, self.places
        return Placed(self.values, cols, rows, (n, m))

    @property
    def cost(self) -> Cost:
        m, n = self.shape
        return Cost(len(self.places[0]), m * n)
