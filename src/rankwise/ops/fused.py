"""Frozen products and their low-rank corrections as one autograd node, for all layers that read one tensor.

Every part gives ``y = m/n * (x W^T + s drop(x) right^T left^T)``, the row scale m/n only where there is one (DoRA).
Shapes: x (*batch, T, N), W (M, N), m and n (M,); left (M, r) and right (r, N), or with one leading batch dim
(B, M, r), (B, r, N), (B, M) for x (B, T, N). x is saved once, as it came, and not at all where nothing that multiplies
it is trained; the mask of dropout is made again from two small vectors; factors of another dtype are cast again and a
quantised weight is dequantised again, never kept.
"""

from collections.abc import Callable, Sequence
from functools import reduce
from typing import Any, NamedTuple, Protocol, final

import torch
from torch import Tensor
from torch.autograd import Function

from rankwise.errors import TrainingError
from rankwise.ops.form import VECTOR
from rankwise.ops.operator import LowRank


class Frozen(Protocol):
    """A weight in a storage format of its own: its product, and itself on demand."""

    def matmul(self, x: Tensor) -> Tensor:
        """``x W^T``."""
        ...

    def dense(self) -> Tensor:
        """W (M, N)."""
        ...


@final
class Edited:
    """``W + s left right``, all frozen (the start of PiSSA in W), formed where it is multiplied and never kept."""

    def __init__(self, weight: Tensor, pair: LowRank, scale: float) -> None:
        self.weight, self.pair, self.scale = weight, pair, scale

    def matmul(self, x: Tensor) -> Tensor:
        return x @ self.dense().mT

    @torch.no_grad()
    def dense(self) -> Tensor:
        left, right = (t.to(self.weight.dtype) for t in self.pair)
        return torch.addmm(self.weight, left, right, alpha=self.scale)


class Part(NamedTuple):
    """One weight with its correction.

    Attributes:
        weight: W, a tensor or a frozen weight in another format.
        left: (M, r).
        right: (r, N).
        scale: s.
        magnitude: m, trainable and never zero, or None for no row scale.
        norm: gives n, a constant, at every run; infinite where a row of W' is zero.
        recompute: make the unscaled output again in backward, which m's gradient needs, instead of saving the output.
    """

    weight: Tensor | Frozen
    left: Tensor
    right: Tensor
    scale: float = 1.0
    magnitude: Tensor | None = None
    norm: Callable[[], Tensor] | None = None
    recompute: bool = False


class Bundle(NamedTuple):
    """Parts made ready to run, again and again while their tensors are the same.

    Attributes:
        how: (dropout, (frozen weight or None, scale, recompute) of each part).
        tensors: weight or None, left, right, magnitude and what gives the norm, of each part.
    """

    how: tuple[float, list[tuple[Frozen | None, float, bool]]]
    tensors: list[Tensor | Callable[[], Tensor] | None]

    @classmethod
    def of(cls, parts: Sequence[Part], dropout: float) -> "Bundle":
        """The parts, all under the same dropout."""
        tensors: list[Tensor | Callable[[], Tensor] | None] = []
        fixed: list[tuple[Frozen | None, float, bool]] = []
        for weight, left, right, scale, magnitude, norm, recompute in parts:
            plain = isinstance(weight, Tensor)
            tensors += [weight if plain else None, left, right, magnitude, norm]
            fixed.append((None if plain else weight, scale / (1 - dropout), recompute))
        return cls((dropout, fixed), tensors)

    def __call__(self, x: Tensor) -> tuple[Tensor, ...]:
        """The output of every part, in x's dtype, differentiable twice: (*batch, T, N) to (*batch, T, M)."""
        if x.dim() == 1:  # a lone token
            return tuple(y.squeeze(0) for y in self(x.unsqueeze(0)))
        rows = cols = None
        if self.how[0]:
            shapes = (*x.shape[:-1], 1), x.shape[-1:]
            rows, cols = (torch.randint(-(2**31), 2**31, s, dtype=torch.int32, device=x.device) | 1 for s in shapes)
        tensors = [t if t is None or isinstance(t, Tensor) else t() for t in self.tensors]
        if torch.compiler.is_compiling():  # Dynamo takes no tensor twice, and parts may share a factor
            tensors = [t if t is None else t.view_as(t) for t in tensors]
        outs = _Fused.apply(self.how, x, rows, cols, *tensors)
        if not torch.compiler.is_compiling() and outs[0].grad_fn is not None:
            _leave_versions_to_backward(outs[0].grad_fn)
        return outs[: len(self.how[1])]


def run(x: Tensor, parts: Sequence[Part], dropout: float = 0.0) -> tuple[Tensor, ...]:
    """The output of every part, in x's dtype, differentiable twice.

    Args:
        x: (*batch, T, N), of the weights' dtype.
        parts: what reads x.
        dropout: share of x's entries that the corrections do not see, the same for all; the others are scaled up.

    Returns:
        (*batch, T, M) of each part.
    """
    return Bundle.of(parts, dropout)(x)


HALF = (torch.bfloat16, torch.float16)
CACHED = 2**16  # entries of a product that is summed at once: a CPU's cache holds them
EACH = 5  # tensors of a part: weight, left, right, magnitude, norm


def _keep(rows: Tensor | None, cols: Tensor | None, dropout: float) -> Tensor | None:
    """Which entries the corrections see: where the wrap-around product of two odd integers is large enough."""
    return None if rows is None or cols is None else rows * cols > int(dropout * 2**32) - 2**31


def _rows(x: Tensor) -> Tensor:
    return x.reshape(-1, x.shape[-1])


def _flat(x: Tensor, factor: Tensor) -> Tensor:
    """Fold x into one matrix (T, N), or one for each of a batch of factors."""
    return _rows(x) if factor.dim() == 2 else x.contiguous()


def thin(x: Tensor, factor: Tensor) -> Tensor:
    """Multiply rows by a thin factor (*batch, r, N): ``x factor^T`` (*batch, T, r).

    Where r does not fill a CPU's vectors it lies as (r, T): so rank 8 takes half of the time or less (see ``python -m
    benchmarks.thin``).
    """
    if factor.shape[-2] % VECTOR == 0:
        return x @ factor.mT
    h = (factor @ _flat(x, factor).mT).mT
    return h if factor.dim() == 3 else h.unflatten(0, x.shape[:-1])


def _outer(g: Tensor, h: Tensor, left: Tensor) -> Tensor:
    """``g^T h`` (*batch, M, r), as (r, M) where that is faster, by up to eight times."""
    g, h = _flat(g, left), _flat(h, left)
    if left.dim() == 2:
        return (h.mT @ g).mT
    return g.mT @ h if g.dtype in HALF else (h.mT @ g).mT.contiguous()  # else each factor's share is copied alone


def _cast(factor: Tensor, like: Tensor) -> Tensor:
    return factor if factor.dtype is like.dtype else factor.to(like.dtype)


def _stacked(factors: Sequence[Tensor], like: Tensor) -> Tensor:
    """Factors in another tensor's dtype, one below the other."""
    cast = [_cast(f, like) for f in factors]
    return cast[0] if len(cast) == 1 else torch.cat(cast, dim=-2)


def _apart(h: Tensor, factors: Sequence[Tensor], dim: int) -> Sequence[Tensor]:
    """The inverse of stacking, along a dim of a product."""
    return (h,) if len(factors) == 1 else torch.split_with_sizes(h, [f.shape[-2] for f in factors], dim)


def _narrow(seen: Tensor, rights: Sequence[Tensor]) -> Sequence[Tensor]:
    """``drop(x) right^T`` of every part."""
    return _apart(thin(seen, _stacked(rights, seen)), rights, -1)


def _product(x: Tensor, weight: Tensor | None, frozen: Frozen | None, onto: Tensor, scale: float) -> Tensor:
    """``scale onto + x W^T``, in place."""
    if isinstance(frozen, Edited):
        weight, frozen = frozen.dense(), None
    if frozen is not None:
        return (onto if scale == 1 else onto.mul_(scale)).add_(frozen.matmul(x))
    assert weight is not None
    return _plus_product(onto, x, weight.mT, scale)


def _plus_product(onto: Tensor, x: Tensor, matrix: Tensor, scale: float = 1.0) -> Tensor:
    """``scale onto + x matrix``, in place where that is not compiled."""
    if torch.compiler.is_compiling():  # which adds within the next elementwise kernel, and copies to add in place
        return _times(scale, onto) + (_rows(x) @ matrix).view(onto.shape)
    onto.view(-1, onto.shape[-1]).addmm_(_rows(x), matrix, beta=scale)
    return onto


def _times(scale: float, x: Tensor) -> Tensor:
    return x if scale == 1 else x * scale


def _scaled_rows(y: Tensor, scale: Tensor, out: Tensor | None = None) -> Tensor:
    """The rows of W scaled by m/n, which are the entries of y's last dim; into ``out`` if given."""
    scale = scale.unsqueeze(-2)
    if y.dtype not in HALF:
        return torch.mul(y, scale.to(y.dtype), out=out)
    # m/n rounded to y's dtype would lose what m has learnt: y is multiplied by 1, or by that, and then by the rest
    high = torch.ones((), dtype=y.dtype, device=y.device)
    if y.device.type != "cpu" or torch.compiler.is_compiling() or (scale < 0.5).any():
        high = scale.to(y.dtype)
        y = torch.mul(y, high, out=out)
    rest = torch.where(high == 0, 0, scale / high - 1).to(y.dtype)
    return torch.addcmul(y, y, rest, out=out)


def _nonzero(magnitude: Tensor) -> Tensor:
    """m, a zero as a tiny number: so its gradient can be read off the output."""
    return magnitude + 1e-30  # which is m itself but where that is as tiny


def _by_weight(weight: Tensor | None, magnitude: Tensor, y: Tensor) -> bool:
    """Whether m/n scales W (M, N), which is smaller than an output (*, T, M), where that is as precise."""
    if weight is None or magnitude.dim() > 1 or y.dtype in HALF or torch.compiler.is_compiling():
        return False
    return weight.shape[-1] < y.shape[:-1].numel()


def _over_tokens(g: Tensor, y: Tensor, like: Tensor) -> Tensor:
    """The sum of ``g * y`` over all tokens: (*batch, T, M) to the shape of a magnitude."""
    if like.dim() > 1:
        return (g * y).sum(-2).to(like.dtype)
    if g.device.type != "cpu" or torch.compiler.is_compiling():
        return (_rows(g) * _rows(y)).sum(0).to(like.dtype)
    every = max(1, CACHED // g.shape[-1])
    pieces = zip(_rows(g).split(every), _rows(y).split(every), strict=True)
    return reduce(torch.add, [(one * other).sum(0) for one, other in pieces]).to(like.dtype)


def _leave_versions_to_backward(node: Any) -> None:
    """Have backward see whether a kept output was written on: autograd would raise, or under hooks not look."""
    for i in node.versions:
        try:
            node._raw_saved_tensors[node.first_kept + i].register_hooks(_same, _same)
        except RuntimeError:  # there are hooks: of activation checkpointing, of an offload
            return


def _same(saved: Tensor) -> Tensor:
    return saved


def _made_again(ctx: Any, i: int, y: Tensor | None) -> bool:
    """Whether the output of part i is to be made again, since it was not kept or the model has written on it.

    Raises:
        TrainingError: it was written on, and what it is made of was not kept.
    """
    if y is not None and (i not in ctx.versions or y._version <= ctx.versions[i]):  # compiled there are no versions
        return False
    if y is None or ctx.read:
        return True
    raise TrainingError(
        "The gradient of DoRA's magnitude reads the layer's output, which the model has changed in place (x += y, "
        "ReLU(inplace=True)), and the layer's input is not kept. Keep that instead: recompute=True in the recipe."
    )


@final
class _Fused(Function):
    @staticmethod
    def forward(ctx: Any, how: Any, x: Tensor, rows: Any, cols: Any, *tensors: Any) -> tuple[Tensor, ...]:
        dropout, fixed = how
        keep = _keep(rows, cols, dropout)
        narrow = _narrow(x if keep is None else torch.where(keep, x, 0), tensors[2::EACH])
        outs, kept, versions = [], [], {}
        for i, ((frozen, scale, recompute), h) in enumerate(zip(fixed, narrow, strict=True)):
            weight, left, _, magnitude, norm = tensors[EACH * i : EACH * i + EACH]
            # the thin product first: the large one adds to it
            ratio = None if magnitude is None else _nonzero(magnitude) / norm
            if ratio is not None and _by_weight(weight, ratio, h):
                ratio = ratio.to(h.dtype).unsqueeze(-1)
                weight, left, ratio = weight * ratio, left * ratio, None
            y = _product(x, weight, frozen, h @ _cast(left, x).mT, scale)
            if ratio is not None:
                _scaled_rows(y, ratio, out=y)
            outs.append(y)
            kept.append(None if magnitude is None or recompute else y)
            if kept[i] is not None and not (torch.compiler.is_compiling() or y.is_inference()):
                versions[i] = y._version
        needs = ctx.needs_input_grad[4:]
        read = any((*needs[::EACH], *needs[2::EACH])) or any(recompute for *_, recompute in fixed)  # x, in backward
        if read and x.dtype in HALF:  # where memory is what one trains in half precision for, h is made again
            narrow = ()
        ctx.save_for_backward(x if read else None, rows, cols, *tensors, *kept, *narrow)
        ctx.how, ctx.read, ctx.versions, ctx.first_kept = how, read, versions, 3 + len(tensors)
        ctx.set_materialize_grads(False)
        return *outs, *narrow  # as an output, what is saved is no constant to a second backward

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, ...]:
        dropout, fixed = ctx.how
        n = len(fixed)
        x, rows, cols, *rest = ctx.saved_tensors
        tensors, outs, narrow = rest[: EACH * n], rest[EACH * n : EACH * n + n], rest[EACH * n + n :]
        rights, keep = tensors[2::EACH], _keep(rows, cols, dropout)
        seen = torch.where(keep, x, 0) if ctx.read and keep is not None else x
        narrow = narrow or _narrow(seen, rights)
        found: list[Tensor | None] = [None] * (4 + EACH * n)
        needs = ctx.needs_input_grad
        backs, wide = [], []
        onto = grads[n:] or (None,) * n  # in a second backward, of the saved intermediates
        used = [grads[i] is not None or onto[i] is not None for i in range(n)]
        for i, (g, more, h) in enumerate(zip(grads[:n], onto, narrow, strict=True)):
            frozen, scale, _ = fixed[i]
            weight, left, _, magnitude, norm = tensors[EACH * i : EACH * i + EACH]
            at = 4 + EACH * i
            if g is None:
                backs.append(torch.zeros_like(h) if more is None else more)
                continue
            ratio = None
            if magnitude is not None:
                m = _nonzero(magnitude)
                if _made_again(ctx, i, outs[i]):
                    y = _product(x, weight, frozen, h @ _cast(left, x).mT, scale)
                    found[at + 3] = _over_tokens(g, y, norm) / norm
                else:  # the output is m/n times that
                    found[at + 3] = _over_tokens(g, outs[i], norm) / m
                if _by_weight(weight, magnitude, g):
                    ratio = (m / norm).to(g.dtype).unsqueeze(-1)
                    weight, left = weight * ratio, left * ratio
                else:
                    g = _scaled_rows(g, m / norm)
            back = _times(scale, thin(g, _cast(left, g).mT))
            backs.append(back if more is None else back + more)
            if needs[at + 1]:
                dl = _times(scale, _cast(_outer(g, h, left), left))
                found[at + 1] = dl if ratio is None else dl * ratio
            if needs[at]:
                dw = _rows(g).mT @ _rows(x)
                found[at] = dw if ratio is None else dw * ratio
            wide.append((_rows(g), weight, frozen))
        back = backs[0] if n == 1 else torch.cat(backs, dim=-1)
        if needs[1]:
            dx = back @ _stacked(rights, back)
            dx = found[1] = dx if keep is None else torch.where(keep, dx, 0)
            for g, weight, frozen in wide:
                dx = found[1] = _plus_product(dx, g, weight if frozen is None else frozen.dense().to(g.dtype))
        if any(needs[6::EACH]):
            for i, da in enumerate(_apart(_flat(back, rights[0]).mT @ _flat(seen, rights[0]), rights, -2)):
                found[6 + EACH * i] = _cast(da, rights[i]) if used[i] else None
        return tuple(found)
