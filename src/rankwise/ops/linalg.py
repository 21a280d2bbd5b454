"""What the methods share: a dtype that is wide enough, truncated SVD, Cayley map, near-square splits."""

import warnings
from contextlib import AbstractContextManager, nullcontext
from functools import cache
from typing import Any, NamedTuple

import torch
from torch import Tensor


def without_autocast(like: Tensor) -> AbstractContextManager[Any]:
    """Autocast off on a tensor's device; nothing where it is off."""
    device = like.device.type
    return torch.autocast(device, enabled=False) if torch.is_autocast_enabled(device) else nullcontext()


def widened(x: Tensor) -> Tensor:
    """The same in float32, or in its own dtype where that is wider."""
    return x.to(torch.promote_types(x.dtype, torch.float32))


class Triplets(NamedTuple):
    """The r leading singular triplets: u (m, r), s (r,), v (n, r)."""

    u: Tensor
    s: Tensor
    v: Tensor


class Randomised(NamedTuple):
    """The triplets of a randomised SVD, and how much energy (sum of squared singular values) they hold.

    Attributes:
        triplets: the triplets.
        held: their energy.
        missed: estimate of what the exact SVD of this rank would hold more; usually one to eight times the truth.
    """

    triplets: Triplets
    held: float
    missed: float


OVERSAMPLE = 8
BLOCKS = 3  # of the iteration's last ones, whose joint span is searched
LEAST = 4  # iterations; after fewer the gains say little of what is missed
SAFETY = 3.0  # by which the estimate of the energy missed is raised
MISSED = 1e-3  # share of the energy that may be missed without a word


def randomised_svd(w: Tensor, rank: int, iterations: int = 8, seed: int = 0) -> Randomised:
    """Leading singular triplets of w (m, n) within the span of the last three blocks of a power iteration.

    A block Krylov method cut short (Musco and Musco 2015, arXiv 1504.05477; Halko, Martinsson, Tropp 2011, 0909.4061).
    What it misses is estimated from the energies that one, two and three blocks hold: if their gains go on falling by
    the same factor, what is missed is the rest of a geometric series.

    Args:
        w: the matrix (m, n).
        rank: how many triplets.
        iterations: power iterations, each two products with w; at least four are made.
        seed: of the random sketch.

    Returns:
        The triplets and their energy.
    """
    w = widened(w)
    least = min(w.shape)
    width = min(rank + OVERSAMPLE, least)
    drawn = torch.randn(w.shape[1], width, generator=torch.Generator().manual_seed(seed), dtype=w.dtype)
    blocks = [torch.linalg.qr(w @ drawn.to(w.device)).Q]
    if width < least:
        for _ in range(max(iterations, LEAST)):
            other = torch.linalg.qr(w.mT @ blocks[0]).Q
            blocks = [torch.linalg.qr(w @ other).Q, *blocks[: BLOCKS - 1]]
    q = torch.linalg.qr(torch.cat(blocks, dim=-1)[:, :least]).Q
    inner = q.mT @ w
    u, s, vh = torch.linalg.svd(inner, full_matrices=False)
    held = float(s[:rank].square().sum(dtype=torch.float64))
    missed = 0.0
    if q.shape[1] < least:  # else it spans everything
        gram = (inner @ inner.mT).double()
        spectra = (torch.linalg.eigvalsh(gram[: k * width, : k * width])[-rank:] for k in (1, 2))
        one, two = (float(values.clamp_min(0).sum()) for values in spectra)
        ratio = min(max((held - two) / max(two - one, torch.finfo(torch.float64).tiny), 0.0), 0.99)
        missed = SAFETY * max(held - two, 0.0) * ratio / (1 - ratio)
    return Randomised(_signed(q @ u[:, :rank], s[:rank], vh[:rank].mT), held, missed)


def _signed(u: Tensor, s: Tensor, v: Tensor) -> Triplets:
    """The triplets with the largest entry of each column of u positive."""
    peak = u.abs().argmax(dim=0, keepdim=True)
    sign = torch.where(u.gather(0, peak) < 0, -1.0, 1.0).to(u.dtype)
    return Triplets(u * sign, s, v * sign)


def truncated_svd(w: Tensor, rank: int, *, iterations: int | None = None, seed: int = 0) -> Triplets:
    """Leading singular triplets of w (m, n), at least in float32, with a fixed sign.

    Warns where a randomised SVD is estimated to miss more than a thousandth of the energy that the exact one holds, as
    it does on a flat spectrum.

    Args:
        w: the matrix (m, n).
        rank: how many triplets.
        iterations: power iterations of the randomised SVD (:func:`randomised_svd`); None for the exact one.
        seed: of the random sketch; the same seed gives the same triplets.

    Returns:
        Triplets whose u columns have their largest entry positive.
    """
    if iterations is None:
        w = widened(w)
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        return _signed(u[:, :rank], s[:rank], vh[:rank].mT)
    triplets, held, missed = randomised_svd(w, rank, iterations, seed)
    if missed > MISSED * held:
        warnings.warn(
            f"A randomised SVD should hold nearly the energy of the exact one; that of rank {rank} of this "
            f"{w.shape[0]} x {w.shape[1]} matrix misses about {missed / held:.1%}: the spectrum is flat. Take more "
            f"iterations than {iterations}, or None for the exact one.",
            stacklevel=2,
        )
    return triplets


@cache
@torch.inference_mode(False)
def _triangle(size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """For each entry of a skew-symmetric matrix which of the upper triangle's it is, and its sign: (size^2,) each."""
    upper = torch.ones(size, size, device=device).triu(1)
    index = torch.zeros(size, size, dtype=torch.long, device=device)
    index[tuple(torch.triu_indices(size, size, 1, device=device))] = torch.arange(size * (size - 1) // 2, device=device)
    return (index + index.mT).flatten(), (upper - upper.mT).flatten()


def skew(entries: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices from their upper triangles: (..., b(b-1)/2) -> (..., b, b)."""
    if size == 1:  # no entries to select from
        return entries.new_zeros(*entries.shape[:-1], 1, 1)
    fresh = torch.compiler.is_compiling() or type(entries).__name__ == "FakeTensor"
    index, sign = (_triangle.__wrapped__ if fresh else _triangle)(size, entries.device)
    return (entries.index_select(-1, index) * sign).unflatten(-1, (size, size))


def cayley(q: Tensor, terms: int | None = None) -> Tensor:
    """The rotation ``(I + Q)(I - Q)^-1`` of a skew-symmetric Q (..., b, b).

    Args:
        q: skew-symmetric matrices.
        terms: sum this many terms (at least 3) of the Neumann series instead of inverting (Qiu
            et al. 2025, arXiv 2506.19847): cheap on a GPU, orthogonal only for small Q.

    Returns:
        Rotations (..., b, b), at least in float32.
    """
    q = widened(q)
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    if terms is None:
        return 2 * torch.linalg.inv_ex(eye - q).inverse - eye  # eye - q is never singular
    # (I+Q)(I-Q)^-1 = I + 2Q + 2Q^2 + ... + 2Q^(t-2) + Q^(t-1), the tail that PEFT uses, by Horner's rule in Q^2
    square, two = q @ q, 2 * (eye + q)
    if terms == 3:
        return two - eye + square
    inner = two + square if terms % 2 else two - q
    for _ in range((terms - 4) // 2):
        inner = two + square @ inner
    return two - eye + square @ inner


def near_square(size: int, factor: int = -1) -> tuple[int, int]:
    """Split ``size`` into two factors, as square as possible or with the first near ``factor``.

    The convention of LyCORIS and PEFT: a ``factor`` that divides is taken as it is; otherwise the
    most balanced pair whose first (smaller) side does not exceed it.

    Examples:
        >>> near_square(64), near_square(12), near_square(7), near_square(64, 4)
        ((8, 8), (3, 4), (1, 7), (4, 16))
    """
    if factor > 0 and size % factor == 0:
        return factor, size // factor
    bound = size if factor == -1 else factor
    small = max(d for d in range(1, int(size**0.5) + 1) if size % d == 0 and d <= bound)
    return small, size // small
