"""Penalties on sharpness: the gradient is taken beside the weights, not at them. W (out, in)."""

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor
from torch.autograd import Function

from rankwise.adapter import Placement, SiteFactors
from rankwise.host import Host, Site, norm_of_rows
from rankwise.ops import Dense, LinearOperator
from rankwise.penalties.factors import squared_norm
from rankwise.penalties.penalty import AfterStep, BeforeStep, Gradients, Perturbation, Rates, Trained
from rankwise.structures import Added, Factor, Factors, Replace, Structure, TokenRows
from rankwise.structures.adversary import SECOND, Adversary
from rankwise.structures.structure import LeafStart, trained_pairs
from rankwise.structures.wrappers import keep

# -- SAM ----------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Sharpness(Perturbation):
    """SAM over the factors: the gradient at ``f + rho g / |g|``, |g| over all factors (Foret et al. 2020; LoRA-SAM).

    Two forwards and backwards a micro-batch, each with its own dropout; the loss that is reported is the second one.

    Attributes:
        rho: radius; 0.05 to 0.2 in Li et al. 2024 (arXiv 2410.14802), 0.003 in Li et al. 2024 (arXiv 2409.14396).
    """

    rho: float = 0.05

    @contextmanager
    def moved(self, adapter: Trained, gradients: Gradients, step: int) -> Iterator[None]:
        own = {p for site in adapter.sites.values() for p in site.own().values()}
        found = {p: g for p, g in gradients().items() if p in own}
        kept = {p: p.detach().clone() for p in found}
        with torch.no_grad():
            norm = torch.stack([torch.linalg.vector_norm(g) for g in found.values()]).norm()
            for p, g in found.items():
                p.add_(g * (self.rho / norm.clamp_min(1e-30)))
        try:
            yield
        finally:
            with torch.no_grad():
                for p, value in kept.items():
                    p.copy_(value)


# -- Flat-LoRA ----------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Noise(Perturbation):
    """Gaussian noise on the adapted weight: ``E_ij ~ N(0, sigma^2 |W'_i|^2 / n)`` (Flat-LoRA; arXiv 2409.14396, Eq. 7).

    W itself is never touched: the noise is drawn again from a seed wherever it is multiplied, forward and backward. The
    micro-batches of a step share it, as the experts of a stack do.

    Attributes:
        sigma: strength.
        steps: optimizer steps over which it rises from zero, as (1 - cos(pi t / steps)) / 2; None for all at once.
        seed: of the noise, apart from torch's generators.
    """

    sigma: float = 0.05
    steps: int | None = None
    seed: int = 0

    @contextmanager
    def moved(self, adapter: Trained, gradients: Gradients, step: int) -> Iterator[None]:
        share = 1.0 if self.steps is None else (1 - math.cos(math.pi * min(1.0, step / self.steps))) / 2
        sites = (s for s in adapter.sites.values() if not isinstance(s.structure, Replace | TokenRows))
        kept = [(site, site.structure) for site in sites]
        for i, (site, structure) in enumerate(kept):
            seed = hash((self.seed, step, i))  # of integers: the same in every process
            seen = structure.inner if isinstance(structure, Adversary) else structure
            noisy = Noisy(seen, self.sigma * share, seed)
            site.structure = replace(structure, inner=noisy) if isinstance(structure, Adversary) else noisy
        try:
            yield
        finally:
            for site, structure in kept:
                site.structure = structure


@final
@dataclass(frozen=True)
class Noisy(Structure):
    """The map of ``inner`` with noise on its weight, while :class:`Noise` puts it in a site's place.

    Attributes:
        inner: the structure.
        sigma: strength of the noise, as a share of the rows' norms.
        seed: of the noise.
    """

    inner: Structure
    sigma: float
    seed: int

    def __post_init__(self) -> None:
        keep(self, traits=self.inner.traits - {"lowrank"})

    def factors(self, site: Site) -> dict[str, Factor]:
        return self.inner.factors(site)

    def start(self, site: Site, weight: Callable[[], Tensor], leaf: LeafStart) -> dict[str, Tensor]:
        return self.inner.start(site, weight, leaf)

    def apply(self, f: Factors, x: Tensor, host: Host) -> Tensor:
        with torch.no_grad():
            if isinstance(self.inner, Added):
                op = self.inner.delta(f)
                noise = self._noise(host.row_norm(op), op.shape[1])
            else:
                w = self.inner.weight(f, host.weight())
                noise = self._noise(norm_of_rows(w), w.shape[-1])
        return self.inner.apply(f, x, host) + host.mv(noise, x)

    def weight(self, f: Factors, w: Tensor) -> Tensor:
        moved = self.inner.weight(f, w)
        return moved + self._noise(norm_of_rows(moved.detach()), w.shape[-1]).dense().to(w.dtype)

    def _noise(self, norms: Tensor, cols: int) -> LinearOperator:
        return Drawn(norms * self.sigma / cols**0.5, cols, self.seed)


@final
class Drawn(LinearOperator):
    """Independent normal entries (M, N), row i scaled by ``scale`` (*batch, M); only the seed is kept."""

    def __init__(self, scale: Tensor, cols: int, seed: int) -> None:
        self.scale, self.seed, self.shape = scale, seed, (scale.shape[-1], cols)

    def mv(self, x: Tensor) -> Tensor:
        return _Multiplied.apply(x, self)

    def dense(self) -> Tensor:
        generator = torch.Generator(self.scale.device).manual_seed(self.seed)
        entries = torch.randn(self.shape, generator=generator, device=self.scale.device, dtype=self.scale.dtype)
        return entries * self.scale.unsqueeze(-1)

    @property
    def T(self) -> LinearOperator:
        return Dense(self.dense().mT)


@final
class _Multiplied(Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, drawn: Drawn) -> Tensor:
        ctx.drawn = drawn
        return x @ drawn.dense().to(x.dtype).mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0] @ ctx.drawn.dense().to(grads[0].dtype), None


# -- Bi-LoRA ------------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Ascent(BeforeStep, AfterStep):
    """A second pair beside each ``s B A`` that climbs the loss in the same backward (Bi-LoRA; arXiv 2508.19564).

    Its gradients change sign before the step; after it, all second pairs together are scaled to
    ``sum |s B2 A2|^2 <= rho^2``, each factor by the root (Eq. 10). They are there while training alone, and in
    checkpoints; what is evaluated, served, merged or saved has only the first pairs.

    Attributes:
        rho: radius.
        rank: r2 of the second pairs; None for that of the first.
    """

    requires = frozenset({"pair"})

    rho: float = 0.05
    rank: int | None = None

    def before(self, sites: Sequence[SiteFactors], rates: Rates, step: int) -> None:
        for p in (p for site in sites for name, p in site.own().items() if name.startswith(SECOND)):
            if p.grad is not None:
                p.grad.neg_()

    def after(self, sites: Sequence[SiteFactors]) -> None:
        found = [(s.get_parameter(b), s.get_parameter(a), scale) for s in sites for b, a, scale in _second(s)]
        if found:
            norm = torch.stack([squared_norm(*pair).sum() for pair in found]).sum().sqrt()
            ratio = (self.rho / norm.clamp_min(1e-30)).clamp_max(1).sqrt()
            for b, a, _ in found:
                b.mul_(ratio)
                a.mul_(ratio)


def opposed(placements: Sequence[Placement], penalties: Sequence[Any]) -> tuple[Placement, ...]:
    """The placements with a second pair beside each product, where a penalty climbs with it."""
    for penalty in penalties:
        if isinstance(penalty, Ascent):
            rank = penalty.rank
            return tuple(
                replace(p, structure=Adversary(p.structure, rank)) if "pair" in p.structure.traits else p
                for p in placements
            )
    return tuple(placements)


def _second(site: SiteFactors) -> list[tuple[str, str, float]]:
    return [pair for pair in trained_pairs(site.described) if pair[0].startswith(SECOND)]
