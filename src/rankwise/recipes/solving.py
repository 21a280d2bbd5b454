"""Methods that are a solver: in which geometry LoRA's factors take a step."""

from typing import Any

from rankwise import solvers
from rankwise._recipe import Recipe
from rankwise.recipes.point import low_rank, point
from rankwise.structures import LoRAFA

__all__ = [
    "als", "altlora", "altlora_plus", "loft", "lora_fa", "lora_plus", "lora_pro", "lora_rite", "muon_lora", "reflora",
    "reflora_s", "riemannion", "rolora", "scaled_adamw", "scaled_gd", "whitened_muon",
]  # fmt: skip


def _solved(
    axes: dict[str, Any], name: str, lr: float, rank: int, alpha: float | None, solver: Any, paper: str
) -> Recipe:
    """LoRA under a solver."""
    return point(axes, name, lr, low_rank(rank, alpha), paper, solver=solver)


def lora_plus(rank: int = 16, alpha: float | None = None, ratio: float = 16.0, **axes: Any) -> Recipe:
    """LoRA+: LoRA whose B learns ``ratio`` times faster than A.

    Parameters per layer: r (out + in). Law: a group for each side, from the factors' named dims.

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        ratio: rate of B over rate of A; the paper finds 2 to 16 and more.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Hayou et al. 2024, arXiv 2402.12354.
    """
    solver = solvers.LoRAPlus(ratio=ratio)
    return _solved(axes, "lora_plus", 5e-4, rank, alpha, solver, "Hayou et al. 2024, arXiv 2402.12354")


def scaled_gd(rank: int = 16, alpha: float | None = None, damping: float = 1e-6, **axes: Any) -> Recipe:
    """ScaledGD: ``b <- b - lr g_b (a a^T + d I)^-1 / s^2``, a alike.

    Parameters per layer: r (out + in). Law: W moves by -lr (G P_a + P_b G) to first order, P projecting on a factor,
    for every split of b a (with d = 0).

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        damping: d, added to the Gram matrices.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Tong, Ma, Chi 2021, arXiv 2005.08898. Deviation: d, and the scale s, which the paper has not.
    """
    return _solved(
        axes, "scaled_gd", 0.3, rank, alpha, solvers.ScaledGD(damping), "Tong, Ma, Chi 2021, arXiv 2005.08898"
    )


def scaled_adamw(rank: int = 16, alpha: float | None = None, damping: float = 1e-6, **axes: Any) -> Recipe:
    """Riemannian preconditioned LoRA: AdamW on ScaledGD's gradients.

    Parameters per layer: r (out + in). Law: the preconditioned gradients are gauge invariant, the quotient of Adam's
    moments is not.

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        damping: d, added to the Gram matrices.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Zhang and Pilanci 2024, arXiv 2402.02347. Deviation: both factors are preconditioned before either moves; the
        paper's code takes the new a for b.
    """
    return _solved(
        axes,
        "scaled_adamw",
        0.002,
        rank,
        alpha,
        solvers.ScaledAdamW(damping),
        "Zhang and Pilanci 2024, arXiv 2402.02347",
    )


def reflora(rank: int = 16, alpha: float | None = None, warmup: int = 100, **axes: Any) -> Recipe:
    """RefLoRA: ``g_a <- S^-1 g_a``, ``g_b <- g_b S``, ``S a a^T S = b^T b``, then AdamW.

    Parameters per layer: r (out + in). Law: the split of b a with the least |b|^2 + |a|^2; without moments the step
    is gauge invariant.

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        warmup: plain steps before, in which b leaves zero.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Zhang, Li, Giannakis 2025, arXiv 2505.18877. Deviation: a damping of 1e-8 on both Gram matrices.
    """
    return _solved(
        axes,
        "reflora",
        0.002,
        rank,
        alpha,
        solvers.RefLoRA(warmup=warmup),
        "Zhang, Li, Giannakis 2025, arXiv 2505.18877",
    )


def reflora_s(rank: int = 16, alpha: float | None = None, warmup: int = 100, **axes: Any) -> Recipe:
    """RefLoRA-S: AdamW with ``a <- sqrt(S) a``, ``b <- b / sqrt(S)``, S = |b| / |a|.

    Parameters per layer: r (out + in). Law: |a| = |b|, and b a moves alike from (b c, a / c).

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        warmup: plain steps before, in which b leaves zero.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Zhang, Li, Giannakis 2025, arXiv 2505.18877. Deviation: it balances before a step, the paper's code after it:
        the same sequence of W.
    """
    return _solved(
        axes, "reflora_s", 0.002, rank, alpha, solvers.RefLoRAS(warmup), "Zhang, Li, Giannakis 2025, arXiv 2505.18877"
    )


def lora_rite(rank: int = 16, alpha: float | None = None, **axes: Any) -> Recipe:
    """LoRA-RITE: ``R_b^-1 V^(-1/2) R_b^-T g_a``, ``b = U R_b``, V the r x r second moment.

    Parameters per layer: r (out + in). Law: gauge invariant, moments included.

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Yen et al. 2024, arXiv 2410.20625. Deviation: no clipping over all sites, no skipping of updates, no escaped
        mass (off in the paper's code); the step is divided by s.
    """
    return _solved(axes, "lora_rite", 1e-3, rank, alpha, solvers.LoRARITE(), "Yen et al. 2024, arXiv 2410.20625")


def altlora(rank: int = 16, alpha: float | None = None, damping: float = 1e-6, **axes: Any) -> Recipe:
    """AltLoRA: ``(b^T b + d I)^-1 g_a / s^2`` with momentum, then b's with the new a.

    Parameters per layer: r (out + in). Law: gauge invariant (with d = 0), momentum included.

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        damping: d, added to the Gram matrices.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Yu et al. 2025, arXiv 2505.12455. Deviation: b's gradient is the one at the old a (one backward a step, as in
        the paper's code); the momentum of both is bias corrected.
    """
    return _solved(axes, "altlora", 0.3, rank, alpha, solvers.AltLoRA(damping), "Yu et al. 2025, arXiv 2505.12455")


def altlora_plus(rank: int = 16, alpha: float | None = None, damping: float = 1e-6, **axes: Any) -> Recipe:
    """AltLoRA+: AltLoRA with an elementwise second moment.

    Parameters per layer: r (out + in). Law: one projection after the other; the second moment is not gauge invariant.

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        damping: d, added to the Gram matrices.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Yu et al. 2025, arXiv 2505.12455. Deviation: Adam's decays (0.9, 0.999).
    """
    return _solved(
        axes, "altlora_plus", 0.002, rank, alpha, solvers.AltLoRAPlus(damping), "Yu et al. 2025, arXiv 2505.12455"
    )


def loft(rank: int = 16, alpha: float | None = None, damping: float = 1e-6, **axes: Any) -> Recipe:
    """LoFT-AdamW: ``(b^T b)^-1 b^T [b m / (sqrt(diag(b V_j b^T)) + eps)] / s``, b and a in turn.

    Parameters per layer: r (out + in). Law: full fine-tuning's AdamW where r is the smaller side. V_j takes r^2 (out
    + in) of memory, and a step forms a dense matrix a site.

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        damping: d, added to the Gram matrices.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Tastan et al. 2025, arXiv 2505.21289. Deviation: V_j becomes P V_j P^T in the new coordinates, where the
        paper's code has the transposes; one damping for both sides; no clipping of its own.
    """
    return _solved(axes, "loft", 1e-3, rank, alpha, solvers.LoFT(damping), "Tastan et al. 2025, arXiv 2505.21289")


def lora_pro(rank: int = 16, alpha: float | None = None, x: str = "sylvester", **axes: Any) -> Recipe:
    """LoRA-Pro: ``h_a = (b^T b)^-1 g_a / s^2 + X a``, ``h_b = (I - P_b) g_b (a a^T)^-1 / s^2 - b X``.

    Parameters per layer: r (out + in). Law: h_b a + b h_a is s^-1 times the full gradient's projection on the tangent
    space, for every X.

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        x: the paper's choice of X; or "zero".
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Wang et al. 2024, arXiv 2407.18242. Deviation: Adam runs on the directions, so its state is that of LoRA; the
        paper's runs on W, with its memory. Its scale is alpha / sqrt(r).
    """
    return _solved(axes, "lora_pro", 0.002, rank, alpha, solvers.LoRAPro(x), "Wang et al. 2024, arXiv 2407.18242")


def riemannion(rank: int = 16, alpha: float | None = None, momentum: float = 0.9, **axes: Any) -> Recipe:
    """Riemannion: Muon on the matrices of rank r; project, orthogonalise, retract.

    Parameters per layer: r (out + in). Law: the retraction is the truncated SVD; gauge invariant, momentum included;
    lr is the spectral norm of W's step.

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        momentum: decay of the momentum.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Bogachev et al. 2025, arXiv 2507.12142. Deviation: starts at b = 0, where the first step is along b alone, not
        at the paper's gradient-based start.
    """
    return _solved(
        axes, "riemannion", 2e-2, rank, alpha, solvers.Riemannion(momentum), "Bogachev et al. 2025, arXiv 2507.12142"
    )


def muon_lora(rank: int = 16, alpha: float | None = None, momentum: float = 0.95, **axes: Any) -> Recipe:
    """Muon of each factor: ``0.2 sqrt(max(m, r)) polar(M_b)``, a alike.

    Parameters per layer: r (out + in). Law: every singular value of a factor's step is the same; not gauge invariant.

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        momentum: decay of the momentum.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Liu et al. 2025, arXiv 2502.16982. Deviation: the exact polar factor, from an r x r eigendecomposition, for
        Newton-Schulz steps.
    """
    return _solved(
        axes, "muon_lora", 5e-3, rank, alpha, solvers.Muon(momentum=momentum), "Liu et al. 2025, arXiv 2502.16982"
    )


def whitened_muon(rank: int = 16, alpha: float | None = None, momentum: float = 0.95, **axes: Any) -> Recipe:
    """Whitened Muon: ``polar(M_b K) K / s``, ``K = (a a^T)^(-1/2)``, a alike.

    Parameters per layer: r (out + in). Law: either side moves W by singular values of lr; gauge invariant without
    momentum.

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        momentum: decay of the momentum.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        no paper that could be checked (arXiv 2606.12921 and 2605.09238 are said to have it). Deviation: a damping of
        1e-6, for b = 0.
    """
    return _solved(axes, "whitened_muon", 2e-2, rank, alpha, solvers.Muon(True, momentum), "")


def rolora(rank: int = 16, alpha: float | None = None, every: int = 1, **axes: Any) -> Recipe:
    """RoLoRA: AdamW on b and a in turn.

    Parameters per layer: r (out + in). Law: W is linear in what moves.

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        every: steps of a turn.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Chen et al. 2025, arXiv 2502.01755. Deviation: turns are steps, not federated rounds; the moments of the
        factor that stands go on.
    """
    return _solved(axes, "rolora", 5e-3, rank, alpha, solvers.RoLoRA(every), "Chen et al. 2025, arXiv 2502.01755")


def als(rank: int = 16, alpha: float | None = None, damping: float = 1e-6, every: int = 1, **axes: Any) -> Recipe:
    """Alternating least squares: ``b <- b - lr g_b (a a^T + d I)^-1 / s^2``, then a alike.

    Parameters per layer: r (out + in). Law: with lr = 1 a step solves a least-squares problem in W for its factor;
    gauge invariant (with d = 0).

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        damping: d, added to the Gram matrices.
        every: steps of a turn.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        block-coordinate descent, no one paper. Deviation: none.
    """
    return _solved(axes, "als", 0.3, rank, alpha, solvers.ALS(damping, every), "")


def lora_fa(rank: int = 16, alpha: float | None = None, damping: float = 1e-6, **axes: Any) -> Recipe:
    """LoRA-FA: ``W + s B A``, A frozen at random; B by AdamW on ``g_b (a a^T + d I)^-1 / s^2``.

    Parameters per layer: r out. Law: B's step is the full gradient's projection on A's rows. Linear layers do not keep
    their input for backward.

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        damping: d, added to the Gram matrices.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Zhang et al. 2023, arXiv 2308.03303. Deviation: the projected gradient is PEFT's, with a damping.
    """
    structure, solver = LoRAFA(rank, rank if alpha is None else alpha), solvers.ScaledAdamW(damping)
    return point(axes, "lora_fa", 5e-3, structure, "Zhang et al. 2023, arXiv 2308.03303", solver=solver)
