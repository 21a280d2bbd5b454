"""Logits that are not there yet: the model's own forward computes its loss in chunks of tokens.

While a loss is computed, the output head answers with a :class:`DeferredLogits`. Whatever the model's code then does
to single logits (a scale, a soft cap, a cast) is noted, and the cross-entropy at the end runs chunk by chunk
(:mod:`rankwise.losses`). So no formula is read out of a config, and auxiliary losses stay the model's. Any other use
computes the logits whole, as the model would have: slower, never wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise import losses

Tell = Callable[[str], None]

# what a look at a tensor may ask without its values
_LOOKS: set[Any] = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.__hash__}
_LOOKS |= {getattr(Tensor, name).__get__ for name in ("shape", "dtype", "device", "ndim", "requires_grad", "layout")}
# of each logit alone; the rest of the arguments are numbers
_EACH: set[Any] = {Tensor.float, Tensor.to, Tensor.tanh, torch.tanh, Tensor.mul, torch.mul, Tensor.div, torch.div}
_EACH |= {Tensor.__mul__, Tensor.__rmul__, Tensor.__truediv__}
_SHAPES: set[Any] = {Tensor.view, Tensor.reshape, torch.reshape, Tensor.contiguous}
_CROSS_ENTROPY = inspect.signature(F.cross_entropy)


class _Head:
    """The output head of a model while its logits are deferred."""

    def __init__(self, head: nn.Module, tell: Tell) -> None:
        self.module, self.tell, self.called = head, tell, False
        self.own: Any = head.forward
        self.plainly = False  # whether it answers as ever

    @contextmanager
    def plain(self) -> Iterator[nn.Module]:
        former, self.plainly = self.plainly, True
        try:
            yield self.module
        finally:
            self.plainly = former

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A DeferredLogits where the logits would be larger than one chunk."""
        if self.plainly or args or kwargs or not x.numel():
            return self.own(x, *args, **kwargs)
        self.called = True
        sample = self.own(x[..., :1, :])  # says the vocabulary and the dtype
        if 4 * x[..., 0].numel() * sample.shape[-1] <= losses.CHUNK_BYTES:
            self.tell(f"holds its logits whole: they are few, less than {losses.CHUNK_BYTES >> 20} MiB")
            return self.own(x)
        return DeferredLogits(self, x, (*x.shape[:-1], sample.shape[-1]), sample)


@final
class DeferredLogits(Tensor):
    """Logits as a promise; see the module.

    Args:
        head: what will compute them.
        hidden: (*batch, in), what from.
        shape: (*batch, vocabulary).
        like: of the dtype and device that they will have.
        steps: what the model has done to each logit so far.
    """

    @staticmethod
    def __new__(cls, head: Any, hidden: Tensor, shape: Any, like: Tensor, steps: tuple[Any, ...] = ()) -> Any:
        """Without storage."""
        new: Any = Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=like.dtype, device=like.device)  # type: ignore[attr-defined]
        new.source, new.steps, new.computed = (head, hidden), steps, None
        return new

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what can be noted; compute the logits whole for anything else."""
        kwargs = kwargs or {}
        if func in _LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = args[0] if args else None
        if isinstance(first, DeferredLogits) and first.computed is None:
            noted = first._noted(func, args[1:], kwargs)
            if noted is not None:
                return noted

        def whole(value: Any) -> Any:
            return value._whole(func) if isinstance(value, DeferredLogits) else value

        return func(*torch.utils._pytree.tree_map(whole, args), **torch.utils._pytree.tree_map(whole, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Below autograd a gradient would be lost."""
        raise RuntimeError(
            f"Logits that are not computed yet reached {func} past torch's functions; pass logits.clone()."
        )

    def _noted(self, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result without computing logits, or None where there is none."""
        (head, hidden), others = self.source, (*rest, *kwargs.values())
        if func in _EACH and all(not isinstance(v, Tensor) or (v.dim() == 0 and v.is_leaf) for v in others):
            like = func(torch.empty(0, dtype=self.dtype, device=self.device), *rest, **kwargs)
            step = lambda y: func(y, *rest, **kwargs)  # noqa: E731
            return DeferredLogits(head, hidden, self.shape, like, (*self.steps, step))
        if func in _SHAPES:
            shape = func(torch.empty(self.shape, device="meta"), *rest, **kwargs).shape
            if shape[-1] == self.shape[-1]:
                return DeferredLogits(head, hidden.reshape(*shape[:-1], -1), shape, self, self.steps)
        if func is Tensor.__getitem__ and _of_tokens(rest[0], self.dim()):
            part = hidden[rest[0]]
            return DeferredLogits(head, part, (*part.shape[:-1], self.shape[-1]), self, self.steps)
        if func is F.cross_entropy and self.dim() == 2:
            given = _CROSS_ENTROPY.bind(self, *rest, **kwargs)
            given.apply_defaults()
            return self._cross_entropy(**given.arguments)
        return None

    def _cross_entropy(
        self, target: Tensor, reduction: str, weight: Any, reduce: Any, size_average: Any, **options: Any
    ) -> Any:
        unusual = weight is not None or reduce is not None or size_average is not None or target.is_floating_point()
        if unusual or reduction not in ("mean", "sum"):
            return None
        del options["input"]
        (head, hidden), items = self.source, None if reduction == "mean" else 1
        head.tell(f"takes its logits in chunks of {losses.CHUNK_BYTES >> 20} MiB at most")
        with head.plain() as module:
            return losses.linear_cross_entropy(
                module, hidden, target, transform=self._stepped, num_items=items, **options
            )

    def _stepped(self, y: Tensor) -> Tensor:
        for step in self.steps:
            y = step(y)
        return y

    def _whole(self, reason: Any) -> Tensor:
        """The logits, once computed the same tensor for ever (they may be written to)."""
        if self.computed is None:
            head, hidden = self.source
            head.tell(f"holds its logits whole: {getattr(reason, '__name__', reason)} asks for all of them")
            with head.plain() as module:
                self.computed = self._stepped(module(hidden))
        return self.computed


def _of_tokens(index: Any, dims: int) -> bool:
    """Whether an index leaves the vocabulary alone."""
    index = index if isinstance(index, tuple) else (index,)
    if any(i is Ellipsis for i in index):
        return index[-1] == slice(None) and all(i is Ellipsis or isinstance(i, slice) for i in index)
    if not all(isinstance(i, slice) or (isinstance(i, Tensor) and i.dtype == torch.bool) for i in index):
        return False
    return sum(1 if isinstance(i, slice) else i.dim() for i in index) < dims


@contextmanager
def deferred_logits(model: Any, tell: Tell) -> Iterator[None]:
    """Within, losses of a model of transformers are computed in chunks of tokens, where the logits are many.

    Args:
        model: with ``get_output_embeddings``.
        tell: told in what way the loss treats its logits, each time.
    """
    module: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if module is None or any(base.__name__ == "FSDPModule" for base in type(module).__mro__):
        tell("holds its logits whole: the model has no output head that runs on its own")
        yield
        return
    head, former = _Head(module, tell), module.__dict__.get("forward")
    module.forward = head.forward
    try:
        yield
    finally:
        if former is None:
            del module.forward
        else:
            module.forward = former
    if not head.called:
        tell("is not of this model's output head alone: it never ran")


def smoothed(
    smoother: Any, output: Any, labels: Tensor, shift_labels: bool = False, num_items_in_batch: Any = None
) -> Tensor:
    """What transformers' LabelSmoother computes, from logits that may be deferred."""
    logits = output["logits"] if isinstance(output, dict) else output[0]
    if not isinstance(logits, DeferredLogits):
        return smoother(output, labels, shift_labels=shift_labels, num_items_in_batch=num_items_in_batch)
    if shift_labels:
        logits, labels = logits[..., :-1, :], labels[..., 1:]
    loss = F.cross_entropy(
        logits.reshape(-1, logits.shape[-1]),
        labels.reshape(-1),
        ignore_index=smoother.ignore_index,
        reduction="mean" if num_items_in_batch is None else "sum",
        label_smoothing=smoother.epsilon,
    )
    items = torch.as_tensor(1 if num_items_in_batch is None else num_items_in_batch)
    return loss / items.to(loss.device)
