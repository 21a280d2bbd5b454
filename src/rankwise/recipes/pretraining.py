"""Methods for training from scratch, whose factors are the weight; see also :mod:`rankwise.recipes.projected`."""

from typing import Any

from rankwise._recipe import Recipe
from rankwise.inits import Xavier
from rankwise.recipes.point import point
from rankwise.solvers import LORO
from rankwise.structures import LowRankActivation, LowRankWeight, SparseLowRank

__all__ = ["cola_act", "loro", "sltrain"]


def sltrain(rank: int = 128, alpha: float | None = None, density: float = 0.03, **axes: Any) -> Recipe:
    """SLTrain: the weight is ``s B A + S``, S sparse on a support drawn once, instead of W.

    Parameters per layer: r (out + in) + density out in, and the places of the latter, 8 bytes each, not trained.
    Law: W' - S has rank r at most. Memory: S is formed dense in forward and again in backward, as in the authors' code,
    and never kept; the base's W stays beside it, unused.

    Args:
        rank: r; a quarter of the width in the paper.
        alpha: numerator of the scale alpha/r; None for r/4, the paper's 32 at rank 128.
        density: share of W's entries in S.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Han, Li, Huang, Hong, Takeda, Jawanpuria, Mishra 2024, arXiv 2406.02214. Deviation: a support has at least one
        place. The start is not the base's: as in the paper B is zero, A Kaiming's and S uniform within +-1/sqrt(in).
    """
    structure = SparseLowRank(rank, rank / 4 if alpha is None else alpha, density)
    return point(axes, "sltrain", 3e-3, structure, "Han et al. 2024, arXiv 2406.02214")


def loro(rank: int = 128, every: int = 500, lazy: float | None = None, **axes: Any) -> Recipe:
    """LORO: the weight is ``B A`` instead of W, and every K-th step goes along the manifold of matrices of rank r.

    Parameters per layer: r (out + in). Values of state: twice that. Law: a K-th step takes B A to the truncated SVD of
    B A - lr T, T in the tangent space at B A.

    Args:
        rank: r; a quarter of the width in the authors' scripts.
        every: K.
        lazy: what the steps between are multiplied with; None for r over a factor's longer side.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Mo, Huang, Pan 2025, ICLR (OpenReview i0zzO7Hslk), by the authors' code: Adam's quotient stands for the
        gradient in both kinds of step, and its moments start anew after a K-th one. Deviation: the code starts all
        moments anew, those of embeddings and norms too, and pairs this with a rate that warms up again.
    """
    paper = "Mo, Huang, Pan 2025, ICLR"
    return point(axes, "loro", 1e-2, LowRankWeight(rank), paper, init=Xavier(), solver=LORO(every, lazy))


def cola_act(rank: int = 128, **axes: Any) -> Recipe:
    """CoLA: every linear layer becomes ``B silu(A x)``, an auto-encoder of its output.

    Parameters per layer: r (out + in). Law: at most r directions of the output move. There is no weight to merge.

    Args:
        rank: r; a quarter of the width in the paper.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Liu, Zhang, Wang, et al. 2025, arXiv 2502.10940. Deviation: the paper's Llama leaves out some of the model's own
        functions where these stand before; here the model's own stay, since an adapter changes layers alone.
    """
    return point(axes, "cola_act", 6e-3, LowRankActivation(rank), "Liu et al. 2025, arXiv 2502.10940")
