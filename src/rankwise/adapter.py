"""How an adapter's factors hang in the model.

``module.adapters`` (:class:`Adapters`) holds one :class:`SiteFactors` an adapter and slot, the slot
being "layer" for a layer's weight or the parameter's name for a bare parameter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Literal, TypeAlias, final

import torch
from torch import Tensor, nn

from rankwise.activity import Activity, Choice, Record, Routing
from rankwise.errors import ActivityError, IncompatibleAxes
from rankwise.host import ParameterHost, Site
from rankwise.structures import Factor, Structure
from rankwise.structures.adversary import Adversary
from rankwise.structures.structure import SAMPLED

REMEMBERED = 0.9  # of a moving average of the norms of inputs, at each forward in training
# which dim of a factor (by its dims) a dropout masks; "" is the whole factor
_MASKED: dict[str, dict[tuple[str, ...], str]] = {
    "rank": {("rank", "in"): "rank"},
    "sides": {("rank", "in"): "in", ("out", "rank"): "out"},
    "site": {("rank", "in"): ""},
}


@final
@dataclass(frozen=True)
class Dropout:
    """What of a low-rank update is dropped while training; a plain number drops entries of its input instead.

    One mask a forward of the layer, the same for the whole batch; what stays is scaled up, so that the update that is
    served is the expected one.

    Attributes:
        p: probability.
        on: "rank": components of the rank; "sides": inputs of A and outputs of B (Lin et al. 2024, arXiv 2404.09610);
            "site": the update of a layer as a whole.
    """

    p: float
    on: Literal["rank", "sides", "site"] = "rank"

    def __post_init__(self) -> None:
        if self.on not in _MASKED:
            known = f"one of {tuple(_MASKED)}, and a plain number drops from the input"
            raise IncompatibleAxes(f"Dropout.on is {known}; found {self.on!r}.")
        if not 0 <= self.p < 1:
            raise IncompatibleAxes(f"dropout lies in [0, 1); found {self.p}.")

    def __call__(self, f: Mapping[str, Tensor], described: Mapping[str, Factor]) -> dict[str, Tensor]:
        """The factors with their masks; factors of one dim and size share one, as an anchor does with what it holds."""
        found, masks = dict(f), {}
        for name, factor in described.items():
            dims = tuple(factor.dims)
            dim = _MASKED[self.on].get(dims)
            if dim is None:
                continue
            lead = f[name].shape[: -len(dims)]  # of a stack
            shape = (*lead, *(n if d == dim else 1 for d, n in factor.dims.items()))
            if (dim, shape) not in masks:
                masks[dim, shape] = f[name].new_empty(shape).bernoulli_(1 - self.p).div_(1 - self.p)
            found[name] = f[name] * masks[dim, shape]
        return found


@final
class SiteFactors(nn.Module):
    """The factors of one adapter at one site: parameters of its own, and some of the pool that several sites read.

    Args:
        site: the facts.
        structure: what sits there.
        values: of every factor.
        dropout: of the recipe.
        trainable: whether those factors that can be trained are.
        pool: holds the shared factors; it is a child of the model, not of this module, so that whoever shards the
            model by its blocks leaves it whole while they run.
        keys: name -> key in the pool, of the shared factors; values of those that are not there yet are put there.
    """

    pool: Any

    def __init__(
        self,
        site: Site,
        structure: Structure,
        values: Mapping[str, Tensor],
        dropout: float | Dropout = 0.0,
        trainable: bool = True,
        pool: nn.Module | None = None,
        keys: Mapping[str, str] = MappingProxyType({}),
    ) -> None:
        super().__init__()
        self.site, self.structure, self.dropout, self.keys = site, structure, dropout, dict(keys)
        self.__dict__["pool"] = pool
        self.begun: list[str] = []  # shared factors that this site is the first to have
        for name, factor in self.described.items():
            holder, key = (pool, self.keys[name]) if pool is not None and name in self.keys else (self, name)
            if key not in holder._parameters:
                value = values[name].clone() if holder is pool else values[name]  # one may begin several
                holder.register_parameter(key, nn.Parameter(value, trainable and factor.trainable))
                self.begun += [name] if holder is pool else []

    def factors(self) -> dict[str, Tensor]:
        """The live factors by name."""
        return {**self._own(), **{name: self.pool._parameters[key] for name, key in self.keys.items()}}

    def own(self) -> dict[str, nn.Parameter]:
        """The parameters that this site answers for: its own, and those shared ones that no site before it has."""
        return {**self._own(), **{name: self.pool._parameters[self.keys[name]] for name in self.begun}}

    def _own(self) -> dict[str, nn.Parameter]:
        return {name: p for name, p in self._parameters.items() if p is not None}

    def seen(self, masked: bool = True) -> dict[str, Tensor]:
        """The factors as a forward sees them now: while training with an adversary's, and with masks of dropout."""
        f, structure = self.factors(), self.structure
        if not self.training:
            return f
        if masked and isinstance(self.dropout, Dropout):
            f = self.dropout(f, self.described)
        if "samples" in structure.traits:
            return {**f, SAMPLED: torch.ones(self.site.stack or ())}  # experts take a slice each
        return structure.joined(f, self.site) if isinstance(structure, Adversary) else f

    def memories(self) -> list[Tensor]:
        """The factors that hold a moving average of the norms of the inputs."""
        f = self.factors()
        return [f[name] for name, factor in self.described.items() if tuple(factor.dims) == ("seen",)]

    @property
    def p(self) -> float:
        """The dropout on the input that applies now."""
        return self.dropout if self.training and not isinstance(self.dropout, Dropout) else 0.0

    @property
    def described(self) -> dict[str, Factor]:
        """What the structure says of each factor."""
        return self.structure.factors(self.site)

    def extra_repr(self) -> str:
        """The structure, for ``print(model)``."""
        return f"{self.structure}"


@final
class Adapters(nn.Module):
    """What the graft adds to a module: the factors of every adapter that sits on it."""

    def __init__(self, registry: Registry) -> None:
        super().__init__()
        self.registry = registry
        self.record = Record()
        self.watches = False  # whether some factor remembers what the module reads
        self.siblings: Any = None  # rankwise.siblings.Siblings: the layers that read what this one reads

    def put(self, name: str, slot: str, factors: SiteFactors) -> None:
        """Add one adapter's factors."""
        self.room(name).add_module(slot, factors)
        self.watches |= bool(factors.memories())

    def watch(self, choice: Choice, slot: str, x: Tensor) -> None:
        """Show the active adapters what the module reads, but for a checkpoint that runs again."""
        again = not torch.compiler.is_compiling() and torch._C._current_graph_task_id() != -1
        if self.watches and self.training and not again and not isinstance(choice, Routing):
            dtype = torch.promote_types(x.dtype, torch.float32)
            norm = torch.linalg.vector_norm(x.detach().reshape(-1, x.shape[-1]), dim=0, dtype=dtype)
            for memory in (m for level in self.active(choice, slot) for m in level.memories()):
                memory.data.lerp_(norm.to(memory), 1 - REMEMBERED)

    def room(self, name: str) -> nn.Module:
        """What holds one adapter's factors here: those of slots as children, shared ones as its own parameters."""
        if name not in self._modules:
            self.add_module(name, nn.Module())  # no ModuleDict: a parameter may be called "keys"
        child: Any = self._modules[name]
        return child

    def get(self, name: str, slot: str) -> SiteFactors | None:
        """One adapter's factors at a slot, if it has any here."""
        child: Any = self._modules.get(name)
        return None if child is None else child._modules.get(slot)

    def active(self, names: tuple[str, ...], slot: str) -> list[SiteFactors]:
        """The factors of the named adapters at a slot, in order."""
        found = (self.get(name, slot) for name in names)
        return [f for f in found if f is not None]  # Dynamo reads no name bound inside a comprehension

    def choice(self) -> Choice:
        """The choice that governs the forward about to run."""
        return self.record.choose(self.registry.activity)

    def note(self, choice: Choice, y: Tensor) -> None:
        """Tie the choice to the output's graph."""
        self.record.note(choice, self.registry.activity, y)


@dataclass
class Registry:
    """What the grafted modules of one model share."""

    activity: Activity = field(default_factory=Activity)
    generation: int = 0  # how often an adapter came or went
    adapters: dict[str, Any] = field(default_factory=dict)  # name -> rankwise.attachment.Adapter


Carriers: TypeAlias = tuple[tuple[str, str, bool], ...]


@dataclass(frozen=True)
class Placement:
    """One site of an adapter and the modules that carry it.

    Attributes:
        site: the facts.
        structure: what sits there (the recipe's, or an override).
        carriers: (module path, slot, transposed) of every module that shares the weight.
    """

    site: Site
    structure: Structure
    carriers: Carriers


def pooled(placements: Sequence[Placement]) -> dict[str, dict[str, str]]:
    """Site name -> factor -> key of the shared ones: sites that have one in common have one key."""
    found: dict[str, dict[str, str]] = {}
    for p in placements:
        lead = () if p.site.stack is None else (p.site.stack,)
        for name, factor in p.structure.factors(p.site).items():
            if factor.shared is not None:
                key = f"{name} of {factor.shared}, {' x '.join(map(str, (*lead, *factor.shape)))}"
                found.setdefault(p.site.name, {})[name] = key.replace(".", "_")
    return found


def borrowed(placements: Sequence[Placement]) -> dict[tuple[str, str], str]:
    """(site, factor) -> the site before it that has the same factor; only what is shared and not begun there."""
    first: dict[str, str] = {}
    keys = [(site, name, key) for site, names in pooled(placements).items() for name, key in names.items()]
    return {(site, name): first[key] for site, name, key in keys if first.setdefault(key, site) != site}


def owned(placements: Sequence[Placement]) -> list[tuple[Placement, dict[str, Factor]]]:
    """Each placement with the factors that it answers for, so that a shared one is met once."""
    others = borrowed(placements)
    return [
        (p, {k: v for k, v in p.structure.factors(p.site).items() if (p.site.name, k) not in others})
        for p in placements
    ]


def adapted_value(module: nn.Module, name: str) -> Tensor:
    """A bare parameter as the model's code reads it: with the active adapters on it."""
    raw: Any = module._parameters[name]
    holder: Any = module._modules["adapters"]
    cached = holder.__dict__.get("values", {}).get(name)
    if cached is not None:
        return cached
    choice = holder.choice()
    if isinstance(choice, Routing):
        if any(holder.active(normal(row), name) for row in choice.rows):
            raise ActivityError(
                f"A bare parameter ({name}) has one value for the whole batch, so rows cannot be "
                f"routed through it; route batches of one adapter, or leave it out of the targets."
            )
        return raw
    levels = holder.active(choice, name)
    if not levels:
        return raw
    host = ParameterHost(module, name)
    w = host.weight()
    for level in levels:
        w = level.structure.weight(level.seen(), w)
    value = host.tensor(w).to(host.dtype)
    if not torch.is_grad_enabled():  # torch picks kernels by requires_grad, even under no_grad
        value = value.detach()
    if not torch.compiler.is_compiling():
        vars(value)["_is_param"] = True  # what torch tells a parameter by, for get_parameter and whoever asks it
    holder.note(choice, value)
    return value


def key_of(level: SiteFactors) -> Any:
    """What the factors of two adapters share if they can run as one batch."""
    return level.structure, level.p, tuple((name, f.shape) for name, f in level.factors().items())


def stacked(levels: Sequence[SiteFactors], masked: bool = True) -> dict[str, Tensor]:
    """The factors of several adapters of one kind as a forward sees them, with a leading batch dim."""
    every = [level.seen(masked) for level in levels]
    return {name: torch.stack([f[name] for f in every]) for name in every[0]}


def blocks(holder: Adapters, rows: tuple[str | None, ...], slot: str) -> list[SiteFactors]:
    """The adapters of equal, consecutive blocks of rows, all of one kind; none where the rows are not like that."""
    now = (rows, slot, holder.registry.generation, holder.training)
    known = holder.__dict__.get("blocks")  # asked by every layer at every forward
    if known is None or known[0] != now:
        names = [row for i, row in enumerate(rows) if i == 0 or row != rows[i - 1]]
        size, rest = divmod(len(rows), len(names))
        levels: list[SiteFactors] = []
        if not rest and all(rows[i] == names[i // size] for i in range(len(rows))):
            levels = [level for name in names for level in holder.active(normal(name), slot)]
            levels = levels if len(levels) == len(names) and len({key_of(level) for level in levels}) == 1 else []
        known = now, levels
        if not torch.compiler.is_compiling():
            holder.__dict__["blocks"] = known
    return known[1]


def normal(row: str | None) -> tuple[str, ...]:
    """A row's adapter as a choice."""
    return () if row is None else (row,)
