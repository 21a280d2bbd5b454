"""The protocol of a frozen weight: what every storage format can do, in five primitives.

Shapes: a linear weight is (out, in) whatever the storage; activations are (*, in).
"""

import copy
from abc import ABC, abstractmethod
from typing import Any, final

import torch
from torch import Tensor, nn


class Weight(ABC):
    """One parameter of a module, in one storage format.

    Args:
        module: the module that registers it.
        name: the parameter's name there.
    """

    def __init__(self, module: nn.Module, name: str = "weight") -> None:
        self.module: Any = module
        self.name = name

    @staticmethod
    @abstractmethod
    def claims(module: nn.Module, name: str) -> bool:
        """Whether this format is how the module stores the parameter."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype in which products with this weight are computed."""

    @abstractmethod
    def matmul(self, x: Tensor) -> Tensor:
        """``x @ W.T`` without bias, differentiable in x: (*, in) -> (*, out)."""

    @property
    @abstractmethod
    def bits(self) -> Any:
        """What is stored: a tensor, or the parts of a quantised one."""

    @abstractmethod
    def put(self, bits: Any) -> None:
        """Store these bits: merging and restoring."""

    @abstractmethod
    def encode(self, w: Tensor) -> Any:
        """The bits that stand for w, rounded or quantised once."""

    @abstractmethod
    def decode(self, bits: Any) -> Tensor:
        """The plain tensor that bits stand for."""

    def prepare(self) -> None:  # noqa: B027  (most formats need nothing)
        """Make the module safe to train on top of; called at attach, before W is read."""

    @final
    def dense(self) -> Tensor:
        """W as a plain tensor; dequantises."""
        return self.decode(self.bits)

    @final
    def snapshot(self) -> Any:
        """A copy of the stored bits, for ``put``."""
        return copy.deepcopy(self.bits)
