"""Structures whose layers weigh fixed random numbers, which they have in common or draw again from a stored key.

m outputs, n inputs, r rank, N bases; D numbers of all layers' A and B together.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor
from torch.utils.checkpoint import checkpoint

from rankwise.errors import IncompatibleAxes
from rankwise.host import Site
from rankwise.ops import Dense, LinearOperator, Product
from rankwise.structures.lowrank import Ranked
from rankwise.structures.shared import Unscaled
from rankwise.structures.structure import Additive, Begun, Factor, Factors, Start, check_rank, sizes, sizes_of


@final
@dataclass(frozen=True)
class RandLoRA(Ranked, Additive, Begun):
    """``W + s sum_i B_i L_i A G_i``, N random B_i and one A in common (Albert et al. 2025, arXiv 2502.00987).

    L_i and G_i are diagonal, each layer's own, and trained.
    N = ceil(min(m, n) / r), so that the update has full rank; A lies on the layer's smaller side, where G_i is trained.
    The fewer the ranks of a basis, the more is trained. Forming the sum costs as much as a matrix of W's size.

    Attributes:
        rank: r of each basis.
        alpha: numerator of the scale; None for a scale of 1.
        scale_rule: as in LoRA.
    """

    traits = frozenset({"additive", "drops", "random_start"})

    def factors(self, site: Site) -> dict[str, Factor]:
        (small, near), (large, far) = sorted([(site.cols, "in"), (site.rows, "out")])
        r, label = check_rank(self.rank, site, small), f"{site.kind}s"
        n = -(-small // r)
        return {
            "basis_a": Factor({"rank": r, "smaller": small}, Start.RANDOM, trainable=False, shared=label),
            "basis_b": Factor({"larger": large, "basis": n, "rank": r}, Start.RANDOM, trainable=False, shared=label),
            "l": Factor({"basis": n, "rank": r}),
            f"g_{near}": Factor({"basis": n, near: small}, 1 / max(n, small)),
        }

    def begin(self, site: Site, weight: Callable[[], Tensor], drawn: Factors) -> Factors:
        return {k: drawn[k] / drawn[k].std().clamp_min(1e-12) for k in ("basis_a", "basis_b")}

    def operator(self, f: Factors) -> LinearOperator:
        g = f["g_in"] if "g_in" in f else f["g_out"]
        weights = f["l"].unsqueeze(-1) @ g.unsqueeze(-2)  # (*batch, N, r, smaller); its gradients are products as well
        large, small = f["basis_b"].flatten(-2), (f["basis_a"].unsqueeze(-3) * weights).flatten(-3, -2)
        return Product(Dense(large), Dense(small)) if "g_in" in f else Product(Dense(small.mT), Dense(large.mT))


@final
@dataclass(frozen=True)
class UniLoRA(Unscaled, Begun):
    """``W + B A``, all numbers of all layers' A and B out of one vector (Li et al. 2025, arXiv 2506.00799).

    Each number is an entry of the vector, chosen at random, over the root of how often the model uses that entry: an
    isometry from the vector to the D numbers. The choices are stored.

    Attributes:
        rank: r.
        size: d, the length of the vector; all that is trained.
    """

    rank: int = 4
    size: int = 256

    traits = frozenset({"additive", "drops", "moves_at_start"})

    def __post_init__(self) -> None:
        if self.size < 1:
            raise IncompatibleAxes(f"The vector holds one number or more; found size={self.size}. Raise it.")

    def factors(self, site: Site) -> dict[str, Factor]:
        r, d, label = check_rank(self.rank, site, min(site.rows, site.cols)), self.size, "all layers"
        return {
            "theta": Factor({"entry": d}, Start.NORMAL, shared=label),
            "count": Factor({"entry": d}, trainable=False, shared=label),
            "index_a": Factor({"rank": r, "in": site.cols}, trainable=False, below=d),
            "index_b": Factor({"out": site.rows, "rank": r}, trainable=False, below=d),
        }

    def begin(self, site: Site, weight: Callable[[], Tensor], drawn: Factors) -> Factors:
        found = {k: torch.randint(self.size, drawn[k].shape, device=drawn[k].device) for k in ("index_a", "index_b")}
        for index in found.values():  # the count is one tensor of all sites, and each adds its own
            where = index.flatten(-2).to(drawn["count"].device)
            drawn["count"].scatter_add_(-1, where, torch.ones_like(where, dtype=drawn["count"].dtype))
        return {**found, "theta": torch.empty_like(drawn["theta"]).uniform_(-0.02, 0.02)}

    def operator(self, f: Factors) -> LinearOperator:
        theta = f["theta"] * f["count"].clamp_min(1).rsqrt()
        a, b = (theta.gather(-1, f[k].flatten(-2)).unflatten(-1, f[k].shape[-2:]) for k in ("index_a", "index_b"))
        return Product(Dense(b), Dense(a))


@final
@dataclass(frozen=True)
class NOLA(Ranked, Additive, Begun):
    """``W + s (sum_j v_j B_j) (A_0 + sum_i u_i A_i)``, A_i and B_j fixed (Koohpayegani et al. 2023, arXiv 2310.02556).

    The random bases are made anew at every use, a few at a time, from a stored key and by whole-number arithmetic, so
    that they are the same bits on every device and under every version of PyTorch; u and v alone are trained.

    Attributes:
        rank: r.
        alpha: numerator of the scale; None for a scale of 1.
        scale_rule: as in LoRA.
        bases: k, of each side.
    """

    bases: int = 1024

    traits = frozenset({"additive", "drops"})

    def factors(self, site: Site) -> dict[str, Factor]:
        check_rank(self.rank, site, min(site.rows, site.cols))
        if self.bases < 1 or (self.bases + 1) * self.rank * max(site.rows, site.cols) > KEYS:
            raise IncompatibleAxes(
                f"Between 1 and 2^32 random numbers make a side's bases; found bases={self.bases} of rank={self.rank} "
                f"at {site.name} ({site.rows} x {site.cols}). Take fewer."
            )
        return {
            "u": Factor({"basis": self.bases}),
            "v": Factor({"basis": self.bases}),
            "key": Factor({"side": 2}, trainable=False, below=KEYS),
            **sizes(site),
        }

    def begin(self, site: Site, weight: Callable[[], Tensor], drawn: Factors) -> Factors:
        return {"key": torch.randint(KEYS, drawn["key"].shape, device=drawn["key"].device)}

    def operator(self, f: Factors) -> LinearOperator:
        (rows, cols), r, key = sizes_of(f), self.rank, f["key"]
        first = uniform(key[..., :1], self.bases, 1, r * cols, f["u"].dtype).squeeze(-2) / cols**0.5
        a = first + _combined(f["u"], key[..., :1], r * cols)
        b = _combined(f["v"], key[..., 1:], r * rows)
        return Product(Dense(b.unflatten(-1, (rows, r))), Dense(a.unflatten(-1, (r, cols))))


KEYS = 2**32
MASK = KEYS - 1
CHUNK = 2**21  # random numbers made at once


def _combined(weights: Tensor, key: Tensor, size: int) -> Tensor:
    """``sum_i weights_i basis_i / sqrt(k)``, (*batch, size), of bases that are made again in backward."""
    step, k = max(1, CHUNK // size), weights.shape[-1]

    def part(some: Tensor, first: int) -> Tensor:
        return (some.unsqueeze(-2) @ uniform(key, first, some.shape[-1], size, some.dtype)).squeeze(-2)

    parts = (checkpoint(part, weights[..., i : i + step], i, use_reentrant=False) for i in range(0, k, step))
    return sum(parts, weights.new_zeros(())) / k**0.5


def uniform(key: Tensor, first: int, count: int, size: int, dtype: torch.dtype) -> Tensor:
    """Random vectors number ``first`` and following of a key, uniform in [-1, 1), by their place alone.

    Args:
        key: (*batch, 1), whole numbers below 2^32.
        first: number of the first vector.
        count: of vectors.
        size: of a vector.
        dtype: of the vectors, float32 or float64.

    Returns:
        (*batch, count, size).
    """
    place = torch.arange(first * size, (first + count) * size, device=key.device).unflatten(0, (count, size))
    key = key.unsqueeze(-1)
    return (_mixed(_mixed(place ^ key) + key & MASK) >> 8).to(dtype) / 2**23 - 1  # 24 bits: exact in float32


def _mixed(h: Tensor) -> Tensor:
    """MurmurHash3's 32-bit finalizer (Appleby 2011)."""
    h = _times(h ^ (h >> 16), 0x85EBCA6B)
    h = _times(h ^ (h >> 13), 0xC2B2AE35)
    return h ^ (h >> 16)


def _times(h: Tensor, c: int) -> Tensor:
    """``h c`` modulo 2^32, by halves of c: 64 bits never overflow."""
    return h * (c & 0xFFFF) + ((h * (c >> 16) & 0xFFFF) << 16) & MASK
