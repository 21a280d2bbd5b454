"""Updates of three factors: frames on both sides, W's own singular vectors or free ones, and a core between them.

Shapes: W (out, in), b (out, rank), a (rank, in); k = min(out, in).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final, get_args

import torch
from torch import Tensor

from rankwise.errors import IncompatibleAxes, RankError
from rankwise.host import Site
from rankwise.ops import Dense, Diagonal, LinearOperator, Patterned, Product, Scaled, Sum
from rankwise.structures.lowrank import Ranked
from rankwise.structures.structure import (
    Added,
    Additive,
    Begun,
    Factor,
    Factors,
    LeafStart,
    Start,
    Structure,
    check_rank,
)
from rankwise.structures.wrappers import keep, named

_PLAIN = Ranked.traits - {"lowrank", "random_start"}


def _sides(rank: int, site: Site, trainable: bool, start: Start = Start.ZEROS) -> dict[str, Factor]:
    """The two outer factors."""
    a, b = {"rank": rank, "in": site.cols}, {"out": site.rows, "rank": rank}
    return {"a": Factor(a, start, trainable), "b": Factor(b, start, trainable)}


@final
@dataclass(frozen=True)
class ThreeFactor(Ranked, Additive, Begun):
    """``W + s B C A``, all trained, B and A^T drawn with orthonormal columns and C = 0 (PoLAR, 2506.03133; StelLA).

    Attributes:
        rank: r.
        alpha: numerator of the scale; None for a scale of 1.
        scale_rule: "alpha/r" or "alpha/sqrt(r)".
        diagonal: C is diagonal.
    """

    diagonal: bool = False

    traits = _PLAIN | {"frames"}

    def factors(self, site: Site) -> dict[str, Factor]:
        r = check_rank(self.rank, site, min(site.rows, site.cols))
        core = {"rank": r} if self.diagonal else {"row": r, "rank": r}
        return {**_sides(r, site, trainable=True, start=Start.NORMAL), "c": Factor(core)}

    def begin(self, site: Site, weight: Callable[[], Tensor], drawn: Factors) -> Factors:
        b, a = (torch.linalg.qr(t).Q for t in (drawn["b"], drawn["a"].mT))
        return {"b": b, "a": a.mT}

    def operator(self, f: Factors) -> LinearOperator:
        core = Diagonal(f["c"]) if self.diagonal else Dense(f["c"])
        return Product(Dense(f["b"]), Product(core, Dense(f["a"])))


@final
@dataclass(frozen=True)
class TinyLoRA(Ranked, Additive, Begun):
    """``W + s B (sum_i v_i P_i) A``: B = U S and A = V^T of W's leading triplets, P_i random, v alone is trained.

    Morris et al. 2026, arXiv 2602.04118. Entries of P_i are normal of variance 1/r.

    Attributes:
        rank: r.
        alpha: numerator of the scale; None for a scale of 1.
        scale_rule: "alpha/r" or "alpha/sqrt(r)".
        size: u, the entries of v; more than r^2 reach nothing new.
    """

    size: int = 64

    traits = _PLAIN - {"two_sided"}

    def factors(self, site: Site) -> dict[str, Factor]:
        r = check_rank(self.rank, site, min(site.rows, site.cols))
        if self.size < 1:
            raise RankError(f"TinyLoRA trains one number or more; found size={self.size!r}. Raise it.")
        basis = Factor({"basis": self.size, "row": r, "rank": r}, Start.NORMAL, trainable=False)
        return {**_sides(r, site, trainable=False), "basis": basis, "v": Factor({"basis": self.size})}

    def begin(self, site: Site, weight: Callable[[], Tensor], drawn: Factors) -> Factors:
        u, s, vh = torch.linalg.svd(weight(), full_matrices=False)
        r = self.rank
        b = u[..., :r] * s[..., None, :r]
        return {"b": b, "a": vh[..., :r, :], "basis": drawn["basis"] / r**0.5}

    def operator(self, f: Factors) -> LinearOperator:
        core = torch.einsum("...i,...ijk->...jk", f["v"], f["basis"])
        return Product(Dense(f["b"]), Product(Dense(core), Dense(f["a"])))


@final
@dataclass(frozen=True)
class Truncated(Added):
    """``W - U_d S_d V_d^T + update``: W without its d smallest singular triplets (KaSA; Wang et al. 2024, 2412.06071).

    What is taken from W is stored beside the factors, and W left alone. Moves at the start, by the singular values that
    are dropped.

    Attributes:
        inner: the update, an additive structure.
        dropped: d.
    """

    inner: Structure
    dropped: int = 16

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Added):
            raise IncompatibleAxes(
                f"What is dropped from W is added to an update; found Truncated({self.inner!r}). Truncate under the "
                f"additive structure inside instead: Magnitude(Truncated(LoRA(...)))."
            )
        keep(self, traits=self.inner.traits | {"moves_at_start"})

    def factors(self, site: Site) -> dict[str, Factor]:
        d = check_rank(self.dropped, site, min(site.rows, site.cols) - 1)
        return {**self.inner.factors(site), **named("cut", _sides(d, site, trainable=False))}

    def start(self, site: Site, weight: Callable[[], Tensor], leaf: LeafStart) -> dict[str, Tensor]:
        u, s, vh = torch.linalg.svd(weight(), full_matrices=False)
        last = -self.dropped
        cut = {"b": u[..., last:] * s[..., None, last:], "a": vh[..., last:, :]}
        return {**self.inner.start(site, weight, leaf), **named("cut", cut)}

    def delta(self, f: Factors) -> LinearOperator:
        assert isinstance(self.inner, Added)
        return Sum(self.inner.delta(f), Scaled(Product(Dense(f["cut_b"]), Dense(f["cut_a"])), -1.0))


Pattern = Literal["banded", "random", "top_k"]


@final
@dataclass(frozen=True)
class SVFT(Additive, Begun):
    """``U (S + M) V^T`` of W's full SVD, M (k, k) sparse and alone trained (Lingam et al. 2024, arXiv 2405.19597).

    U and V are stored: for a square W twice its size. The update has full rank, so no form of it is smaller than W: it
    is formed for a product and never kept, or applied through U and V where W is quantised, or under dropout.

    Attributes:
        pattern: where M has entries: "banded", on ``width`` diagonals to both sides of the main one; "random",
            anywhere; "top_k", where |u_i . v_j| is largest (W not square: where the square one of U and V is).
        width: d; each pattern has k (2 d + 1) - d (d + 1) entries. 0 is SVFT-plain with "banded".
    """

    pattern: Pattern = "banded"
    width: int = 0

    traits = frozenset({"additive", "drops"})

    def __post_init__(self) -> None:
        if self.pattern not in get_args(Pattern):
            raise IncompatibleAxes(f"A pattern of SVFT is one of {get_args(Pattern)}; found {self.pattern!r}.")

    @property
    def scale(self) -> float:
        return 1.0

    def _entries(self, site: Site) -> tuple[int, int]:
        """K and the number of M's entries."""
        k, d = min(site.rows, site.cols), self.width
        if not 0 <= d < k:
            raise RankError(
                f"The width of SVFT's pattern lies between 0 and k - 1, k the smaller side of the layer, here {k}; "
                f"found width={d!r} at {site.name}. Choose another, or override it there with Sites(overrides)."
            )
        return k, k * (2 * d + 1) - d * (d + 1)

    def factors(self, site: Site) -> dict[str, Factor]:
        k, count = self._entries(site)
        entries = {"entry": count}
        return {
            "u": Factor({"out": site.rows, "triplet": k}, trainable=False),
            "v": Factor({"triplet": k, "in": site.cols}, trainable=False),
            "m": Factor(entries),
            **{name: Factor(entries, trainable=False, below=k) for name in ("row", "col")},
        }

    def begin(self, site: Site, weight: Callable[[], Tensor], drawn: Factors) -> Factors:
        u, _, v = torch.linalg.svd(weight(), full_matrices=False)
        k, count = self._entries(site)
        if self.pattern == "banded":
            i = torch.arange(k, device=u.device)
            row, col = ((i[:, None] - i).abs() <= self.width).nonzero(as_tuple=True)
            place = (row * k + col).expand(*u.shape[:-2], -1)
        else:
            square = u.mT @ v.mT if site.rows == site.cols else u if site.rows < site.cols else v
            score = torch.rand_like(square) if self.pattern == "random" else square.abs()
            place = score.flatten(-2).topk(count).indices.sort().values
        return {"u": u, "v": v, "row": place // k, "col": place % k}

    def operator(self, f: Factors) -> LinearOperator:
        return Patterned(f["u"], f["m"], f["row"], f["col"], f["v"])
