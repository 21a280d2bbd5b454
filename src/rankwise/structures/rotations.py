"""Rotations of the input space. q (blocks, b(b-1)/2) holds the skew-symmetric generators."""

from dataclasses import dataclass
from typing import final

from rankwise.errors import IncompatibleAxes, RankError
from rankwise.host import Site
from rankwise.ops import BlockDiagonal, LinearOperator
from rankwise.ops.linalg import cayley, skew
from rankwise.structures.structure import Factor, Factors, Leaf, Rotation, check_rank


@dataclass(frozen=True)
class Blocks(Leaf):
    """Cayley rotations of equal blocks, from skew-symmetric generators."""

    block: int = 32
    terms: int | None = None

    def __post_init__(self) -> None:
        if self.terms is not None and self.terms < 3:
            raise IncompatibleAxes(
                f"The Neumann series needs at least 3 terms; found terms={self.terms}. Give 5, or "
                f"None for the exact inverse."
            )

    @final
    def blocks(self, site: Site, size: int) -> dict[str, Factor]:
        """The generators that rotate ``size`` inputs.

        Raises:
            RankError: no block divides them.
        """
        check_rank(self.block, site, max(self.block, 1))
        for b in range(min(self.block, size), 1, -1):
            if size % b == 0:
                return {"q": Factor({"block": size // b, "skew": b * (b - 1) // 2})}
        raise RankError(
            f"A block of a rotation divides the layer's inputs and holds at least two; none "
            f"up to {self.block} divides the {size} of {site.name}. Choose a larger block, or "
            f"another structure there: Sites(overrides={{'{site.name}': LoRA(4)}})."
        )

    @final
    def operator(self, f: Factors) -> LinearOperator:
        """R, (size, size)."""
        q = f["q"]
        size = round((1 + (1 + 8 * q.shape[-1]) ** 0.5) / 2)
        return BlockDiagonal(cayley(skew(q, size), self.terms))


@final
@dataclass(frozen=True)
class OFT(Blocks, Rotation):
    """``W diag(R_1 ... R_k)``, each block a Cayley rotation (Qiu et al. 2023, arXiv 2306.07280).

    Attributes:
        block: desired size of a block; the largest divisor of ``in`` not above it is taken.
        terms: sum this many terms of the Neumann series instead of inverting (OFTv2, Qiu et al.
            2025, arXiv 2506.19847); None for the exact inverse.
    """

    traits = frozenset({"rotation"})

    def factors(self, site: Site) -> dict[str, Factor]:
        return self.blocks(site, site.cols)
