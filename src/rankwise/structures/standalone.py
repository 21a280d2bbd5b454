r"""Structures that are the weight, for training from scratch: W itself has no part in the map.

The base keeps its W under its name, as under any method: it takes its own memory, but no gradient, no optimizer state
and no part in any product. Shapes: b (\*batch, out, rank), a (\*batch, rank, in), values and places (\*batch, k).
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from math import prod
from typing import final

import torch
from torch import Tensor
from torch.nn.functional import silu

from rankwise.errors import IncompatibleAxes, TargetError
from rankwise.host import Host, Site
from rankwise.ops import Dense, LinearOperator, Product, Scaled, Scattered, Sum
from rankwise.structures.convolutions import Unmerged
from rankwise.structures.lowrank import scale_of
from rankwise.structures.structure import Begun, Factor, Factors, Leaf, Start, check_rank


class Standalone(Leaf):
    """``W' = operator``: the factors are the weight, wherever they start."""

    @abstractmethod
    def operator(self, f: Factors) -> LinearOperator:
        """The weight, (out, in)."""

    @final
    def apply(self, f: Factors, x: Tensor, host: Host) -> Tensor:
        return host.mv(self.operator(f), x)

    @final
    def weight(self, f: Factors, w: Tensor) -> Tensor:
        return self.operator(f).dense()


def _sides(rank: int, site: Site, b: Start, scale: float | None) -> dict[str, Factor]:
    r = check_rank(rank, site, min(site.rows, site.cols))
    a = Factor({"rank": r, "in": site.cols}, Start.RANDOM, scale=scale)
    return {"a": a, "b": Factor({"out": site.rows, "rank": r}, b, scale=scale)}


@final
@dataclass(frozen=True)
class LowRankWeight(Standalone):
    """``W' = B A``, both at random: what LORO trains (Mo, Huang, Pan 2025, ICLR).

    Attributes:
        rank: r.
    """

    rank: int = 128

    traits = frozenset({"two_sided", "random_start", "product", "pair", "moves_at_start"})

    def factors(self, site: Site) -> dict[str, Factor]:
        return _sides(self.rank, site, Start.RANDOM, 1.0)

    def operator(self, f: Factors) -> LinearOperator:
        return Product(Dense(f["b"]), Dense(f["a"]))


@final
@dataclass(frozen=True)
class SparseLowRank(Begun, Standalone):
    """``W' = s B A + S``, S sparse with a fixed support drawn at random (SLTrain; Han et al. 2024, arXiv 2406.02214).

    S is formed in forward and again in backward and never kept; its entries start uniform within +-1/sqrt(in).

    Attributes:
        rank: r.
        alpha: numerator of the scale alpha/r; None for a scale of 1.
        density: share of W's entries that S has, rounded down to at least one entry.
    """

    rank: int = 128
    alpha: float | None = 32.0
    density: float = 0.03

    traits = frozenset({"two_sided", "random_start", "moves_at_start"})

    def __post_init__(self) -> None:
        if not 0 < self.density < 1:
            raise IncompatibleAxes(
                f"A sparse part holds a share of W's entries between 0 and 1; found density={self.density}. Take "
                f"LowRankWeight for none, Replace for all."
            )

    def factors(self, site: Site) -> dict[str, Factor]:
        size = site.rows * site.cols
        kept = {"kept": max(1, int(self.density * size))}
        return {
            **_sides(self.rank, site, Start.ZEROS, scale_of(self.rank, self.alpha, "alpha/r")),
            "places": Factor(kept, trainable=False, below=size),
            "values": Factor(kept),
        }

    def begin(self, site: Site, weight: Callable[[], Tensor], drawn: Factors) -> Factors:
        values, size = drawn["values"], site.rows * site.cols
        lead, k = values.shape[:-1], values.shape[-1]
        chosen = [torch.randperm(size, device=values.device)[:k].sort().values for _ in range(prod(lead))]
        bound = site.cols**-0.5
        return {"places": torch.stack(chosen).view(*lead, k), "values": values.clone().uniform_(-bound, bound)}

    def operator(self, f: Factors) -> LinearOperator:
        pair = Scaled(Product(Dense(f["b"]), Dense(f["a"])), scale_of(self.rank, self.alpha, "alpha/r"))
        return Sum(pair, Scattered(f["places"], f["values"], pair.shape))


@final
@dataclass(frozen=True)
class LowRankActivation(Begun, Unmerged):
    """``y = B silu(A x)``, on linear layers (CoLA; Liu et al. 2025, arXiv 2502.10940).

    Not linear in x, so there is no weight to merge. Entries start normal, of variance ``1/sqrt(r (out + in))``.

    Attributes:
        rank: r.
    """

    rank: int = 128

    traits = frozenset({"not_mergeable", "moves_at_start", "two_sided"})

    def factors(self, site: Site) -> dict[str, Factor]:
        if site.kind != "linear":
            raise TargetError(
                f"A function between two factors stands in for a linear layer; {site.name} is of kind {site.kind}. "
                f"Take LowRankWeight there."
            )
        return _sides(self.rank, site, Start.RANDOM, None)

    def begin(self, site: Site, weight: Callable[[], Tensor], drawn: Factors) -> Factors:
        std = (self.rank * (site.rows + site.cols)) ** -0.25
        return {name: torch.randn_like(value) * std for name, value in drawn.items()}

    def apply(self, f: Factors, x: Tensor, host: Host) -> Tensor:
        return host.mv(Dense(f["b"]), silu(host.mv(Dense(f["a"]), x)))
