"""A matrix that is zero but at given places."""

from typing import final

import torch
from torch import Tensor

from rankwise.ops.operator import Cost, LinearOperator
from rankwise.ops.whole import run as run_whole


@final
class Scattered(LinearOperator):
    """Entries ``values`` (*batch, k) at ``places`` (*batch, k) of a matrix (M, N), zeros elsewhere.

    Places count along the rows, ``i N + j``, each at most once. The matrix is formed to be applied, and again in
    backward; it is not kept between the two.
    """

    def __init__(self, places: Tensor, values: Tensor, shape: tuple[int, int]) -> None:
        self.places, self.values = places, values
        self.shape = shape

    def mv(self, x: Tensor) -> Tensor:
        plain = torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active()
        if plain or torch.is_autocast_enabled(x.device.type) or self.values.dim() > 1:
            return x @ self.dense().to(x.dtype).mT
        return run_whole(x, None, self)

    def dense(self) -> Tensor:
        m, n = self.shape
        flat = self.values.new_zeros(*self.values.shape[:-1], m * n)
        return flat.scatter(-1, self.places, self.values).unflatten(-1, (m, n))

    @property
    def T(self) -> LinearOperator:
        m, n = self.shape
        return Scattered(self.places % n * m + self.places // n, self.values, (n, m))

    def gradients(self, g: Tensor) -> list[Tensor | None]:
        return [None, g.flatten(-2).gather(-1, self.places)]

    @property
    def cost(self) -> Cost:
        m, n = self.shape
        return Cost(m * n, m * n)  # and formed at every application
