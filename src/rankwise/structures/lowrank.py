"""Structures whose update is exactly low rank. b (out, rank), a (rank, in), e (rank,)."""

from abc import abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import log
from typing import ClassVar, final

import torch
from torch import Tensor

from rankwise.errors import IncompatibleAxes
from rankwise.host import Site
from rankwise.ops import Dense, Diagonal, LinearOperator, Product
from rankwise.structures.structure import SAMPLED, Additive, Begun, Factor, Factors, Leaf, Start, check_rank


def scale_of(rank: int, alpha: float | None, rule: str) -> float:
    """The scale s of a rank-r update: alpha/r or alpha/sqrt(r) (rsLoRA); 1 where alpha is None."""
    if alpha is None:
        return 1.0
    return alpha / rank**0.5 if rule == "alpha/sqrt(r)" else alpha / rank


@dataclass(frozen=True)
class Ranked(Leaf):
    """A rank and a scale."""

    rank: int = 16
    alpha: float | None = 16.0
    scale_rule: str = "alpha/r"

    traits = frozenset({"additive", "lowrank", "two_sided", "random_start", "drops"})

    def __post_init__(self) -> None:
        if (rule := self.scale_rule) not in ("alpha/r", "alpha/sqrt(r)"):
            raise IncompatibleAxes(f'The scale rule is "alpha/r" or "alpha/sqrt(r)" (rsLoRA); found "{rule}".')

    @property
    @final
    def scale(self) -> float:
        return scale_of(self.rank, self.alpha, self.scale_rule)


@dataclass(frozen=True)
class Pair(Ranked, Additive):
    """``W + s B A``; a side that is fixed starts at random, the other one at zero."""

    fixed: ClassVar[str | None] = None  # "a" or "b"

    @final
    def factors(self, site: Site) -> dict[str, Factor]:
        r = check_rank(self.rank, site, min(site.rows, site.cols))
        # a column of a moves only when its token is seen: a look-up starts with b at random
        moving = "b" if site.kind == "embedding" else "a"
        sides = {"a": {"rank": r, "in": site.cols}, "b": {"out": site.rows, "rank": r}}
        return {
            name: Factor(
                dims, Start.RANDOM if name == (self.fixed or moving) else Start.ZEROS, name != self.fixed, self.scale
            )
            for name, dims in sides.items()
        }

    @final
    def operator(self, f: Factors) -> LinearOperator:
        return Product(Dense(f["b"]), Dense(f["a"]))


@final
@dataclass(frozen=True)
class LoRA(Pair):
    """``W + s B A`` (Hu et al. 2021, arXiv 2106.09685).

    Attributes:
        rank: r.
        alpha: numerator of the scale; None for a scale of 1.
        scale_rule: "alpha/r", or "alpha/sqrt(r)" (rsLoRA; Kalajdzievski 2023, arXiv 2312.03732).
    """

    traits = Ranked.traits | {"product", "pair"}


@final
@dataclass(frozen=True)
class Rising(Ranked, Additive):
    """``W + s B A`` of a rank that rises linearly with depth (PRILoRA; Benedek and Wolf 2024, arXiv 2401.11316).

    The norms of the inputs that a linear layer reads in training are remembered, for :class:`rankwise.ranks.Pruning`.

    Attributes:
        rank: r, on average over the blocks of the model; of layers outside of blocks.
        alpha: numerator of the scale, which is that of r everywhere; None for a scale of 1.
        scale_rule: as in LoRA.
        spread: the rank goes from (1 - spread) r in the first block to (1 + spread) r in the last one.
    """

    spread: float = 0.5

    traits = Ranked.traits | {"product", "pair", "seen"}

    def factors(self, site: Site) -> dict[str, Factor]:
        depth = 0.5 if site.layer is None or site.layers < 2 else site.layer / (site.layers - 1)
        pair = LoRA(round(self.rank * (1 + self.spread * (2 * depth - 1)))).factors(site)
        norms = {"norms": Factor({"seen": site.cols}, trainable=False)} if site.kind == "linear" else {}
        return {**{name: replace(factor, scale=self.scale) for name, factor in pair.items()}, **norms}

    def operator(self, f: Factors) -> LinearOperator:
        return Product(Dense(f["b"]), Dense(f["a"]))


@final
@dataclass(frozen=True)
class LoRAFA(Pair):
    """``W + s B A`` with A frozen where it started (Zhang et al. 2023, arXiv 2308.03303).

    Attributes:
        rank: r.
        alpha: numerator of the scale; None for a scale of 1.
        scale_rule: as in LoRA.
    """

    traits = (Ranked.traits - {"two_sided"}) | {"product"}
    fixed = "a"


@final
@dataclass(frozen=True)
class InputSide(Pair):
    """``W + s B A`` with B fixed where it starts, and only A trained (MiCA; arXiv 2604.01694).

    Attributes:
        rank: r.
        alpha: numerator of the scale; None for a scale of 1.
        scale_rule: as in LoRA.
    """

    traits = Ranked.traits - {"two_sided", "lowrank"} | {"input_side"}
    fixed = "b"


@dataclass(frozen=True)
class Weighed(Ranked, Additive):
    """``W + s B diag(w(e)) A``: e (rank,) weighs the rank components."""

    outer = Start.ZEROS  # of b
    gate = Factor({"rank": 0}, Start.ONES)  # what e is, how it starts, and whether it is trained
    beside: ClassVar[Mapping[str, Factor]] = {}  # other factors

    @abstractmethod
    def weights(self, f: Factors) -> Tensor:
        """What weighs the components: w(e)."""

    @final
    def factors(self, site: Site) -> dict[str, Factor]:
        r = check_rank(self.rank, site, min(site.rows, site.cols))
        return {
            "a": Factor({"rank": r, "in": site.cols}, Start.RANDOM),
            "b": Factor({"out": site.rows, "rank": r}, self.outer),
            "e": replace(self.gate, dims=dict.fromkeys(self.gate.dims, r)),
            **self.beside,
        }

    @final
    def operator(self, f: Factors) -> LinearOperator:
        return Product(Dense(f["b"]), Product(Diagonal(self.weights(f)), Dense(f["a"])))


@dataclass(frozen=True)
class Direct(Weighed):
    """``W + s B diag(e) A``."""

    @final
    def weights(self, f: Factors) -> Tensor:
        return f["e"]


@final
@dataclass(frozen=True)
class SVDForm(Direct):
    """``W + s B diag(e) A``, AdaLoRA's three factors (Zhang et al. 2023, arXiv 2303.10512).

    Attributes:
        rank: r.
        alpha: numerator of the scale; None for a scale of 1.
        scale_rule: "alpha/r" or "alpha/sqrt(r)".
    """

    traits = Ranked.traits | {"gated"}
    outer = Start.RANDOM
    gate = Factor({"rank": 0})


@final
@dataclass(frozen=True)
class Gated(Direct):
    """``W + s B diag(e) A``, B at zero, e trained from a standard normal start (SoRA; Ding et al. 2023, 2311.11696).

    Attributes:
        rank: r.
        alpha: numerator of the scale; None for a scale of 1.
        scale_rule: "alpha/r" or "alpha/sqrt(r)".
    """

    traits = Ranked.traits | {"gated"}
    gate = Factor({"rank": 0}, Start.NORMAL)


@final
@dataclass(frozen=True)
class Switched(Direct, Begun):
    """``W + s B diag(e) A``, B at zero and e not trained but set by a rank plan (DyLoRA), at one to begin with.

    Attributes:
        rank: r.
        alpha: numerator of the scale; None for a scale of 1.
        scale_rule: "alpha/r" or "alpha/sqrt(r)".
        open: how many of the r begin at one, the others at zero, as room to grow (ALoRA); None for all.
    """

    open: int | None = None

    traits = Ranked.traits | {"switched"}
    gate = Factor({"rank": 0}, Start.ONES, trainable=False)

    def begin(self, site: Site, weight: Callable[[], Tensor], drawn: Factors) -> Factors:
        e = drawn["e"]
        most = check_rank(self.rank if self.open is None else self.open, site, self.rank)
        return {"e": (torch.arange(self.rank, device=e.device) < most).to(e).expand_as(e)}


# -- gates that are functions of what is trained ------------------------------------------------

_LOW, _HIGH, _TEMPERATURE = -0.1, 1.1, 2 / 3  # as Louizos et al. 2017 (arXiv 1712.01312) advise


def chance_of_open(e: Tensor) -> Tensor:
    """How likely each gate of :class:`HardConcrete` is above zero; the sum is the expected rank."""
    return torch.sigmoid(e - _TEMPERATURE * log(-_LOW / _HIGH))


@final
@dataclass(frozen=True)
class HardConcrete(Weighed):
    """``W + s B diag(z) A``, z in [0, 1] drawn from a hard concrete distribution of log-odds e (SaLoRA).

    ``z = min(1, max(0, 1.2 sigmoid((e + log u - log(1 - u)) / (2/3)) - 0.1))``, u uniform, while training, for each
    forward of a layer; afterwards, and in what is merged, ``min(1, max(0, 1.2 sigmoid(e) - 0.1))``. Hu et al. 2023,
    Mathematics 11(20), 4317; Louizos et al. 2017, arXiv 1712.01312, eq. 10 to 13. The multiplier is that of
    :class:`rankwise.penalties.ExpectedRank`.

    Attributes:
        rank: r.
        alpha: as in Gated.
        scale_rule: as in Gated.
    """

    traits = Ranked.traits | {"samples", "hard_concrete"}
    gate = Factor({"odds": 0}, Start.ONES)
    beside: ClassVar[Mapping[str, Factor]] = {"multiplier": Factor({"one": 1}, trainable=False, shared="all sites")}

    def weights(self, f: Factors) -> Tensor:
        e = f["e"]
        if SAMPLED in f:
            e = (e + torch.rand_like(e).clamp(1e-6, 1 - 1e-6).logit()) / _TEMPERATURE
        return (torch.sigmoid(e) * (_HIGH - _LOW) + _LOW).clamp(0, 1)


@final
@dataclass(frozen=True)
class Selection(Weighed):
    """``W + s B diag(softmax(e)) A``: the rank components of a layer compete (AutoLoRA; Zhang et al. 2024, 2403.09113).

    Attributes:
        rank: r.
        alpha: as in Gated.
        scale_rule: as in Gated.
    """

    traits = Ranked.traits - {"lowrank"} | {"selection"}
    gate = Factor({"odds": 0})

    def weights(self, f: Factors) -> Tensor:
        return f["e"].softmax(-1)


@final
@dataclass(frozen=True)
class Core(Ranked, Additive):
    """``W + s B C A`` with B and A frozen, and only the r x r core C trained (LoRA-XS; Balazy et al. 2024, 2405.17604).

    Attributes:
        rank: r.
        alpha: numerator of the scale; None for a scale of 1.
        scale_rule: "alpha/r" or "alpha/sqrt(r)".
    """

    traits = Ranked.traits - {"two_sided", "lowrank"} | {"core"}

    def factors(self, site: Site) -> dict[str, Factor]:
        r = check_rank(self.rank, site, min(site.rows, site.cols))
        return {
            "a": Factor({"rank": r, "in": site.cols}, Start.RANDOM, trainable=False),
            "b": Factor({"out": site.rows, "rank": r}, Start.RANDOM, trainable=False),
            "c": Factor({"row": r, "rank": r}),
        }

    def operator(self, f: Factors) -> LinearOperator:
        return Product(Dense(f["b"]), Product(Dense(f["c"]), Dense(f["a"])))
