"""A product with a sparse core, which is scattered and never formed."""

from typing import final

from torch import Tensor

from rankwise.ops.operator import Cost, LinearOperator, LowRank


@final
class Patterned(LinearOperator):
    """``left S right``, left (*batch, M, k), right (*batch, k, N), S (k, k) sparse.

    S holds ``entries`` at (row, col), each (*batch, e); what is given for one place adds up.
    """

    def __init__(self, left: Tensor, entries: Tensor, row: Tensor, col: Tensor, right: Tensor) -> None:
        self.left, self.entries, self.row, self.col, self.right = left, entries, row, col, right
        self.shape = left.shape[-2], right.shape[-1]

    def _core(self, h: Tensor) -> Tensor:
        """``h S^T`` for rows h (*batch, T, k)."""
        shape = *h.shape[:-1], self.entries.shape[-1]
        row, col = (index.unsqueeze(-2).expand(shape) for index in (self.row, self.col))
        return h.new_zeros(h.shape).scatter_add(-1, row, h.gather(-1, col) * self.entries.to(h.dtype).unsqueeze(-2))

    def mv(self, x: Tensor) -> Tensor:
        return self._core(x @ self.right.to(x.dtype).mT) @ self.left.to(x.dtype).mT

    def dense(self) -> Tensor:
        return self.left @ self._core(self.right.mT).mT

    @property
    def T(self) -> LinearOperator:
        return Patterned(self.right.mT, self.entries, self.col, self.row, self.left.mT)

    def lower(self) -> LowRank | None:
        return None  # as a rule k is the smaller side

    @property
    def cost(self) -> Cost:
        (m, n), k, e = self.shape, self.left.shape[-1], self.entries.shape[-1]
        return Cost(k * (m + n) + e, e * n + m * k * n)
