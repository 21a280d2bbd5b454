r"""Budgets: which rank components count. They act on the gates e (\*stack, rank) of ``s B diag(e) A``."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from math import prod
from typing import Any, final

import torch
from torch import Tensor

from rankwise.adapter import SiteFactors
from rankwise.errors import IncompatibleAxes, RankError, StatisticsError
from rankwise.ranks.ranks import Memory, Plan, Ranks, gates


@final
@dataclass(frozen=True)
class Budget(Ranks):
    """AdaLoRA's: the most important triplets of all sites keep their singular value (Zhang et al. 2023, 2303.10512).

    An entry's sensitivity ``|w g|`` and its variation are smoothed over steps, their product is its score; a triplet's
    is that of e plus the means of those of its row of A and column of B. The number kept falls as
    ``b_T + (b_0 - b_T)(1 - (t - warmup) / (steps - final - warmup))^3``. Until the last ``final`` steps a gradient
    can bring a triplet back.

    Attributes:
        steps: of the whole training.
        budget: ranks that are left, on average over the sites.
        warmup: steps before anything is masked.
        final: steps at the end with the last masks.
        every: steps between two masks.
        betas: decay of the smoothed sensitivity and of its variation.
    """

    steps: int
    budget: float = 8.0
    warmup: int = 0
    final: int = 0
    every: int = 1
    betas: tuple[float, float] = (0.85, 0.85)

    requires = frozenset({"gated"})

    def __post_init__(self) -> None:
        if self.budget <= 0:
            raise RankError(f"A rank budget is above 0; found {self.budget}.")
        if min(self.warmup, self.final) < 0 or self.every < 1 or self.warmup + self.final >= self.steps:
            raise IncompatibleAxes(
                f"The budget falls between warmup and steps - final; found warmup={self.warmup}, final={self.final}, "
                f"every={self.every}, steps={self.steps}. Give the steps of the whole training."
            )

    def left(self, step: int, start: int, end: int) -> int:
        """How many triplets are kept at a step, of ``start`` to begin with and ``end`` at last."""
        done = (step - self.warmup) / (self.steps - self.final - self.warmup)
        return int((start - end) * (1 - min(max(done, 0.0), 1.0)) ** 3 + end)

    def plan(self, step: int, sites: Sequence[SiteFactors], memory: Memory) -> Plan | None:
        last = self.steps - self.final
        remembered: dict[str, dict[str, dict[str, Tensor]]] = {m.site.name: {} for m in sites}
        if step < last:
            for module in sites:
                for name, p in module.own().items():
                    if p.grad is not None and "rank" in module.described[name].dims:
                        remembered[module.site.name][name] = self._smoothed(p, memory.get(p, {}))
        weighed = [(m, name) for m in sites for name in gates(m)]
        if step > last:
            kept = {(m, n): memory.get(m.factors()[n], {}).get("kept") for m, n in weighed}
        elif step > self.warmup and (step % self.every == 0 or step == last):
            kept = self._kept(step, weighed, remembered, memory)
        else:
            return Plan(memory=remembered)
        factors: dict[str, dict[str, Tensor]] = {m.site.name: {} for m in sites}
        for (module, name), mask in kept.items():
            if mask is not None:
                factors[module.site.name][name] = module.factors()[name] * mask
                remembered[module.site.name].setdefault(name, {})["kept"] = mask
        return Plan(factors, remembered)

    def _smoothed(self, p: Tensor, before: Any) -> dict[str, Tensor]:
        assert p.grad is not None
        (one, two), now = self.betas, (p * p.grad).abs()
        sensitivity = one * before.get("sensitivity", torch.zeros_like(p)) + (1 - one) * now
        variation = two * before.get("variation", torch.zeros_like(p)) + (1 - two) * (now - sensitivity).abs()
        return {"sensitivity": sensitivity, "variation": variation}

    def _kept(self, step: int, weighed: Any, remembered: Any, memory: Memory) -> dict[Any, Tensor]:
        """The masks of the gates: those above the k-th smallest of all scores."""

        def score(module: SiteFactors, name: str) -> Tensor:
            p = module.factors()[name]
            known = remembered[module.site.name].get(name) or memory.get(p, {})
            return known["sensitivity"] * known["variation"] if "variation" in known else torch.zeros_like(p)

        found = {
            (m, e): score(m, e) + (score(m, f"{e[:-1]}a").mean(-1) + score(m, f"{e[:-1]}b").mean(-2))
            for m, e in weighed
        }
        start = sum(s.numel() for s in found.values())
        end = int(self.budget * sum(prod(s.shape[:-1]) for s in found.values()))
        fewer = start - self.left(step, start, end)
        if fewer <= 0:
            return {key: torch.ones_like(s) for key, s in found.items()}
        bound = torch.cat([s.flatten() for s in found.values()]).kthvalue(fewer).values
        return {key: (s > bound).to(s) for key, s in found.items()}


def at_rank(sites: Iterable[SiteFactors], rank: int) -> Plan:
    """DyLoRA's update at a rank b: the first b components, times r/b.

    Args:
        sites: with gates that are not trained.
        rank: b; a site of a smaller rank keeps all of its own.

    Returns:
        The plan, for :func:`carry_out`.

    Raises:
        RankError: b is below 1 or above every site's rank.
    """
    sites = list(sites)
    live = {m.site.name: {name: m.factors()[name] for name in gates(m)} for m in sites}
    most = max((e.shape[-1] for named in live.values() for e in named.values()), default=0)
    if not 1 <= rank <= most:
        raise RankError(f"The rank lies between 1 and that of the adapter, here {most}; found {rank}. Choose another.")

    def cut(e: Tensor) -> Tensor:
        r = e.shape[-1]
        b = min(rank, r)
        return (torch.arange(r, device=e.device) < b).to(e).expand_as(e) * (r / b)

    return Plan({site: {name: cut(e) for name, e in named.items()} for site, named in live.items()})


@final
@dataclass(frozen=True)
class Sampled(Ranks):
    """DyLoRA's: each step at a rank drawn uniformly, so that the adapter is of use at all of them.

    Valipour et al. 2022, arXiv 2210.07558, without its option to train the last component alone. The first step is
    at the full rank. What is saved is at the rank drawn last: choose with :func:`at_rank`.

    Attributes:
        least: the smallest rank.
        seed: of the draws; a draw depends on it and on the step alone.
    """

    least: int = 1
    seed: int = 0

    requires = frozenset({"switched"})

    def __post_init__(self) -> None:
        if self.least < 1:
            raise RankError(f"The smallest rank is at least 1; found {self.least}.")
        object.__setattr__(self, "budget", self.least)

    def plan(self, step: int, sites: Sequence[SiteFactors], memory: Memory) -> Plan | None:
        most = max(m.factors()[name].shape[-1] for m in sites for name in gates(m))
        draw = torch.Generator().manual_seed(self.seed + step)
        return at_rank(sites, int(torch.randint(min(self.least, most), most + 1, (), generator=draw)))


@final
@dataclass(frozen=True)
class Shrinking(Ranks):
    """SoRA's: after each step the gates go towards zero by ``threshold``, and stop there (a proximal step of L1).

    Ding et al. 2023, arXiv 2311.11696; as in its main optimizer the threshold is not multiplied by the rate.

    Attributes:
        threshold: xi.
    """

    threshold: float = 3e-4

    requires = frozenset({"gated"})

    def plan(self, step: int, sites: Sequence[SiteFactors], memory: Memory) -> Plan | None:
        shrink = torch.nn.functional.softshrink
        live = {m.site.name: {name: m.factors()[name] for name in gates(m)} for m in sites}
        return Plan({s: {name: shrink(e, self.threshold) for name, e in named.items()} for s, named in live.items()})


@final
@dataclass(frozen=True)
class Pruning(Ranks):
    """PRILoRA's: every so many steps a share of each row of A is set to zero, by ``|A_ij|`` times the norm of input j.

    The norm is a moving average over the forwards of training, and over processes. What is zero goes on being trained
    (Benedek and Wolf 2024, arXiv 2401.11316).

    Attributes:
        every: steps between two prunings.
        share: of the entries of a row.
    """

    every: int = 40
    share: float = 0.5

    requires = frozenset({"seen"})

    def __post_init__(self) -> None:
        if self.every < 1 or not 0 < self.share < 1:
            raise IncompatibleAxes(f"A share in (0, 1) is pruned every 1 or more steps; found {self!r}.")

    def plan(self, step: int, sites: Sequence[SiteFactors], memory: Memory) -> Plan | None:
        if step % self.every:
            return None
        factors: dict[str, dict[str, Tensor]] = {}
        watching = [m for m in sites if m.memories()]
        for module in watching:
            norms, f = module.memories()[0].clone(), module.factors()
            if torch.distributed.is_available() and torch.distributed.is_initialized():
                torch.distributed.all_reduce(norms)
            for name, factor in module.described.items():
                least = int(self.share * factor.shape[-1])
                if norms.any() and least and factor.trainable and tuple(factor.dims) == ("rank", "in"):
                    score = f[name].abs() * norms
                    kept = score > score.kthvalue(least, -1, keepdim=True).values
                    factors.setdefault(module.site.name, {})[name] = f[name] * kept
        if watching and not factors:
            raise StatisticsError("Entries are pruned by what layers read in training; found none that has read any.")
        return Plan(factors)
