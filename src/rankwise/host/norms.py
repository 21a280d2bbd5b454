"""Norms of the rows of ``W + s B A`` without the sum: ``|W|^2 + 2 s rowsum(W A^T o B) + s^2 rowsum(B A A^T o B)``.

Shapes: W (M, N), B (*batch, M, r), A (*batch, r, N); norms (*batch, M).
"""

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from rankwise.ops import LinearOperator
from rankwise.ops.fused import thin
from rankwise.ops.linalg import widened, without_autocast

CANCELLED = 1e-3  # below this share of |W|^2 the three terms have cancelled, and float32 has lost the sum
_known: WeakIdKeyDictionary = WeakIdKeyDictionary()  # of a frozen parameter: its version, address and _of_base


def norm_of_rows(w: Tensor) -> Tensor:
    """Euclidean norm of each row of w (*batch, M, N), at least in float32: (*batch, M)."""
    return torch.linalg.vector_norm(widened(w), dim=-1)


def dense_row_norm(w: Tensor, op: LinearOperator) -> Tensor:
    """The norms from the sum itself."""
    return norm_of_rows(w + op.dense())


def _of_base(parameter: Tensor, w: Tensor) -> tuple[Tensor, Tensor]:
    """|W|^2 of each row, and below what a sum has cancelled; remembered while the parameter is frozen and as it was."""

    def found() -> tuple[Tensor, Tensor]:
        squares = norm_of_rows(w).square()
        return squares, CANCELLED * squares

    if parameter.requires_grad or type(parameter.data) is not Tensor:
        return found()
    now = (parameter._version, parameter.data_ptr(), parameter.shape)
    known = _known.get(parameter)
    if known is None or known[0] != now:
        known = _known[parameter] = (now, found())
    return known[1]


@torch.no_grad()
def factored_row_norm(parameter: Tensor, w: Tensor, op: LinearOperator) -> Tensor:
    """The norms from the factors, where the operator has them.

    Args:
        parameter: what stores W, to remember its norms by.
        w: W (M, N).
        op: the update (M, N).

    Returns:
        (*batch, M), at least in float32.
    """
    pair = op.lower()
    if pair is None or torch.compiler.is_compiling() or torch._C._are_functorch_transforms_active():
        return dense_row_norm(w, op)  # what has cancelled below is known by its values, which a tracer has not
    squares, least = _of_base(parameter, w)
    left, right = pair.left.to(squares.dtype), pair.right.to(squares.dtype)
    add = torch.addmm if left.dim() == 2 else torch.baddbmm
    with without_autocast(w):  # its dtype would round the norms
        mixed = add(thin(w, right.to(w.dtype)).to(squares.dtype), left, right @ right.mT, beta=2)  # 2 W A^T + B A A^T
    squared = (mixed * left).sum(-1).add_(squares)
    found = squared.clamp_min(0).sqrt_()
    if type(w).__name__ == "FakeTensor":  # of a plan; its class is slow to import
        return found
    lost = squared <= least
    if lost.any():
        rows = lost.flatten(0, -2).any(0) if lost.dim() > 1 else lost
        exact = norm_of_rows(w[rows] + left[..., rows, :] @ right)
        found[..., rows] = exact
    return found
