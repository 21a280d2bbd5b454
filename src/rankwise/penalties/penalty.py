"""The penalties axis: what else than the loss shapes training. Three kinds, by when they act."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Any, Protocol, TypeAlias

from torch import Tensor, nn

from rankwise.adapter import SiteFactors

Rates: TypeAlias = Mapping[nn.Parameter, float]
Gradients: TypeAlias = Callable[[], Mapping[nn.Parameter, Tensor]]


class Penalty(ABC):  # noqa: B024  (what it does, its kinds say)
    """A frozen dataclass of its options, saved with the recipe. ``step`` is the number of optimizer steps done."""

    requires: frozenset[str] = frozenset()  # traits that the structure must have.


class Term(Penalty):
    """Added to the loss."""

    @abstractmethod
    def __call__(self, adapter: Any, step: int) -> Tensor:
        """The term, differentiable in the factors of the adapter."""


class BeforeStep(Penalty):
    """Changes factors or gradients when the gradients are complete, before the optimizer's step."""

    @abstractmethod
    def before(self, sites: Sequence[SiteFactors], rates: Rates, step: int) -> None:
        """Act, without gradients; ``rates`` are the learning rates of the step."""


class AfterStep(Penalty):
    """Changes factors after the optimizer's step."""

    @abstractmethod
    def after(self, sites: Sequence[SiteFactors]) -> None:
        """Act, without gradients."""


class Trained(Protocol):
    """What is asked of an adapter."""

    recipe: Any
    model: Any

    @property
    def sites(self) -> Mapping[str, SiteFactors]:
        """Site name -> the module that holds its factors."""
        ...


class Perturbation(Penalty):
    """Changes the model for a forward and its backward, and restores it to the bit."""

    @abstractmethod
    def moved(self, adapter: Trained, gradients: Gradients, step: int) -> AbstractContextManager[None]:
        """Within it the model is changed.

        Args:
            adapter: one that is trained.
            gradients: takes a forward and backward where the weights are now, for perturbations that follow them.
            step: optimizer steps done.

        Returns:
            The context.
        """
