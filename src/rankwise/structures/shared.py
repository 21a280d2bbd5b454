"""Structures some of whose factors several sites have in common.

A factor with a label (``Factor.shared``) is one parameter for all sites of an adapter that have it under the same name,
shape and label. b (out, rank), a (rank, in), u (rank,), v (out,).
"""

from dataclasses import dataclass, replace
from typing import Literal, final

import torch
from torch import Tensor

from rankwise.errors import IncompatibleAxes
from rankwise.host import Correction, Host, Site
from rankwise.host.site import flat_tokens
from rankwise.ops import Dense, Diagonal, LinearOperator, Product
from rankwise.structures.lowrank import Ranked
from rankwise.structures.structure import SAMPLED, Additive, Factor, Factors, Leaf, Start, check_rank, sizes, sizes_of

_SIDES = {"a": ("a",), "b": ("b",), "both": ("a", "b")}


@dataclass(frozen=True)
class Unscaled(Additive):
    """``W + operator``, without a scale."""

    @property
    @final
    def scale(self) -> float:
        return 1.0


@final
@dataclass(frozen=True)
class ShareLoRA(Ranked, Additive):
    """``W + s B A`` with A, B or both the same in all layers of one width (Song et al. 2024, arXiv 2406.10785).

    Attributes:
        rank: r.
        alpha: numerator of the scale; None for a scale of 1.
        scale_rule: as in LoRA.
        share: "a" (of all layers that read as many inputs), "b" (that give as many outputs) or "both".
    """

    share: Literal["a", "b", "both"] = "a"

    def factors(self, site: Site) -> dict[str, Factor]:
        if self.share not in _SIDES:
            raise IncompatibleAxes(f'share is "a", "b" or "both"; found {self.share!r}.')
        r = check_rank(self.rank, site, min(site.rows, site.cols))
        found = {"a": Factor({"rank": r, "in": site.cols}, Start.RANDOM), "b": Factor({"out": site.rows, "rank": r})}
        return found | {side: replace(found[side], shared=site.kind) for side in _SIDES[self.share]}

    def operator(self, f: Factors) -> LinearOperator:
        return Product(Dense(f["b"]), Dense(f["a"]))


@dataclass(frozen=True)
class Weighted(Ranked, Additive):
    """``W + s diag(v) B diag(u) A``, B and A the same in all layers of one shape, u and v each layer's own."""

    def _pair(self, site: Site, r: int, b: Start, trainable: bool) -> dict[str, Factor]:
        both = {"a": {"rank": r, "in": site.cols}, "b": {"out": site.rows, "rank": r}}
        label = f"{site.kind}s of {site.rows} x {site.cols}"
        return {k: Factor(dims, b if k == "b" else Start.RANDOM, trainable, shared=label) for k, dims in both.items()}

    def operator(self, f: Factors) -> LinearOperator:
        b, a = sliced(f)
        return Product(Dense(f["v"].unsqueeze(-1) * b), Product(Diagonal(f["u"]), Dense(a)))


def sliced(f: Factors) -> tuple[Tensor, Tensor]:
    """B and A as one layer reads them, of a pair that layers of several sizes may share."""
    b, a = f["b"], f["a"]
    if "sizes" not in f:
        return b, a
    rows, cols = sizes_of(f)
    return b[..., :rows, :], a[..., :cols]


def fits(site: Site, widths: tuple[int, int]) -> tuple[int, int]:
    """The sides (out, in) of a pair that the layers slice, if it is as large as this layer.

    Raises:
        IncompatibleAxes: it is not.
    """
    if len(widths) != 2 or site.rows > widths[0] or site.cols > widths[1]:
        raise IncompatibleAxes(
            f"Widths are the most outputs and the most inputs of any adapted layer; found {tuple(widths)}, while "
            f"{site.name} is {site.rows} x {site.cols}. Raise them, or leave that layer out."
        )
    return widths


@final
@dataclass(frozen=True)
class VeRA(Weighted):
    """``W + diag(v) B diag(u) A``, B and A random, frozen and shared (Kopiczko et al. 2023, arXiv 2310.11454).

    Attributes:
        rank: r; far above LoRA's, even above the layer's sides, since only u and v are trained.
        alpha: numerator of a scale; None for a scale of 1, as in the paper.
        scale_rule: as in LoRA.
        start_u: where u starts.
        widths: the most outputs and the most inputs of any layer, for one pair of which each layer takes the first rows
            of B and columns of A, as in PEFT; None for a pair for each shape.
    """

    start_u: float = 0.1
    widths: tuple[int, int] | None = None

    traits = Ranked.traits - {"two_sided", "lowrank"}

    def factors(self, site: Site) -> dict[str, Factor]:
        r = check_rank(self.rank, site, max(self.rank, 1))
        own = {"u": Factor({"rank": r}, self.start_u), "v": Factor({"out": site.rows})}
        if self.widths is None:
            return {**self._pair(site, r, Start.RANDOM, trainable=False), **own}
        rows, cols = fits(site, self.widths)
        pair = {"a": {"rank": r, "widest_in": cols}, "b": {"widest_out": rows, "rank": r}}
        both = {k: Factor(dims, Start.RANDOM, trainable=False, shared=f"{site.kind}s") for k, dims in pair.items()}
        return {**both, **own, **sizes(site)}


@final
@dataclass(frozen=True)
class PVeRA(Ranked, Leaf):
    """VeRA whose latent vector is drawn while training: ``W x + diag(v) B z`` (Fillioux et al. 2025, arXiv 2512.07703).

    z is normal with mean ``diag(u) A x`` and the exponential of ``diag(u') A' x`` as variance, A and A' the halves of
    a, u and u' those of u. Afterwards, and in what is merged, z is its mean. Linear layers alone.

    Attributes:
        rank: r.
        alpha: numerator of a scale; None for a scale of 1, as in the paper.
        scale_rule: as in LoRA.
        start_u: where u starts.
        widths: as in VeRA.
    """

    start_u: float = 0.1
    widths: tuple[int, int] | None = None

    traits = frozenset({"random_start", "drops", "samples"})

    def factors(self, site: Site) -> dict[str, Factor]:
        if site.kind != "linear":
            raise IncompatibleAxes(
                f"PVeRA draws between its two matrices, for each token that a linear layer reads; {site.name} is of "
                f"kind {site.kind}. Take VeRA there."
            )
        found = VeRA(self.rank, None, start_u=self.start_u, widths=self.widths).factors(site)
        twice = {k: replace(found[k], dims={**found[k].dims, "rank": 2 * self.rank}) for k in ("a", "u")}
        return {**found, **twice}

    def correction(self, f: Factors, host: Host) -> Correction | None:
        return None if SAMPLED in f else Correction(self._delta(f))

    def apply(self, f: Factors, x: Tensor, host: Host) -> Tensor:
        correction = self.correction(f, host)
        if correction is not None:
            return host.plus(correction, x)
        b, a = sliced(f)
        b = f["v"].unsqueeze(-1) * b * self.scale

        def drawn() -> Tensor:
            mean, log = host.mv(Product(Diagonal(f["u"]), Dense(a)), host.drop(x)).chunk(2, -1)
            z = mean + torch.randn_like(mean) * (log / 2).exp()
            return Dense(b).mv(flat_tokens(z)).reshape(*x.shape[:-1], b.shape[-2])

        return host.beside(x, drawn)

    def weight(self, f: Factors, w: Tensor) -> Tensor:
        return w + self._delta(f).dense()

    def _delta(self, f: Factors) -> LinearOperator:
        mean = {**f, "a": f["a"].chunk(2, -2)[0], "u": f["u"].chunk(2, -1)[0]}
        return VeRA(self.rank, self.alpha, self.scale_rule).delta(mean)


@final
@dataclass(frozen=True)
class TiedLoRA(Weighted):
    """``W + s diag(v) B diag(u) A``, B and A trained and shared (Renduchintala et al. 2023, arXiv 2311.09578).

    Attributes:
        rank: r.
        alpha: numerator of the scale; None for a scale of 1.
        scale_rule: as in LoRA.
    """

    traits = Ranked.traits - {"lowrank"}

    def factors(self, site: Site) -> dict[str, Factor]:
        r, ones = check_rank(self.rank, site, min(site.rows, site.cols)), Start.ONES
        own = {"u": Factor({"rank": r}, ones), "v": Factor({"out": site.rows}, ones)}
        return {**self._pair(site, r, Start.ZEROS, trainable=True), **own}
