"""Plain floating-point weights: float64, float32, bfloat16, float16, DTensors included."""

from __future__ import annotations

from typing import final

import torch
from torch import Tensor, nn

from rankwise.weights.weight import Weight


@final
class DenseWeight(Weight):
    """``module.weight`` as an ordinary parameter (out, in)."""

    format = "dense"

    @staticmethod
    def claims(module: nn.Module) -> bool:
        weight = module._parameters.get("weight")
        # type(), not isinstance: quantised formats are tensor subclasses that say float
        plain = (nn.Parameter, Tensor)
        return (
            weight is not None
            and weight.is_floating_point()
            and (type(weight.data) in plain or type(weight.data).__name__ == "DTensor")
        )

    @property
    def _weight(self) -> Tensor:
        weight = self.module._parameters["weight"]
        assert weight is not None
        return weight

    @property
    def shape(self) -> tuple[int, int]:
        return self._weight.shape[0], self._weight.shape[1]

    @property
    def dtype(self) -> torch.dtype:
        return self._weight.dtype

    def matmul(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self._weight)

    def dense(self) -> Tensor:
        return self._weight

    @torch.no_grad()
    def write(self, w: Tensor) -> None:
        self._weight.copy_(w)

    def stored(self, w: Tensor) -> Tensor:
        return w.to(self.dtype)

    def snapshot(self) -> object:
        return self._weight.detach().clone()

    @torch.no_grad()
    def restore(self, bits: object) -> None:
        assert isinstance(bits, Tensor)
        self._weight.copy_(bits)
