"""Logits that are not there yet: the model's own forward computes its loss in chunks of tokens.

While a loss is computed, the output head answers with a :class:`DeferredLogits`. Whatever the model's code then does
to single logits (a scale, a soft cap, a cast) is noted, and the cross-entropy at the end runs chunk by chunk
(:mod:`rankwise.losses`). So no formula is read out of a config, and auxiliary losses stay the model's. Any other use
computes the logits whole, as the model would have: slower, never wrong.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._pytree import tree_map

from rankwise import losses
from rankwise.activity import Chosen
from rankwise.graft import Grafted

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

    def __init__(self, module: nn.Module, tell: Tell) -> None:
        self.module, self.tell, self.called = module, tell, False
        self.own: Any = module.forward
        self.plain = False  # whether it answers as ever

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Any:
        """A DeferredLogits where the logits would be larger than one chunk."""
        if self.plain or args or kwargs or not x.numel():
            return self.own(x, *args, **kwargs)
        self.called = True
        sample = self.own(x[..., :1, :])  # says the vocabulary and the dtype
        if 4 * x[..., 0].numel() * sample.shape[-1] <= losses.CHUNK_BYTES:
            self.tell(f"holds its logits whole: they are few, less than {losses.CHUNK_BYTES >> 20} MiB")
            return self.own(x)
        return DeferredLogits(_Call(self, x), (*x.shape[:-1], sample.shape[-1]), sample)


class _Call:
    """A call of the head that can be made later, as it would have been made now."""

    def __init__(self, head: _Head, x: Tensor) -> None:
        self.head, kind = head, x.device.type
        self.autocast = kind, torch.get_autocast_dtype(kind), torch.is_autocast_enabled(kind)
        grafted = (module.adapters for module in head.module.modules() if isinstance(module, Grafted))
        self.chosen = [(holder.registry.activity, holder.choice()) for holder in grafted][:1]
        self.hidden = x

    @contextmanager
    def made(self) -> Iterator[nn.Module]:
        """Within, the head answers as it would have answered then."""
        former, self.head.plain = self.head.plain, True
        try:
            with torch.autocast(*self.autocast), ExitStack() as stack:
                for activity, choice in self.chosen:
                    stack.enter_context(Chosen(activity, choice))
                yield self.head.module
        finally:
            self.head.plain = former


@final
class DeferredLogits(Tensor):
    """Logits as a promise; see the module.

    Args:
        call: what computes the head's output.
        shape: (*batch, vocabulary).
        like: of the dtype and device that they will have.
        made: (logits, function, further arguments) that gave these, where they are not the head's own.
    """

    call: _Call
    hidden: Tensor
    steps: tuple[Any, ...]
    made: Any
    computed: Any

    @staticmethod
    def __new__(cls, call: Any, shape: Any, like: Tensor, made: Any = None) -> Any:
        """Without storage."""
        new: Any = torch.Tensor._make_wrapper_subclass(cls, tuple(shape), dtype=like.dtype, device=like.device)
        new.call, new.hidden, new.steps, new.made, new.computed = call, call.hidden, (), made, None
        if made is not None:
            new.hidden, new.steps = made[0].hidden, made[0].steps
        return new

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what can be noted; compute the logits whole for anything else."""
        kwargs = kwargs or {}
        if func in _LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        first = args[0] if args else None
        if isinstance(first, DeferredLogits) and not first._exists():
            noted = first._noted(func, args[1:], kwargs)
            if noted is not None:
                return noted

        def whole(value: Any) -> Any:
            return value._whole(func) if isinstance(value, DeferredLogits) else value

        return func(*tree_map(whole, args), **tree_map(whole, kwargs))

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Below autograd a gradient would be lost."""
        raise RuntimeError(f"Logits that are not computed yet reached {func} itself; pass logits.clone() to it.")

    def _noted(self, func: Any, rest: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """The result without computing logits, or None where there is none."""
        made, others = (self, func, rest, kwargs), (*rest, *kwargs.values())
        if func in _EACH and all(not isinstance(v, Tensor) or (v.dim() == 0 and v.is_leaf) for v in others):
            like = func(torch.empty(0, dtype=self.dtype, device=self.device), *rest, **kwargs)
            new = DeferredLogits(self.call, self.shape, like, made)
            new.steps += ((func, rest, kwargs),)
            return new
        if func in _SHAPES:
            shape = func(torch.empty(self.shape, device="meta"), *rest, **kwargs).shape
            if shape[-1] == self.shape[-1]:
                new = DeferredLogits(self.call, shape, self, made)
                new.hidden = self.hidden.reshape(*shape[:-1], self.hidden.shape[-1])
                return new
        if func is Tensor.__getitem__ and _of_tokens(rest[0], self.dim()):
            hidden = self.hidden[rest[0]]
            new = DeferredLogits(self.call, (*hidden.shape[:-1], self.shape[-1]), self, made)
            new.hidden = hidden
            return new
        if func is F.cross_entropy and self.dim() == 2:
            given = _CROSS_ENTROPY.bind(self, *rest, **kwargs)
            given.apply_defaults()
            return self._cross_entropy(**given.arguments)
        return None

    def _cross_entropy(self, target: Tensor, reduction: str, **given: Any) -> Any:
        unusual = any(given[name] is not None for name in ("weight", "reduce", "size_average"))
        if unusual or reduction not in ("mean", "sum") or target.is_floating_point() or not target.numel():
            return None
        self.call.head.tell(f"takes its logits in chunks of {losses.CHUNK_BYTES >> 20} MiB at most")
        with self.call.made() as head:
            return losses.linear_cross_entropy(
                head,
                self.hidden,
                target,
                transform=self._stepped,
                num_items=None if reduction == "mean" else 1,
                ignore_index=given["ignore_index"],
                label_smoothing=given["label_smoothing"],
            )

    def _stepped(self, y: Tensor) -> Tensor:
        for func, rest, kwargs in self.steps:
            y = func(y, *rest, **kwargs)
        return y

    def _exists(self) -> bool:
        return self.computed is not None or (self.made is not None and self.made[0]._exists())

    def _whole(self, reason: Any) -> Tensor:
        """The logits; computed once, and views of each other as the model meant them, since they may be written to."""
        if self.computed is None and self.made is not None:
            logits, func, rest, kwargs = self.made
            self.computed = func(logits._whole(reason), *rest, **kwargs)
        elif self.computed is None:
            self.call.head.tell(f"holds its logits whole: {getattr(reason, '__name__', reason)} asks for all of them")
            with self.call.made() as head:
                self.computed = head(self.hidden)
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
        tell("holds its logits whole: the model has no output head, or one that is an FSDP unit of its own")
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
        tell("holds its logits whole: the model's output head never ran")


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
