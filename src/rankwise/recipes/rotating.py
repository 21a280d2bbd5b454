"""Methods that rotate, reflect or scale a layer, that bound its update, or share one shard of it."""

from typing import Any, Literal

from rankwise._recipe import Recipe
from rankwise.recipes.point import point
from rankwise.structures import BOFT, HRA, IA3, PSOFT, Anchored, Bat, BlockLoRA, DeLoRA, MiSS, RoAd

__all__ = ["bat", "bd_lora", "boft", "delora", "hra", "ia3", "miss", "psoft", "road"]


def boft(block: int = 8, levels: int = 2, scaled: bool = False, **axes: Any) -> Recipe:
    """BOFT: ``diag(s) W R_1 ... R_m``, each R_i Cayley rotations of interleaved blocks: a block butterfly.

    Parameters per layer: m in (b - 1) / 2, and out more for s. Law: identity at the start (Q = 0, s = 1); without s the
    angles between the rows of W, and their norms, are kept.

    Args:
        block: b; the largest one not above it is taken of which 2^(m-1) divide ``in``, an even one unless m is 1.
        levels: m; log2(in / b) + 1 of them reach every output from every input.
        scaled: train s, a scale of every output, as PEFT always does.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Liu et al. 2023, arXiv 2311.06243. Deviation: no multiplicative dropout.
    """
    return point(axes, "boft", 2e-3, BOFT(block, levels, scaled), "Liu et al. 2023, arXiv 2311.06243")


def hra(rank: int = 8, **axes: Any) -> Recipe:
    """HRA: ``W H_1 ... H_r``, Householder reflections ``H_i = I - 2 u_i u_i^T / |u_i|^2``.

    Parameters per layer: r in. Law: identity at the start up to rounding (the u_i in equal pairs); W R has the singular
    values of W, and differs from W by rank r.

    Args:
        rank: r, even.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Yuan et al. 2024, arXiv 2405.17484. Deviation: neither the penalty on ``U^T U - I`` nor its strict limit, the
        Gram-Schmidt variant.
    """
    return point(axes, "hra", 2e-3, HRA(rank), "Yuan et al. 2024, arXiv 2405.17484")


def psoft(rank: int = 32, terms: int | None = None, relaxed: bool = True, **axes: Any) -> Recipe:
    """PSOFT: ``W + B (diag(p) R diag(q) - I) A``, R a rotation of the r leading singular directions of W.

    Parameters per layer: r (r - 1) / 2 + 2 r. Law: identity at the start (R = I, p = q = 1); with p = q = 1 the Gram
    matrix of the principal part's columns is kept; exact LoRA of rank r.

    Args:
        rank: r.
        terms: of the Neumann series; None for the exact inverse (the paper sums 5).
        relaxed: train p and q.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Wu et al. 2025, arXiv 2505.11235.
    """
    return point(axes, "psoft", 4e-3, PSOFT(rank, terms, relaxed), "Wu et al. 2025, arXiv 2505.11235")


def ia3(side: Literal["out", "in"] = "out", **axes: Any) -> Recipe:
    """IA3: ``diag(l) W``, or ``W diag(l)``: a trained scale of each output, or of each input.

    Parameters per layer: out, or in. Law: identity at the start (l = 1).

    Args:
        side: "out" or "in".
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    Examples:
        The paper's sites: keys, values and the inputs of the second feed-forward layer.

        >>> from rankwise import Sites
        >>> sites = Sites(("k_proj", "v_proj", "down_proj"), overrides={"down_proj": {"side": "in"}})
        >>> ia3(sites=sites).structure
        IA3(side='out')

    References:
        Liu et al. 2022, arXiv 2205.05638. Deviation: by default every linear layer, at its outputs; a bias is not
        scaled; the inputs of a convolution are scaled position by position of its kernel.
    """
    return point(axes, "ia3", 1e-2, IA3(side), "Liu et al. 2022, arXiv 2205.05638")


def road(variant: Literal[1, 2, 4] = 1, group: int = 64, **axes: Any) -> Recipe:
    """RoAd: ``R W``, R a turn by theta and a scale alpha of each pair of outputs.

    Parameters per layer: variant * out. Law: identity at the start (theta = 0, alpha = 1); in variant 1 with alpha = 1
    the norm of the output is kept.

    Args:
        variant: 1, one theta and alpha a pair; 2, one an output; 4, one an entry of the 2 x 2 matrices.
        group: in each group of so many outputs the first half is paired with the second; 2 for neighbours.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Liao and Monz 2024, arXiv 2409.00119. Deviation: pairs within groups of 64, as in PEFT, not neighbours; a bias
        is not turned.
    """
    return point(axes, "road", 5e-3, RoAd(variant, group), "Liao and Monz 2024, arXiv 2409.00119")


def delora(rank: int = 8, strength: float = 15.0, from_zero: bool = False, **axes: Any) -> Recipe:
    """DeLoRA: ``W - D_0 + D``, ``D = l/r B diag(1 / (|b_i| |a_i|)) A diag(|w_j|)``, w_j W's columns; D_0 its start.

    Parameters per layer: r (out + in) + 1. Law: identity at the start up to rounding; the norm of D is at most l times
    the largest |w_j|, whatever A and B; exact LoRA of rank 2 r, of r from zero.

    Args:
        rank: r.
        strength: l at the start.
        from_zero: start with B = 0 and without D_0, as PEFT does, a length below 1e-4 counting as that. Once B is not
            zero D has its full size, so that the first step is a large one.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Bini et al. 2025, arXiv 2503.18225. Deviation: the norms of W's columns in place of the norm of W, as in PEFT.
    """
    inner = DeLoRA(rank, strength, from_zero)
    return point(axes, "delora", 1e-3, inner if from_zero else Anchored(inner), "Bini et al. 2025, arXiv 2503.18225")


def miss(rank: int = 64, shard: int | None = None, **axes: Any) -> Recipe:
    """MiSS (Bone): ``W + B [I I ... I]``: one shard B (out, r) for every r columns of W.

    Parameters per layer: r out; r shard with a shard. Law: identity at the start (B = 0); exact LoRA of rank r.

    Args:
        rank: r.
        shard: rows of B that are trained, and repeated to fill ``out`` ("mini" in PEFT); None for all.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Kang and Yin 2024, arXiv 2409.15371, its efficient form. The shard of few rows is PEFT's. Deviation: it runs as
        a LoRA whose A holds zeros and ones, not by sums of the input.
    """
    return point(axes, "miss", 1e-3, MiSS(rank, shard), "Kang and Yin 2024, arXiv 2409.15371")


def bat(rank: int = 64, **axes: Any) -> Recipe:
    """Bat: ``W_ij + W_ij D_i + D_i`` on the r x r blocks of W: MiSS's shard, guided by W.

    Parameters per layer: r out. Law: identity at the start (D = 0); an update of any rank.

    Args:
        rank: r, which divides both sides of W.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Kang 2024, arXiv 2409.15371, versions 5 to 7; written from PEFT 0.21.2. The update is formed, (out, in), in
        every step.
    """
    return point(axes, "bat", 1e-3, Bat(rank), "Kang 2024, arXiv 2409.15371")


def bd_lora(
    rank: int = 16, alpha: float | None = None, blocks: int = 2, side: Literal["a", "b"] = "b", **axes: Any
) -> Recipe:
    """BD-LoRA: ``W + s B A`` with one of the factors block-diagonal, to be served sharded without an exchange.

    Parameters per layer: r (out / k + in), or r (out + in / k) with side "a". Law: identity at the start (B = 0); exact
    LoRA of rank r.

    Args:
        rank: r, a multiple of k.
        alpha: numerator of the scale; None for r.
        blocks: k, the devices to serve on.
        side: "b" where the outputs are sharded (q, k, v, up, gate), "a" where the inputs are (o, down).
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    Examples:
        >>> from rankwise import Sites
        >>> recipe = bd_lora(sites=Sites(overrides={"o_proj": {"side": "a"}, "down_proj": {"side": "a"}}))

    References:
        Wang et al. 2025, arXiv 2510.23346. Deviation: side "b" everywhere, unless overridden.
    """
    structure = BlockLoRA(rank, rank if alpha is None else alpha, blocks, side)
    return point(axes, "bd_lora", 2e-3, structure, "Wang et al. 2025, arXiv 2510.23346")
