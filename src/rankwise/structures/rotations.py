"""Rotations of the input space. q (blocks, b(b-1)/2) holds the skew-symmetric generators."""

from dataclasses import dataclass
from typing import final

from rankwise.errors import IncompatibleAxes, RankError
from rankwise.host import Site
from rankwise.ops import BlockDiagonal, LinearOperator
from rankwise.ops.linalg import cayley, skew
from rankwise.structures.structure import Factor, Factors, Rotation, check_rank


@final
@dataclass(frozen=True)
class OFT(Rotation):
    """``W diag(R_1 ... R_k)``, each block a Cayley rotation (Qiu et al. 2023, arXiv 2306.07280).

    Attributes:
        block: desired size of a block; the largest divisor of ``in`` not above it is taken.
        terms: sum this many terms of the Neumann series instead of inverting (OFTv2, Qiu et al.
            2025, arXiv 2506.19847); None for the exact inverse.
    """

    block: int = 32
    terms: int | None = None

    def __post_init__(self) -> None:
        if self.terms is not None and self.terms < 3:
            raise IncompatibleAxes(
                f"The Neumann series needs at least 3 terms; found terms={self.terms}. Give 5, or "
                f"None for the exact inverse."
            )

    traits = frozenset({"rotation"})

    def _block(self, site: Site) -> int:
        check_rank(self.block, site, max(self.block, 1))
        largest = min(self.block, site.cols)
        for b in range(largest, 1, -1):
            if site.cols % b == 0:
                return b
        raise RankError(
            f"A block of a rotation divides the layer's inputs and holds at least two; none "
            f"up to {self.block} divides the {site.cols} of {site.name}. Choose a larger block, or "
            f"another structure there: Sites(overrides={{'{site.name}': LoRA(4)}})."
        )

    def factors(self, site: Site) -> dict[str, Factor]:
        b = self._block(site)
        return {"q": Factor({"block": site.cols // b, "skew": b * (b - 1) // 2})}

    def operator(self, f: Factors) -> LinearOperator:
        q = f["q"]
        size = round((1 + (1 + 8 * q.shape[-1]) ** 0.5) / 2)
        return BlockDiagonal(cayley(skew(q, size), self.terms))
