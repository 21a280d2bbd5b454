"""Linear layers: ``nn.Linear``, its quantised subclasses and transformers' ``Conv1D``.

Shapes: x (*batch, tokens, in), W (out, in); Conv1D stores (in, out).
"""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from rankwise.host.norms import factored_row_norm
from rankwise.host.site import Correction, LayerHost, Site, computes_as, flat_tokens, turn_last
from rankwise.ops import Kronecker, LinearOperator, Product, Scaled, Sum
from rankwise.ops.form import Form, about, cheapest
from rankwise.ops.fused import Edited, Part
from rankwise.ops.kronecker import Beside
from rankwise.ops.operator import leaves
from rankwise.ops.whole import Whole, together
from rankwise.weights import DenseWeight, format_of


def scale_last(y: Tensor, scale: Tensor) -> Tensor:
    """Scale the last dim of y (*batch, ..., M) by ``scale`` (*batch, M)."""
    shape = (*scale.shape[:-1], *(1,) * (y.dim() - scale.dim()), scale.shape[-1])
    return y * scale.to(y.dtype).reshape(shape)


def unscaled(op: LinearOperator) -> tuple[LinearOperator, float]:
    """An operator without the numbers in front of it, and their product."""
    scale = 1.0
    while isinstance(op, Scaled):
        op, scale = op.op, scale * op.scale
    return op, scale


ADDED = 10  # multiply-adds in the time of copying an entry of W once more


def _cheap_to_add(op: LinearOperator, weight: Tensor, x: Tensor) -> bool:
    """Whether an update without trained factors is better formed with W, twice a step, than applied beside it."""
    tensors, (m, n) = [weight, *leaves(op)], op.shape
    if torch.compiler.is_compiling() or not together(x) or any(t.requires_grad or t.dim() != 2 for t in tensors):
        return False
    return op.rank is not None and (x.numel() // n) * op.rank * (m + n) > op.cost.form + ADDED * m * n


class _MatrixHost(LayerHost):
    """What Linear and Conv1D share: an operator acts on the last dim."""

    def mv(self, op: LinearOperator, x: Tensor) -> Tensor:
        return op.mv(flat_tokens(x)).reshape(*x.shape[:-1], op.shape[0])

    def rotate(self, op: LinearOperator, x: Tensor) -> Tensor:
        return self(turn_last(op, x))

    def part(self, correction: Correction, x: Tensor) -> Part | None:
        op, scale = unscaled(correction.op)
        if not self._direct(x, op.shape[1]) or self._form(op, x) is not Form.LOW_RANK:
            return None
        plain = isinstance(self.storage, DenseWeight)
        stored = self.matrix(self.module.weight) if plain else self.storage
        if isinstance(op, Sum) and isinstance(stored, Tensor) and scale == 1 and _cheap_to_add(op.second, stored, x):
            still, times = unscaled(op.second)
            factors = still.lower()
            assert factors is not None
            stored, (op, scale) = Edited(stored, factors, times), unscaled(op.first)
        pair = op.lower()
        if pair is None or pair.right.dim() == 3 and x.dim() != 3:
            return None
        return Part(stored, pair.left, pair.right, scale, *correction[1:])

    def node(self, op: LinearOperator, x: Tensor) -> Whole | Beside | None:
        tensors, (inner, scale) = leaves(op), unscaled(op)
        if torch.compiler.is_compiling() or self.dropout or any(t.dim() != 2 for t in tensors):
            return None
        if not self._direct(x, op.shape[1]):
            return None
        form, plain = self._form(op, x), isinstance(self.storage, DenseWeight)
        stored = self.matrix(self.module.weight) if plain else self.storage
        if form is Form.OWN and isinstance(inner, Kronecker):
            return Beside(stored, inner, scale, tensors)
        return Whole(stored, op, tensors) if form is Form.WHOLE and isinstance(stored, Tensor) else None

    def beside(self, x: Tensor, update: Callable[[], Tensor]) -> Tensor:
        if not isinstance(self.storage, DenseWeight) or not self._direct(x, x.shape[-1]):
            return super().beside(x, update)
        y, more = self(x), update()  # in this order, so that in backward too the product's share is added in place
        return y.add_(more) if more.dtype == y.dtype else y + more

    def _direct(self, x: Tensor, n: int) -> bool:
        """Whether a node of ours may multiply x, n wide, by the stored weight: nothing else would cast or gather."""
        weight = self.module.weight
        if x.dtype != self.dtype or x.device != weight.device or x.shape[-1] != n:
            return False
        if hasattr(weight, "full_tensor") or torch._C._are_functorch_transforms_active():
            return False
        device = x.device.type
        return not torch.is_autocast_enabled(device) or torch.get_autocast_dtype(device) == x.dtype

    @staticmethod
    def _form(op: LinearOperator, x: Tensor) -> Form:
        rank, (m, n) = op.rank, op.shape
        if rank is not None and isinstance(op, Product) and 3 * rank * (m + n) <= m * n:
            return Form.LOW_RANK  # as nearly always
        return cheapest(op, about(x.numel() // max(n, 1)), together(x))

    def row_norm(self, op: LinearOperator) -> Tensor:
        return factored_row_norm(self.module.weight, self.weight(), op)

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        bias = self.module.bias
        return y if bias is None else y + bias.to(y.dtype)

    def turn(self, op: LinearOperator, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return turn_last(op, run(x))

    def scale_rows(self, scale: Tensor, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return scale_last(run(x), scale)

    def overwrite(self, y: Tensor, x: Tensor, index: tuple[int, ...], rows: Tensor) -> Tensor:
        where = torch.tensor(index, device=y.device)  # y[..., index] = x @ rows.T
        return y.index_copy(-1, where, (x @ rows.to(x.dtype).mT).to(y.dtype))


@final
class LinearHost(_MatrixHost):
    """``nn.Linear`` and its subclasses, the weight in any format of ``rankwise.weights``."""

    kind = "linear"

    @staticmethod
    def claims(module: nn.Module) -> bool:
        if not isinstance(module, nn.Linear):
            return False
        written_out = type(module).__name__ == "FalconLinear"  # the same product, in its own words
        return computes_as(module, nn.Linear) or written_out or format_of(module) is not DenseWeight

    def site(self, name: str) -> Site:
        out, in_ = self.module.out_features, self.module.in_features  # a packed weight has another shape
        return Site(name, self.kind, out, in_, shape=(out, in_))

    def __call__(self, x: Tensor) -> Tensor:
        return self.storage.matmul(x)

    def matrix(self, tensor: Tensor) -> Tensor:
        return tensor

    def tensor(self, w: Tensor) -> Tensor:
        return w


@final
class Conv1DHost(_MatrixHost):
    """transformers' ``Conv1D`` (GPT-2): a linear layer that stores (in, out)."""

    kind = "linear"

    @staticmethod
    def claims(module: nn.Module) -> bool:
        names = {(c.__module__, c.__name__) for c in type(module).__mro__}
        return ("transformers.pytorch_utils", "Conv1D") in names

    def site(self, name: str) -> Site:
        in_, out = self.module.weight.shape
        return Site(name, self.kind, out, in_, shape=(in_, out))

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.module.weight.mT)

    def matrix(self, tensor: Tensor) -> Tensor:
        return tensor.mT

    def tensor(self, w: Tensor) -> Tensor:
        return w.mT
