"""Inits from the weight's own spectrum."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from rankwise.host import Site
from rankwise.inits.init import Init, factors_of, rank_of
from rankwise.ops.linalg import Triplets, truncated_svd
from rankwise.structures import Additive, Structure


def split(structure: Structure, site: Site, triplets: Triplets) -> dict[str, Tensor]:
    """The factors with ``s b a = u diag(s) v^T``: the root of the spectrum on both sides, or all of it in e."""
    assert isinstance(structure, Additive)
    u, s, v = triplets
    s = s / structure.scale
    if "e" in structure.factors(site):
        return {**factors_of(structure, site, u, v.mT), "e": s}
    root = s.sqrt()
    return factors_of(structure, site, u * root, root.unsqueeze(-1) * v.mT)


def last(triplets: Triplets, rank: int) -> Triplets:
    """The triplets of the smallest singular values."""
    return Triplets(triplets.u[:, -rank:], triplets.s[-rank:], triplets.v[:, -rank:])


@final
@dataclass(frozen=True)
class Principal(Init):
    """The r leading singular triplets of W (PiSSA; Meng et al. 2024, arXiv 2404.02948).

    ``s b a`` (``s b diag(e) a``) is the best rank-r approximation of W. The result is stored with
    the adapter, so the randomised SVD is safe: nothing is decomposed again on load.

    Attributes:
        iterations: power iterations of the randomised SVD; None for the exact one.
        seed: of the randomised SVD.
    """

    iterations: int | None = None
    seed: int = 0

    requires = frozenset({"lowrank", "anchored"})

    def __call__(
        self, site: Site, structure: Structure, weight: Callable[[], Tensor], stats: Mapping[str, Any] | None
    ) -> dict[str, Tensor]:
        found = truncated_svd(weight(), rank_of(structure, site), iterations=self.iterations, seed=self.seed)
        return split(structure, site, found)


@final
@dataclass(frozen=True)
class Minor(Init):
    """The r last singular triplets of W (MiLoRA; Wang et al. 2024, arXiv 2406.09044)."""

    requires = frozenset({"lowrank", "anchored"})

    def __call__(
        self, site: Site, structure: Structure, weight: Callable[[], Tensor], stats: Mapping[str, Any] | None
    ) -> dict[str, Tensor]:
        w = weight()
        return split(structure, site, last(truncated_svd(w, min(w.shape)), rank_of(structure, site)))


@final
@dataclass(frozen=True)
class QR(Init):
    """``b = Q[:, :r]``, ``a = R[:r]`` of ``W = Q R`` (OLoRA; Buyukakyuz 2024, arXiv 2406.01775)."""

    requires = frozenset({"lowrank", "anchored"})

    def __call__(
        self, site: Site, structure: Structure, weight: Callable[[], Tensor], stats: Mapping[str, Any] | None
    ) -> dict[str, Tensor]:
        q, r = torch.linalg.qr(weight())
        rank = rank_of(structure, site)
        return factors_of(structure, site, q[:, :rank], r[:rank])


@final
@dataclass(frozen=True)
class MinorOutput(Init):
    """``b`` the r last left singular vectors of W, ``a = 0`` (MiCA; arXiv 2604.01694)."""

    requires = frozenset({"input_side"})

    def __call__(
        self, site: Site, structure: Structure, weight: Callable[[], Tensor], stats: Mapping[str, Any] | None
    ) -> dict[str, Tensor]:
        w, rank = weight(), rank_of(structure, site)
        u = last(truncated_svd(w, min(w.shape)), rank).u
        return factors_of(structure, site, u, w.new_zeros(rank, w.shape[1]))


@final
@dataclass(frozen=True)
class Nystrom(Init):
    """``b = W O`` with a Gaussian sketch O (in, r), ``a = 0`` (NoRA; Li et al. 2024, arXiv 2410.18965).

    Attributes:
        std: standard deviation of O's entries; None for 1/sqrt(in), so that b is no larger than W.
    """

    std: float | None = None

    requires = frozenset({"pair"})

    def __call__(
        self, site: Site, structure: Structure, weight: Callable[[], Tensor], stats: Mapping[str, Any] | None
    ) -> dict[str, Tensor]:
        w, rank = weight(), rank_of(structure, site)
        drawn = torch.randn(w.shape[1], rank).to(w) * (w.shape[1] ** -0.5 if self.std is None else self.std)
        return factors_of(structure, site, w @ drawn, w.new_zeros(rank, w.shape[1]))


@final
@dataclass(frozen=True)
class PrincipalFrame(Init):
    """The fixed sides of ``s b c a`` from the r leading triplets of W, ``b = U S``, ``a = V^T`` (LoRA-XS; 2405.17604).

    The core c starts at zero, and so the model at the base; it has a gradient, since b and a are not zero.

    Attributes:
        iterations: power iterations of the randomised SVD; None for the exact one.
    """

    iterations: int | None = None

    requires = frozenset({"core"})

    def __call__(
        self, site: Site, structure: Structure, weight: Callable[[], Tensor], stats: Mapping[str, Any] | None
    ) -> dict[str, Tensor]:
        rank = rank_of(structure, site)
        u, s, v = truncated_svd(weight(), rank, iterations=self.iterations)
        return {"a": v.mT.contiguous(), "b": u * s, "c": s.new_zeros(rank, rank)}
