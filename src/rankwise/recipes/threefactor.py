"""Methods of three factors: a core between frames of W's own singular vectors, or of free ones."""

from typing import Any, Literal

from rankwise._recipe import Recipe
from rankwise.inits import Orthogonal, Principal
from rankwise.penalties import OrthonormalPull, SingularValues
from rankwise.recipes.point import point
from rankwise.solvers import Landing, StelLA
from rankwise.structures import SVFT, Anchored, Gated, LoRAFA, SVDForm, ThreeFactor, TinyLoRA, Truncated

__all__ = ["asym_lora", "kasa", "polar", "sorsa", "stella", "svft", "tinylora"]


def svft(pattern: Literal["banded", "random", "top_k"] = "banded", width: int = 0, **axes: Any) -> Recipe:
    """SVFT: ``U (S + M) V^T`` of W's full SVD, with a sparse M between all pairs of singular vectors.

    Parameters per layer: k (2 d + 1) - d (d + 1), k = min(out, in); stored: U and V, for a square W twice its size.
    Law: identity at the start (M = 0).

    Args:
        pattern: where M has entries: a band, anywhere at random, or where the singular vectors are aligned most.
        width: d, as many diagonals on either side of the main one; 0 is SVFT-plain with "banded".
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Lingam et al. 2024, arXiv 2405.19597. Deviation: M starts at zero and has no gate, which the code draws and
        multiplies by the sigmoid of a trained number; random places are drawn without repetition; alignments
        count by their absolute value.
    """
    return point(axes, "svft", 5e-2, SVFT(pattern, width), "Lingam et al. 2024, arXiv 2405.19597")


def polar(rank: int = 16, alpha: float | None = None, strength: float = 5e-3, **axes: Any) -> Recipe:
    """PoLAR: ``W + s X C Y^T``, X and Y kept near orthonormal columns by the landing field, C free.

    Parameters per layer: r (out + in) + r^2. Law: identity at the start (C = 0); X^T X and Y^T Y are drawn to I.

    Args:
        rank: r; 4 to 32 in the paper.
        alpha: numerator of the scale; None for r. 32 in the paper.
        strength: lambda, of the pull back to orthonormal columns.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Lion, Zhang, Li, He 2025, arXiv 2506.03133.
    """
    structure = ThreeFactor(rank, rank if alpha is None else alpha)
    return point(axes, "polar", 4e-3, structure, "Lion et al. 2025, arXiv 2506.03133", solver=Landing(strength))


def stella(
    rank: int = 16, alpha: float | None = None, diagonal: bool = False, width: float | None = None, **axes: Any
) -> Recipe:
    """StelLA: ``W + s U C V^T``, U and V with orthonormal columns: Adam in the tangent space, retracted.

    Parameters per layer: r (out + in) + r^2, or + r with ``diagonal``. Law: identity at the start (C = 0); U^T U = I
    and V^T V = I after every step, to rounding.

    Args:
        rank: r; 32 in the paper.
        alpha: numerator of the scale; None for 2 r, the paper's ratio.
        diagonal: C is diagonal.
        width: c of the paper's gradient scaling, the model's width; None for no scaling.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Li, Sajadmanesh, Li, Lyu 2025, arXiv 2510.01938. Deviation: C starts at zero and not at I, which moves W; the
        exponential map and the starts at W's singular vectors are not here.
    """
    structure = ThreeFactor(rank, 2 * rank if alpha is None else alpha, diagonal=diagonal)
    return point(axes, "stella", 5e-4, structure, "Li et al. 2025, arXiv 2510.01938", solver=StelLA(width))


def sorsa(
    rank: int = 16, alpha: float | None = None, gamma: float = 4e-4, iterations: int | None = None, **axes: Any
) -> Recipe:
    """SORSA: ``W + s (B diag(e) A - B0 diag(e0) A0)`` from W's r leading triplets, B and A drawn to orthonormal.

    Parameters per layer: r (out + in + 1) trained, as many stored. Law: identity at the start up to rounding; the
    pull has a step of its own, gamma, whatever the learning rate.

    Args:
        rank: r; 128 in the paper.
        alpha: numerator of the scale; None for r (scale 1).
        gamma: step of the pull on the mean of ``|A A^T - I|`` and ``|B^T B - I|`` over all factors.
        iterations: of the randomised SVD (4 to 16); None for the exact one.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Cao 2024, arXiv 2409.00055. Deviation: the start is anchored, not cut out of W.
    """
    return point(
        axes,
        "sorsa",
        5e-4,
        Anchored(SVDForm(rank, rank if alpha is None else alpha)),
        "Cao 2024, arXiv 2409.00055",
        init=Principal(iterations),
        penalties=(OrthonormalPull(gamma),),
    )


def kasa(rank: int = 16, alpha: float | None = None, beta: float = 1e-4, gamma: float = 1e-3, **axes: Any) -> Recipe:
    """KaSA: W without its r smallest singular values, plus ``s B diag(e) A``.

    Parameters per layer: r (out + in + 1) trained, r (out + in) stored. Law: moves at the start, by the r smallest
    singular values and no more; an exact LoRA of rank 2 r.

    Args:
        rank: r, below the smaller side of the layer.
        alpha: numerator of the scale; None for r (scale 1).
        beta: weight of ``|e|^2``, summed over layers.
        gamma: weight of ``|A A^T - I| + |B^T B - I|``, summed over layers.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Wang et al. 2024, arXiv 2412.06071. Deviation: what is dropped from W is subtracted by the adapter, not cut out
        of W; under dropout it sees the dropped input, as the update does.
    """
    return point(
        axes,
        "kasa",
        5e-4,
        Truncated(Gated(rank, rank if alpha is None else alpha), rank),
        "Wang et al. 2024, arXiv 2412.06071",
        penalties=(SingularValues(beta, gamma),),
    )


def asym_lora(rank: int = 32, alpha: float | None = None, **axes: Any) -> Recipe:
    """Asymmetry LoRA: ``W + s B A``, A frozen with random orthonormal rows, B trained.

    Parameters per layer: r out trained, r in stored. Law: identity at the start (B = 0); at twice LoRA's rank as many
    parameters.

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Zhu et al. 2024, arXiv 2402.16842.
    """
    structure = LoRAFA(rank, rank if alpha is None else alpha)
    return point(axes, "asym_lora", 2e-3, structure, "Zhu et al. 2024, arXiv 2402.16842", init=Orthogonal())


def tinylora(rank: int = 2, size: int = 64, alpha: float | None = None, **axes: Any) -> Recipe:
    """TinyLoRA: ``W + s U S (sum_i v_i P_i) V^T`` with W's leading triplets, random P_i and a trained v.

    Parameters per layer: u, down to one; r (out + in) + u r^2 stored. Law: identity at the start (v = 0).

    Args:
        rank: r; 2 in the paper.
        size: u, the entries of v; more than r^2 reach nothing new.
        alpha: numerator of the scale; None for r (scale 1).
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Morris et al. 2026, arXiv 2602.04118. Deviation: every layer has its own v, the paper also shares it between
        layers; P_i is normal of variance 1/r, as in PEFT: the paper does not say its distribution.
    """
    structure = TinyLoRA(rank, rank if alpha is None else alpha, size=size)
    return point(axes, "tinylora", 1e-2, structure, "Morris et al. 2026, arXiv 2602.04118")
