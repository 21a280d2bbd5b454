"""Operators that mix few entries at a time, or none: pairs, blocks of interleaved entries, an exchange.

Letters: N columns, k blocks, b block size, T tokens; (*batch) everywhere.
"""

from typing import final

import torch
from torch import Tensor

from rankwise.ops.operator import Cost, LinearOperator


@final
class Pairs(LinearOperator):
    """``diag(c) + diag(s) J``, c and s (*batch, N); J turns each pair: ``J (x1, x2) = (-x2, x1)``.

    Within every group of ``group`` entries, entry i of the first half is paired with entry i of the second.
    """

    def __init__(self, c: Tensor, s: Tensor, group: int) -> None:
        self.c, self.s, self.group = c, s, group
        self.shape = c.shape[-1], c.shape[-1]

    def _exchanged(self, x: Tensor) -> Tensor:
        one, two = x.unflatten(-1, (-1, 2, self.group // 2)).unbind(-2)
        return torch.stack([two, one], dim=-2).flatten(-3)

    def _signed(self) -> Tensor:
        one, two = self.s.unflatten(-1, (-1, 2, self.group // 2)).unbind(-2)
        return torch.stack([-one, two], dim=-2).flatten(-3)

    def mv(self, x: Tensor) -> Tensor:
        c, s = (t.to(x.dtype).unsqueeze(-2) for t in (self.c, self._signed()))
        return torch.addcmul(x * c, self._exchanged(x), s)

    def dense(self) -> Tensor:
        return self.mv(torch.eye(self.shape[0], dtype=self.c.dtype, device=self.c.device)).mT

    @property
    def T(self) -> LinearOperator:
        return Pairs(self.c, -self._exchanged(self.s), self.group)

    @property
    def cost(self) -> Cost:
        n = self.shape[0]
        return Cost(2 * n, n * n)


@final
class Butterfly(LinearOperator):
    """Square blocks (*batch, k, b, b) on interleaved entries: one level of a block butterfly.

    The entries are half-blocks of b/2; within every 2 ``stride`` of them, block i acts on half-blocks i and
    i + stride. Stride 1 is block-diagonal.
    """

    def __init__(self, blocks: Tensor, stride: int) -> None:
        self.blocks, self.stride = blocks, stride
        k, b = blocks.shape[-3:-1]
        self.shape = k * b, k * b

    def mv(self, x: Tensor) -> Tensor:
        k, b = self.blocks.shape[-3:-1]
        parts = x.unflatten(-1, (-1, 2, self.stride, b // 2)).transpose(-3, -2)  # (..., T, chunks, stride, 2, b/2)
        chunks = parts.shape[-4:]
        parts = parts.reshape(*x.shape[:-1], k, b).transpose(-3, -2)  # (..., k, T, b)
        y = (parts @ self.blocks.to(x.dtype).mT).transpose(-3, -2)
        return y.reshape(*y.shape[:-2], *chunks).transpose(-3, -2).flatten(-4)

    def dense(self) -> Tensor:
        return self.mv(torch.eye(self.shape[0], dtype=self.blocks.dtype, device=self.blocks.device)).mT

    @property
    def T(self) -> LinearOperator:
        return Butterfly(self.blocks.mT, self.stride)

    @property
    def cost(self) -> Cost:
        n, b = self.shape[0], self.blocks.shape[-1]
        return Cost(n * b, n * n)


@final
class Swap(LinearOperator):
    """The permutation that exchanges the first two of entries' three indices (i, j, e), i and j below k.

    Args:
        size: N, a multiple of k^2.
        k: how many blocks there are, and how many parts of each.
        like: (*batch,), of the dtype and on the device that it is formed in; it is not kept.
    """

    def __init__(self, size: int, k: int, like: Tensor) -> None:
        self.k, self.batch, self.dtype, self.device = k, like.shape, like.dtype, like.device
        self.shape = size, size

    def mv(self, x: Tensor) -> Tensor:
        return x.unflatten(-1, (self.k, self.k, -1)).transpose(-3, -2).flatten(-3)

    def dense(self) -> Tensor:
        n = self.shape[0]
        return self.mv(torch.eye(n, dtype=self.dtype, device=self.device).expand(*self.batch, n, n))

    @property
    def T(self) -> LinearOperator:
        return self

    @property
    def cost(self) -> Cost:
        n = self.shape[0]
        return Cost(n, n * n)
