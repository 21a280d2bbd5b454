"""Updates of few numbers in a transform domain, or at few places of the weight itself; circulant blocks.

Shapes: W (out, in); k entries ``values`` (k,) at the places ``row`` and ``col`` (k,), whole numbers that are stored.
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from functools import lru_cache
from math import gcd
from typing import Literal, final, get_args

import torch
from torch import Tensor

from rankwise.errors import IncompatibleAxes, RankError
from rankwise.host import Site
from rankwise.ops import Circulant, Dense, Diagonal, Fourier, Haar, LinearOperator, Product, Sparse
from rankwise.ops.spectral import inverse_cosine
from rankwise.structures.lowrank import Ranked
from rankwise.structures.structure import Additive, Begun, Factor, Factors, Start, check_rank, sizes, sizes_of


@lru_cache(maxsize=4)  # layers of one shape share their places
def _drawn(size: int, count: int, seed: int) -> Tensor:
    """The places that PEFT draws from a seed."""
    return torch.randperm(size, generator=torch.Generator().manual_seed(seed))[:count]


@dataclass(frozen=True)
class Placed(Additive, Begun):
    """Trained entries of a matrix at fixed places, zero elsewhere."""

    traits = frozenset({"additive", "drops"})

    @abstractmethod
    def entries(self, site: Site) -> int:
        """How many entries are trained."""

    @abstractmethod
    def grid(self, rows: int, cols: int) -> tuple[int, int]:
        """The sizes of the matrix that holds the entries, for a layer (rows, cols)."""

    @abstractmethod
    def places(self, site: Site, weight: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        """The rows and columns of the entries, (*experts, k) or (k,)."""

    @final
    def factors(self, site: Site) -> dict[str, Factor]:
        k, most = self.entries(site), site.rows * site.cols
        if not isinstance(k, int) or not 1 <= k <= most:
            raise RankError(
                f"A layer has between 1 trained entry and its whole size, here {most}; found {k!r}, of {self!r} at "
                f"{site.name} ({site.rows} x {site.cols}). Choose fewer, or override it there with Sites(overrides)."
            )
        entries, (rows, cols) = {"entry": k}, self.grid(site.rows, site.cols)
        return {
            "values": Factor(entries),
            "row": Factor(entries, trainable=False, below=rows),
            "col": Factor(entries, trainable=False, below=cols),
            **sizes(site),
        }

    @final
    def begin(self, site: Site, weight: Callable[[], Tensor], drawn: Factors) -> Factors:
        like = drawn["values"]
        row, col = (t.to(like.device, torch.int32).expand(like.shape) for t in self.places(site, weight))
        return {"row": row.clone(), "col": col.clone()}

    @final
    def sparse(self, f: Factors) -> Sparse:
        """The entries as a matrix."""
        return Sparse(f["values"], f["row"], f["col"], self.grid(*sizes_of(f)))


@dataclass(frozen=True)
class Spectrum(Placed):
    """``count`` coefficients at random places, the same in all layers of one shape."""

    count: int
    scaling: float
    seed: int = 777

    @property
    @final
    def scale(self) -> float:
        return self.scaling

    @final
    def entries(self, site: Site) -> int:
        return self.count


@final
@dataclass(frozen=True)
class FourierFT(Spectrum):
    """``W + s Re(IDFT2(S))``, S zero but for few trained coefficients (Gao et al. 2024, arXiv 2405.03003).

    The Fourier transforms act on the activations; the matrix is formed only to be merged, in a convolution and in an
    embedding.

    Attributes:
        count: k, coefficients a layer.
        scaling: s, before the transform's own 1 / (out in).
        seed: of the places, drawn as PEFT draws them.
    """

    count: int = 1000
    scaling: float = 150.0

    def grid(self, rows: int, cols: int) -> tuple[int, int]:
        return rows, cols

    def places(self, site: Site, weight: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        place = _drawn(site.rows * site.cols, self.count, self.seed)
        return place // site.cols, place % site.cols

    def operator(self, f: Factors) -> LinearOperator:
        return Fourier(self.sparse(f))


@final
@dataclass(frozen=True)
class WaveFT(Spectrum):
    """``W + s IDWT2(S)``, one level of Haar wavelets, S of few coefficients (Bilican et al. 2025, arXiv 2505.12532).

    An odd side is made even and cut again. The transforms act on the activations, as in FourierFT.

    Attributes:
        count: k, coefficients a layer.
        scaling: s.
        seed: of the places, drawn as PEFT draws them.
    """

    count: int = 2592
    scaling: float = 25.0

    def grid(self, rows: int, cols: int) -> tuple[int, int]:
        return rows + rows % 2, cols + cols % 2

    def places(self, site: Site, weight: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        place = _drawn(site.rows * site.cols, self.count, self.seed)
        row, col = place // site.cols, place % site.cols
        down, right = (n // 2 for n in self.grid(site.rows, site.cols))
        # PEFT's quarters: the upper right one holds differences of rows, the lower left one those of columns
        return row % down + (col // right) * down, col % right + (row // down) * right

    def operator(self, f: Factors) -> LinearOperator:
        *_, rows, cols, _ = f["sizes"].shape
        return Haar(self.sparse(f), (rows, cols))


Mask = Literal["rand", "wm"]


@final
@dataclass(frozen=True)
class SHiRA(Placed):
    """``W + S``, S zero but for r (out + in) trained entries (Bhardwaj et al. 2024, arXiv 2406.13175).

    Attributes:
        rank: r, of the LoRA with as many numbers; S has a higher one.
        mask: where the entries lie: "rand", anywhere; "wm", where W is largest in size.
    """

    rank: int = 32
    mask: Mask = "rand"

    @property
    def scale(self) -> float:
        return 1.0

    def __post_init__(self) -> None:
        if self.mask not in get_args(Mask):
            raise IncompatibleAxes(f"A mask of SHiRA is one of {get_args(Mask)}; found {self.mask!r}.")

    def entries(self, site: Site) -> int:
        return self.rank * (site.rows + site.cols)

    def grid(self, rows: int, cols: int) -> tuple[int, int]:
        return rows, cols

    def places(self, site: Site, weight: Callable[[], Tensor]) -> tuple[Tensor, Tensor]:
        k = self.entries(site)
        if self.mask == "rand":
            place = torch.randperm(site.rows * site.cols)[:k]
        else:
            place = weight().abs().flatten(-2).topk(k).indices
        place = place.sort().values
        return place // site.cols, place % site.cols

    def operator(self, f: Factors) -> LinearOperator:
        return self.sparse(f)


@final
@dataclass(frozen=True)
class C3A(Additive):
    """``W + C``, C of circulant blocks (Chen et al. 2024, arXiv 2407.19342), applied by Fourier transforms of x.

    Attributes:
        block: desired size of a block; the largest common divisor of out and in not above it is taken.
    """

    block: int = 128

    traits = frozenset({"additive", "drops"})

    @property
    def scale(self) -> float:
        return 1.0

    def factors(self, site: Site) -> dict[str, Factor]:
        check_rank(self.block, site, max(self.block, 1))
        common = gcd(site.rows, site.cols)
        b = max((b for b in range(2, min(self.block, common) + 1) if common % b == 0), default=None)
        if b is None:
            raise RankError(
                f"A circulant block divides out and in, and holds at least 2 x 2; none up to {self.block} divides both "
                f"sides of {site.name} ({site.rows} x {site.cols}). Choose a larger block, or another structure there: "
                f"Sites(overrides={{'{site.name}': LoRA(4)}})."
            )
        return {"kernel": Factor({"block_row": site.rows // b, "block_col": site.cols // b, "shift": b})}

    def operator(self, f: Factors) -> LinearOperator:
        return Circulant(f["kernel"])


@final
@dataclass(frozen=True)
class FouRA(Ranked, Additive):
    """``W + s D^T B diag(e) A D``, D orthonormal cosine transforms (DCT-II; Borse et al. 2024, arXiv 2406.08798).

    Exactly of rank r. The transforms act on B and A, so that the update is as cheap as LoRA's.

    Attributes:
        rank: r.
        alpha: numerator of the scale; None for a scale of 1.
        scale_rule: "alpha/r" or "alpha/sqrt(r)".
    """

    traits = frozenset({"additive", "random_start", "drops"})

    def factors(self, site: Site) -> dict[str, Factor]:
        r = check_rank(self.rank, site, min(site.rows, site.cols))
        return {
            "a": Factor({"rank": r, "frequency": site.cols}, Start.RANDOM),
            "b": Factor({"frequency": site.rows, "rank": r}),
            "e": Factor({"rank": r}, Start.ONES),
        }

    def operator(self, f: Factors) -> LinearOperator:
        left, right = inverse_cosine(f["b"].mT).mT, inverse_cosine(f["a"])
        return Product(Dense(left), Product(Diagonal(f["e"]), Dense(right)))
