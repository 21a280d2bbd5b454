"""Methods whose rank changes in time: budgets on gates, and restarts that put finished pairs aside."""

from typing import Any

from rankwise._recipe import Recipe
from rankwise.inits import Gaussian
from rankwise.penalties import Orthogonality
from rankwise.ranks import Budget, Following, Rescaling, Restarts, Sampled, Shrinking
from rankwise.recipes.point import low_rank, point
from rankwise.structures import Chain, Delta, Gated, SVDForm, Switched

__all__ = [
    "adalora", "cola_chain", "delta_lora", "dylora", "periodic_lora", "relora", "scalora", "sora", "xgblora",
]  # fmt: skip


def adalora(
    rank: int = 12,
    budget: float | None = None,
    steps: int = 1000,
    warmup: int = 0,
    final: int = 0,
    every: int = 1,
    alpha: float | None = None,
    **axes: Any,
) -> Recipe:
    """AdaLoRA: ``W + s B diag(e) A``, whose least important triplets are masked as a budget falls.

    Parameters per layer: r (out + in + 1). Law: identity at the start (e = 0); the masks are those of PEFT's allocator.

    Args:
        rank: r to begin with; the paper takes 1.5 times the budget.
        budget: ranks that are left, on average over the layers; None for two thirds of r.
        steps: of the whole training; give your own.
        warmup: steps before the budget falls.
        final: steps at the end with the last masks.
        every: steps between two masks.
        alpha: numerator of the scale; None for r.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Zhang et al. 2023, arXiv 2303.10512. Its penalty on the orthogonality of A and B (Eq. 4) is in ``penalties``.
        Deviation: squared norms with a weight of 0.1, as there; PEFT takes norms with 0.5.
    """
    return point(
        axes,
        "adalora",
        4e-3,
        SVDForm(rank, rank if alpha is None else alpha),
        "Zhang et al. 2023, arXiv 2303.10512",
        init=Gaussian(0.02),
        ranks=Budget(steps, 2 * rank / 3 if budget is None else budget, warmup, final, every),
        penalties=(Orthogonality(),),
    )


def dylora(rank: int = 16, least: int = 1, alpha: float | None = None, seed: int = 0, **axes: Any) -> Recipe:
    """DyLoRA: LoRA trained at a rank b drawn at each step, ``W + s r/b B[:, :b] A[:b]``; of use at every rank.

    Parameters per layer: r (out + in). Law: identity at the start (B = 0). Choose the rank with
    ``ranks.carry_out(sites, ranks.at_rank(sites, b))``, then ``rw.compact``.

    Args:
        rank: the largest b.
        least: the smallest b.
        alpha: numerator of the scale; None for r.
        seed: of the draws.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Valipour et al. 2022, arXiv 2210.07558. Deviations: the first step is at the full rank; the option that trains
        component b alone is left out.
    """
    return point(
        axes,
        "dylora",
        2e-3,
        Switched(rank, rank if alpha is None else alpha),
        "Valipour et al. 2022, arXiv 2210.07558",
        ranks=Sampled(least, seed),
    )


def sora(rank: int = 8, alpha: float = 16.0, threshold: float = 3e-4, **axes: Any) -> Recipe:
    """SoRA: ``W + s B diag(e) A``, whose trained gates e are soft-thresholded after each step, so that some become 0.

    Parameters per layer: r (out + in + 1). Law: identity at the start (B = 0); ``rw.compact`` drops the closed gates.

    Args:
        rank: r to begin with.
        alpha: numerator of the scale.
        threshold: xi, how far a gate goes towards zero after a step.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Ding et al. 2023, arXiv 2311.11696. Deviation: xi is constant; the paper also raises it between runs.
    """
    return point(
        axes, "sora", 8e-4, Gated(rank, alpha), "Ding et al. 2023, arXiv 2311.11696", ranks=Shrinking(threshold)
    )


def relora(
    rank: int = 128, alpha: float = 32.0, every: int = 5000, prune: float = 0.99, links: int | None = None, **axes: Any
) -> Recipe:
    """ReLoRA: ``W + s (B A + past)``; every so many steps the pair joins the past, and a new one begins.

    Parameters per layer: r (out + in) trained; beside them the past, out in, or links r (out + in). Law: a restart
    leaves the map as it is. The rate: ``LambdaLR(optimizer, ranks.jagged_cosine(steps, every))``.

    Args:
        rank: r of each pair.
        alpha: numerator of the scale.
        every: steps of a pair; 1,000 to 5,000 in the paper.
        prune: share of the optimizer's moments that are forgotten, the smallest.
        links: room for so many pairs, after which there are no more restarts; None for one matrix.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Lialin et al. 2023, arXiv 2307.05695. Deviations: the base is left alone, its change is kept beside it; both
        moments lose the same entries, those of the smallest first moment (its code prunes each for itself); the
        full-rank steps of the beginning are the user's.
    """
    return point(
        axes,
        "relora",
        1e-3,
        Chain(low_rank(rank, alpha), links),
        "Lialin et al. 2023, arXiv 2307.05695",
        ranks=Restarts(every, prune=prune),
    )


def cola_chain(rank: int = 8, alpha: float | None = None, every: int = 1000, links: int = 3, **axes: Any) -> Recipe:
    """Chain of LoRA: ``W + s (B A + sum B_i A_i)``, each pair trained after the one before, with a fresh optimizer.

    Parameters per layer: r (out + in) trained, links times as many stored. Law: a restart leaves the map as it is;
    ``rw.compact`` makes it a LoRA of rank (links + 1) r.

    Args:
        rank: r of each pair.
        alpha: numerator of the scale; None for r.
        every: steps of a pair.
        links: how many pairs come before the last one.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Xia, Qin and Hazan 2024, arXiv 2401.04151. Deviations: the base is left alone; A is uniform.
    """
    return point(
        axes,
        "cola_chain",
        1e-3,
        Chain(low_rank(rank, alpha), links),
        "Xia et al. 2024, arXiv 2401.04151",
        ranks=Restarts(every),
    )


def periodic_lora(
    rank: int = 8,
    alpha: float | None = None,
    every: int = 100,
    keep: float = 0.0,
    links: int | None = None,
    **axes: Any,
) -> Recipe:
    """PeriodicLoRA: many short stages; at the end of each the pair, or all but a share of it, joins the past.

    Parameters per layer: r (out + in) trained; beside them the past. Law: a restart leaves the map as it is.

    Args:
        rank: r of each pair.
        alpha: numerator of the scale; None for r.
        every: steps of a stage.
        keep: share of the update that stays in the pair (the paper's momentum).
        links: room for so many pairs; None for one matrix, for any number.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Meng et al. 2024, arXiv 2402.16141. Deviations: the base is left alone; the form of the momentum is ours, since
        the paper's was not at hand: B keeps its share, A stays.
    """
    return point(
        axes,
        "periodic_lora",
        2e-3,
        Chain(low_rank(rank, alpha), links),
        "Meng et al. 2024, arXiv 2402.16141",
        ranks=Restarts(every, keep),
    )


def xgblora(
    rank: int = 1,
    alpha: float | None = None,
    every: int = 100,
    blocks: int | None = None,
    links: int = 32,
    seed: int = 0,
    **axes: Any,
) -> Recipe:
    """XGBLoRA: boosting with pairs of rank 1, each trained for a few steps in some blocks of the model.

    Parameters per layer: r (out + in) trained, links times as many stored. Law: a restart leaves the map as it is;
    ``rw.compact`` makes it a LoRA of the rank that was used.

    Args:
        rank: r of each pair.
        alpha: numerator of the scale, a learner's shrinkage; None for r.
        every: steps of a pair.
        blocks: how many blocks train at a time, drawn at each restart; None for all.
        links: how many pairs come before the last one.
        seed: of the draws.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Zhang et al. 2024, arXiv 2410.19694. Deviations: the base is left alone; the first pair trains in all blocks.
    """
    return point(
        axes,
        "xgblora",
        2e-3,
        Chain(low_rank(rank, alpha), links),
        "Zhang et al. 2024, arXiv 2410.19694",
        ranks=Restarts(every, blocks=blocks, seed=seed),
    )


def delta_lora(rank: int = 8, alpha: float | None = None, ratio: float = 2.0, start: int = 500, **axes: Any) -> Recipe:
    """Delta-LoRA: W moves too, by ``ratio`` times each step's change of ``s B A``, with no gradient of its own.

    Parameters per layer: r (out + in) trained, as many stored. Law: identity at the start (B = 0). The changes
    telescope, so that the map is ``W + s B A + ratio s (B A - B_K A_K)``, of rank 2 r at most.

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        ratio: lambda.
        start: K, steps before W moves.
        **axes: other axes of :class:`rankwise.Recipe`; no dropout, as in the paper.

    Returns:
        The recipe.

    References:
        Zi et al. 2023, arXiv 2309.02411. Deviation: the base is left alone, its change is kept beside it.
    """
    return point(
        axes,
        "delta_lora",
        5e-4,
        Delta(low_rank(rank, alpha), ratio),
        "Zi et al. 2023, arXiv 2309.02411",
        ranks=Following(start),
    )


def scalora(rank: int = 8, alpha: float | None = None, every: int = 10, bound: float = 1.0, **axes: Any) -> Recipe:
    """ScaLoRA: the pair's columns are scaled to follow the full gradient best, what that changes joins the past.

    Parameters per layer: r (out + in) trained, out in stored. Law: a scaling leaves the map as it is; moments go with
    the gradients, so the optimizer is not reset.

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        every: steps between two scalings.
        bound: the loss's Lipschitz constant times the rate; found by a search in the paper.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Zhang et al. 2025, arXiv 2510.23818. Deviations: the base is left alone; the scales come from the factors after
        the step and the gradients before it.
    """
    return point(
        axes,
        "scalora",
        1e-3,
        Chain(low_rank(rank, alpha)),
        "Zhang et al. 2025, arXiv 2510.23818",
        ranks=Rescaling(every, bound),
    )
