"""A structure, two inits, a solver and two methods for rankwise, from a package of their own.

W (out, in), a (rank, in), b (out, rank), r (rank, inner); site by site, as rankwise asks for them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor

from rankwise import Recipe
from rankwise.adapter import SiteFactors
from rankwise.host import Site
from rankwise.inits import Init
from rankwise.ops import Dense, LinearOperator, Product
from rankwise.ops.linalg import truncated_svd
from rankwise.solvers import AdamW, Solver
from rankwise.structures import Additive, Anchored, Factor, Factors, LoRA, Start, Structure
from rankwise.structures.structure import check_rank


@final
@dataclass(frozen=True)
class LoRAXS(Additive):
    """``W + s B R A``, only R (r x r) trained (LoRA-XS; Balazy et al. 2024, arXiv 2405.17604).

    Attributes:
        rank: r.
        alpha: numerator of the scale alpha/r.
    """

    rank: int = 16
    alpha: float = 16.0

    traits = frozenset({"additive", "random_start", "drops", "framed"})  # the last one is this package's own

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def factors(self, site: Site) -> dict[str, Factor]:
        k = check_rank(self.rank, site, min(site.rows, site.cols))
        a = Factor({"rank": k, "in": site.cols}, Start.RANDOM, trainable=False)
        b = Factor({"out": site.rows, "rank": k}, Start.RANDOM, trainable=False)
        return {"a": a, "r": Factor({"rank": k, "inner": k}), "b": b}

    def operator(self, f: Factors) -> LinearOperator:
        return Product(Dense(f["b"]), Product(Dense(f["r"]), Dense(f["a"])))


@final
@dataclass(frozen=True)
class Frames(Init):
    """LoRA-XS's frozen frames: ``B = U_r S_r``, ``A = V_r^T`` of the leading triplets; R = 0."""

    requires = frozenset({"framed"})

    def __call__(
        self, site: Site, structure: Structure, weight: Callable[[], Tensor], stats: Mapping[str, Any] | None
    ) -> dict[str, Tensor]:
        shape = structure.factors(site)["r"].shape
        u, s, v = truncated_svd(weight(), shape[0])
        return {"a": v.mT, "r": s.new_zeros(shape), "b": u * s}


@final
@dataclass(frozen=True)
class Minor(Init):
    """The r last singular triplets of W (MiLoRA; Wang et al. 2024, arXiv 2406.09044)."""

    requires = frozenset({"lowrank", "anchored"})

    def __call__(
        self, site: Site, structure: Structure, weight: Callable[[], Tensor], stats: Mapping[str, Any] | None
    ) -> dict[str, Tensor]:
        assert isinstance(structure, Additive)
        described, w = structure.factors(site), weight()
        u, s, v = (t[..., -described["a"].dims["rank"] :] for t in truncated_svd(w, min(w.shape)))
        s = s / structure.scale
        if "e" in described:
            return {"a": v.mT, "b": u, "e": s}
        return {"a": (v * s.sqrt()).mT, "b": u * s.sqrt()}


def damped(gram: Tensor, damping: float) -> Tensor:
    """``G + d I`` of Gram matrices G (..., r, r), at least in float32."""
    gram = gram.to(torch.promote_types(gram.dtype, torch.float32))
    return gram + damping * torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)


@final
@dataclass(frozen=True)
class ScaledAdamW(Solver):
    """AdamW on ``(B^T B + d I)^-1 g_A`` and ``g_B (A A^T + d I)^-1`` (Zhang and Pilanci 2024, arXiv 2402.02347).

    Attributes:
        damping: d.
        inner: the AdamW that takes the step.
    """

    damping: float = 1e-6
    inner: AdamW = AdamW()

    requires = frozenset({"lowrank"})

    def groups(self, sites: Iterable[SiteFactors], lr: float) -> list[dict[str, Any]]:
        return self.inner.groups(sites, lr)

    def __call__(self, sites: Iterable[SiteFactors], lr: float) -> torch.optim.Optimizer:
        sites = list(sites)
        optimizer = self.inner(sites, lr)
        optimizer.register_step_pre_hook(lambda *_: self._precondition(sites))
        return optimizer

    @torch.no_grad()
    def _precondition(self, sites: Iterable[SiteFactors]) -> None:
        for f in (site.factors() for site in sites):
            for name in [n for n in f if n == "a" or n.endswith("_a")]:  # v_a of Rows, first_a of Stack
                a, b = f[name], f[name[:-1] + "b"]
                if a.grad is not None and b.grad is not None:
                    left, right = damped(b.mT @ b, self.damping), damped(a @ a.mT, self.damping)
                    a.grad.copy_(torch.linalg.solve(left, a.grad.to(left.dtype)))
                    b.grad.copy_(torch.linalg.solve(right, b.grad.to(right.dtype), left=False))


def lora_xs(rank: int = 16, alpha: float | None = None, **axes: Any) -> Recipe:
    """LoRA-XS: ``W + s B R A``, B and A frozen at W's leading singular vectors.

    Parameters per layer: r^2, whatever the layer's size. Law: identity at the start (R = 0).

    Args:
        rank: r.
        alpha: numerator of the scale; None for r.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Balazy et al. 2024, arXiv 2405.17604. Deviations: R starts at 0, not at noise of 1e-5; the SVD is exact.
    """
    structure = LoRAXS(rank, rank if alpha is None else alpha)
    own = {"structure": structure, "init": Frames(), "lr": 5e-3, "name": "lora_xs"}
    return Recipe(**{**own, "paper": "Balazy et al. 2024, arXiv 2405.17604", **axes})


def milora(rank: int = 16, alpha: float | None = None, **axes: Any) -> Recipe:
    """MiLoRA: LoRA that starts at the r last singular triplets of W, which are subtracted.

    Parameters per layer: r (out + in) trained, as many stored. Law: identity at the start up to rounding.

    Args:
        rank: r; the paper uses 32 to 64.
        alpha: numerator of the scale; None for r.
        **axes: other axes of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    References:
        Wang et al. 2024, arXiv 2406.09044. Deviation: the base is left alone.
    """
    structure = Anchored(LoRA(rank, rank if alpha is None else alpha))
    own = {"structure": structure, "init": Minor(), "lr": 1e-3, "name": "milora"}
    return Recipe(**{**own, "paper": "Wang et al. 2024, arXiv 2406.09044", **axes})
