"""The few decompositions that the methods share: truncated SVD, Cayley map, near-square splits."""

from typing import NamedTuple

import torch
from torch import Tensor


class Triplets(NamedTuple):
    """The r leading singular triplets: u (m, r), s (r,), v (n, r)."""

    u: Tensor
    s: Tensor
    v: Tensor


def truncated_svd(w: Tensor, rank: int, *, iterations: int | None = None, seed: int = 0) -> Triplets:
    """Leading singular triplets of w (m, n), at least in float32, with a fixed sign.

    Args:
        w: the matrix (m, n).
        rank: how many triplets.
        iterations: power iterations of the randomised SVD (Halko, Martinsson, Tropp 2011,
            arXiv 0909.4061); None for the exact one.
        seed: of the random sketch; the same seed gives the same triplets.

    Returns:
        Triplets whose u columns have their largest entry positive.
    """
    w = w.to(torch.promote_types(w.dtype, torch.float32))
    if iterations is None:
        u, s, vh = torch.linalg.svd(w, full_matrices=False)
        u, s, v = u[:, :rank], s[:rank], vh[:rank].mT
    else:
        devices = [w.device] if w.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            u, s, v = torch.svd_lowrank(w, q=min(rank + 8, *w.shape), niter=iterations)
        u, s, v = u[:, :rank], s[:rank], v[:, :rank]
    peak = u.abs().argmax(dim=0, keepdim=True)
    sign = torch.where(u.gather(0, peak) < 0, -1.0, 1.0).to(u.dtype)
    return Triplets(u * sign, s, v * sign)


def skew(entries: Tensor, size: int) -> Tensor:
    """Skew-symmetric matrices from their upper triangles: (..., b(b-1)/2) -> (..., b, b)."""
    row, col = torch.triu_indices(size, size, 1, device=entries.device)
    q = entries.new_zeros(*entries.shape[:-1], size, size)
    q[..., row, col] = entries
    return q - q.mT


def cayley(q: Tensor, terms: int | None = None) -> Tensor:
    """The rotation ``(I + Q)(I - Q)^-1`` of a skew-symmetric Q (..., b, b).

    Args:
        q: skew-symmetric matrices.
        terms: sum this many terms (at least 3) of the Neumann series instead of inverting (Qiu
            et al. 2025, arXiv 2506.19847): cheap on a GPU, orthogonal only for small Q.

    Returns:
        Rotations (..., b, b), at least in float32.
    """
    q = q.to(torch.promote_types(q.dtype, torch.float32))
    eye = torch.eye(q.shape[-1], dtype=q.dtype, device=q.device)
    if terms is None:
        return torch.linalg.solve(eye - q, eye + q)  # the two factors commute
    # (I+Q)(I-Q)^-1 = I + 2Q + 2Q^2 + ... + 2Q^(t-2) + Q^(t-1), the tail that PEFT uses, by Horner's rule
    two = 2 * eye
    inner = two + q
    for _ in range(terms - 3):
        inner = two + q @ inner
    return eye + q @ inner


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
