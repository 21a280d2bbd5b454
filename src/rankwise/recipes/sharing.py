"""Methods whose layers have factors in common."""

from typing import Any, Literal

from rankwise._recipe import Recipe
from rankwise.recipes.point import point
from rankwise.structures import NOLA, BSLoRA, PVeRA, RandLoRA, RaSA, ShareLoRA, TiedLoRA, UniLoRA, VBLoRA, VeRA

__all__ = ["bslora", "nola", "pvera", "randlora", "rasa", "share_lora", "tied_lora", "unilora", "vblora", "vera"]


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


def vera(rank: int = 256, start_u: float = 0.1, widths: tuple[int, int] | None = None, **axes: Any) -> Recipe:
    """VeRA: ``W + diag(v) B diag(u) A``, B and A random, frozen, the same in all layers of one shape; u and v trained.

    Parameters per layer: r + out. Law: identity at the start (v = 0); each layer exports as a LoRA of rank r.

    Args:
        rank: r; may be above the layer's sides.
        start_u: where u starts, the paper's d.
        widths: the most outputs and the most inputs of any layer, for one pair that all layers slice, as in PEFT; None
            for a pair for each shape.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Kopiczko et al. 2023, arXiv 2310.11454, eq. 2. Deviation: B and A are stored, not drawn again from a seed, and
        layers of unlike shapes have pairs of their own, unless ``widths`` is given.
    """
    structure = VeRA(rank, None, start_u=start_u, widths=widths)
    return point(axes, "vera", 2e-2, structure, "Kopiczko et al. 2023, arXiv 2310.11454")


def pvera(rank: int = 256, start_u: float = 0.1, widths: tuple[int, int] | None = None, **axes: Any) -> Recipe:
    """PVeRA: VeRA whose latent vector is drawn from a normal distribution while training, and is its mean afterwards.

    Parameters per layer: 2 r + out. Law: identity at the start (v = 0), also while drawing; each layer exports as a
    LoRA of rank r.

    Args:
        rank: r; may be above the layer's sides.
        start_u: where u starts.
        widths: as in VeRA.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Fillioux et al. 2025, arXiv 2512.07703, as in PEFT 0.21.2. Deviation: linear layers alone; no divergence from a
        prior in the loss; no drawing at inference.
    """
    structure = PVeRA(rank, None, start_u=start_u, widths=widths)
    return point(axes, "pvera", 2e-2, structure, "Fillioux et al. 2025, arXiv 2512.07703")


def rasa(rank: int = 16, alpha: float | None = None, given: int = 1, **axes: Any) -> Recipe:
    """RaSA: ``W + [B, B_s] diag(e, e_s) [A; A_s]``, to whose common part each of L layers gives k of its r ranks.

    Parameters per layer: (r - k) (out + in) + r - k + L k, and L k (out + in) once for the L layers: on the average
    r (out + in), as LoRA, and the weights e. Law: identity at the start; each layer exports as a LoRA of rank
    r - k + L k.

    Args:
        rank: r.
        alpha: of the start of e, alpha / (2 (r - k)) and alpha / (2 L k); None for r.
        given: k.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        He et al. 2025, arXiv 2503.12576; the start of e as in its code. Deviation: L is the number of the model's
        blocks, also where some of them are left out of the sites.
    """
    structure = RaSA(rank, float(rank) if alpha is None else alpha, given)
    return point(axes, "rasa", 2e-3, structure, "He et al. 2025, arXiv 2503.12576")


def bslora(
    rank: int = 2,
    intra: int = 4,
    inter: int = 16,
    strength: float = 2.0,
    widths: tuple[int, int] | None = None,
    **axes: Any,
) -> Recipe:
    """BSLoRA: ``W + s (B A + B_i A_i + B_g A_g)``, a pair of the layer, one of its block and one of the whole model.

    Parameters per layer: r (out + in); once a block, r_i, and once a model, r_g times the sum of ``widths`` (without
    them, of every width that occurs). Law: identity at the start; each layer exports as a LoRA of rank r + r_i + r_g.

    Args:
        rank: r of the layer's own pair; 0 for none.
        intra: r_i.
        inter: r_g.
        strength: s.
        widths: the most outputs and the most inputs of any layer, for common pairs that layers of all shapes take the
            middle of; None to share among layers of one width.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Zhou et al. 2025, ICML (PMLR 267:78883), the variant of slice sharing; the ranks are those of its table at half
        of LoRA's size, s that of its code. Deviation: without ``widths`` nothing is cut, and layers of unlike widths
        have nothing in common on that side.
    """
    structure = BSLoRA(rank, intra, inter, strength, widths)
    return point(axes, "bslora", 1e-3, structure, "Zhou et al. 2025, ICML")


def vblora(rank: int = 4, vectors: int = 256, length: int = 256, topk: int = 2, **axes: Any) -> Recipe:
    """VB-LoRA: ``W + B A``, whose pieces of ``length`` numbers are mixtures of k vectors out of one bank.

    Parameters per layer: r (out + in) h / length logits, and h length once, h the number of vectors. Law: each layer
    exports as a LoRA of rank r; the start moves the outputs a little.

    Args:
        rank: r.
        vectors: h.
        length: of a vector; divides every side of every layer.
        topk: k.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Li et al. 2024, arXiv 2405.15179, as in PEFT 0.21.2. Deviation: one learning rate for the bank and the logits,
        where the paper has 1e-3 and 1e-2; all logits are stored, not the top k alone.
    """
    structure = VBLoRA(rank, vectors, length, topk)
    return point(axes, "vblora", 5e-3, structure, "Li et al. 2024, arXiv 2405.15179")


def randlora(rank: int = 32, alpha: float | None = None, **axes: Any) -> Recipe:
    """RandLoRA: ``W + s sum_i B_i L_i A G_i``, B_i and A random and common to the layers of one shape; L and G trained.

    Parameters per layer: N (r + min(out, in)), N = ceil(min(out, in) / r): the smaller r, the more. Law: identity at
    the start (L = 0); of full rank.

    Args:
        rank: r of each basis.
        alpha: numerator of the scale; None for 20 r.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Albert et al. 2025, arXiv 2502.00987. Deviation: B_i goes with L_i and G_i, as in the paper's formula; the
        authors' code and PEFT pair the columns of all B_i with the rows of A in another order. Layers of unlike shapes
        have bases of their own.
    """
    structure = RandLoRA(rank, 20.0 * rank if alpha is None else alpha)
    return point(axes, "randlora", 1e-3, structure, "Albert et al. 2025, arXiv 2502.00987")


def unilora(rank: int = 4, size: int = 4096, **axes: Any) -> Recipe:
    """Uni-LoRA: ``W + B A``, each number of all A and B an entry of one trained vector, by a random isometry.

    Parameters of the whole model: d. Law: the map from the vector to all numbers keeps lengths; each layer exports as a
    LoRA of rank r; the start moves the outputs a little.

    Args:
        rank: r.
        size: d.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Li et al. 2025, arXiv 2506.00799. Deviation: an entry that no number drew is not trained, and the map an
        isometry on the others; the choices are stored (8 bytes a number of A and B), not drawn again from a seed.
    """
    return point(axes, "unilora", 1e-2, UniLoRA(rank, size), "Li et al. 2025, arXiv 2506.00799")


def nola(rank: int = 8, bases: int = 1024, alpha: float | None = None, **axes: Any) -> Recipe:
    """NOLA: ``W + s (sum_j v_j B_j) (A_0 + sum_i u_i A_i)``, all matrices random and fixed; u and v trained.

    Parameters per layer: 2 k, whatever the rank and the layer's sides. Law: identity at the start (v = 0); each layer
    exports as a LoRA of rank r.

    Args:
        rank: r.
        bases: k.
        alpha: numerator of the scale; None for r.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Koohpayegani et al. 2023, arXiv 2310.02556; distributions and start as in its code for LLaMA-2: bases uniform in
        +-1 / sqrt(k), A_0 in +-1 / sqrt(in), u = v = 0. Deviation: the bases come from a hash of their place and a
        stored key, in whole numbers, rather than from PyTorch's generator, which may change. Stored, those of
        LLaMA-2-7B's widths would be 1 GB beside 1.8 MB of u and v; made anew, they take longer than the layer itself
        where k is large.
    """
    structure = NOLA(rank, float(rank) if alpha is None else alpha, bases=bases)
    return point(axes, "nola", 1e-2, structure, "Koohpayegani et al. 2023, arXiv 2310.02556")
