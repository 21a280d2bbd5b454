"""Methods that find out how many ranks each layer is worth, in training or between two trainings."""

import re
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from rankwise._recipe import Recipe
from rankwise.penalties import Alternation, ExpectedRank, Orthogonality
from rankwise.ranks import Pruning
from rankwise.recipes.point import low_rank, point
from rankwise.sites import Override, Sites, Target
from rankwise.structures import HardConcrete, Rising, Selection, ShareLoRA, Switched

__all__ = ["alora_alloc", "autolora", "lora_drop", "prilora", "salora_struct"]


def salora_struct(
    rank: int = 16, budget: float = 8.0, alpha: float | None = None, gamma: float = 0.1, rate: float = 0.1, **axes: Any
) -> Recipe:
    """SaLoRA (structure-aware): ``W + s B diag(z) A``, drawn gates z whose expected number is driven to a budget.

    Parameters per layer: r (out + in + 1). Law: identity at the start (B = 0); what is served has no draw in it, and
    ``rw.compact`` drops the gates that closed.

    Args:
        rank: r to begin with.
        budget: ranks that are left, on average over the layers.
        alpha: numerator of the scale; None for r.
        gamma: weight of the orthogonality of A and B.
        rate: of the Lagrange multiplier.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Hu et al. 2023, Mathematics 11(20), 4317; gates of Louizos et al. 2017, arXiv 1712.01312. Deviation: the text of
        its method was not at hand, so that the start of the gates (log-odds 1), gamma, the multiplier's rate and its
        form (an ascent that starts anew wherever the budget is met) are ours. Not the SaLoRA of safety.
    """
    return point(
        axes,
        "salora_struct",
        4e-3,
        HardConcrete(rank, rank if alpha is None else alpha),
        "Hu et al. 2023, Mathematics 11(20), 4317",
        penalties=(ExpectedRank(budget, rate), Orthogonality(gamma)),
    )


def alora_alloc(rank: int = 8, most: int = 16, alpha: float | None = None, **axes: Any) -> Recipe:
    """ALoRA: ``W + s B diag(e) A``, whose components move to where they matter, a few at a time between trainings.

    Every so many steps ``ranks.ablations(sites, loss)`` scores each open component on a validation batch, and
    ``ranks.carry_out(sites, ranks.reallocated(sites, scores, count, optimizer.state, seed), optimizer)`` closes the
    least important ones and opens as many where none was lost. In the paper: one a layer, after the first epoch and
    then each quarter of one, 8 times. Parameters per layer: r_most (out + in), of which r (out + in) learn. Law:
    identity at the start (B = 0); a new component adds nothing at first; ``rw.compact`` drops the closed ones.

    Args:
        rank: components of each layer to begin with, the budget.
        most: components that a layer has room for.
        alpha: numerator of the scale; None for rank.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Liu et al. 2024, arXiv 2403.16187. Deviations: a layer has room for ``most`` components, where the paper's grows
        without bound; a layer that lost all of its components gets none back.
    """
    return point(
        axes,
        "alora_alloc",
        2e-3,
        Switched(most, most if alpha is None else alpha * most / rank, open=rank),
        "Liu et al. 2024, arXiv 2403.16187",
    )


def autolora(rank: int = 8, alpha: float = 16.0, **axes: Any) -> Recipe:
    """AutoLoRA: ``W + s B diag(softmax(e)) A``, e trained on other data than B and A, to find each layer's rank.

    Of every two optimizer steps the first trains B and A and the second e: give the batches of the two parts of the
    data in turn (the authors take 70 and 30 %), unshuffled under a trainer. Then train plain LoRA with the ranks that
    were found: ``rw.recipe("lora", sites=Sites(overrides=ranks.selected(adapter.sites.values())))``. Parameters per
    layer: r (out + in + 1). Law: identity at the start (B = 0, softmax(e) = 1/r).

    Args:
        rank: r, the largest rank that can be found.
        alpha: numerator of the scale, of the search and of the LoRA after it.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Zhang et al. 2024, arXiv 2403.09113, as in the authors' code: e takes the gradient at the present factors, and
        a rank counts from softmax(e) >= 1/r on. Deviations: one learning rate, where the code takes ten times that of
        the factors for e; no gradient of one part of the data reaches the other's factors, as it does there.
    """
    return point(
        axes,
        "autolora",
        1e-3,
        Selection(rank, alpha),
        "Zhang et al. 2024, arXiv 2403.09113",
        penalties=(Alternation(),),
    )


def lora_drop(
    rank: int = 8, alpha: float | None = None, kept: Sequence[str] = (), sites: Sites | None = None, **axes: Any
) -> Recipe:
    """LoRA-drop: the layers whose update shows most in the output keep a LoRA of their own, all others share one.

    Train plain LoRA for a short time; ``shares = ranks.output_shares(adapter, run)`` on a sample of the data, and
    ``kept = ranks.important(shares, 0.9)``; then train this recipe on a fresh model. Parameters: r (out + in) for each
    kept layer, and once for the others of one width. Law: identity at the start (B = 0); each layer exports as a LoRA.

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        kept: names of the layers that keep their own; none as long as nothing was measured.
        sites: where; the overrides of what is kept come before its own.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Zhou et al. 2024, arXiv 2402.07721. Deviations: importance is compared over all layers at once, padding
        included, and A is shared by the layers that read as many inputs, B by those that give as many outputs.
    """
    own, where = low_rank(rank, alpha), sites or Sites()
    overrides = tuple(Override(Target(re.escape(name), "regex"), own) for name in kept)
    return point(
        {**axes, "sites": replace(where, overrides=(*overrides, *where.overrides))},
        "lora_drop",
        2e-3,
        ShareLoRA(rank, own.alpha, share="both"),
        "Zhou et al. 2024, arXiv 2402.07721",
    )


def prilora(
    rank: int = 8, alpha: float | None = None, spread: float = 0.5, every: int = 40, share: float = 0.5, **axes: Any
) -> Recipe:
    """PRILoRA: ``W + s B A``, r rising linearly with depth, and a half of A's entries set to zero again and again.

    Parameters per layer: r_l (out + in), r_l from (1 - spread) r in the first block to (1 + spread) r in the last one,
    and the norms of its inputs, which are stored. Law: identity at the start (B = 0).

    Args:
        rank: r, the average of the ranks.
        alpha: numerator of the scale; None for r.
        spread: how far the first and the last rank are from r, as a share of it; the paper goes from 4 to 12.
        every: optimizer steps between two prunings.
        share: of the entries of each row of A, those of least ``|A_ij| * norm of input j``.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Benedek and Wolf 2024, arXiv 2401.11316. Deviations: the text of its method was not at hand, so that the decay
        of the moving average of the norms (0.9 a forward, padding included), the comparison within a row of A, and one
        scale for all layers are ours. Only what linear layers read is seen: others keep all of A.
    """
    return point(
        axes,
        "prilora",
        2e-3,
        Rising(rank, rank if alpha is None else alpha, spread=spread),
        "Benedek and Wolf 2024, arXiv 2401.11316",
        ranks=Pruning(every, share),
    )
