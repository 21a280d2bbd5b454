"""Convolutions, plain and transposed, 1-d to 3-d, with every stride, padding, padding mode,
dilation and number of groups.

The weight is seen as a matrix (out, in/g * k), g groups, k the kernel's size. An operator that is
low rank runs as a convolution to r channels and a 1x1: within every group the same (r, in/g * k)
right factor, then that group's rows of the left one. An operator (out, in * k) runs without groups.
A batch of operators (B, ...) folds the batch into the groups.
"""

from collections.abc import Callable
from math import prod
from typing import final

import torch
from torch import Tensor, nn

from rankwise.host.norms import dense_row_norm
from rankwise.host.site import LayerHost, Site, computes_as
from rankwise.ops import Dense, LinearOperator
from rankwise.ops.linalg import widened

_CONV = {1: nn.functional.conv1d, 2: nn.functional.conv2d, 3: nn.functional.conv3d}
KINDS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d)
_TRANSPOSED = {1: nn.functional.conv_transpose1d, 2: nn.functional.conv_transpose2d, 3: nn.functional.conv_transpose3d}


@final
class ConvHost(LayerHost):
    """``nn.Conv1d/2d/3d`` and ``nn.ConvTranspose1d/2d/3d``."""

    kind = "conv"

    def __init__(self, module: nn.Module, dropout: float = 0.0, output_size: list[int] | None = None) -> None:
        super().__init__(module, dropout)
        self.output_size = output_size

    @staticmethod
    def claims(module: nn.Module) -> bool:
        return computes_as(module, *KINDS) and not isinstance(module.weight, nn.UninitializedParameter)

    def site(self, name: str) -> Site:
        m = self.module
        k = prod(m.kernel_size)
        cols = m.in_channels // m.groups * k
        return Site(name, self.kind, m.out_channels, cols, k, tuple(m.weight.shape), groups=m.groups)

    # -- matrix <-> kernel ------------------------------------------------------------------

    def tensor(self, w: Tensor) -> Tensor:  # (*batch, out, in/g * k); a batch is folded away
        m = self.module
        size = w.shape[-1] // prod(m.kernel_size)
        if not m.transposed:
            return w.reshape(-1, size, *m.kernel_size)
        out = w.shape[-2] * size // m.in_channels  # of a group
        w = w.reshape(-1, out, size, *m.kernel_size)  # (batch * g, out/g, in/g, *k)
        return w.transpose(1, 2).reshape(-1, out, *m.kernel_size)

    def matrix(self, tensor: Tensor) -> Tensor:
        m = self.module
        if m.transposed:
            tensor = tensor.unflatten(0, (m.groups, -1)).transpose(1, 2)  # (g, out/g, in/g, *k)
        return tensor.reshape(m.out_channels, -1)

    # -- the map ----------------------------------------------------------------------------

    def _convolve(self, x: Tensor, kernel: Tensor, groups: int) -> Tensor:
        m = self.module
        dims = len(m.kernel_size)
        if m.transposed:
            # a folded batch changes the channel dim only, never the spatial size
            extra = m._output_padding(x, self.output_size, m.stride, m.padding, m.kernel_size, dims, m.dilation)
            return _TRANSPOSED[dims](x, kernel, None, m.stride, m.padding, extra, groups, m.dilation)
        if m.padding_mode == "zeros":
            return _CONV[dims](x, kernel, None, m.stride, m.padding, m.dilation, groups)
        x = nn.functional.pad(x, m._reversed_padding_repeated_twice, mode=m.padding_mode)
        return _CONV[dims](x, kernel, None, m.stride, 0, m.dilation, groups)

    def __call__(self, x: Tensor) -> Tensor:
        return self._convolve(x, self.module.weight, self.module.groups)

    def mv(self, op: LinearOperator, x: Tensor) -> Tensor:
        m = self.module
        pair, (rows, cols) = op.lower(), op.shape
        groups = m.in_channels * prod(m.kernel_size) // cols  # the layer's, or one
        dense = pair is None or pair.left.shape[-1] * (rows + cols) >= rows * cols
        first = op.dense() if pair is None or dense else pair.right
        batched = first.dim() == 3
        folds = first.shape[0] if batched else 1
        h = x.reshape(1, -1, *x.shape[2:]) if batched else x
        if pair is None or dense:
            y = self._convolve(h, self.tensor(first.to(x.dtype)), groups * folds)
        else:
            right = pair.right.to(x.dtype)  # the same in every group
            h = self._convolve(h, self.tensor(torch.cat([right] * groups, dim=-2)), groups * folds)
            left = pair.left.to(x.dtype).flatten(0, -2)  # (batch * out, r)
            ones = (1,) * len(m.kernel_size)
            y = _CONV[len(ones)](h, left.reshape(*left.shape, *ones), groups=groups * folds)
        return y.reshape(folds, rows, *y.shape[2:]) if batched else y

    def row_norm(self, op: LinearOperator) -> Tensor:
        return dense_row_norm(self.weight(), op)

    def rotate(self, op: LinearOperator, x: Tensor) -> Tensor:
        w = self.weight()
        return self.mv(Dense(op.T.mv(widened(w))), x)

    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        bias = self.module.bias
        return y if bias is None else y + bias.reshape(-1, *(1,) * len(self.module.kernel_size))

    def turn(self, op: LinearOperator, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        y, dims = run(x), len(self.module.kernel_size)
        return op.mv(y.flatten(-dims).mT).mT.reshape(y.shape)

    def scale_rows(self, scale: Tensor, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        y = run(x)
        return y * scale.to(y.dtype).reshape(*scale.shape, *(1,) * len(self.module.kernel_size))

    def overwrite(self, y: Tensor, x: Tensor, index: tuple[int, ...], rows: Tensor) -> Tensor:
        raise AssertionError("a convolution has no vocabulary")
