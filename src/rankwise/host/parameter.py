"""Bare parameters: a tensor of a module that is not a layer of its own.

MoE expert stacks (E, out, in), ``nn.MultiheadAttention``'s packed and separate projections, and,
for structures that replace a tensor whole, biases and norms. There is no map to apply, only the
adapted tensor: a bare parameter is adapted by reading it.
"""

from collections.abc import Callable
from typing import final

from torch import Tensor, nn

from rankwise.host.linear import scale_last
from rankwise.host.norms import dense_row_norm
from rankwise.host.site import Correction, Host, Site, Stored, turn_last
from rankwise.ops import LinearOperator
from rankwise.ops.fused import Part
from rankwise.weights import weight_of


@final
class ParameterHost(Stored):
    """One named parameter of a module.

    Args:
        module: the module that registers the parameter.
        name: the parameter's name there.
    """

    kind = "parameter"

    def __init__(self, module: nn.Module, name: str) -> None:
        self.storage = weight_of(module, name)
        expert = self.parameter().dim() == 3
        self.transposed = expert and bool(getattr(module, "is_transposed", False))  # stored (E, in, out)

    def site(self, name: str) -> Site:
        shape = tuple(self.parameter().shape)
        if len(shape) == 3:
            out, in_ = (shape[2], shape[1]) if self.transposed else shape[1:]
            return Site(name, self.kind, out, in_, shape=shape, stack=shape[0])
        rows = shape[0] if shape else 1  # 1-d ones have rows only
        return Site(name, self.kind, rows, shape[1] if len(shape) == 2 else 1, shape=shape)

    def matrix(self, tensor: Tensor) -> Tensor:
        return tensor.mT if self.transposed else tensor

    def tensor(self, w: Tensor) -> Tensor:
        return w.mT if self.transposed else w


@final
class TransposedHost(Host):
    """An output head that shares an embedding's weight: the adapter's map, used transposed.

    The inner host is the head's own (linear, (vocabulary, width)); structures are written for the
    embedding (width, vocabulary).
    """

    kind = "transposed"

    def __init__(self, head: Host, dropout: float = 0.0) -> None:
        super().__init__(head.module, dropout)
        self.head = head

    def __call__(self, x: Tensor) -> Tensor:
        return self.head(x)

    def mv(self, op: LinearOperator, x: Tensor) -> Tensor:
        return self.head.mv(op.T, x)

    def weight(self) -> Tensor:
        return self.head.weight().mT

    def part(self, correction: Correction, x: Tensor) -> Part | None:
        return None if correction.magnitude is not None else self.head.part(Correction(correction.op.T), x)

    def row_norm(self, op: LinearOperator) -> Tensor:
        return dense_row_norm(self.weight(), op)

    def rotate(self, op: LinearOperator, x: Tensor) -> Tensor:
        # (W R)^T = R^T W^T: the rotation of the embedding's input acts on the head's output
        return op.T.mv(self.head(x))

    def turn(self, op: LinearOperator, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return run(turn_last(op.T, x))

    def scale_rows(self, scale: Tensor, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return run(scale_last(x, scale))  # rows of the embedding are the head's input units

    def overwrite(self, y: Tensor, x: Tensor, index: tuple[int, ...], rows: Tensor) -> Tensor:
        return self.head.overwrite(y, x, index, rows)
