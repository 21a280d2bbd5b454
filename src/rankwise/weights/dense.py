"""Plain floating-point weights: float64, float32, bfloat16, float16, DTensors included.

The bias that a linear layer or a convolution could have and has not is one too: zeros (out,), stored as None.
"""

from functools import cached_property
from typing import Any, final

import torch
from torch import Tensor, nn

from rankwise.weights.weight import Weight


def computes(weight: Tensor) -> bool:
    """Whether torch multiplies by the weight as it is: floating point, and no float8 that needs scales of its own."""
    return weight.is_floating_point() and weight.element_size() > 1


@final
class DenseWeight(Weight):
    """An ordinary parameter."""

    @staticmethod
    def claims(module: nn.Module, name: str) -> bool:
        weight = module._parameters.get(name)
        if weight is None and isinstance(module, nn.Linear | nn.modules.conv._ConvNd):
            return name == "bias" and name in module._parameters
        if weight is None or not computes(weight):
            return False
        kind = type(weight.data)  # not isinstance: quantised formats are tensor subclasses that say float
        return kind in (nn.Parameter, Tensor) or kind.__name__ in ("DTensor", "FakeTensor")  # fake: of a plan

    @cached_property
    def _zeros(self) -> Tensor:
        m, like = self.module, self.module._parameters["weight"]
        size = m.out_features if isinstance(m, nn.Linear) else m.out_channels
        dtype = like.dtype if like.is_floating_point() else None  # a quantised layer casts its bias
        return torch.zeros(size, dtype=dtype, device=like.device)

    @property
    def dtype(self) -> torch.dtype:
        return self.dense().dtype

    def matmul(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.dense())

    @property
    def bits(self) -> Tensor | None:
        return self.module._parameters[self.name]

    @torch.no_grad()
    def put(self, bits: Any) -> None:
        if bits is not None and self.bits is not None:
            self.bits.copy_(bits)
        else:
            trained = self.module._parameters["weight"].requires_grad
            self.module._parameters[self.name] = None if bits is None else nn.Parameter(bits.clone(), trained)

    def encode(self, w: Tensor) -> Tensor:
        return w.to(self.dtype)

    def decode(self, bits: Any) -> Tensor:
        return self._zeros if bits is None else bits
