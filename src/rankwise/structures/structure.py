"""The structure: from a few small tensors to the adapted map, with no tensors of its own.

Shapes: W (out, in); factors are named, each a :class:`Factor` of named dims, with the same leading
batch dims everywhere when several adapters (or experts) are stacked; x is whatever the host takes.

Laws, checked over everything exported (``rankwise.testing``):

- L1 meaning: ``apply(f, x, host) == x @ weight(f, W).T``
- L2 identity: with the start values the adapted map is the base's map
- L3 batch: ``apply`` on stacked factors equals ``apply`` sample by sample
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from enum import Enum
from numbers import Integral
from typing import Protocol, TypeAlias, final

from torch import Tensor

from rankwise.errors import RankError
from rankwise.host import Correction, Host, Site
from rankwise.ops import Dense, Hadamard, LinearOperator, Scaled

Factors: TypeAlias = Mapping[str, Tensor]
SAMPLED = "sampled"  # among the factors of a structure that ``samples``, while it trains


class Start(Enum):
    """Where a factor starts when the init axis says nothing else of it."""

    ZEROS = "zeros"
    ONES = "ones"
    RANDOM = "random"  # drawn by the init axis
    NORMAL = "normal"  # standard normal, whatever the init axis draws


@final
@dataclass(frozen=True)
class Factor:
    """One small tensor, described by named dims.

    The names are the contract: "out" follows the rows of W, "in" its columns, "rank" is what rank
    masks act on. They alone give the shape, the groups of a solver, and the export.

    Attributes:
        dims: name of each dim and its size, in order.
        start: where it starts; a number fills it.
        trainable: whether it is trained or only stored.
        scale: of a factor of a pair ``s * b @ a``, its s; None for any other factor.
        shared: among which sites: those of one adapter that have a factor of this name, shape and label have it in
            common, as the first of them starts it; None for a factor of the site's own.
        below: of whole numbers from 0 on, which are not trained, their upper bound; 0 for any other factor.
    """

    dims: Mapping[str, int]
    start: Start | float = Start.ZEROS
    trainable: bool = True
    scale: float | None = None
    shared: str | None = None
    below: int = 0

    @property
    def shape(self) -> tuple[int, ...]:
        """The sizes, in order."""
        return tuple(self.dims.values())

    def inside(self, value: Tensor) -> bool:
        """Whether whole numbers lie within their bounds; True of any other factor."""
        return not self.below or bool(((value >= 0) & (value < self.below)).all())


def sizes(site: Site) -> dict[str, Factor]:
    """A factor without entries; its shape tells the operator how large the layer is, see :func:`sizes_of`."""
    return {"sizes": Factor({"out": site.rows, "in": site.cols, "none": 0}, trainable=False)}


def sizes_of(f: Factors) -> tuple[int, int]:
    """The sides (out, in) of the layer that the factors are of."""
    rows, cols, _ = f["sizes"].shape[-3:]
    return rows, cols


SIDES = (("rank", "in"), ("out", "rank"))  # dims of a and b


def trained_pairs(described: Mapping[str, Factor]) -> list[tuple[str, str, float]]:
    """The names of b and a, and s, of every trained product ``s * b @ a``."""
    found = []
    for name, factor in described.items():
        partner = f"{name[:-1]}a"
        if factor.scale is None or tuple(factor.dims) != ("out", "rank") or partner not in described:
            continue
        if factor.trainable or described[partner].trainable:
            found.append((name, partner, factor.scale))
    return found


class LeafStart(Protocol):
    """What an init gives a structure: the starting values of a structure that wraps no other."""

    def __call__(self, structure: Structure, site: Site, weight: Callable[[], Tensor]) -> Factors:
        """Values of every factor of ``structure`` at ``site``."""
        ...


class Structure(ABC):
    """How trainable factors become an update, and how it meets W. A frozen dataclass.

    Facts that other axes rely on are traits:

    - ``random_start``: some factor is drawn at random, so an init can choose how;
    - ``lowrank``: the update is ``s * b @ a`` (``b @ diag(e) @ a``), with factors of these names;
    - ``product``: every trained update is ``s * b @ a``, so dL/db = s G a^T and dL/da = s b^T G, G = dL/dW;
    - ``pair``: it is, and both factors of each product are trained;
    - ``core``: the update is ``s * b @ c @ a`` and c alone is trained;
    - ``frames``: it has trained factors b (out, rank) and a (rank, in) that start with orthonormal columns and rows;
    - ``input_side``: the update is ``s * b @ a`` and a alone is trained;
    - ``two_sided``: some factors lie on the "out" side and others on the "in" side;
    - ``anchored``: may start anywhere, since the start is subtracted;
    - ``additive``: y = host(x) + update(x);
    - ``whole``: the trained matrices are the weight itself, or rows of it, not factors of an update;
    - ``drops``: honours dropout on its input;
    - ``gated``: rank components are weighed by a trained ``e`` (rank,), ``s * b @ diag(e) @ a``;
    - ``switched``: the same with an ``e`` that is not trained;
    - ``hard_concrete``, ``selection``: they are weighed by drawn gates, or by a softmax, of a trained ``e``;
    - ``chain``: room for finished pairs beside the one in training; ``open_chain``: for any number of them;
    - ``seen``: an untrained factor ("seen",) in which training keeps the norms of the layer's inputs;
    - ``delta``: an anchor that W's own change is measured from;
    - ``not_mergeable``: no dense form, ``weight`` raises: excepted from L1;
    - ``samples``: a random map while training, excepted from L1 then; ``weight`` is the map that is served;
    - ``moves_at_start``, ``identity_to_rounding``: documented exceptions to L2.
    """

    traits: frozenset[str] = frozenset()

    @abstractmethod
    def factors(self, site: Site) -> dict[str, Factor]:
        """The factors that one site needs.

        Raises:
            RankError: the rank does not fit the site.
        """

    @abstractmethod
    def start(self, site: Site, weight: Callable[[], Tensor], leaf: LeafStart) -> dict[str, Tensor]:
        """Starting values: ``leaf`` gives those of the innermost structure, wrappers add theirs."""

    def correction(self, f: Factors, host: Host) -> Correction | None:
        """The adapted weight as ``m/n * (W + op)``, None where it is not of this form."""
        return None

    @abstractmethod
    def apply(self, f: Factors, x: Tensor, host: Host) -> Tensor:
        """Output of the adapted layer, without bias."""

    @abstractmethod
    def weight(self, f: Factors, w: Tensor) -> Tensor:
        """The same map, dense: (*batch, out, in)."""


class Begun(ABC):
    """A leaf some of whose starting values follow from the frozen weight, or are neither drawn nor constant."""

    @abstractmethod
    def begin(self, site: Site, weight: Callable[[], Tensor], drawn: Factors) -> Factors:
        """Values in place of the init's, of the weight's dtype or whole numbers.

        Args:
            site: the facts of the layer.
            weight: gives the frozen weight (*experts, out, in), in float32 or above.
            drawn: what the init gave, (*experts, ...).

        Returns:
            Those values, by factor.
        """


class Leaf(Structure):
    """A structure that wraps no other: its starting values are the init's, but for those that it begins itself."""

    @final
    def start(self, site: Site, weight: Callable[[], Tensor], leaf: LeafStart) -> dict[str, Tensor]:
        drawn = dict(leaf(self, site, weight))
        return {**drawn, **self.begin(site, weight, drawn)} if isinstance(self, Begun) else drawn


class Added(Structure):
    """``W + delta``: the one coupling that says its update apart from W."""

    @abstractmethod
    def delta(self, f: Factors) -> LinearOperator:
        """The update, (out, in)."""

    @final
    def correction(self, f: Factors, host: Host) -> Correction:
        return Correction(self.delta(f))

    @final
    def apply(self, f: Factors, x: Tensor, host: Host) -> Tensor:
        return host.plus(self.correction(f, host), x)

    @final
    def weight(self, f: Factors, w: Tensor) -> Tensor:
        return w + self.delta(f).dense()


class Additive(Added, Leaf):
    """``W + scale * operator``."""

    @property
    @abstractmethod
    def scale(self) -> float:
        """The factor s in front of the operator."""

    @abstractmethod
    def operator(self, f: Factors) -> LinearOperator:
        """The update without its scale."""

    @final
    def delta(self, f: Factors) -> LinearOperator:
        return Scaled(self.operator(f), self.scale)


class Sided(Leaf):
    """``L W R``: operators on the output and on the input of the frozen map."""

    @abstractmethod
    def sides(self, f: Factors) -> tuple[LinearOperator | None, LinearOperator | None]:
        """L (out, out) and R (in, in), None for the identity."""

    @final
    def apply(self, f: Factors, x: Tensor, host: Host) -> Tensor:
        left, right = self.sides(f)
        run = host if right is None else lambda x: host.rotate(right, x)
        return run(x) if left is None else host.turn(left, run, x)

    @final
    def weight(self, f: Factors, w: Tensor) -> Tensor:
        left, right = self.sides(f)
        w = w if right is None else right.T.mv(w)
        return w if left is None else left.mv(w.mT).mT


class Rotation(Sided):
    """``W R``: a rotation of the input space, exactly identity at R = I."""

    @abstractmethod
    def operator(self, f: Factors) -> LinearOperator:
        """R, (in, in)."""

    @final
    def sides(self, f: Factors) -> tuple[LinearOperator | None, LinearOperator | None]:
        return None, self.operator(f)


class Gate(Leaf):
    """``W * (1 + operator)`` elementwise."""

    @abstractmethod
    def operator(self, f: Factors) -> LinearOperator:
        """The gate minus one, (out, in)."""

    @final
    def correction(self, f: Factors, host: Host) -> Correction:
        return Correction(Hadamard(Dense(host.weight()), self.operator(f)))

    @final
    def apply(self, f: Factors, x: Tensor, host: Host) -> Tensor:
        return host.plus(self.correction(f, host), x)

    @final
    def weight(self, f: Factors, w: Tensor) -> Tensor:
        return w + w * self.operator(f).dense()


def check_rank(rank: int, site: Site, most: int) -> int:
    """Return the rank if it fits the site.

    Raises:
        RankError: it is below 1 or above ``most``.
    """
    whole = isinstance(rank, Integral) and not isinstance(rank, bool)
    if not whole or not 1 <= rank <= most:
        raise RankError(
            f"A rank is a whole number between 1 and the smaller side of the layer, here {most}; found rank={rank!r} "
            f"at {site.name} ({site.rows} x {site.cols}). Choose another, or override it there with Sites(overrides)."
        )
    return rank
