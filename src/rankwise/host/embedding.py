"""Embeddings: the map of a one-hot vector, so W as a matrix is (width, vocabulary).

x holds indices (*batch, tokens). An adapter's dropout acts on the looked-up rows. The padding row
belongs to the base and never moves. Embeddings with a scale (``embed_scale``) scale the update too.
"""

from collections.abc import Callable
from typing import final

import torch
from torch import Tensor, nn

from rankwise.errors import TargetError
from rankwise.host.linear import scale_last
from rankwise.host.norms import dense_row_norm
from rankwise.host.site import LayerHost, Site, computes_as, turn_last
from rankwise.ops import Dense, LinearOperator
from rankwise.ops.linalg import widened
from rankwise.ops.operator import gather_rows


@final
class EmbeddingHost(LayerHost):
    """``nn.Embedding`` and its scaled subclasses."""

    kind = "embedding"

    @staticmethod
    def claims(module: nn.Module) -> bool:
        return isinstance(module, nn.Embedding) and (
            computes_as(module, nn.Embedding) or hasattr(module, "embed_scale")
        )

    def site(self, name: str) -> Site:
        if self.module.max_norm is not None:
            raise TargetError(
                f"An embedding with max_norm rewrites its own rows at every look-up; {name} has "
                f"max_norm={self.module.max_norm}. Exclude it from the targets."
            )
        count, width = self.module.weight.shape
        return Site(name, self.kind, width, count, shape=(count, width))

    def _scaled(self, y: Tensor) -> Tensor:
        scale = getattr(self.module, "embed_scale", None)
        if scale is None:
            return y
        return y * (scale.to(y.dtype) if isinstance(scale, Tensor) else scale)

    def __call__(self, x: Tensor) -> Tensor:
        return self._scaled(nn.functional.embedding(x, self.module.weight))

    def mv(self, op: LinearOperator, x: Tensor) -> Tensor:
        index = x if x.dim() <= 2 else x.flatten(1)
        y = op.T.rows(index).to(self.module.weight.dtype)
        y = nn.functional.dropout(y, self.dropout) if self.dropout else y
        return self._scaled(y.reshape(*x.shape, y.shape[-1]))

    def matrix(self, tensor: Tensor) -> Tensor:
        return tensor.mT

    def tensor(self, w: Tensor) -> Tensor:
        table, pad = w.mT, self.module.padding_idx
        if pad is not None:
            table = table.clone()
            table[pad] = self.module.weight[pad]
        return table

    def row_norm(self, op: LinearOperator) -> Tensor:
        return dense_row_norm(self.weight(), op)

    def rotate(self, op: LinearOperator, x: Tensor) -> Tensor:
        w = self.weight()
        return self.mv(Dense(op.T.mv(widened(w))), x)

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        pad = self.module.padding_idx
        return y if pad is None else torch.where((x == pad).unsqueeze(-1), self(x), y)

    def turn(self, op: LinearOperator, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return turn_last(op, run(x))

    def scale_rows(self, scale: Tensor, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return scale_last(run(x), scale)

    def overwrite(self, y: Tensor, x: Tensor, index: tuple[int, ...], rows: Tensor) -> Tensor:
        table = torch.full((self.module.num_embeddings,), -1, device=x.device, dtype=torch.long)
        table[torch.tensor(index, device=x.device)] = torch.arange(len(index), device=x.device)
        slot = table[x]
        values = self._scaled(gather_rows(rows, slot.clamp_min(0))).to(y.dtype)
        return torch.where((slot >= 0).unsqueeze(-1), values, y)
