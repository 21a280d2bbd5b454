"""Few entries at given places, of the matrix or of its Fourier or wavelet transform, and circulant blocks.

None is formed to be applied: transforms act on the activations, entries as a sparse product. All run in float32 or
above. Letters as in :mod:`rankwise.ops.atoms`; k entries.
"""

import warnings
from math import pi
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd import Function

from rankwise.ops.operator import Cost, LinearOperator, LowRank, gather_rows

FOURIER = 128  # multiply-adds in the time that a Fourier transform takes for each entry, there and back
WAVELET = 8  # a wavelet transform
COLUMN = 64  # to lay it out for a sparse product, there and back
PLACE = 12  # and that product for each of the matrix's entries


def _wide(x: Tensor) -> Tensor:
    return x.to(torch.promote_types(x.dtype, torch.float32))


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
        order = (row * len(x) + col).argsort()
        start = torch.searchsorted(row[order], torch.arange(len(g) + 1, device=row.device))
        with warnings.catch_warnings():  # torch's word on compressed rows: in beta state
            warnings.simplefilter("ignore", UserWarning)
            none, shape = g.new_zeros(len(row)), (len(g), len(x))
            places = torch.sparse_csr_tensor(start, col[order], none, shape, check_invariants=False)
            with torch.autocast(x.device.type, enabled=False):
                found = torch.sparse.sampled_addmm(places, g.contiguous(), x.mT).values()
        return torch.empty_like(found).index_copy_(0, order, found)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        g, x, row, col = ctx.saved_tensors
        (d,) = grads
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
        wide, (m, n) = _wide(x), self.shape
        parts = wide if self.values.dim() == 3 else wide.reshape(1, -1, n)
        _, row, col, values = self._one(len(parts))
        columns, values = parts.mT.reshape(-1, parts.shape[1]), values.to(wide.dtype)
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
class Fourier(LinearOperator):
    """``Re(F^-1 S F^-1)``, the real part of the two-dimensional inverse Fourier transform of few coefficients S.

    With 2 k (M + N) < M N it lowers to rank 2 k: k pairs of waves. A look-up forms the matrix.
    """

    def __init__(self, coefficients: Sparse) -> None:
        self.coefficients = coefficients
        self.shape = coefficients.shape

    def mv(self, x: Tensor) -> Tensor:
        (m, n), s = self.shape, self.coefficients
        row, col, values = (t.squeeze(-2) for t in (s.row, s.col, s.values))
        high, right = 2 * row > m, 2 * col > n  # x and y are real: a frequency above the half is a lower one, conjugate
        row, col = torch.where(high, m - row, row), torch.where(right, n - col, col)
        values = values * (1 + ((row == 0) | (2 * row == m)).to(values)) / (2 * n)
        turned = torch.where(high == right, -values, values)
        z, half = torch.fft.rfft(_wide(x)), (m // 2 + 1, n // 2 + 1)
        y = Sparse(values, row, col, half).mv(z.real), Sparse(turned, row, col, half).mv(z.imag)
        return torch.fft.irfft(torch.complex(*y), n=m).to(x.dtype)

    def dense(self) -> Tensor:
        return torch.fft.ifft2(self.coefficients.dense()).real

    @property
    def T(self) -> LinearOperator:
        return Fourier(self.coefficients.T)

    def lower(self) -> LowRank | None:
        (m, n), s = self.shape, self.coefficients
        if self.rank is None:
            return None
        waves: list[Tensor] = []
        for place, size in ((s.row, m), (s.col, n)):
            step = place.mT * torch.arange(size, device=place.device) % size
            angle = step.to(s.values) * (2 * pi / size)
            waves.append(torch.cat([angle.cos(), angle.sin()], dim=-2))
        weighed = torch.cat([s.values, -s.values], dim=-1).mT / (m * n)
        return LowRank((waves[0] * weighed).mT, waves[1])

    @property
    def rank(self) -> int | None:
        (m, n), rank = self.shape, 2 * self.coefficients.values.shape[-1]
        return rank if rank * (m + n) < m * n else None

    @property
    def cost(self) -> Cost:
        m, n = self.shape
        return Cost(FOURIER * (m + n) + 2 * self.coefficients.cost.apply, 6 * FOURIER * m * n)


@final
class Haar(LinearOperator):
    """``(H_M S H_N^T)[:M, :N]``, one level of the inverse Haar wavelet transform of few coefficients S.

    S has an even number of rows and columns; its first half are averages, its second one differences. H is orthonormal.
    A look-up forms the matrix.
    """

    def __init__(self, coefficients: Sparse, shape: tuple[int, int]) -> None:
        self.coefficients, self.shape = coefficients, shape

    @staticmethod
    def _back(c: Tensor) -> Tensor:
        """``c H^T``, along the last dim."""
        average, difference = c.chunk(2, dim=-1)
        return torch.stack([average + difference, average - difference], dim=-1).flatten(-2) / 2**0.5

    def mv(self, x: Tensor) -> Tensor:
        odd = self.coefficients.shape[1] - self.shape[1]
        even, other = torch.nn.functional.pad(_wide(x), (0, odd)).unflatten(-1, (-1, 2)).unbind(-1)
        y = self.coefficients.mv(torch.cat([even + other, even - other], dim=-1) / 2**0.5)
        return self._back(y)[..., : self.shape[0]].to(x.dtype)

    def dense(self) -> Tensor:
        full = self._back(self._back(self.coefficients.dense()).mT).mT
        return full[..., : self.shape[0], : self.shape[1]]

    @property
    def T(self) -> LinearOperator:
        return Haar(self.coefficients.T, (self.shape[1], self.shape[0]))

    @property
    def cost(self) -> Cost:
        m, n = self.shape
        return Cost(WAVELET * (m + n) + self.coefficients.cost.apply, 4 * m * n)


@final
class Circulant(LinearOperator):
    """Circulant blocks from their first rows (*batch, M/b, N/b, b); each further row is shifted right by one."""

    def __init__(self, first: Tensor) -> None:
        self.first = first
        p, q, b = first.shape[-3:]
        self.shape = p * b, q * b

    def mv(self, x: Tensor) -> Tensor:
        _, q, b = self.first.shape[-3:]
        wide = _wide(x)
        parts = wide if self.first.dim() == 4 else wide.reshape(-1, x.shape[-1])
        z, kernel = torch.fft.rfft(parts.unflatten(-1, (q, b))), torch.fft.rfft(self.first.to(wide.dtype)).conj()
        y = torch.fft.irfft(torch.einsum("...tqf,...pqf->...tpf", z, kernel), n=b)
        return y.reshape(*x.shape[:-1], self.shape[0]).to(x.dtype)

    def _shift(self, index: Tensor) -> Tensor:
        """Where the entries of these rows (*, 1) of a block lie in its first row: (*, b)."""
        b = self.first.shape[-1]
        return (torch.arange(b, device=index.device) - index) % b

    def dense(self) -> Tensor:
        b = self.first.shape[-1]
        blocks = self.first[..., self._shift(torch.arange(b, device=self.first.device).unsqueeze(-1))]
        return blocks.transpose(-3, -2).reshape(*self.first.shape[:-3], *self.shape)

    @property
    def T(self) -> LinearOperator:
        return Circulant(self.first.transpose(-3, -2).flip(-1).roll(1, -1))

    def rows(self, index: Tensor) -> Tensor:
        q, b = self.first.shape[-2:]
        found = gather_rows(self.first.flatten(-2), index // b).unflatten(-1, (q, b))
        shift = self._shift(index[..., None, None] % b)
        return found.gather(-1, shift.expand(found.shape)).flatten(-2)

    @property
    def cost(self) -> Cost:
        (m, n), b = self.shape, self.first.shape[-1]
        return Cost(FOURIER * (m + n) + 4 * m * n // b, m * n)


def inverse_cosine(c: Tensor) -> Tensor:
    """The orthonormal inverse cosine transform (DCT-III) along the last dim, by a Fourier transform twice as long."""
    n = c.shape[-1]
    frequency = torch.arange(n, device=c.device, dtype=c.dtype)
    scale = ((2 - (frequency == 0).to(c.dtype)) / n).sqrt()
    phase = torch.polar(scale, frequency * (pi / (2 * n)))
    return torch.fft.ifft(c * phase, n=2 * n)[..., :n].real * (2 * n)
