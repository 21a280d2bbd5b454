"""Methods that hold an update as a tensor in a compressed format."""

from typing import Any

from rankwise._recipe import Recipe
from rankwise.inits import Orthogonal
from rankwise.recipes.point import point
from rankwise.structures import Anchored, CaRA, FacTTK, FacTTT, LoRETTA, LoRTA, LoTR, MetaTT, QuanTA, TTLoRA

__all__ = ["cara", "fact_tk", "fact_tt", "loretta", "lorta", "lotr", "metatt", "quanta", "tt_lora"]

_QKV = CaRA.attention


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


def fact_tt(rank: int = 8, alpha: float = 1.0, width: int | None = None, **axes: Any) -> Recipe:
    """FacT-TT: ``W + s V S U`` in each square block, S the matrix's own, V and U the same in all matrices.

    Parameters of the model: 2 d r, and p q r^2 for a matrix of p x q blocks: 12 L r^2 for a transformer of L layers and
    width d, four blocks in each matrix of its MLP. Law: identity at the start (V = 0); a LoRA of rank min(p, q) r.

    Args:
        rank: r.
        alpha: the scale s; the paper searches 0.01 to 100.
        width: d; None for the smaller side of each layer where it divides the larger one, and else the layer is one
            block. Sides of unlike widths have V and U of their own.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Jie and Deng 2022, arXiv 2212.03145 (AAAI 2023). Deviation: dropout is on the input, in the code on U x.
    """
    return point(axes, "fact_tt", 1e-3, FacTTT(rank, alpha, width), "Jie and Deng 2022, arXiv 2212.03145")


def fact_tk(rank: int = 8, alpha: float = 1.0, width: int | None = None, **axes: Any) -> Recipe:
    """FacT-TK: ``W + s V (sum_t p_t C_t) U`` in each square block, p the block's own, C, V and U of all matrices.

    Parameters of the model: 2 d r + r^3, and r for each block: 12 L r for a transformer of L layers. Law: as FacT-TT.

    Args:
        rank: r.
        alpha: the scale s.
        width: as for ``fact_tt``.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Jie and Deng 2022, arXiv 2212.03145 (AAAI 2023). Deviation: p and C are drawn as the init draws, in the code by
        Xavier's rule; dropout as for ``fact_tt``.
    """
    return point(axes, "fact_tk", 1e-3, FacTTK(rank, alpha, width), "Jie and Deng 2022, arXiv 2212.03145")


def lotr(rank: int = 16, alpha: float | None = None, **axes: Any) -> Recipe:
    """LoTR: ``W + s L M R``, s = alpha / r, M the layer's own, L and R the same in all layers of a role.

    Parameters of the model: r (out + in) for each role, and r^2 for each matrix. Law: identity at the start (M = 0); a
    plain LoRA of rank r.

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Bershatsky et al. 2024, arXiv 2402.01376. The example of its code has one L and R for query and value; here, as
        for the tensor of one role's layers, each role has its own.
    """
    structure = LoTR(rank, rank if alpha is None else alpha)
    return point(axes, "lotr", 1e-3, structure, "Bershatsky et al. 2024, arXiv 2402.01376")


def lorta(rank: int = 8, alpha: float = 1.0, heads: int = 8, **axes: Any) -> Recipe:
    """LoRTA: ``W + alpha B diag(h * l * q) A`` in the rows of each head: a CP tensor of five modes.

    Parameters of the model: r (d + d / H + H + L + M), d the width, H heads, L layers, M roles; sides of unlike widths
    have an A, B and h of their own. Law: identity at the start (B = 0); a plain LoRA of rank r.

    Args:
        rank: r.
        alpha: the scale.
        heads: H; where it does not divide a layer's outputs, the largest divisor below it.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Hounie et al. 2024, arXiv 2410.04060. Heads are rows of every matrix, that after attention included, as its code
        concatenates them. The branch with a preconditioner is not here.
    """
    return point(axes, "lorta", 4e-3, LoRTA(rank, alpha, heads), "Hounie et al. 2024, arXiv 2410.04060")


def cara(rank: int = 16, alpha: float = 1.0, heads: int = 8, attention: Any = _QKV, **axes: Any) -> Recipe:
    """CaRA: ``W + s CP``, one CP tensor over matrices, inputs, heads and rows of a head, and one over all other blocks.

    Parameters of the model: r (3 L + d + H + d / H) for attention's projections, r (9 L + 2 d) for the rest of a
    transformer of width d with MLPs of 4 d, and 2 r weights. Law: identity at the start; a plain LoRA of rank r.

    Args:
        rank: r.
        alpha: the scale s.
        heads: H; where it does not divide a layer's outputs, the largest divisor below it.
        attention: roles of the projections in front of attention.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Veeramacheneni et al. 2025, ICML. Deviation: its three shared biases are not added; ``Sites(train="*bias")``
        trains those that the layers have. Dropout is on the input, in the code on the update's matrix; rows k are drawn
        as unit vectors, in the code by Xavier's rule. A fused qkv is one matrix here, three there.
    """
    structure = CaRA(rank, alpha, heads, tuple(attention))
    return point(axes, "cara", 1e-3, structure, "Veeramacheneni et al. 2025, ICML", init=Orthogonal())


def metatt(
    rank: int = 8, alpha: float = 1.0, heads: int | None = None, tasks: int | None = None, **axes: Any
) -> Recipe:
    """MetaTT: ``W + alpha B R_q L_l A``, a tensor train over rows, roles, layers and columns (4-D).

    With ``heads`` (5-D) a core (r, r) for each head stands between B and R_q, and B has the rows of one head. With
    ``tasks`` a core for each task stands between R_q and L_l; the untrained factor "chosen" (tasks,), one tensor for
    all layers, weighs them. Write a 1 at the task of a batch to train or serve it: ``adapter[site]["chosen"]``.

    Parameters of the model: 4-D r (out + in) + (L + M) r^2, 5-D r (out / H + in) + (L + M + H) r^2, and r^2 a task; L
    layers, M roles; sides of unlike widths have a B, A and head cores of their own. Law: identity at the start (B = 0,
    cores at the identity); a plain LoRA of rank r.

    Args:
        rank: r of every bond.
        alpha: the scale.
        heads: H, or None; where it does not divide a layer's outputs, the largest divisor below it.
        tasks: how many, or None.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Lopez-Piqueres et al. 2025, arXiv 2506.09105. Only its abstract could be read: the order of the cores, the start
        and the default of alpha are of second hand. Its sweeps that adapt the ranks are not here.
    """
    structure = MetaTT(rank, alpha, heads, tasks)
    return point(axes, "metatt", 1e-3, structure, "Lopez-Piqueres et al. 2025, arXiv 2506.09105")
