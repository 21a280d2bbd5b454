"""Plain floating-point weights: float64, float32, bfloat16, float16, DTensors included."""

from typing import Any, final

import torch
from torch import Tensor, nn

from rankwise.weights.weight import Weight


@final
class DenseWeight(Weight):
    """An ordinary parameter."""

    @staticmethod
    def claims(module: nn.Module, name: str) -> bool:
        weight = module._parameters.get(name)
        if weight is None or not weight.is_floating_point():
            return False
        kind = type(weight.data)  # not isinstance: quantised formats are tensor subclasses that say float
        return kind in (nn.Parameter, Tensor) or kind.__name__ in ("DTensor", "FakeTensor")  # fake: of a plan

    @property
    def _weight(self) -> Tensor:
        return self.module._parameters[self.name]

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    def matmul(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self._weight)

    @property
    def bits(self) -> Tensor:
        return self._weight

    @torch.no_grad()
    def put(self, bits: Any) -> None:
        self._weight.copy_(bits)

    def encode(self, w: Tensor) -> Tensor:
        return w.to(self.dtype)

    def decode(self, bits: Any) -> Tensor:
        return bits
