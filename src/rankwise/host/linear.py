"""Linear layers: ``nn.Linear``, its quantised subclasses and transformers' ``Conv1D``.

Shapes: x (*batch, tokens, in), W (out, in); Conv1D stores (in, out).
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, final

import torch
from torch import Tensor, nn

from rankwise.host.site import LayerHost, PlainHost, Site, flat_tokens
from rankwise.ops import LinearOperator
from rankwise.weights import weight_of


def scale_last(y: Tensor, scale: Tensor) -> Tensor:
    """Scale the last dim of y (*batch, ..., M) by ``scale`` (*batch, M)."""
    shape = (*scale.shape[:-1], *(1,) * (y.dim() - scale.dim()), scale.shape[-1])
    return y * scale.to(y.dtype).reshape(shape)


def overwrite_outputs(y: Tensor, x: Tensor, index: tuple[int, ...], rows: Tensor) -> Tensor:
    """Replace the output units ``index`` of a linear layer: y[..., index] = x @ rows.T."""
    where = torch.tensor(index, device=y.device)
    return y.index_copy(-1, where, (x @ rows.to(x.dtype).mT).to(y.dtype))


class _MatrixHost(LayerHost):
    """What Linear and Conv1D share: an operator acts on the last dim."""

    def mv(self, op: LinearOperator, x: Tensor) -> Tensor:
        return op.mv(flat_tokens(x)).reshape(*x.shape[:-1], op.shape[0])

    def drop(self, x: Tensor) -> Tensor:
        return nn.functional.dropout(x, self.dropout) if self.dropout else x

    def rotate(self, op: LinearOperator, x: Tensor) -> Tensor:
        return self(op.mv(flat_tokens(x)).reshape(x.shape))

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        bias = self.module.bias
        return y if bias is None else y + bias.to(y.dtype)

    def scale_rows(self, scale: Tensor, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return scale_last(run(x), scale)

    def overwrite(self, y: Tensor, x: Tensor, index: tuple[int, ...], rows: Tensor) -> Tensor:
        return overwrite_outputs(y, x, index, rows)


@final
class LinearHost(_MatrixHost):
    """``nn.Linear`` and its subclasses, the weight in any format of ``rankwise.weights``."""

    kind = "linear"

    def __init__(self, module: nn.Module, dropout: float = 0.0) -> None:
        super().__init__(module, dropout)
        self.stored_weight = weight_of(module)

    @staticmethod
    def claims(module: nn.Module) -> bool:
        return isinstance(module, nn.Linear)

    def site(self, name: str) -> Site:
        out, in_ = self.stored_weight.shape
        return Site(name, self.kind, out, in_, shape=(out, in_))

    def __call__(self, x: Tensor) -> Tensor:
        return self.stored_weight.matmul(x)

    def weight(self) -> Tensor:
        return self.stored_weight.dense()

    def stored(self, w: Tensor) -> Tensor:
        return self.stored_weight.stored(w)

    def write(self, w: Tensor) -> None:
        self.stored_weight.write(w)

    @property
    def dtype(self) -> torch.dtype:
        return self.stored_weight.dtype

    def snapshot(self) -> object:
        return self.stored_weight.snapshot()

    def restore(self, bits: Any) -> None:
        self.stored_weight.restore(bits)


@final
class Conv1DHost(_MatrixHost, PlainHost):
    """transformers' ``Conv1D`` (GPT-2): a linear layer that stores (in, out)."""

    kind = "linear"

    @staticmethod
    def claims(module: nn.Module) -> bool:
        return any(
            c.__name__ == "Conv1D" and c.__module__ == "transformers.pytorch_utils"
            for c in type(module).__mro__
        )

    def site(self, name: str) -> Site:
        in_, out = self.module.weight.shape
        return Site(name, self.kind, out, in_, shape=(in_, out))

    def __call__(self, x: Tensor) -> Tensor:
        return nn.functional.linear(x, self.module.weight.mT)

    def weight(self) -> Tensor:
        return self.module.weight.mT

    def stored(self, w: Tensor) -> Tensor:
        return w.to(self.dtype)

    @torch.no_grad()
    def write(self, w: Tensor) -> None:
        self.parameter().copy_(w.mT)
