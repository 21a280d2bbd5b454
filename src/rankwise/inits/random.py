"""Inits that draw: uniform, normal, orthonormal. Shapes are those of each factor."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from rankwise.host import Site
from rankwise.inits.init import Drawn, Init, factors_of
from rankwise.structures import Factor, Structure


@final
@dataclass(frozen=True)
class Kaiming(Drawn):
    """Uniform within +-1/sqrt(n), n the last dim: as ``nn.Linear``, loralib and PEFT do."""

    def draw(self, factor: Factor) -> Tensor:
        return torch.empty(factor.shape).uniform_(-1, 1) / max(factor.shape[-1], 1) ** 0.5


@final
@dataclass(frozen=True)
class Gaussian(Drawn):
    """Normal with standard deviation ``std``, or 1/r as in PEFT's "gaussian".

    Attributes:
        std: standard deviation; None for 1 over the size of the factor's rank dim.
    """

    std: float | None = None

    requires = frozenset({"random_start"})

    def draw(self, factor: Factor) -> Tensor:
        std = self.std if self.std is not None else 1 / max(factor.dims.get("rank", factor.shape[-1]), 1)
        return torch.randn(factor.shape) * std


@final
@dataclass(frozen=True)
class Orthogonal(Drawn):
    """Orthonormal rows or columns, whichever are fewer (Saxe et al. 2013, arXiv 1312.6120)."""

    requires = frozenset({"random_start"})

    def draw(self, factor: Factor) -> Tensor:
        return torch.nn.init.orthogonal_(torch.empty(factor.shape))


@final
@dataclass(frozen=True)
class Xavier(Drawn):
    """Normal of variance 2/(n + m), n and m the two dims of a factor (Glorot and Bengio 2010)."""

    requires = frozenset({"random_start"})

    def draw(self, factor: Factor) -> Tensor:
        return torch.randn(factor.shape) * (2 / max(sum(factor.shape[-2:]), 1)) ** 0.5


@final
@dataclass(frozen=True)
class NonZero(Init):
    """Both factors uniform within +-1/sqrt(in), so that neither starts at zero (Li et al. 2025, arXiv 2505.23194).

    Attributes:
        gain: of b.
    """

    gain: float = 1.0

    requires = frozenset({"lowrank"})
    traits = frozenset({"moves_at_start"})

    def __call__(
        self, site: Site, structure: Structure, weight: Callable[[], Tensor], stats: Mapping[str, Any] | None
    ) -> dict[str, Tensor]:
        found = structure.factors(site)
        a, b = (torch.empty(found[name].shape).uniform_(-1, 1) / max(site.cols, 1) ** 0.5 for name in "ab")
        return factors_of(structure, site, self.gain * b, a)
