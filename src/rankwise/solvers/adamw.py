"""AdamW, with one rate or with two (LoRA+)."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final

import torch

from rankwise.adapter import SiteFactors
from rankwise.solvers.solver import Solver, grouped


@dataclass(frozen=True)
class _Adam(Solver):
    """What the two share: torch's AdamW over groups."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    @final
    def __call__(self, sites: Iterable[SiteFactors], lr: float) -> torch.optim.Optimizer:
        options = {"betas": self.betas, "eps": self.eps, "weight_decay": self.weight_decay}
        return torch.optim.AdamW(self.groups(sites, lr), lr=lr, fused=True, **options)  # one kernel, not ten a factor


@final
@dataclass(frozen=True)
class AdamW(_Adam):
    """Adam with decoupled weight decay (Loshchilov and Hutter 2017, arXiv 1711.05101).

    Attributes:
        betas: decay of the two moments.
        eps: added to the root of the second moment.
        weight_decay: per step, times the learning rate.
    """

    def groups(self, sites: Iterable[SiteFactors], lr: float) -> list[dict[str, Any]]:
        params = [p for site in sites for p in site.own().values() if p.requires_grad]
        return grouped({"factors": params}, {"factors": lr})


@final
@dataclass(frozen=True)
class LoRAPlus(_Adam):
    """AdamW with a larger rate on the output side (LoRA+; Hayou et al. 2024, arXiv 2402.12354).

    Factors whose first dim is "out" and that have a second one take ``ratio * lr``.

    Attributes:
        betas: as in AdamW.
        eps: as in AdamW.
        weight_decay: as in AdamW.
        ratio: rate of the output side over the rate of the rest.
    """

    requires = frozenset({"two_sided"})

    ratio: float = 16.0

    def groups(self, sites: Iterable[SiteFactors], lr: float) -> list[dict[str, Any]]:
        members: dict[str, list[torch.nn.Parameter]] = {"in side": [], "out side": []}
        for site in sites:
            described = site.described
            for name, parameter in site.own().items():
                dims = tuple(described[name].dims)
                side = "out side" if dims[0] == "out" and len(dims) > 1 else "in side"
                if parameter.requires_grad:
                    members[side].append(parameter)
        return grouped(members, {"in side": lr, "out side": lr * self.ratio})
