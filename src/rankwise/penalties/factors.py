"""Penalties on the size and the shape of factors. a (rank, in), b (out, rank)."""

import functools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, final

import torch
from torch import Tensor, nn

from rankwise.adapter import SiteFactors
from rankwise.errors import IncompatibleAxes
from rankwise.penalties.penalty import AfterStep, BeforeStep, Rates, Term
from rankwise.structures.adversary import SECOND
from rankwise.structures.lowrank import chance_of_open
from rankwise.structures.structure import SIDES, trained_pairs


def pairs(site: SiteFactors) -> Iterator[tuple[nn.Parameter, nn.Parameter, float]]:
    """b, a and s of every trained product ``s * b @ a`` of a site, second pairs left out."""
    for b, a, scale in trained_pairs(site.described):
        if not b.startswith(SECOND):
            yield site.get_parameter(b), site.get_parameter(a), scale


def squared_norm(b: Tensor, a: Tensor, scale: float) -> Tensor:
    """``|s b a|^2`` in the Frobenius norm, without the product: (*batch,)."""
    return scale**2 * ((b.mT @ b) * (a @ a.mT)).sum((-2, -1)).clamp_min(0)


def trained(sites: Iterable[SiteFactors], *wanted: tuple[str, ...]) -> list[nn.Parameter]:
    """Every trained factor of these dims."""
    found = ((p, tuple(s.described[name].dims)) for s in sites for name, p in s.own().items())
    return [p for p, dims in found if p.requires_grad and dims in wanted]


def excess(p: Tensor) -> Tensor:
    """``a a^T - I``, ``b^T b - I``: of the smaller side, (*batch, rank, rank)."""
    gram = p @ p.mT if p.shape[-2] <= p.shape[-1] else p.mT @ p
    return gram - torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


@final
@dataclass(frozen=True)
class Orthogonality(Term):
    """``gamma * mean of |A A^T - I|^2 and |B^T B - I|^2``, on every trained factor (AdaLoRA; arXiv 2303.10512, Eq. 4).

    The mean is over the factors, as in AdaLoRA's code, so that gamma does not depend on the number of layers. A factor
    that starts at zero is pulled away from there: meant for structures whose product starts elsewhere (SVDForm).

    Attributes:
        gamma: weight of the term.
    """

    requires = frozenset({"lowrank"})

    gamma: float = 0.1

    def __call__(self, adapter: Any, step: int) -> Tensor:
        found = [excess(p).square().sum((-2, -1)).mean() for p in trained(adapter.sites.values(), *SIDES)]
        return self.gamma * torch.stack(found).mean()


@final
@dataclass(frozen=True)
class OrthonormalPull(BeforeStep):
    """Adds ``gamma / lr`` times the gradient of the mean of ``|A A^T - I|`` and ``|B^T B - I|`` (SORSA; 2409.00055).

    The mean is over all trained factors. Its step in gradient descent is gamma, whatever the learning rate.

    Attributes:
        gamma: size of that step.
    """

    requires = frozenset({"lowrank"})

    gamma: float = 4e-4

    def before(self, sites: Sequence[SiteFactors], rates: Rates, step: int) -> None:
        found = [p for p in trained(sites, *SIDES) if p.grad is not None and rates[p]]
        for p in found:
            e = excess(p)
            e = e / torch.linalg.matrix_norm(e, keepdim=True).clamp_min(1e-30)
            share = self.gamma / rates[p] / len(found) / math.prod(p.shape[:-2])
            assert p.grad is not None
            p.grad.add_(e @ p if e.shape[-1] == p.shape[-2] else p @ e, alpha=2 * share)


@final
@dataclass(frozen=True)
class SingularValues(Term):
    """``beta sum |e|^2 + gamma sum (|A A^T - I| + |B^T B - I|)`` over the sites (KaSA; arXiv 2412.06071, Eq. 9 to 11).

    Attributes:
        beta: weight of the singular values e.
        gamma: weight of what the factors lack to orthonormal rows and columns.
    """

    requires = frozenset({"lowrank"})

    beta: float = 1e-4
    gamma: float = 1e-3

    def __call__(self, adapter: Any, step: int) -> Tensor:
        sites = adapter.sites.values()
        terms = [self.beta * e.square().sum() for e in trained(sites, ("rank",))]
        terms += [self.gamma * torch.linalg.matrix_norm(excess(p)).sum() for p in trained(sites, *SIDES)]
        return torch.stack(terms).sum()


@final
@dataclass(frozen=True)
class Balance(BeforeStep):
    """BAR: one factor of a pair grows and the other shrinks, by ``1 +- alpha * lr`` (Li et al. 2024, arXiv 2410.14802).

    Decoupled from the gradient, like weight decay. What it moves is the balancedness (|B|^2 - |A|^2) / 2, the way SAM
    does; the product changes by (alpha lr)^2 only.

    Attributes:
        by: "gradient" (nBAR): the factor of the larger gradient grows; "size" (oBAR): the larger factor shrinks.
        alpha: coefficient; 0.2 to 2 in the paper.
        steps: optimizer steps over which alpha falls to zero; None keeps it.
        schedule: how it falls: "linear" or "cosine".
    """

    requires = frozenset({"pair"})

    by: Literal["gradient", "size"] = "gradient"
    alpha: float = 0.5
    steps: int | None = None
    schedule: Literal["linear", "cosine"] = "linear"

    def __post_init__(self) -> None:
        if self.by not in ("gradient", "size") or self.schedule not in ("linear", "cosine"):
            found = f"found by={self.by!r}, schedule={self.schedule!r}."
            raise IncompatibleAxes(f'Balance is by "gradient" or "size", its schedule "linear" or "cosine"; {found}')

    def coefficient(self, step: int) -> float:
        """Alpha after so many steps."""
        if self.steps is None:
            return self.alpha
        left = max(0.0, 1 - step / self.steps)
        return self.alpha * (left if self.schedule == "linear" else (1 - math.cos(math.pi * left)) / 2)

    def before(self, sites: Sequence[SiteFactors], rates: Rates, step: int) -> None:
        alpha = self.coefficient(step)
        size = functools.partial(torch.linalg.matrix_norm, keepdim=True)
        for b, a, _ in (pair for site in sites for pair in pairs(site)):
            if b.grad is None or a.grad is None:
                continue
            grows = size(b.grad) >= size(a.grad) if self.by == "gradient" else size(b) < size(a)  # b does
            sign = grows.to(b.dtype) * 2 - 1
            b.mul_(1 + sign * (alpha * rates[b]))
            a.mul_(1 - sign * (alpha * rates[a]))


@final
@dataclass(frozen=True)
class MaxNorm(AfterStep):
    """Scales an update back where ``|s B A|`` exceeds a limit, B and A by the root (kohya's scale_weight_norms).

    Attributes:
        limit: largest Frobenius norm of a site's update; of each matrix of a stack.
    """

    requires = frozenset({"pair"})

    limit: float = 1.0

    def after(self, sites: Sequence[SiteFactors]) -> None:
        for b, a, scale in (pair for site in sites for pair in pairs(site)):
            ratio = (self.limit / squared_norm(b, a, scale).sqrt().clamp_min(1e-30)).clamp_max(1).sqrt()
            b.mul_(ratio[..., None, None])
            a.mul_(ratio[..., None, None])


# -- on gates -----------------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class ExpectedRank(Term, AfterStep):
    """Drives the expected rank of drawn gates to a budget: ``l c``, and after a step ``l <- l + rate c``, 0 for c <= 0.

    c is what the expected rank of all sites has above the budget, as a share of their rank; l is its Lagrange
    multiplier, which starts at zero and is saved with the adapter (SaLoRA; Hu et al. 2023). That it starts anew
    wherever the budget is met keeps the rank from falling far below (Gallego-Posada et al. 2022, arXiv 2208.04425).

    Attributes:
        budget: ranks that are left, on average over the sites.
        rate: of the multiplier.
    """

    requires = frozenset({"hard_concrete"})

    budget: float = 8.0
    rate: float = 0.1

    def __post_init__(self) -> None:
        if self.budget <= 0 or self.rate <= 0:
            raise IncompatibleAxes(f"A rank budget and the rate of its multiplier are above 0; found {self!r}.")

    def above(self, sites: Iterable[SiteFactors]) -> Tensor:
        """c, differentiable in the gates."""
        gates = trained(sites, ("odds",))
        least = sum(self.budget * e.numel() / e.shape[-1] for e in gates)
        return (torch.stack([chance_of_open(e).sum() for e in gates]).sum() - least) / sum(e.numel() for e in gates)

    def __call__(self, adapter: Any, step: int) -> Tensor:
        sites = [*adapter.sites.values()]
        return _multipliers(sites)[0].flatten()[0] * self.above(sites)

    def after(self, sites: Sequence[SiteFactors]) -> None:
        c = self.above(sites)
        for multiplier in _multipliers(sites):
            multiplier.copy_((multiplier + self.rate * c).clamp_min(0) * (c > 0))


def _multipliers(sites: Iterable[SiteFactors]) -> list[Tensor]:
    """One, or one a kind of site: stacks have one of a shape of their own, of equal value."""
    return [p for site in sites for name, p in site.own().items() if tuple(site.described[name].dims) == ("one",)]


@final
@dataclass(frozen=True)
class Alternation(BeforeStep):
    """Of every two steps the first trains the factors and the second the gates, for data of their own (AutoLoRA)."""

    requires = frozenset({"selection"})

    def before(self, sites: Sequence[SiteFactors], rates: Rates, step: int) -> None:
        for site in sites:
            for name, p in site.own().items():
                if (tuple(site.described[name].dims) == ("odds",)) != bool(step % 2):
                    p.grad = None
