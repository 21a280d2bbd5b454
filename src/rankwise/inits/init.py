"""The init axis: where the factors start.

An init gives the starting values of a structure that wraps no other; wrappers complete them
(:meth:`rankwise.structures.Structure.start`). Stacked sites (experts) call it once a matrix.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from typing import Any, final

import torch
from torch import Tensor

from rankwise.errors import StatisticsError
from rankwise.host import Site
from rankwise.structures import Factor, Start, Structure


class Init(ABC):
    """A frozen dataclass of the init's own options."""

    requires: frozenset[str] = frozenset()  # traits that the structure must have.

    needs: frozenset[str] = frozenset()  # statistics that must have been collected

    traits: frozenset[str] = frozenset()  # facts of the start: "moves_at_start" excepts it from L2

    @abstractmethod
    def __call__(
        self, site: Site, structure: Structure, weight: Callable[[], Tensor], stats: Mapping[str, Any] | None
    ) -> dict[str, Tensor]:
        """Starting values of every factor of ``structure`` at ``site``.

        Args:
            site: the facts of the layer.
            structure: the innermost structure.
            weight: gives the frozen weight (out, in); call it only if it is needed.
            stats: what ``collect`` gathered at this site.

        Returns:
            A tensor for each name of ``structure.factors(site)``.
        """


def collected(
    init: Init, site: Site, stats: Mapping[str, Any] | None, shape: tuple[int | None, int] | None = None
) -> Any:
    """The one statistic that an init needs, as it was gathered at this site.

    Args:
        init: the init.
        site: where.
        stats: what was gathered there.
        shape: that a tensor must have to be of this site.

    Returns:
        The statistic.

    Raises:
        StatisticsError: it was not gathered, or for a layer of another size.
    """
    (name,) = init.needs
    found = None if stats is None else stats.get(name)
    if found is None:
        raise StatisticsError(
            f'{type(init).__name__} reads the statistic "{name}" of every site; none was gathered at {site.name}. Call '
            f"stats = rw.collect(model, batches, recipe) with this very recipe, and attach with stats=stats."
        )
    if isinstance(found, Tensor) and found.shape != shape:
        raise StatisticsError(
            f'The "{name}" of {site.name} should be of shape {shape}; found {tuple(found.shape)}. Collect it on this '
            f"model; a part of a fused projection has no gradient of its own, adapt the whole."
        )
    return found


def rank_of(structure: Structure, site: Site) -> int:
    """The rank of a structure with a factor a (rank, in)."""
    return structure.factors(site)["a"].dims["rank"]


def factors_of(structure: Structure, site: Site, b: Tensor, a: Tensor) -> dict[str, Tensor]:
    """The factors of ``s b a``, b (out, rank), a (rank, in); where there is an e it is one, and any other is zero."""
    others = {k: a.new_full(f.shape, float(k == "e")) for k, f in structure.factors(site).items()}
    return {**others, "a": a.contiguous(), "b": b.contiguous()}


class Drawn(Init):
    """Inits that only choose a distribution for the factors that start at random."""

    @abstractmethod
    def draw(self, factor: Factor) -> Tensor:
        """A float32 tensor of the factor's shape."""

    @final
    def __call__(
        self, site: Site, structure: Structure, weight: Callable[[], Tensor], stats: Mapping[str, Any] | None
    ) -> dict[str, Tensor]:
        return {name: self._value(factor) for name, factor in structure.factors(site).items()}

    def _value(self, factor: Factor) -> Tensor:
        if factor.start is Start.RANDOM:
            return self.draw(factor)
        if factor.start is Start.NORMAL:
            return torch.randn(factor.shape)
        if isinstance(factor.start, float):
            return torch.full(factor.shape, factor.start)
        return torch.full(factor.shape, 1.0 if factor.start is Start.ONES else 0.0)
