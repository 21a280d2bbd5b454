"""Structures some of whose factors several sites have in common.

A factor with a label (``Factor.shared``) is one parameter for all sites of an adapter that have it under the same name,
shape and label. b (out, rank), a (rank, in), u (rank,), v (out,).
"""

from dataclasses import dataclass, replace
from typing import Literal, final

from rankwise.errors import IncompatibleAxes
from rankwise.host import Site
from rankwise.ops import Dense, Diagonal, LinearOperator, Product
from rankwise.structures.lowrank import Ranked
from rankwise.structures.structure import Additive, Factor, Factors, Start, check_rank

_SIDES = {"a": ("a",), "b": ("b",), "both": ("a", "b")}


@final
@dataclass(frozen=True)
class ShareLoRA(Ranked, Additive):
    """``W + s B A`` with A, B or both the same in all layers of one width (Song et al. 2024, arXiv 2406.10785).

    Attributes:
        rank: r.
        alpha: numerator of the scale; None for a scale of 1.
        scale_rule: as in LoRA.
        share: "a" (of all layers that read as many inputs), "b" (that give as many outputs) or "both".
    """

    share: Literal["a", "b", "both"] = "a"

    def factors(self, site: Site) -> dict[str, Factor]:
        if self.share not in _SIDES:
            raise IncompatibleAxes(f'share is "a", "b" or "both"; found {self.share!r}.')
        r = check_rank(self.rank, site, min(site.rows, site.cols))
        found = {"a": Factor({"rank": r, "in": site.cols}, Start.RANDOM), "b": Factor({"out": site.rows, "rank": r})}
        return found | {side: replace(found[side], shared=site.kind) for side in _SIDES[self.share]}

    def operator(self, f: Factors) -> LinearOperator:
        return Product(Dense(f["b"]), Dense(f["a"]))


@dataclass(frozen=True)
class Weighted(Ranked, Additive):
    """``W + s diag(v) B diag(u) A``, B and A the same in all layers of one shape, u and v each layer's own."""

    def operator(self, f: Factors) -> LinearOperator:
        return Product(Dense(f["v"].unsqueeze(-1) * f["b"]), Product(Diagonal(f["u"]), Dense(f["a"])))

    def _pair(self, site: Site, b: Start, trainable: bool) -> dict[str, Factor]:
        r = check_rank(self.rank, site, min(site.rows, site.cols))
        both = {"a": {"rank": r, "in": site.cols}, "b": {"out": site.rows, "rank": r}}
        label = f"{site.kind}s of {site.rows} x {site.cols}"
        return {k: Factor(dims, b if k == "b" else Start.RANDOM, trainable, shared=label) for k, dims in both.items()}


@final
@dataclass(frozen=True)
class VeRA(Weighted):
    """``W + diag(v) B diag(u) A``, B and A random, frozen and shared (Kopiczko et al. 2023, arXiv 2310.11454).

    Attributes:
        rank: r; far above LoRA's, since only u and v are trained.
        alpha: numerator of a scale; None for a scale of 1, as in the paper.
        scale_rule: as in LoRA.
        start_u: where u starts.
    """

    start_u: float = 0.1

    traits = Ranked.traits - {"two_sided", "lowrank"}

    def factors(self, site: Site) -> dict[str, Factor]:
        pair = self._pair(site, Start.RANDOM, trainable=False)
        return {**pair, "u": Factor({"rank": pair["a"].dims["rank"]}, self.start_u), "v": Factor({"out": site.rows})}


@final
@dataclass(frozen=True)
class TiedLoRA(Weighted):
    """``W + s diag(v) B diag(u) A``, B and A trained and shared (Renduchintala et al. 2023, arXiv 2311.09578).

    Attributes:
        rank: r.
        alpha: numerator of the scale; None for a scale of 1.
        scale_rule: as in LoRA.
    """

    traits = Ranked.traits - {"lowrank"}

    def factors(self, site: Site) -> dict[str, Factor]:
        pair, ones = self._pair(site, Start.ZEROS, trainable=True), Start.ONES
        return {**pair, "u": Factor({"rank": pair["a"].dims["rank"]}, ones), "v": Factor({"out": site.rows}, ones)}
