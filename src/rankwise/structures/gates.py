"""Scales and turns of a layer's outputs, or of its inputs; W (out, in)."""

from dataclasses import dataclass
from typing import Literal, final

from rankwise.errors import IncompatibleAxes, RankError
from rankwise.host import Site
from rankwise.ops import Diagonal, LinearOperator, Pairs
from rankwise.structures.structure import Factor, Factors, Sided, Start, check_rank


@final
@dataclass(frozen=True)
class IA3(Sided):
    """``diag(l) W`` on the outputs, ``W diag(l)`` on the inputs (Liu et al. 2022, arXiv 2205.05638).

    Attributes:
        side: "out" (keys and values) or "in" (the second layer of a feed-forward block).
    """

    side: Literal["out", "in"] = "out"

    traits = frozenset({"gate"})

    def __post_init__(self) -> None:
        if self.side not in ("out", "in"):
            raise IncompatibleAxes(f'IA3 scales the outputs, side="out", or the inputs, "in"; found "{self.side}".')

    def factors(self, site: Site) -> dict[str, Factor]:
        return {"l": Factor({self.side: site.rows if self.side == "out" else site.cols}, Start.ONES)}

    def sides(self, f: Factors) -> tuple[LinearOperator | None, LinearOperator | None]:
        scale = Diagonal(f["l"])
        return (scale, None) if self.side == "out" else (None, scale)


@final
@dataclass(frozen=True)
class RoAd(Sided):
    """``R W``, R a turn and a scale of each pair of outputs (Liao and Monz 2024, arXiv 2409.00119).

    ``y1 = c1 x1 - s1 x2`` and ``y2 = s2 x1 + c2 x2`` with ``c = alpha cos(theta)`` and ``s = alpha sin(theta)``.

    Attributes:
        variant: 1, alpha and theta of a pair; 2, of an output; 4, of an output for c and again for s.
        group: desired size of the groups of outputs, in which entry i of the first half is paired with entry i of the
            second; the largest even divisor of ``out`` (of a convolution's group) not above it is taken.
    """

    variant: Literal[1, 2, 4] = 1
    group: int = 64

    traits = frozenset({"rotation"})

    def __post_init__(self) -> None:
        if self.variant not in (1, 2, 4):
            raise IncompatibleAxes(f"The variants of RoAd are 1, 2 and 4; found {self.variant!r}.")

    def group_at(self, site: Site) -> int:
        """The size of the groups at a site.

        Raises:
            RankError: its outputs are odd, or no group is allowed to hold two.
        """
        check_rank(self.group, site, max(self.group, 1))
        outputs = site.rows // site.groups  # a convolution's groups see inputs of their own
        for size in range(min(self.group, outputs) // 2 * 2, 0, -2):
            if outputs % size == 0:
                return size
        raise RankError(
            f"RoAd turns pairs of outputs; groups of at most {self.group} make none of the {outputs} of {site.name}. "
            f"Take group=64, or another structure there."
        )

    def factors(self, site: Site) -> dict[str, Factor]:
        group = self.group_at(site)
        dims = {"part": max(self.variant // 2, 1), "group": site.rows // group, "end": min(self.variant, 2)}
        dims["pair"] = group // 2
        return {"theta": Factor(dims), "alpha": Factor(dims, Start.ONES)}

    def sides(self, f: Factors) -> tuple[LinearOperator | None, LinearOperator | None]:
        theta, alpha = (
            t.expand(*t.shape[:-2], 2, -1).flatten(-3) for t in (f["theta"], f["alpha"])
        )  # (..., part, out)
        c, s = (alpha * theta.cos())[..., 0, :], (alpha * theta.sin())[..., -1, :]
        return Pairs(c, s, 2 * f["theta"].shape[-1]), None
