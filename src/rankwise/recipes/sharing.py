"""Methods whose layers have factors in common."""

from typing import Any, Literal

from rankwise._recipe import Recipe
from rankwise.recipes.point import point
from rankwise.structures import ShareLoRA, TiedLoRA, VeRA

__all__ = ["share_lora", "tied_lora", "vera"]


def share_lora(
    rank: int = 16, alpha: float | None = None, share: Literal["a", "b", "both"] = "a", **axes: Any
) -> Recipe:
    """ShareLoRA: ``W + s B A`` with A (or B, or both) the same in all layers of one width.

    Parameters per layer: r out for each, and r in once for all layers that read as many inputs. Law: identity at the
    start (B = 0); each layer exports as a LoRA of rank r.

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        share: the side that is shared, "a", "b" or "both".
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Song et al. 2024, arXiv 2406.10785.
    """
    structure = ShareLoRA(rank, float(rank) if alpha is None else alpha, share=share)
    return point(axes, "share_lora", 2e-3, structure, "Song et al. 2024, arXiv 2406.10785")


def tied_lora(rank: int = 16, alpha: float | None = None, **axes: Any) -> Recipe:
    """Tied-LoRA: ``W + s diag(v) B diag(u) A``, B and A trained and the same in all layers of one shape.

    Parameters per layer: r + out, and r (out + in) once for all layers of the shape. Law: identity at the start;
    each layer exports as a LoRA of rank r.

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Renduchintala et al. 2023, arXiv 2311.09578 (its variant that trains all four). Deviation: the paper ties the
        fused projections of attention; here layers of one shape are tied.
    """
    structure = TiedLoRA(rank, float(rank) if alpha is None else alpha)
    return point(axes, "tied_lora", 2e-3, structure, "Renduchintala et al. 2023, arXiv 2311.09578")


def vera(rank: int = 256, start_u: float = 0.1, **axes: Any) -> Recipe:
    """VeRA: ``W + diag(v) B diag(u) A``, B and A random, frozen, the same in all layers of one shape; u and v trained.

    Parameters per layer: r + out. Law: identity at the start (v = 0); each layer exports as a LoRA of rank r.

    Args:
        rank: r.
        start_u: where u starts, the paper's d.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Kopiczko et al. 2023, arXiv 2310.11454, eq. 2. Deviation: B and A are stored, not drawn again from a seed, and
        layers of unlike shapes have pairs of their own.
    """
    return point(axes, "vera", 2e-2, VeRA(rank, None, start_u=start_u), "Kopiczko et al. 2023, arXiv 2310.11454")
