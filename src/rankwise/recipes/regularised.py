"""Methods that are a penalty: what besides the loss shapes LoRA's training."""

from typing import Any, Literal

from rankwise._recipe import Recipe
from rankwise.penalties import Ascent, Balance, Dropout, HiddenKey, Noise, Sharpness
from rankwise.recipes.point import low_rank, point

__all__ = ["bar", "bi_lora", "flat_lora", "hidden_key", "lora_dropout", "lora_sam"]


def bar(
    rank: int = 16,
    alpha: float | None = None,
    by: Literal["gradient", "size"] = "gradient",
    strength: float = 0.5,
    steps: int | None = None,
    **axes: Any,
) -> Recipe:
    """BAR: LoRA whose factors are kept in balance, by ``1 +- strength * lr`` before each step.

    nBAR ("gradient") lets the factor of the larger gradient grow, oBAR ("size") lets the larger factor shrink; the
    other one does the opposite. Parameters per layer: r (out + in). Law: B A changes by its (strength lr)^2 only.

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        by: "gradient" for nBAR, "size" for oBAR.
        strength: coefficient of the balance; the paper takes 0.2 to 2.
        steps: optimizer steps over which it falls to zero, linearly; None keeps it.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Li et al. 2024, arXiv 2410.14802, Algorithms 2 and 3. Deviation: with two learning rates (LoRA+) each factor
        takes its own; the paper has one.
    """
    penalty = Balance(by, strength, steps)
    structure = low_rank(rank, alpha)
    return point(axes, "bar", 2e-3, structure, "Li et al. 2024, arXiv 2410.14802", penalties=(penalty,))


def lora_sam(rank: int = 16, alpha: float | None = None, rho: float = 0.05, **axes: Any) -> Recipe:
    """LoRA-SAM: the gradient at ``f + rho g / |g|``, g over all factors of all layers.

    Parameters per layer: r (out + in). Law: the factors come back to the bit before the step. A step takes two forwards
    and backwards; a loop of your own calls ``rankwise.penalties.backward``.

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        rho: radius.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Foret et al. 2020, arXiv 2010.01412; Li et al. 2024, arXiv 2410.14802. Deviation: under gradient accumulation
        each micro-batch has its own perturbation.
    """
    structure = low_rank(rank, alpha)
    return point(axes, "lora_sam", 2e-3, structure, "Foret et al. 2020, arXiv 2010.01412", penalties=(Sharpness(rho),))


def flat_lora(
    rank: int = 16, alpha: float | None = None, sigma: float = 0.05, steps: int | None = None, **axes: Any
) -> Recipe:
    """Flat-LoRA: gradients at ``W' + E``, ``E_ij ~ N(0, sigma^2 |W'_i|^2 / n)``, W' = W + s B A of n columns.

    Parameters per layer: r (out + in). Law: W is never written; one noise a step, from a seed, so a resumed run draws
    it again. A loop of your own calls ``rankwise.penalties.backward``.

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        sigma: strength of the noise; 0.05 in the paper, 0.15 for images.
        steps: optimizer steps of the run, over which it rises from zero as in the paper; None for all of it at once.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Li et al. 2024, arXiv 2409.14396, Eq. 7. Deviation: the noise is multiplied beside W and not added to it, which
        takes one more product a layer and keeps a low-precision or quantised base as it is.
    """
    noise, structure = Noise(sigma, steps), low_rank(rank, alpha)
    return point(axes, "flat_lora", 2e-3, structure, "Li et al. 2024, arXiv 2409.14396", penalties=(noise,))


def bi_lora(
    rank: int = 8, alpha: float | None = None, rho: float = 0.05, second: int | None = None, **axes: Any
) -> Recipe:
    """Bi-LoRA: ``W + s B A + s B2 A2``, of which the second pair climbs the loss within a ball of radius rho.

    Parameters per layer: r (out + in), and as many while training. Law: the second pairs never reach a weight that is
    evaluated, saved, exported or merged. Checkpoints of ``rw.hf.Trainer`` have them; an adapter that is loaded goes on
    without.

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        rho: radius of all second pairs together; the paper takes 0.05 to 0.1.
        second: rank of the second pairs; None for r.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Liu et al. 2025, arXiv 2508.19564, Eq. 7 to 10. Deviation: the scale s counts in the radius, for it counts in
        the weight.
    """
    climb, structure = Ascent(rho, second), low_rank(rank, alpha)
    return point(axes, "bi_lora", 2e-3, structure, "Liu et al. 2025, arXiv 2508.19564", penalties=(climb,))


def lora_dropout(rank: int = 16, alpha: float | None = None, p: float = 0.5, **axes: Any) -> Recipe:
    """LoRA Dropout: ``W + s (D_out B) (A D_in)``, random inputs of A and outputs of B left out at each forward.

    Parameters per layer: r (out + in). Law: the expected update is the served one; the rank is never cut.

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        p: probability, on either side.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Lin et al. 2024, arXiv 2404.09610. Deviation: what stays is scaled up, as in dropout; the paper's masks are
        zeros and ones, and its ensemble over masks at test time is not here.
    """
    dropout, structure = Dropout(p, "sides"), low_rank(rank, alpha)
    return point(axes, "lora_dropout", 2e-3, structure, "Lin et al. 2024, arXiv 2404.09610", dropout=dropout)


def hidden_key(
    rank: int = 16, alpha: float | None = None, keys: float = 0.1, hidden: float = 0.1, agree: float = 1.0, **axes: Any
) -> Recipe:
    """HiddenKey: LoRA under dropout of attention's keys and of the feed-forward outputs, two such passes in agreement.

    Parameters per layer: r (out + in). Law: the model is the base's once a step is over. For transformers' models; a
    loop of your own calls ``rankwise.penalties.backward``.

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        keys: probability with which a token is no key of a layer's self-attention.
        hidden: probability for each entry that a feed-forward network returns.
        agree: weight of the symmetric Kullback-Leibler divergence between two passes, which a step then takes; 0 for
            one pass.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Wang et al. 2024, arXiv 2403.00812, Figure 3: columns of attention logits, elements of hidden representations,
        bidirectional divergence. Li et al. 2022, arXiv 2208.02646; Chen et al. 2021, arXiv 2106.00149, Figure 1: after
        the feed-forward network of every layer. Deviations: a key is left out for all heads of a layer at once, and
        never for its own token; the three strengths are ours, the paper's could not be read.
    """
    penalty, structure = HiddenKey(keys, hidden, agree), low_rank(rank, alpha)
    return point(axes, "hidden_key", 2e-3, structure, "Wang et al. 2024, arXiv 2403.00812", penalties=(penalty,))
