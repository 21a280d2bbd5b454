"""The protocol of a frozen weight: what every format of a linear layer's weight can do.

Shapes: the weight is (out, in) whatever the storage; activations are (*, in).
"""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn


class Weight(ABC):
    """The frozen weight of a linear module, in one storage format."""

    format: str

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    @staticmethod
    @abstractmethod
    def claims(module: nn.Module) -> bool:
        """Whether this format is how the module stores its weight."""

    @property
    @abstractmethod
    def shape(self) -> tuple[int, int]:
        """(out, in), never the packed tensor's shape."""

    @property
    @abstractmethod
    def dtype(self) -> torch.dtype:
        """The dtype in which products with this weight are computed."""

    @abstractmethod
    def matmul(self, x: Tensor) -> Tensor:
        """``x @ W.T`` without bias, differentiable in x: (*, in) -> (*, out)."""

    @abstractmethod
    def dense(self) -> Tensor:
        """W as a plain (out, in) tensor; dequantises."""

    @abstractmethod
    def write(self, w: Tensor) -> None:
        """Store w (out, in), rounding or quantising once. Used by merging alone."""

    @abstractmethod
    def stored(self, w: Tensor) -> Tensor:
        """What ``dense()`` would return after ``write(w)``, without writing."""

    @abstractmethod
    def snapshot(self) -> object:
        """The stored bits, for an exact ``restore``."""

    @abstractmethod
    def restore(self, bits: object) -> None:
        """Put back what ``snapshot`` returned, bit for bit."""

    def prepare(self) -> None:  # noqa: B027  (most formats need nothing)
        """Make the module safe to train on top of; called at attach, before W is read."""
