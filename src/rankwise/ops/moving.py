"""Operators that move entries and multiply none: two indices exchanged, entries folded onto each other.

(*batch) everywhere. ``like`` (*batch,) says in which batch, dtype and device they are formed; it is not kept.
"""

import copy
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import pad

from rankwise.ops.form import VECTOR
from rankwise.ops.operator import Cost, LinearOperator


class Moving(LinearOperator):
    """A matrix of zeros and ones, applied by views and copies."""

    def __init__(self, shape: tuple[int, int], like: Tensor) -> None:
        self.shape = shape
        self.batch, self.dtype, self.device = like.shape, like.dtype, like.device

    @final
    def dense(self) -> Tensor:
        size = min(self.shape)
        eye = torch.eye(size, dtype=self.dtype, device=self.device).expand(*self.batch, size, size)
        return self.T.mv(eye) if size == self.shape[0] else self.mv(eye).mT

    @property
    @final
    def cost(self) -> Cost:
        m, n = self.shape
        return Cost(VECTOR * max(m, n), m * n)  # to read an entry is to multiply it by so many


@final
class Exchange(Moving):
    """The permutation that takes entry (i, j, e) to (j, i, e), i below ``first`` and j below ``second``."""

    def __init__(self, size: int, first: int, second: int, like: Tensor) -> None:
        super().__init__((size, size), like)
        self.first, self.second = first, second

    def mv(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.first, self.second, -1)).transpose(-3, -2).flatten(-3)

    @property
    def T(self) -> LinearOperator:
        other = copy.copy(self)
        other.first, other.second = self.second, self.first
        return other


@final
class Fold(Moving):
    """``[I I ... I]`` (side, size), the last one cut: adds up the entries that lie ``side`` apart.

    Where it wraps, the entries begin again after the last one until they fill whole blocks.
    """

    def __init__(self, size: int, side: int, like: Tensor, wraps: bool = False) -> None:
        super().__init__((side, size), like)
        self.missing, self.wraps = -size % side, wraps
        assert not wraps or self.missing <= size, "it wraps once at most"

    def mv(self, x: Tensor) -> Tensor:
        if self.missing:
            x = torch.cat([x, x[..., : self.missing]], dim=-1) if self.wraps else pad(x, (0, self.missing))
        return x.unflatten(-1, (-1, self.shape[0])).sum(-2)

    @property
    def T(self) -> LinearOperator:
        return Tile(self)


@final
class Tile(LinearOperator):
    """The transpose of a fold (size, side): entries repeated, and those added up that it wraps."""

    def __init__(self, fold: Fold) -> None:
        self.fold = fold
        self.shape = fold.shape[1], fold.shape[0]

    def mv(self, x: Tensor) -> Tensor:
        (size, side), missing = self.shape, self.fold.missing
        whole = torch.cat([x] * ((size + missing) // side), dim=-1)
        first, rest = whole.split([size, missing], dim=-1)
        return first + pad(rest, (0, size - missing)) if self.fold.wraps and missing else first

    def dense(self) -> Tensor:
        return self.fold.dense().mT

    @property
    def T(self) -> LinearOperator:
        return self.fold

    @property
    def cost(self) -> Cost:
        return self.fold.cost
