"""Rotations of the input space. q (..., b(b-1)/2) holds the skew-symmetric generators of b x b rotations."""

from collections.abc import Callable
from dataclasses import dataclass
from functools import reduce
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import normalize

from rankwise.errors import IncompatibleAxes, RankError
from rankwise.host import Site
from rankwise.ops import BlockDiagonal, Butterfly, Dense, Diagonal, LinearOperator, Product, Scaled, Sum
from rankwise.ops.linalg import cayley, skew, widened
from rankwise.structures.structure import Added, Begun, Factor, Factors, Leaf, Rotation, Sided, Start, check_rank


def size_of(q: Tensor) -> int:
    """The block size b of generators (..., b(b-1)/2)."""
    return round((1 + (1 + 8 * q.shape[-1]) ** 0.5) / 2)


def check_terms(terms: int | None) -> None:
    """Refuse a Neumann series that is too short."""
    if terms is not None and terms < 3:
        raise IncompatibleAxes(
            f"The Neumann series needs at least 3 terms; found terms={terms}. Give 5, or None for the exact inverse."
        )


@dataclass(frozen=True)
class Blocks(Leaf):
    """Cayley rotations of equal blocks, from skew-symmetric generators."""

    block: int = 32
    terms: int | None = None

    def __post_init__(self) -> None:
        check_terms(self.terms)

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
        return BlockDiagonal(cayley(skew(f["q"], size_of(f["q"])), self.terms))


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


@final
@dataclass(frozen=True)
class BOFT(Sided):
    """``diag(s) W R_1 ... R_m``, each R_i block rotations of interleaved entries (Liu et al. 2023, arXiv 2311.06243).

    R_i^T is level i of a block butterfly: its blocks hold the half-blocks that are 2^(i-1) apart.

    Attributes:
        block: desired size of a block; the largest one not above it is taken of which 2^(m-1) divide ``in``, an even
            one unless m is 1.
        levels: m, the number of factors; with log2(in / b) + 1 of them every input reaches every output.
        scaled: train a scale s of every output too.
    """

    block: int = 8
    levels: int = 2
    scaled: bool = False

    traits = frozenset({"rotation"})

    def factors(self, site: Site) -> dict[str, Factor]:
        check_rank(self.levels, site, max(self.levels, 1))
        check_rank(self.block, site, max(self.block, 1))
        n, parts = site.cols, 2 ** (self.levels - 1)
        sizes = (b for b in range(min(self.block, n), 1, -1) if parts == 1 or b % 2 == 0)
        b = next((b for b in sizes if n % (b * parts) == 0), 0)
        if not b:
            raise RankError(
                f"Blocks of a butterfly are even (for one level 2 or more), and {parts} of them divide the inputs; no "
                f"block up to {self.block} does for the {n} of {site.name}. Take fewer levels than {self.levels}, a "
                f"larger block, or another structure there."
            )
        q = Factor({"level": self.levels, "block": n // b, "skew": b * (b - 1) // 2})
        return {"q": q} | ({"s": Factor({"out": site.rows}, Start.ONES)} if self.scaled else {})

    def sides(self, f: Factors) -> tuple[LinearOperator | None, LinearOperator | None]:
        blocks = cayley(skew(f["q"], size_of(f["q"])))  # (*batch, levels, k, b, b)
        first, *rest = blocks.unbind(-4)
        each = [BlockDiagonal(first), *(Butterfly(level, 2**i) for i, level in enumerate(rest, 1))]
        return Diagonal(f["s"]) if self.scaled else None, reduce(Product, each)


@final
@dataclass(frozen=True)
class HRA(Rotation, Begun):
    """``W H_1 ... H_r``, reflections ``H_i = I - 2 u_i u_i^T / |u_i|^2`` (Yuan et al. 2024, arXiv 2405.17484).

    Applied as ``I - U^T T U`` with T (r, r) triangular (Schreiber and Van Loan 1989), so that W changes by rank r.

    Attributes:
        rank: r, even: the vectors start in equal pairs, whose reflections cancel.
    """

    rank: int = 8

    traits = frozenset({"rotation", "random_start", "identity_to_rounding"})

    def factors(self, site: Site) -> dict[str, Factor]:
        r = check_rank(self.rank, site, site.cols)
        if r % 2:
            raise RankError(f"Reflections start in pairs that cancel; found rank={r} at {site.name}. Take {r + 1}.")
        return {"u": Factor({"reflection": r, "in": site.cols}, Start.RANDOM)}

    def begin(self, site: Site, weight: Callable[[], Tensor], drawn: Factors) -> Factors:
        return {"u": drawn["u"][..., ::2, :].repeat_interleave(2, -2)}

    def operator(self, f: Factors) -> LinearOperator:
        u = normalize(widened(f["u"]), dim=-1)
        gram = u @ u.mT
        half = torch.eye(gram.shape[-1], dtype=u.dtype, device=u.device) / 2
        turned = torch.linalg.solve_triangular(gram.triu(1) + half, u, upper=True)  # T U
        return Sum(Diagonal(torch.ones_like(u[..., 0, :])), Scaled(Product(Dense(u.mT), Dense(turned)), -1))


@final
@dataclass(frozen=True)
class PSOFT(Added, Leaf, Begun):
    """``W + B (diag(p) R diag(q) - I) A``, R an r x r rotation (Wu et al. 2025, arXiv 2505.11235).

    ``B A`` is the part of W of rank r that is nearest to it: A its right singular vectors, B the left ones times the
    singular values. Both are stored and frozen.

    Attributes:
        rank: r.
        terms: of the Neumann series; None for the exact inverse.
        relaxed: train the scales p and q, which let go of orthogonality.
    """

    rank: int = 32
    terms: int | None = None
    relaxed: bool = True

    traits = frozenset({"additive", "drops"})

    def __post_init__(self) -> None:
        check_terms(self.terms)

    def factors(self, site: Site) -> dict[str, Factor]:
        r = check_rank(self.rank, site, min(site.rows, site.cols))
        scale = Factor({"component": r}, Start.ONES)
        return {
            "a": Factor({"rank": r, "in": site.cols}, trainable=False),
            "b": Factor({"out": site.rows, "rank": r}, trainable=False),
            "q": Factor({"skew": r * (r - 1) // 2}),
            **({"left": scale, "right": scale} if self.relaxed else {}),
        }

    def begin(self, site: Site, weight: Callable[[], Tensor], drawn: Factors) -> Factors:
        u, s, vh = torch.linalg.svd(weight(), full_matrices=False)
        r = self.rank
        return {"a": vh[..., :r, :].contiguous(), "b": u[..., :r] * s[..., None, :r]}

    def delta(self, f: Factors) -> LinearOperator:
        core = cayley(skew(f["q"], self.rank), self.terms)
        if self.relaxed:
            core = f["left"].unsqueeze(-1) * core * f["right"].unsqueeze(-2)
        change = core - torch.eye(self.rank, dtype=core.dtype, device=core.device)
        return Product(Dense(f["b"]), Product(Dense(change), Dense(f["a"])))
