"""Matrices said by their Fourier or wavelet transform, and circulant blocks.

None is formed to be applied: transforms act on the activations. All run in float32 or above. Letters as in
:mod:`rankwise.ops.sparse`, b block size.
"""

from math import pi
from typing import final

import torch
from torch import Tensor

from rankwise.ops.linalg import widened
from rankwise.ops.operator import Cost, LinearOperator, LowRank, gather_rows
from rankwise.ops.sparse import Sparse

FOURIER = 128  # multiply-adds in the time that a Fourier transform takes for each entry, there and back
WAVELET = 8  # a wavelet transform


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
        z, half = torch.fft.rfft(widened(x)), (m // 2 + 1, n // 2 + 1)
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
        even, other = torch.nn.functional.pad(widened(x), (0, odd)).unflatten(-1, (-1, 2)).unbind(-1)
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
        full = widened(x)
        parts = full if self.first.dim() == 4 else full.reshape(-1, x.shape[-1])
        z, kernel = torch.fft.rfft(parts.unflatten(-1, (q, b))), torch.fft.rfft(self.first.to(full.dtype)).conj()
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
