"""Kronecker and Hadamard products: more rank for the same number of parameters."""

from dataclasses import dataclass
from typing import final

from rankwise.host import Site
from rankwise.ops import Dense, Hadamard, Kronecker, LinearOperator, Product
from rankwise.ops.linalg import near_square
from rankwise.structures.lowrank import scale_of
from rankwise.structures.structure import Additive, Factor, Factors, Gate, Start, check_rank


@final
@dataclass(frozen=True)
class LoKr(Additive):
    """``W + s C (x) D`` (LyCORIS; Yeh et al. 2023, arXiv 2309.14859; KronA with both dense).

    C is (m1, n1) and D (m2, n2) with out = m1 m2, in = n1 n2. D is ``D_b D_a`` of rank r where
    that is smaller, and so is C with ``decompose_both``.

    Attributes:
        rank: r of the decomposed factors; None keeps both dense (KronA).
        alpha: numerator of the scale alpha/r; None for a scale of 1.
        factor: desired m1 and n1; -1 for the split nearest to a square.
        decompose_both: decompose C too.
    """

    rank: int | None = 16
    alpha: float | None = 16.0
    factor: int = -1
    decompose_both: bool = False

    traits = frozenset({"additive", "random_start", "drops"})

    @property
    def scale(self) -> float:
        return scale_of(self.rank or 1, self.alpha, "alpha/r")

    def factors(self, site: Site) -> dict[str, Factor]:
        m1, m2 = near_square(site.rows, self.factor)
        n1, n2 = near_square(site.cols // site.kernel, self.factor)
        r, k = self.rank, site.kernel
        if r is not None:
            check_rank(r, site, max(site.rows, site.cols))
        found: dict[str, Factor] = {}
        if r is not None and self.decompose_both and r < max(m1, n1) / 2:
            found["c_b"] = Factor({"out": m1, "rank": r})
            found["c_a"] = Factor({"rank": r, "in": n1}, Start.RANDOM)
        else:
            found["c"] = Factor({"out": m1, "in": n1})
        if r is not None and r < max(m2, n2) / 2:
            found["d_b"] = Factor({"out": m2, "rank": r}, Start.RANDOM)
            found["d_a"] = Factor({"rank": r, "in": n2 * k}, Start.RANDOM)
        else:
            found["d"] = Factor({"out": m2, "in": n2 * k}, Start.RANDOM)
        return found

    def operator(self, f: Factors) -> LinearOperator:
        c = Dense(f["c"]) if "c" in f else Product(Dense(f["c_b"]), Dense(f["c_a"]))
        d = Dense(f["d"]) if "d" in f else Product(Dense(f["d_b"]), Dense(f["d_a"]))
        return Kronecker(c, d)


@final
@dataclass(frozen=True)
class LoHa(Additive):
    """``W + s (B1 A1) * (B2 A2)``, rank up to r^2 (FedPara; Hyeon-Woo et al. 2021, 2108.06098)."""

    rank: int = 8
    alpha: float | None = 8.0

    traits = frozenset({"additive", "two_sided", "random_start", "drops"})

    @property
    def scale(self) -> float:
        return scale_of(self.rank, self.alpha, "alpha/r")

    def factors(self, site: Site) -> dict[str, Factor]:
        r = check_rank(self.rank, site, min(site.rows, site.cols))
        out, in_ = {"out": site.rows, "rank": r}, {"rank": r, "in": site.cols}
        return {
            "b1": Factor(out, Start.RANDOM),
            "a1": Factor(in_, Start.RANDOM),
            "b2": Factor(out),
            "a2": Factor(in_, Start.RANDOM),
        }

    def operator(self, f: Factors) -> LinearOperator:
        one = Product(Dense(f["b1"]), Dense(f["a1"]))
        return Hadamard(one, Product(Dense(f["b2"]), Dense(f["a2"])))


@final
@dataclass(frozen=True)
class HiRA(Gate):
    """``W * (1 + B A)``, elementwise (Huang et al. 2025, ICLR, OpenReview TwJrTz9cRS)."""

    rank: int = 32

    traits = frozenset({"two_sided", "random_start", "drops"})

    def factors(self, site: Site) -> dict[str, Factor]:
        r = check_rank(self.rank, site, min(site.rows, site.cols))
        return {"a": Factor({"rank": r, "in": site.cols}, Start.RANDOM), "b": Factor({"out": site.rows, "rank": r})}

    def operator(self, f: Factors) -> LinearOperator:
        return Product(Dense(f["b"]), Dense(f["a"]))
