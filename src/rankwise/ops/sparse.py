"""Operators that mix few entries at a time: pairs, and blocks of interleaved entries.

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

    def _halves(self, x: Tensor) -> tuple[Tensor, Tensor]:
        one, two = x.unflatten(-1, (-1, 2, self.group // 2)).unbind(-2)
        return one, two

    def mv(self, x: Tensor) -> Tensor:
        one, two = self._halves(x)
        turned = torch.stack([-two, one], dim=-2).flatten(-3)
        return x * self.c.to(x.dtype).unsqueeze(-2) + turned * self.s.to(x.dtype).unsqueeze(-2)

    def dense(self) -> Tensor:
        return self.mv(torch.eye(self.shape[0], dtype=self.c.dtype, device=self.c.device)).mT

    @property
    def T(self) -> LinearOperator:
        one, two = self._halves(self.s)
        return Pairs(self.c, -torch.stack([two, one], dim=-2).flatten(-3), self.group)

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
