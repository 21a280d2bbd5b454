r"""Low-rank updates of blocks of the weight: on its diagonal, or on a whole grid.

k blocks a side; a (\*batch, k, rank, in/k) and b (\*batch, k, out/k, rank) are block diagonals, and what stands between
them says which blocks of rows and columns meet.
"""

from dataclasses import dataclass
from typing import final

from rankwise.errors import RankError
from rankwise.host import Site
from rankwise.ops import BlockDiagonal, Dense, Exchange, LinearOperator, Product, Sum
from rankwise.structures.lowrank import Ranked
from rankwise.structures.structure import Additive, Factor, Factors, Start, check_rank


@dataclass(frozen=True)
class Blocked(Ranked, Additive):
    """A rank, a scale, and a number of blocks a side."""

    blocks: int = 4

    traits = Ranked.traits - {"lowrank"}

    @final
    def sides(self, site: Site, most: int) -> dict[str, Factor]:
        """The two block diagonals, the rank at most ``most`` times that of a block.

        Raises:
            RankError: the blocks do not divide the layer, or the rank is above.
        """
        k = self.blocks
        if k < 1 or site.rows % k or site.cols % k:
            raise RankError(
                f"Blocks divide both sides of the layer; found blocks={k} at {site.name} ({site.rows} x {site.cols}). "
                f"Choose another number, or another structure there: Sites(overrides={{'{site.name}': LoRA(4)}})."
            )
        r = check_rank(self.rank, site, most * min(site.rows, site.cols) // k)
        return {
            "a": Factor({"block": k, "rank": r, "in": site.cols // k}, Start.RANDOM),
            "b": Factor({"block": k, "out": site.rows // k, "rank": r}),
        }


@final
@dataclass(frozen=True)
class MELoRA(Blocked):
    """``W + s diag(B_1 A_1 ... B_k A_k)``, rank k r for the parameters of rank r (Ren et al. 2024, arXiv 2402.17263).

    Attributes:
        rank: r of each block.
        alpha: numerator of the scale; None for a scale of 1.
        scale_rule: "alpha/r" or "alpha/sqrt(r)".
        blocks: k; divides both sides of the layer.
    """

    def factors(self, site: Site) -> dict[str, Factor]:
        return self.sides(site, 1)

    def operator(self, f: Factors) -> LinearOperator:
        return Product(BlockDiagonal(f["b"]), BlockDiagonal(f["a"]))


@final
@dataclass(frozen=True)
class BoRA(Blocked):
    """``W + s [B_i diag(e_ij) A_j]``, rank k r (block diversity; Li et al. 2025, arXiv 2508.06953).

    Attributes:
        rank: r, shared by the blocks of a row and those of a column.
        alpha: as in MELoRA.
        scale_rule: as in MELoRA.
        blocks: k; divides both sides of the layer.
    """

    def factors(self, site: Site) -> dict[str, Factor]:
        k = self.blocks
        return {**self.sides(site, 1), "e": Factor({"row": k, "column": k, "rank": self.rank}, Start.ONES)}

    def operator(self, f: Factors) -> LinearOperator:
        k, _, r = f["e"].shape[-3:]
        by_rank = Exchange(k * r, k, r, f["e"][..., 0, 0, 0])
        core = Product(by_rank.T, Product(BlockDiagonal(f["e"].movedim(-1, -3)), by_rank))
        return Product(BlockDiagonal(f["b"]), Product(core, BlockDiagonal(f["a"])))


@final
@dataclass(frozen=True)
class GraLoRA(Blocked):
    """``W + s [B_ij A_ij]``, every block of a k x k grid a LoRA of rank r/k (Jung et al. 2025, arXiv 2505.20355).

    a_j holds the A_ij of column j one below the other, b_i the B_ij of row i side by side.

    Attributes:
        rank: r, a multiple of k; the whole is of rank k r.
        alpha: numerator of the scale; None for a scale of 1.
        scale_rule: "alpha/r" or "alpha/sqrt(r)".
        blocks: k; divides both sides of the layer.
        hybrid: rank of a LoRA on the whole weight beside the grid, of the same scale; 0 for none.
    """

    hybrid: int = 0

    def factors(self, site: Site) -> dict[str, Factor]:
        found, h = self.sides(site, self.blocks), self.hybrid
        if self.rank % self.blocks:
            raise RankError(
                f"The rank is a multiple of the blocks of a side; found rank={self.rank}, blocks={self.blocks} at "
                f"{site.name}. Choose another rank."
            )
        if not h:
            return found
        check_rank(h, site, min(site.rows, site.cols))
        pair = {"whole_a": Factor({"rank": h, "in": site.cols}, Start.RANDOM)}
        return {**found, **pair, "whole_b": Factor({"out": site.rows, "rank": h})}

    def operator(self, f: Factors) -> LinearOperator:
        k, _, r = f["b"].shape[-3:]
        exchange = Exchange(k * r, k, k, f["b"][..., 0, 0, 0])
        grid = Product(BlockDiagonal(f["b"]), Product(exchange, BlockDiagonal(f["a"])))
        return Sum(grid, Product(Dense(f["whole_b"]), Dense(f["whole_a"]))) if self.hybrid else grid
