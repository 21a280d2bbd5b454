"""Gradient descent on the factors."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final

import torch

from rankwise.adapter import SiteFactors
from rankwise.solvers.solver import Solver, grouped


@final
@dataclass(frozen=True)
class SGD(Solver):
    """Gradient descent, with heavy-ball momentum or without (Polyak 1964).

    Attributes:
        momentum: share of the last step that is kept.
    """

    momentum: float = 0.0

    def groups(self, sites: Iterable[SiteFactors], lr: float) -> list[dict[str, Any]]:
        params = [p for site in sites for p in site.own().values() if p.requires_grad]
        return grouped({"factors": params}, {"factors": lr})

    def __call__(self, sites: Iterable[SiteFactors], lr: float) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.groups(sites, lr), lr=lr, momentum=self.momentum)
