"""Methods that are a structure of more rank than its parameters would buy as a low-rank pair."""

from typing import Any

from rankwise._recipe import Recipe
from rankwise.recipes.point import point
from rankwise.structures import ABBA, BoRA, GLoRA, GraLoRA, MELoRA, MoRA, PRoLoRA, SineLoRA

__all__ = ["abba", "bora", "glora", "gralora", "localized", "melora", "mora", "prolora", "sinelora"]


def abba(rank: int = 8, alpha: float | None = None, iterations: int | None = None, **axes: Any) -> Recipe:
    """ABBA: ``W + s (B1 A1) * (B2 A2)`` elementwise, s = alpha / r.

    Parameters per layer: 2 r (out + in). Law: identity at the start (B2 = 0), B1 A1 the best rank-r approximation of W;
    an exact LoRA of rank r^2.

    Args:
        rank: r of both products; 8 has LoRA's parameters at rank 16.
        alpha: numerator of the scale, what the paper calls alpha^2; None for 8 r, its code's scale by default.
        iterations: power iterations of a randomised SVD of W; None for the exact one.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Singhal et al. 2025, arXiv 2505.14238. Deviation: one rank for both products; the SVD of W is exact, where the
        paper's code takes a randomised one of 10 iterations.
    """
    structure = ABBA(rank, 8.0 * rank if alpha is None else alpha, iterations=iterations)
    return point(axes, "abba", 2e-3, structure, "Singhal et al. 2025, arXiv 2505.14238")


def mora(rank: int = 8, kind: str = "rope", **axes: Any) -> Recipe:
    """MoRA: ``W + D M C``, one trained square matrix M between fixed maps without parameters.

    Parameters per layer: h^2, h = floor(sqrt((out + in) r) + 1/2), made even for "rope". Law: identity at the start
    (M = 0); "sharing" is an exact LoRA of rank h, "rope" is of any rank.

    Args:
        rank: r of the LoRA with as many parameters.
        kind: "rope" (type 6 of the paper's code, for small r) or "sharing" (type 1, for large r).
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Jiang et al. 2024, arXiv 2405.12130. Deviation: never merged during training; the paper does so every few
        thousand steps in pre-training.
    """
    return point(axes, "mora", 3e-4, MoRA(rank, kind), "Jiang et al. 2024, arXiv 2405.12130")


def sinelora(rank: int = 8, alpha: float | None = None, frequency: float = 200.0, **axes: Any) -> Recipe:
    """Sine LoRA: ``W + s / sqrt(in) sin(w B A)`` elementwise, s = alpha / r.

    Parameters per layer: r (out + in). Law: identity at the start (B = 0); of any rank once ``w B A`` is not small, and
    LoRA of scale ``s w / sqrt(in)`` as long as it is.

    Args:
        rank: r of the product inside the sine.
        alpha: numerator of the scale; None for r.
        frequency: w.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Ji et al. 2024, arXiv 2403.19243. Deviation: the paper leaves the frequency to the user; 200 is ours.
    """
    structure = SineLoRA(rank, rank if alpha is None else alpha, frequency=frequency)
    return point(axes, "sinelora", 1e-3, structure, "Ji et al. 2024, arXiv 2403.19243")


def melora(rank: int = 4, blocks: int = 4, alpha: float | None = None, **axes: Any) -> Recipe:
    """MELoRA: ``W + s diag(B_1 A_1 ... B_k A_k)``, a small LoRA for each block of the diagonal, s = alpha / r.

    Parameters per layer: r (out + in). Law: identity at the start (B = 0); an exact LoRA of rank k r.

    Args:
        rank: r of each block.
        blocks: k; divides both sides of every layer.
        alpha: numerator of the scale; None for r.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Ren et al. 2024, arXiv 2402.17263. Deviation: the number of blocks is ours.
    """
    structure = MELoRA(rank, rank if alpha is None else alpha, blocks=blocks)
    return point(axes, "melora", 2e-3, structure, "Ren et al. 2024, arXiv 2402.17263")


def bora(rank: int = 8, blocks: int = 4, alpha: float | None = None, **axes: Any) -> Recipe:
    """BoRA, block diversity: ``W + s [B_i diag(e_ij) A_j]``, a block of the grid for each i and j, s = alpha / r.

    Parameters per layer: r (out + in) + k^2 r. Law: identity at the start (B = 0); an exact LoRA of rank k r, and with
    all e = 1 the LoRA ``B A`` of rank r.

    Args:
        rank: r.
        blocks: k, of either side; divides both sides of every layer.
        alpha: numerator of the scale; None for r.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Li et al. 2025, arXiv 2508.06953. Deviation: e itself is trained, from 1, so that training begins at LoRA; a
        note on the paper says that it trains sigma of ``e = exp(sigma / mean |sigma|)``. The number of blocks is ours.
    """
    structure = BoRA(rank, rank if alpha is None else alpha, blocks=blocks)
    return point(axes, "bora", 2e-3, structure, "Li et al. 2025, arXiv 2508.06953")


def gralora(rank: int = 32, blocks: int = 2, alpha: float | None = None, hybrid: int = 0, **axes: Any) -> Recipe:
    """GraLoRA: ``W + s [B_ij A_ij]``, every block of a k x k grid a LoRA of rank r / k, s = alpha / r.

    Parameters per layer: (r + h) (out + in). Law: identity at the start (B = 0); an exact LoRA of rank k r + h.

    Args:
        rank: r, a multiple of k.
        blocks: k; 2 up to rank 32, 4 from 64 on; divides both sides of every layer.
        alpha: numerator of the scale; None for r.
        hybrid: h, the rank of a LoRA on the whole weight beside the grid, of the same scale; 0 for none.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Jung et al. 2025, arXiv 2505.20355. Deviation: PEFT divides alpha by r + h, here by r.
    """
    structure = GraLoRA(rank, rank if alpha is None else alpha, blocks=blocks, hybrid=hybrid)
    return point(axes, "gralora", 2e-3, structure, "Jung et al. 2025, arXiv 2505.20355")


def localized(rank: int = 2, blocks: int = 4, alpha: float | None = None, **axes: Any) -> Recipe:
    """Localized LoRA: ``W + s [B_ij A_ij]``, every block of a k x k grid a LoRA of rank r, s = alpha / r.

    GraLoRA of rank k r, said by the rank of its blocks.

    Parameters per layer: k r (out + in). Law: identity at the start (B = 0); an exact LoRA of rank k^2 r.

    Args:
        rank: r of each block.
        blocks: k; divides both sides of every layer.
        alpha: numerator of the scale; None for r.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Barazandeh et al. 2025, arXiv 2506.00236. Deviation: blocks of one size and one rank; for the blocks of the
        diagonal alone take melora.
    """
    structure = GraLoRA(rank * blocks, blocks * (rank if alpha is None else alpha), blocks=blocks)
    return point(axes, "localized", 2e-3, structure, "Barazandeh et al. 2025, arXiv 2506.00236")


def glora(rank: int = 8, gate: str = "lora", update: str = "lora", **axes: Any) -> Recipe:
    """GLoRA: ``W + W * A + B`` elementwise, each of A and B a product of rank r, a column, a number or nothing.

    Parameters per layer: of each, r (out + in), out, 1 or 0. Law: identity at the start (A = B = 0); an exact LoRA
    where A is nothing.

    Args:
        rank: r of "lora".
        gate: A: "lora", "vector" (one number a row), "constant" or "none".
        update: B, of the same kinds.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Chavan et al. 2023, arXiv 2306.07967. Deviation: C, D and E, which the paper adds to the bias, are left out:
        ``Sites(train="*.bias")`` trains it whole, which is all that they can do. No evolutionary search for the kinds:
        choose them by site with overrides.
    """
    return point(axes, "glora", 2e-3, GLoRA(rank, gate, update), "Chavan et al. 2023, arXiv 2306.07967")


def prolora(
    rank: int = 16, alpha: float | None = None, unshared: int = 4, shares_out: int = 2, shares_in: int = 2, **axes: Any
) -> Recipe:
    """PRoLoRA: ``W + s B A``, all but u ranks of A and B repeating one chunk, rotated along the rank; s = alpha / r.

    Parameters per layer: u (out + in) + (r - u) (out / k_out + in / k_in). Law: identity at the start (B = 0); an exact
    LoRA of rank r.

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        unshared: u, ranks that are not shared.
        shares_out: k_out, chunks of rows that share; divides the rows of every layer.
        shares_in: k_in, chunks of columns that share; divides the columns of every layer.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Wang et al. 2024, arXiv 2402.16902. Deviation: the strides are ``max((r - u) // k, 1)``, of the ranks that are
        rotated, where a summary of the paper has r; u and k are ours.
    """
    structure = PRoLoRA(
        rank, rank if alpha is None else alpha, unshared=unshared, shares_out=shares_out, shares_in=shares_in
    )
    return point(axes, "prolora", 2e-3, structure, "Wang et al. 2024, arXiv 2402.16902")
