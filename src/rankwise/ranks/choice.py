r"""Choices between rank components, or sites, that need more than a step's gradients: the user calls them.

Gates e (\*stack, rank) of ``s B diag(e) A``; b (\*stack, out, rank), a (\*stack, rank, in).
"""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from rankwise.adapter import SiteFactors
from rankwise.errors import IncompatibleAxes
from rankwise.ranks.ranks import Memory, Plan, gates
from rankwise.sites import Override, Target
from rankwise.stats.watch import Watch
from rankwise.structures import Added, LoRA, Selection
from rankwise.structures.structure import Start

# -- ALoRA --------------------------------------------------------------------------------------


def _switches(sites: Iterable[SiteFactors]) -> dict[tuple[SiteFactors, str], Tensor]:
    """The gates that no gradient moves."""
    found = {(m, n): m.factors()[n] for m in sites if "switched" in m.structure.traits for n in gates(m)}
    if not found:
        raise IncompatibleAxes("Only switched components are opened and closed; found none. Take Switched(...).")
    return found


@torch.no_grad()
def ablations(sites: Iterable[SiteFactors], loss: Callable[[], Any]) -> dict[str, Tensor]:
    r"""AB-LoRA's importance of every open component: the loss without it, minus that with it alone.

    Two runs of ``loss`` a component. The gates are put back.

    Args:
        sites: with gates that are not trained.
        loss: runs the model in evaluation mode on validation data, always the same, and returns the loss.

    Returns:
        By site, (\*stack, rank), infinity where a component is closed.

    Raises:
        IncompatibleAxes: no site has such gates.

    References:
        Liu et al. 2024, arXiv 2403.16187, eq. 6, without its constant term.
    """
    live = _switches(sites)
    kept = {key: e.clone() for key, e in live.items()}
    found: dict[str, Tensor] = {}
    try:
        for key, e in live.items():
            scores = torch.full_like(e, torch.inf)
            for i in kept[key].nonzero().unbind():
                at = tuple(i.tolist())
                e[at] = 0
                without = float(loss())
                for other in live.values():
                    other.zero_()
                e[at] = kept[key][at]
                scores[at] = without - float(loss())
                for k, other in live.items():
                    other.copy_(kept[k])
            found[key[0].site.name] = scores
    finally:
        for key, e in live.items():
            e.copy_(kept[key])
    return found


def reallocated(
    sites: Iterable[SiteFactors], importance: Mapping[str, Tensor], count: int, memory: Memory, seed: int = 0
) -> Plan:
    """ALoRA's step: the least important components close, and sites that lost none get as many new ones between them.

    What is given is spread evenly, sites of a higher mean importance first; a site takes no more than it has room for.
    A new component begins anew: its row of a at random, its column of b at zero, the optimizer's memory of both too.

    Args:
        sites: with gates that are not trained.
        importance: as :func:`ablations` gives it.
        count: how many components move; the paper takes one a site.
        memory: ``optimizer.state``.
        seed: of what begins; give another at each call.

    Returns:
        The plan, for ``carry_out(sites, plan, optimizer)``.

    Raises:
        IncompatibleAxes: no site has such gates, or there are not that many open components.

    References:
        Liu et al. 2024, arXiv 2403.16187, Algorithm 1.
    """
    live = _switches(sites)
    scores = {(m, n, i): s for m, n in live for i, s in enumerate(_rows(importance[m.site.name]))}
    each = torch.cat([*scores.values()])
    if not 1 <= count <= int(each.isfinite().sum()):
        raise IncompatibleAxes(f"At least one component moves, at most the open ones; found count={count}.")
    shut = torch.zeros_like(each, dtype=torch.bool)
    shut[each.argsort(stable=True)[:count]] = True
    closed = dict(zip(scores, shut.split([len(s) for s in scores.values()]), strict=True))
    free = {key: s.isinf() for key, s in scores.items()}
    whole = [key for key in scores if not closed[key].any() and not free[key].all()]
    whole.sort(key=lambda key: -float(scores[key][~free[key]].mean()))
    opened, left = {key: torch.zeros_like(mask) for key, mask in free.items()}, count
    while left and (room := [key for key in whole if free[key].any()][:left]):
        for key in room:
            i = int(free[key].nonzero()[0])
            opened[key][i], free[key][i] = True, False
        left -= len(room)
    draw = torch.Generator().manual_seed(seed)
    factors: dict[str, dict[str, Tensor]] = defaultdict(dict)
    remembered: dict[str, dict[str, dict[str, Tensor]]] = defaultdict(dict)
    for m, n in live:
        e = live[m, n]
        off, new = (
            torch.stack([v for k, v in mask.items() if k[:2] == (m, n)]).reshape(e.shape) for mask in (closed, opened)
        )
        factors[m.site.name][n] = e.masked_fill(off, 0).masked_fill(new, 1)
        for name, dim in ((f"{n[:-1]}a", -1), (f"{n[:-1]}b", -2)):
            p, fresh = m.factors()[name], new.unsqueeze(dim)
            random = (torch.rand(p.shape, generator=draw) * 2 - 1).to(p) / p.shape[-1] ** 0.5
            random = random if m.described[name].start is Start.RANDOM else torch.zeros_like(p)
            factors[m.site.name][name] = torch.where(fresh, random, p)
            known = {k: v for k, v in memory.get(p, {}).items() if isinstance(v, Tensor) and v.shape == p.shape}
            remembered[m.site.name][name] = {k: v.masked_fill(fresh, 0) for k, v in known.items()}
    return Plan(factors, remembered)


def _rows(e: Tensor) -> Sequence[Tensor]:
    """Of one expert each."""
    return e.reshape(-1, e.shape[-1]).unbind()


# -- AutoLoRA -----------------------------------------------------------------------------------


def selected(sites: Iterable[SiteFactors]) -> tuple[Override, ...]:
    """A LoRA for each site, of as many ranks as have a softmax gate of 1/r or above there, to be trained anew.

    Args:
        sites: whose structure is :class:`rankwise.structures.Selection`, trained.

    Returns:
        For ``Sites(overrides=...)``. A stack of experts takes the largest of their ranks.

    Raises:
        IncompatibleAxes: a site has no such gates.

    References:
        Zhang et al. 2024, arXiv 2403.09113.
    """
    found = []
    for m in sites:
        if not isinstance(m.structure, Selection):
            raise IncompatibleAxes(
                f"Ranks are chosen by softmax gates; {m.site.name} has {m.structure!r}. Take Selection."
            )
        share = m.factors()["e"].detach().softmax(-1)
        rank = int((share >= 1 / share.shape[-1] - 1e-6).sum(-1).max())  # of equal gates all
        structure = LoRA(rank, m.structure.alpha, m.structure.scale_rule)
        found.append(Override(Target(re.escape(m.site.name), "regex"), structure))
    return tuple(found)


# -- LoRA-drop ----------------------------------------------------------------------------------


def output_shares(adapter: Any, run: Callable[[], Any]) -> dict[str, float]:
    """LoRA-drop's importance of a site: ``sum over tokens of |s B A x|^2``, as a share of that of all sites.

    Args:
        adapter: a trained one, of structures whose update is added to W, on linear layers and convolutions.
        run: runs the adapted model on a sample of the data; in evaluation mode, for what is served.

    Returns:
        By site; the sum is 1.

    Raises:
        IncompatibleAxes: a structure has no update apart from W.
        StatisticsError: a site reads no tensor, as an embedding's.

    References:
        Zhou et al. 2024, arXiv 2402.07721.
    """
    for m in adapter.sites.values():
        if not isinstance(m.structure, Added):
            raise IncompatibleAxes(
                f"An update's output is seen apart from W; {m.site.name} has {m.structure!r}. Take LoRA."
            )
    found = dict.fromkeys(adapter.sites, 0.0)

    def see(name: str, seen: Any) -> None:
        m = adapter.sites[name]
        op = m.structure.delta({k: p.detach().to(seen.x.dtype) for k, p in m.factors().items()})
        found[name] += float(op.mv(seen.x).square().sum())

    watch = Watch(adapter.model, adapter.placements, see, True, False, {}, False)
    with watch.hooked():
        watch.run(0, None, run)
    total = sum(found.values())
    return {name: size / total if total else 1 / len(found) for name, size in found.items()}


def important(shares: Mapping[str, float], least: float = 0.9) -> tuple[str, ...]:
    """The fewest sites whose shares sum to ``least``, the largest first.

    Args:
        shares: as :func:`output_shares` gives them.
        least: the paper's T.

    Returns:
        Their names, for ``rw.recipe("lora_drop", kept=...)``.

    Raises:
        IncompatibleAxes: the threshold is not above 0 and at most 1.
    """
    if not 0 < least <= 1:
        raise IncompatibleAxes(f"The shares of what is kept sum to a number in (0, 1]; found least={least}.")
    found, total = [], 0.0
    for name in sorted(shares, key=lambda name: -shares[name]):
        if total >= least - 1e-9:
            break
        found.append(name)
        total += shares[name]
    return tuple(found)
