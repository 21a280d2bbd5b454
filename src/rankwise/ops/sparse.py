"""Few entries at given places: a sparse product where they are few enough, a matrix formed anew, a sparse core.

Letters: M rows, N columns, k entries, T tokens; (*batch) everywhere.
"""

import warnings
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd import Function

from rankwise.ops.linalg import widened
from rankwise.ops.operator import Cost, LinearOperator, LowRank
from rankwise.ops.whole import run as run_whole

COLUMN = 64  # multiply-adds in the time that laying a row or column out for a sparse product takes, there and back
PLACE = 12  # and that product for each of the matrix's entries


@final
class _Spread(Function):
    """``y[row] += v x[col]`` of every entry: x (N, T) -> (M, T)."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, values: Tensor, row: Tensor, col: Tensor, size: int) -> Tensor:
        ctx.save_for_backward(x, values, row, col)
        place, shape = torch.stack([row, col]), (size, len(x))
        with torch.autocast(x.device.type, enabled=False):
            matrix = torch.sparse_coo_tensor(place, values, shape, check_invariants=False)
            return torch.sparse.mm(matrix, x.contiguous())  # 30 times faster than a view of rows

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (x, values, row, col), needs = ctx.saved_tensors, ctx.needs_input_grad
        dx = _Spread.apply(grads[0], values, col, row, len(x)) if needs[0] else None
        return dx, _Sample.apply(grads[0], x, row, col) if needs[1] else None, None, None, None


@final
class _Sample(Function):
    """``g[row] . x[col]`` of every entry: g (M, T), x (N, T) -> (k,)."""

    @staticmethod
    def forward(ctx: Any, g: Tensor, x: Tensor, row: Tensor, col: Tensor) -> Tensor:
        ctx.save_for_backward(g, x, row, col)
        if len(row) > len(g) * len(x):  # some places twice: torch's product takes no more entries than the matrix has
            return (g[row] * x[col]).sum(-1)
        order = (row * len(x) + col).argsort()
        start = torch.searchsorted(row[order], torch.arange(len(g) + 1, device=row.device))
        with warnings.catch_warnings(), torch.autocast(x.device.type, enabled=False):
            warnings.simplefilter("ignore", UserWarning)  # torch's word on compressed rows: in beta state
            none, shape = g.new_zeros(len(row)), (len(g), len(x))
            places = torch.sparse_csr_tensor(start, col[order], none, shape, check_invariants=False)
            found = torch.sparse.sampled_addmm(places, g.contiguous(), x.mT).values()
        return torch.empty_like(found).index_copy_(0, order, found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (g, x, row, col), (d,) = ctx.saved_tensors, grads
        return _Spread.apply(x, d, row, col, len(g)), _Spread.apply(g, d, col, row, len(x)), None, None


@final
class Sparse(LinearOperator):
    """Entries ``values`` (*batch, k) at the places (row, col), whole numbers (*batch, k); no place twice."""

    def __init__(self, values: Tensor, row: Tensor, col: Tensor, shape: tuple[int, int]) -> None:
        # each a matrix of one row, as leaves without a batch are; the values last, since theirs is the matrix's dtype
        self.row, self.col = row.long().unsqueeze(-2), col.long().unsqueeze(-2)
        self.values, self.shape = values.unsqueeze(-2), shape

    def _one(self, batch: int) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """One block-diagonal matrix of the whole batch: first row of each part; row, column and value of each entry."""
        step = torch.arange(batch, device=self.row.device)[:, None, None]
        row, col = self.row + step * self.shape[0], self.col + step * self.shape[1]
        return step.squeeze(-1) * self.shape[0], row.flatten(), col.flatten(), self.values.flatten()

    def mv(self, x: Tensor) -> Tensor:
        full, (m, n) = widened(x), self.shape
        parts = full if self.values.dim() == 3 else full.reshape(1, -1, n)
        _, row, col, values = self._one(len(parts))
        columns, values = parts.mT.reshape(-1, parts.shape[1]), values.to(full.dtype)
        if torch.compiler.is_compiling():  # Dynamo knows no sparse tensors
            y = columns.new_zeros(len(parts) * m, parts.shape[1])
            y = y.index_add(0, row, columns[col] * values.unsqueeze(-1))
        else:
            y: Tensor = _Spread.apply(columns, values, row, col, len(parts) * m)
        return y.unflatten(0, (-1, m)).mT.reshape(*x.shape[:-1], m).to(x.dtype)

    @property
    def _places(self) -> Tensor:
        return self.row * self.shape[1] + self.col

    def dense(self) -> Tensor:
        return self.added(self.values.new_zeros(self.shape))

    def added(self, weight: Tensor, scale: float = 1.0) -> Tensor:
        values = self.values.to(weight.dtype) * scale
        flat = weight.flatten(-2).unsqueeze(-2).expand(*values.shape[:-1], -1)
        return flat.scatter_add(-1, self._places, values).unflatten(-1, self.shape).squeeze(-3)

    def gradients(self, g: Tensor) -> list[Tensor | None]:
        return [None, None, g.flatten(-2).unsqueeze(-2).gather(-1, self._places)]

    @property
    def T(self) -> "Sparse":
        values, row, col = (t.squeeze(-2) for t in (self.values, self.row, self.col))
        return Sparse(values, col, row, (self.shape[1], self.shape[0]))

    def rows(self, index: Tensor) -> Tensor:
        (m, n), batch = self.shape, 1 if self.values.dim() == 2 else len(self.values)
        first, row, col, values = self._one(batch)
        asked = (index.reshape(batch, -1) + first).flatten()
        slot = torch.full((batch * m,), len(asked), device=index.device)  # the last slot is of rows not asked for
        slot[asked] = torch.arange(len(asked), device=index.device)
        table = values.new_zeros((len(asked) + 1) * n).index_add(0, slot[row] * n + col % n, values)
        return table.unflatten(0, (-1, n))[slot[asked]].reshape(*index.shape, n)

    @property
    def cost(self) -> Cost:
        m, n = self.shape
        return Cost(COLUMN * (m + n) + PLACE * self.values.shape[-1], m * n)


@final
class Scattered(LinearOperator):
    """Entries ``values`` (*batch, k) at ``places`` (*batch, k) of a matrix (M, N), zeros elsewhere.

    Places count along the rows, ``i N + j``, each at most once. The matrix is formed to be applied, and again in
    backward; it is not kept between the two.
    """

    def __init__(self, places: Tensor, values: Tensor, shape: tuple[int, int]) -> None:
        self.places, self.values = places, values
        self.shape = shape

    def mv(self, x: Tensor) -> Tensor:
        plain = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if plain or torch.is_autocast_enabled(x.device.type) or self.values.dim() > 1:
            return x @ self.dense().to(x.dtype).mT
        return run_whole(x, None, self)

    def dense(self) -> Tensor:
        m, n = self.shape
        flat = self.values.new_zeros(*self.values.shape[:-1], m * n)
        return flat.scatter(-1, self.places, self.values).unflatten(-1, (m, n))

    @property
    def T(self) -> LinearOperator:
        m, n = self.shape
        return Scattered(self.places % n * m + self.places // n, self.values, (n, m))

    def gradients(self, g: Tensor) -> list[Tensor | None]:
        return [None, g.flatten(-2).gather(-1, self.places)]

    @property
    def cost(self) -> Cost:
        m, n = self.shape
        return Cost(m * n, m * n)  # and formed at every application


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
