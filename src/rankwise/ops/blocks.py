"""Operators that mix few entries at a time: pairs, blocks, gates; applied by reshaping.

Letters: M rows, N columns, k blocks, b block size, T tokens; (*batch) everywhere.
"""

from collections.abc import Sequence
from math import prod
from typing import final

import torch
from torch import Tensor, nn

from rankwise.ops.operator import Cost, LinearOperator


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
