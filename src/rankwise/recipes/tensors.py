"""Methods that hold an update as a tensor in a compressed format."""

from typing import Any

from rankwise._recipe import Recipe
from rankwise.recipes.point import point
from rankwise.structures import Anchored, LoRETTA, QuanTA, TTLoRA

__all__ = ["loretta", "quanta", "tt_lora"]


def tt_lora(rank: int = 5, alpha: float = 1.0, out_modes: Any = 3, in_modes: Any = 3, **axes: Any) -> Recipe:
    """TT-LoRA: ``W + alpha reshape(TT(G_1 ... G_D), (out, in))``, a train over the modes of out and of in.

    Parameters per layer: the sum of r_{k-1} n_k r_k over all modes n_k, r_0 = r_D = 1 and r_k = r between. Law: a plain
    LoRA of rank r, the bond at the cut between the two sides; identity at the start.

    Args:
        rank: of every bond.
        alpha: the scale.
        out_modes: modes of out, a tuple; or how many balanced ones.
        in_modes: modes of in.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Anjum et al. 2024, arXiv 2408.01008. Deviation: the last core of the out side starts at zero; the code starts
        from the train of a random matrix, and moves the model.
    """
    structure = TTLoRA(rank, alpha, out_modes, in_modes)
    return point(axes, "tt_lora", 4e-3, structure, "Anjum et al. 2024, arXiv 2408.01008")


def loretta(
    rank: int = 8, bond: int = 5, alpha: float | None = None, out_modes: Any = 3, in_modes: Any = 3, **axes: Any
) -> Recipe:
    """LoRETTA_rep: ``W + s B A``, s = alpha / r, B over the modes (out, r) and A over (r, in) each a tensor train.

    Parameters per layer: the sum of R_{k-1} n_k R_k over the modes of out and r, and over r and the modes of in, R the
    bond inside a train and 1 at its ends. Law: a plain LoRA of rank min(r, R); identity at the start (last core of B).

    Args:
        rank: r.
        bond: R.
        alpha: numerator of the scale; None for r.
        out_modes: modes of out, a tuple; or how many balanced ones.
        in_modes: modes of in.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Yang et al. 2024, arXiv 2402.11417. Deviation: the last core of B starts at zero, of which the code has none; r
        is one mode of its own, where the code has tables of modes for known widths.
    """
    structure = LoRETTA(rank, bond, rank if alpha is None else alpha, out_modes, in_modes)
    return point(axes, "loretta", 4e-3, structure, "Yang et al. 2024, arXiv 2402.11417")


def quanta(modes: Any = 4, **axes: Any) -> Recipe:
    """QuanTA: ``W + T(theta) - T(theta_0)``, T a product of gates, one on each pair of axes of the reshaped inputs.

    Parameters per layer: the sum of (d_i d_j)^2 over pairs of axes. Law: identity at the start up to rounding; of full
    rank. T is applied gate by gate.

    Args:
        modes: d_1 ... d_N, whose product is at least the larger side; or how many even ones.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Chen et al. 2024, arXiv 2406.00132. Deviation: theta_0 is stored and subtracted, where the code writes
        ``W - T(theta_0)`` to the base. As there, inputs are padded with zeros to d_1 ... d_N and outputs cut.
    """
    return point(axes, "quanta", 1e-3, Anchored(QuanTA(modes)), "Chen et al. 2024, arXiv 2406.00132")
