"""Inits from the weight's own spectrum."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, final

from torch import Tensor

from rankwise.host import Site
from rankwise.inits.init import Init
from rankwise.ops.linalg import truncated_svd
from rankwise.structures import Additive, Structure


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
        assert isinstance(structure, Additive)
        described = structure.factors(site)
        rank = described["a"].dims["rank"]
        u, s, v = truncated_svd(weight(), rank, iterations=self.iterations, seed=self.seed)
        s = s / structure.scale
        if "e" in described:
            return {"a": v.mT.contiguous(), "b": u.contiguous(), "e": s}
        root = s.sqrt()
        return {"a": root.unsqueeze(-1) * v.mT, "b": u * root}
