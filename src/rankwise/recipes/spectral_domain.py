"""Methods of few numbers in a transform domain or at few places of the weight, and of circulant blocks."""

from typing import Any

from rankwise._recipe import Recipe
from rankwise.recipes.point import point
from rankwise.structures import C3A, FouRA, FourierFT, SHiRA, WaveFT
from rankwise.structures.spectral_domain import Mask

__all__ = ["c3a", "foura", "fourierft", "shira", "waveft"]


def fourierft(count: int = 1000, scaling: float = 150.0, seed: int = 777, **axes: Any) -> Recipe:
    """FourierFT: ``W + s Re(IDFT2(S))``, S zero but for k trained coefficients at random places.

    Parameters per layer: k. Law: identity at the start (S = 0); rank at most 2 k. Applied by two Fourier transforms of
    each activation, or by its 2 k waves where they are few; a dense form is made only to merge, in convolutions and for
    look-ups.

    Args:
        count: k; the paper takes 1000 for most models, 3000 for the largest images.
        scaling: s; the transform divides by out in besides.
        seed: of the places, which layers of one shape share as in the paper; they are drawn as PEFT draws them.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Gao et al. 2024, arXiv 2405.03003; the transform's normalisation is that of its code in PEFT. Deviation: the
        paper starts S at a standard normal, which moves the model; here it starts at 0.
    """
    return point(axes, "fourierft", 5e-2, FourierFT(count, scaling, seed), "Gao et al. 2024, arXiv 2405.03003")


def waveft(count: int = 2592, scaling: float = 25.0, seed: int = 777, **axes: Any) -> Recipe:
    """WaveFT: ``W + s IDWT2(S)``, one level of Haar wavelets, S zero but for k coefficients at random places.

    Parameters per layer: k. Law: identity at the start (S = 0); a coefficient reaches 2 x 2 neighbouring entries of W.
    Applied by a wavelet transform of each activation and a sparse product; a dense form is made only to merge, in
    convolutions and for look-ups.

    Args:
        count: k, PEFT's default.
        scaling: s, PEFT's default.
        seed: of the places, which layers of one shape share; they are drawn as PEFT draws them.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Bilican et al. 2025, arXiv 2505.12532; read off its authors' code in PEFT, as the paper's text was not at hand.
        Deviation: Haar wavelets alone, PEFT's default; an odd side is padded by one and cut.
    """
    return point(axes, "waveft", 1e-4, WaveFT(count, scaling, seed), "Bilican et al. 2025, arXiv 2505.12532")


def shira(rank: int = 32, mask: Mask = "rand", **axes: Any) -> Recipe:
    """SHiRA: ``W + S``, S zero but for few trained entries, of high rank.

    Parameters per layer: r (out + in), as many as LoRA's. Law: identity at the start (S = 0); only these entries of W
    ever change. Applied as a sparse product, or added to W where that is cheaper.

    Args:
        rank: r, of the LoRA with as many numbers.
        mask: where the entries lie: "rand", anywhere; "wm", where W is largest in size.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Bhardwaj et al. 2024, arXiv 2406.13175, section 3.1; no scale, by its lemma 4.3. Deviation: the paper trains the
        entries of W, here their change is; its masks from gradients (Grad, SNIP) and by rows and columns (Struct) are
        not here.
    """
    return point(axes, "shira", 5e-4, SHiRA(rank, mask), "Bhardwaj et al. 2024, arXiv 2406.13175")


def c3a(block: int = 128, **axes: Any) -> Recipe:
    """C3A: ``W + C``, C of circulant b x b blocks, each a circular convolution of a part of the input.

    Parameters per layer: out in / b. Law: identity at the start (C = 0); a block has any rank up to b. Applied by
    Fourier transforms of the activations' parts.

    Args:
        block: b; the largest common divisor of out and in not above it is taken.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Chen et al. 2024, arXiv 2407.19342, eq. 1 and 4. Deviation: its code starts C at random, here it starts at 0 so
        that nothing moves; its code in PEFT divides C by ``in``, which its equations do not: rates differ by that.
    """
    return point(axes, "c3a", 2e-4, C3A(block), "Chen et al. 2024, arXiv 2407.19342")


def foura(rank: int = 16, alpha: float | None = None, **axes: Any) -> Recipe:
    """FouRA: ``W + s D^T B diag(e) A D``, a low-rank update between cosine transforms D, its components gated by e.

    Parameters per layer: r (out + in + 1). Law: identity at the start (B = 0); gauge that of the SVD form; D is
    orthonormal, so that without its gate it is LoRA in another basis: it steps otherwise only under solvers, starts or
    penalties that read entries one by one, as Adam's.

    Args:
        rank: r.
        alpha: numerator of the scale; None for r, so that the rate does not depend on the rank.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Borse et al. 2024, arXiv 2406.08798, its form with the cosine transform, known to us through summaries of the
        paper. Deviation: the paper's gate is 0 or 1 and follows from each input by the entropy of a small network's
        output, which leaves no weight to merge; here e is trained, from 1, and the same for all inputs.
    """
    structure = FouRA(rank, rank if alpha is None else alpha)
    return point(axes, "foura", 2e-3, structure, "Borse et al. 2024, arXiv 2406.08798")
