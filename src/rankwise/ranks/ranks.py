"""The ranks axis: rank over time, as data. A plan is new values of factors, never a reshape.

``rankwise.steps.accompany`` has an optimizer carry the plans out after each of its steps. What a plan must remember
(AdaLoRA's smoothed sensitivity, the count of steps) is kept in the optimizer's own state, so whoever saves and loads
that resumes exactly.
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, TypeAlias, final

import torch
from torch import Tensor

from rankwise.adapter import SiteFactors

Memory: TypeAlias = Mapping[Tensor, Mapping[str, Any]]


@dataclass(frozen=True)
class Plan:
    """New values of factors, and of what the optimizer remembers of them; what is not named stays.

    Attributes:
        factors: site name -> factor name -> value, of the factor's shape.
        memory: site name -> factor name -> key of ``optimizer.state[factor]`` -> value.
    """

    factors: Mapping[str, Mapping[str, Tensor]] = field(default_factory=dict)
    memory: Mapping[str, Mapping[str, Mapping[str, Tensor]]] = field(default_factory=dict)


class Ranks(ABC):
    """How rank changes in time. A frozen dataclass of its options."""

    requires: frozenset[str] = frozenset()  # traits that the structure must have.
    budget: float = 0  # the rank that the structure must have at least; 0 where it says nothing
    rests: bool = False  # whether some sites may learn nothing for a while

    @abstractmethod
    def plan(self, step: int, sites: Sequence[SiteFactors], memory: Memory) -> Plan | None:
        """What to do after this optimizer step, or None. The gradients are still there; nothing is written here.

        Args:
            step: optimizer steps done.
            sites: the factors of every site.
            memory: ``optimizer.state``; read it with ``get``, since a factor may have none.

        Returns:
            The plan, or None for no change.
        """


@final
@dataclass(frozen=True)
class Constant(Ranks):
    """The rank never changes."""

    def plan(self, step: int, sites: Sequence[SiteFactors], memory: Memory) -> Plan | None:
        return None


# -- carrying out -------------------------------------------------------------------------------


@torch.no_grad()
def carry_out(sites: Iterable[SiteFactors], plan: Plan, optimizer: torch.optim.Optimizer | None = None) -> None:
    """Write a plan's values, in place; what it remembers, where there is an optimizer."""
    for module in sites:
        live, name = module.factors(), module.site.name
        for factor, value in plan.factors.get(name, {}).items():
            live[factor].copy_(value)
        if optimizer is not None:
            for factor, values in plan.memory.get(name, {}).items():
                if live[factor].grad is not None or live[factor] in optimizer.state:  # else Adam takes it for begun
                    optimizer.state[live[factor]].update(values)


# -- what plans are made of -----------------------------------------------------------------------


def scores(sites: Iterable[SiteFactors]) -> dict[str, Tensor]:
    """Importance (rank,) of each rank component: sum over its factors of the mean |w g|, where they have gradients.

    The first-order sensitivity of AdaLoRA (Zhang et al. 2023, arXiv 2303.10512), unsmoothed.
    """
    found: dict[str, Tensor] = {}
    for module in sites:
        total = None
        for name, parameter in module.own().items():
            dims = list(module.described[name].dims)
            if parameter.grad is None or "rank" not in dims or module.site.stack is not None:
                continue
            score = (parameter * parameter.grad).detach().abs().movedim(dims.index("rank"), 0)
            score = score.unsqueeze(-1).flatten(1).mean(1)
            total = score if total is None else total + score
        if total is not None:
            found[module.site.name] = total
    return found


def gates(module: SiteFactors) -> list[str]:
    """The factors of a site that weigh its rank components: those whose only dim is "rank"."""
    described = module.described
    return [name for name in described if tuple(described[name].dims) == ("rank",) and "anchor_" not in name]


def masked(module: SiteFactors, mask: Tensor) -> dict[str, Tensor]:
    """A site's factors with the rank components at 0 of the mask (rank,) removed.

    Where the site has gates they alone are masked, so that a gradient can bring a component back; else every trained
    factor is, and what is removed is gone for good.
    """
    live, described, weighed = module.factors(), module.described, gates(module)
    found = {}
    for name in weighed or [n for n, p in live.items() if p.requires_grad and "rank" in described[n].dims]:
        dims = list(described[name].dims)
        shape = [-1 if dim == "rank" else 1 for dim in dims]
        found[name] = live[name] * mask.to(live[name]).reshape(shape)
    return found
