"""Solvers on whole weights: the moments live in a small space that the gradient is projected to.

Letters as in ``rankwise.solvers.rules``: G the gradient, tall; Q (short, r) spans the small space, R = G Q, and N is
Adam's direction there.
"""

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any, ClassVar, final

import torch

from rankwise.adapter import SiteFactors
from rankwise.errors import IncompatibleAxes, RankError
from rankwise.solvers.optimizer import Projected
from rankwise.solvers.rules import Group
from rankwise.solvers.solver import Solver, grouped


@dataclass(frozen=True)
class _OnWeights(Solver):
    """What the five share: the weight itself is trained, a matrix through a space of rank r."""

    requires = frozenset({"whole"})
    rule: ClassVar[str]  # how the small space makes a step: a key of RULES

    rank: int = 128
    every: int = 200
    weight_decay: float = 0.0
    bits: int = 32
    in_backward: bool = False

    def __post_init__(self) -> None:
        if not isinstance(self.rank, int) or self.rank < 1:
            raise RankError(f"A rank is a whole number from 1 on; found rank={self.rank!r}. Choose another.")
        if self.every < 1 or self.bits not in (8, 32):
            raise IncompatibleAxes(
                f"A projection lasts every >= 1 steps, and moments take 8 or 32 bits; found every={self.every}, "
                f"bits={self.bits}. Choose others."
            )

    @final
    def groups(self, sites: Iterable[SiteFactors], lr: float) -> list[Group]:
        params = [p for site in sites for p in site.own().values() if p.requires_grad]
        return grouped({"weights": params}, {"weights": lr})

    @final
    def __call__(self, sites: Iterable[SiteFactors], lr: float) -> torch.optim.Optimizer:
        return self.over(self.groups(sites, lr), lr)

    @final
    def over(self, params: Iterable[Any], lr: float) -> torch.optim.Optimizer:
        """The optimizer over any parameters, a plain model's own for example; no adapter is needed.

        Matrices whose smaller side is larger than the rank are projected; all other tensors take the same rule
        without a projection (plain Adam, for Flora plain Adafactor with momentum).

        Args:
            params: parameters, (name, parameter) pairs, or groups, as of any torch optimizer. A group may have
                options of its own: ``{"params": ..., "rank": 64}``; ``"rank": None`` projects nothing in it.
            lr: the learning rate.

        Returns:
            The optimizer.

        Raises:
            MissingDependency: ``bits=8`` without bitsandbytes.

        Examples:
            >>> model = torch.nn.Linear(64, 32)
            >>> optimizer = GaLore(rank=4).over(model.named_parameters(), lr=1e-2)
            >>> model(torch.ones(64)).sum().backward()
            >>> optimizer.step()
            >>> tuple(optimizer.state[model.weight]["exp_avg"].shape)
            (64, 4)
        """
        options = {k: v for k, v in asdict(self).items() if k != "in_backward"}
        return Projected(params, {"lr": lr, "rule": self.rule, **options}, self.in_backward)


@dataclass(frozen=True)
class _WithAdam(_OnWeights):
    """Adam in the small space."""

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-6


@final
@dataclass(frozen=True)
class GaLore(_WithAdam):
    """``W - lr scale N Q^T``, Q the leading right singular vectors of G (Zhao et al. 2024, arXiv 2403.03507).

    State of a projected matrix: short r + 2 long r values.

    Attributes:
        rank: r.
        every: steps after which Q is taken from the gradient anew; the moments stay as they are.
        weight_decay: per step, times the learning rate.
        bits: 32, or 8 for moments in blockwise quantisation (bitsandbytes).
        in_backward: update each weight inside of backward, as soon as its gradient is there, and free the gradient.
            No accumulation, clipping, DDP or loss scaling then.
        betas: decay of the two moments.
        eps: added to the root of the second moment, before the bias is corrected.
        scale: of the step in the small space.
        iterations: power iterations of a randomised SVD, None for the exact one.
    """

    rule = "lift"

    scale: float = 0.25
    iterations: int | None = None


@final
@dataclass(frozen=True)
class Fira(_WithAdam):
    """GaLore plus what it leaves out: ``W - lr scale (N Q^T + phi (G - R Q^T))`` (Chen et al. 2024, arXiv 2410.01623).

    phi = |N_i| / |R_i| for each channel i. The norm of the second term may grow by ``limit`` a step. State of a
    projected matrix: short r + 2 long r + 1 values.

    Attributes:
        rank: r.
        every: as in GaLore.
        weight_decay: as in GaLore.
        bits: as in GaLore.
        in_backward: as in GaLore.
        betas: as in GaLore.
        eps: as in GaLore.
        scale: of the whole step.
        iterations: as in GaLore.
        limit: the largest growth of the norm in a step; None for no limit.
    """

    rule = "lift and rest"

    scale: float = 1.0
    iterations: int | None = None
    limit: float | None = 1.01


@final
@dataclass(frozen=True)
class Apollo(_WithAdam):
    """``W - lr sqrt(scale) diag(s) G``, s_i = |N_i| / |R_i| (APOLLO; Zhu et al. 2024, arXiv 2412.05270).

    Q is Gaussian, of variance 1/r, drawn from a seed, which is all that is kept of it; no SVD. State of a projected
    matrix: 2 long r + 1 values.

    Attributes:
        rank: r.
        every: steps after which another Q is drawn.
        weight_decay: as in GaLore.
        bits: as in GaLore.
        in_backward: as in GaLore.
        betas: as in GaLore.
        eps: as in GaLore.
        scale: of the gradient's scale; the step grows with its root.
        limit: the largest growth of the step's norm in a step; None for no limit.
    """

    rule = "scale channels"

    scale: float = 1.0
    limit: float | None = 1.01


@final
@dataclass(frozen=True)
class ApolloMini(_WithAdam):
    """APOLLO with one scale a matrix: ``W - lr sqrt(scale) (|N| / |R|) G``, at rank 1 (arXiv 2412.05270).

    State of a projected matrix: 2 long + 1 values.

    Attributes:
        rank: r.
        every: as in Apollo.
        weight_decay: as in GaLore.
        bits: as in GaLore.
        in_backward: as in GaLore.
        betas: as in GaLore.
        eps: as in GaLore.
        scale: as in Apollo.
        limit: as in Apollo.
    """

    rule = "scale tensor"

    rank: int = 1
    scale: float = 128.0
    limit: float | None = 1.01


@final
@dataclass(frozen=True)
class Flora(_OnWeights):
    """Momentum kept as its projection: ``M <- b M + (1 - b) U Q`` (FLoRA; Hao et al. 2024, arXiv 2402.03293).

    U is Adafactor's step and the update ``b M Q^T + (1 - b) U``, times the root mean square of W (at least 1e-3). Q is
    Gaussian, of variance 1/r, drawn from a seed; a new one takes the momentum over, ``M Q^T Q'``. State of a
    projected matrix: long r + long + short values.

    Attributes:
        rank: r.
        every: steps after which another Q is drawn.
        weight_decay: as in GaLore.
        bits: as in GaLore, for the momentum.
        in_backward: as in GaLore.
        momentum: b.
        clip: the largest root mean square of U.
    """

    rule = "momentum"

    every: int = 1000
    momentum: float = 0.9
    clip: float = 1.0
