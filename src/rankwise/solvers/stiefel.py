"""Steps that keep the columns of factors orthonormal: they land on the manifold, or are retracted onto it.

Shapes: a frame x is b (S, *, m, r), or a (S, *, r, n) seen as its transpose; g is its gradient. Frames of equal shapes
are one stack.
"""

from abc import abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from rankwise.adapter import SiteFactors
from rankwise.solvers.chain import ALONE, FRAME, ChainOptimizer, Step, Transform
from rankwise.solvers.gauge import moments
from rankwise.solvers.muon import polar
from rankwise.solvers.solver import Solver
from rankwise.structures.structure import SIDES


def tall(frame: Tensor) -> Tensor:
    """The matrix, transposed where it is wide; its own inverse."""
    return frame if frame.shape[-2] >= frame.shape[-1] else frame.mT


@dataclass(frozen=True, kw_only=True)
class Framed(Solver):
    """A solver that is a chain on each frame of a structure; every other trained factor takes Adam's step.

    Attributes:
        betas: as in AdamW; None for the plain form, gradient descent.
        eps: as in AdamW.
    """

    betas: tuple[float, float] | None = (0.9, 0.999)
    eps: float = 1e-8

    requires = frozenset({"frames"})

    @abstractmethod
    def chain(self) -> tuple[Transform, ...]:
        """The transforms of a frame, whose one role is "frame"."""

    @final
    def groups(self, sites: Iterable[SiteFactors], lr: float) -> list[dict[str, Any]]:
        found: dict[str, list[torch.nn.Parameter]] = {"frames": [], "others": []}
        for site in sites:
            for name, p in site.own().items():
                if p.requires_grad:
                    found["frames" if tuple(site.described[name].dims) in SIDES else "others"].append(p)
        each = {"frames": {"lr": lr, "roles": FRAME}, "others": {"lr": lr, "roles": ALONE}}
        return [{"name": n, "params": p, "scales": [1.0] * len(p), **each[n]} for n, p in found.items() if p]

    @final
    def __call__(self, sites: Iterable[SiteFactors], lr: float) -> torch.optim.Optimizer:
        return ChainOptimizer(self.groups(sites, lr), self.chain(), moments(self.betas, self.eps))


@final
@dataclass(frozen=True)
class Land(Transform):
    """``(g x^T - x g^T) x + strength x (x^T x - I)``, of which the first part is tangent, without an m x m matrix.

    Attributes:
        strength: of the pull towards orthonormal columns.
    """

    strength: float = 5e-3

    def start(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def __call__(self, step: Step) -> None:
        x, g = tall(step.values["frame"]), tall(step.update["frame"])
        gram = x.mT @ x
        field = g @ gram - x @ (g.mT @ x) + self.strength * (x @ gram - x)
        step.update = {"frame": field if x is step.values["frame"] else field.mT}


@final
@dataclass(frozen=True)
class Landing(Framed):
    """AdamW along the landing field, without a retraction (PoLAR; Lion et al. 2025, arXiv 2506.03133).

    Attributes:
        strength: lambda, of the pull towards orthonormal columns.
        betas: as in AdamW; None for the plain form, gradient descent.
        eps: as in AdamW.
    """

    strength: float = 5e-3

    def chain(self) -> tuple[Transform, ...]:
        return Land(self.strength), *moments(self.betas, self.eps)


@final
@dataclass(frozen=True)
class Tangent(Transform):
    """``g - x g^T x``: the gradient on the manifold."""

    def start(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def __call__(self, step: Step) -> None:
        x, g = tall(step.values["frame"]), tall(step.update["frame"])
        field = g - x @ (g.mT @ x)
        step.update = {"frame": field if x is step.values["frame"] else field.mT}


@final
@dataclass(frozen=True)
class Retract(Transform):
    """The polar factor of ``x + d``, d the step projected on the tangent space: ``d - x sym(x^T d)``.

    Attributes:
        width: c, where d is divided by ``sqrt(m / c)`` first; None for no scaling.
    """

    width: float | None = None

    def start(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def __call__(self, step: Step) -> None:
        x, d = tall(step.values["frame"]), tall(step.update["frame"]) * -step.lr
        if self.width is not None:
            d = d * (self.width / x.shape[-2]) ** 0.5
        inner = x.mT @ d
        after = polar(x + d - x @ ((inner + inner.mT) / 2))
        step.values, step.update = {"frame": after if x is step.values["frame"] else after.mT}, {}


@final
@dataclass(frozen=True)
class StelLA(Framed):
    """Adam of the manifold's gradient, retracted by the polar factor (Li et al. 2025, arXiv 2510.01938).

    Attributes:
        width: c of the scaling of steps by the width of the model; None for none.
        betas: as in AdamW; None for the plain form, gradient descent.
        eps: as in AdamW.
    """

    width: float | None = None

    def chain(self) -> tuple[Transform, ...]:
        return Tangent(), *moments(self.betas, self.eps), Retract(self.width)
