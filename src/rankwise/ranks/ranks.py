"""The ranks axis: rank over time, as data. A plan is masks on the rank dim, never a reshape."""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from rankwise.adapter import SiteFactors


@dataclass(frozen=True)
class Plan:
    """What to do to the ranks now.

    Attributes:
        masks: site name -> mask (rank,) of ones and zeros; the rank components at 0 are set to 0.
    """

    masks: Mapping[str, Tensor]


class Ranks(ABC):
    """How rank changes in time. A frozen dataclass of its options."""

    requires: frozenset[str] = frozenset()  # traits that the structure must have.

    @abstractmethod
    def plan(self, step: int, scores: Mapping[str, Tensor]) -> Plan | None:
        """What to do after this optimizer step, or None.

        Args:
            step: optimizer steps done.
            scores: site name -> importance (rank,) of each rank component.

        Returns:
            The plan, or None for no change.
        """


@final
@dataclass(frozen=True)
class Constant(Ranks):
    """The rank never changes."""

    def plan(self, step: int, scores: Mapping[str, Tensor]) -> Plan | None:
        return None


def scores(sites: Iterable[SiteFactors]) -> dict[str, Tensor]:
    """Importance of each rank component: sum over its factors of |w g|, where they have gradients.

    The first-order sensitivity of AdaLoRA (Zhang et al. 2023, arXiv 2303.10512), unsmoothed.
    """
    found: dict[str, Tensor] = {}
    for module in sites:
        total = None
        for name, parameter in module.named_parameters():
            dims = list(module.described[name].dims)
            if parameter.grad is None or "rank" not in dims or module.site.stack is not None:
                continue
            score = (parameter * parameter.grad).detach().abs().movedim(dims.index("rank"), 0)
            score = score.unsqueeze(-1).flatten(1).mean(1)
            total = score if total is None else total + score
        if total is not None:
            found[module.site.name] = total
    return found


@torch.no_grad()
def carry_out(sites: Iterable[SiteFactors], plan: Plan) -> None:
    """Zero the masked rank components in place."""
    for module in sites:
        mask = plan.masks.get(module.site.name)
        if mask is None:
            continue
        for name, parameter in module.named_parameters():
            dims = list(module.described[name].dims)
            if "rank" in dims and parameter.requires_grad:
                shape = [-1 if d == "rank" else 1 for d in dims]
                parameter.mul_(mask.to(parameter).reshape(shape))
