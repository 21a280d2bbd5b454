"""Logits that are not there yet: the model's own forward computes its loss in chunks of tokens.

While a loss is computed, the output head answers with a :class:`DeferredLogits`. Whatever the model's code then does
to single logits (a scale, a soft cap, a cast) is noted, and the cross-entropy at the end runs chunk by chunk
(:mod:`rankwise.losses`). So no formula is read out of a config, and auxiliary losses stay the model's. Any other use
computes the logits whole, as the model would have: slower, never wrong.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
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
_SHAPES: set[Any] = {Tensor.view, Tensor.reshape, Tensor.flatten, Tensor.contiguous}
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
        return DeferredLogits(_Call(self, x.device.type), x, sample)


class _Call:
    """A call of the head that can be made later, as it would have been made now."""

    def __init__(self, head: _Head, device: str) -> None:
        self.head, self.autocast = head, (device, torch.get_autocast_dtype(device), torch.is_autocast_enabled(device))
        grafted = [module.adapters for module in head.module.modules() if isinstance(module, Grafted)]
        self.chosen = [(holder.registry.activity, holder.choice()) for holder in grafted[:1]]

    @contextmanager
    def made(self) -> Iterator[nn.Module]:
        """Within, the head answers as it would have answered then."""
        former, self.head.plain = self.head.plain, True
        try:
            with torch.autocast(*self.autocast), Chosen(*self.chosen[0]) if self.chosen else nullcontext():
                yield self.head.module
        finally:
            self.head.plain = former


@final
class DeferredLogits(Tensor):
    """Logits as a promise; see the module.

    Args:
        call: what computes the head's output.
        hidden: (*batch, in), what these come from.
        like: of the size of the vocabulary (last), the dtype and the device that they will have.
        made: (logits, function, further arguments) that gave these, where they are not the head's own.
    """

    @staticmethod
    def __new__(cls, call: Any, hidden: Tensor, like: Tensor, *made: Any) -> Any:
        """Without storage."""
        shape = (*hidden.shape[:-1], like.shape[-1])
        new: Any = Tensor._make_wrapper_subclass(cls, shape, dtype=like.dtype, device=like.device)
        new.call, new.hidden, new.made, new.computed = call, hidden, made, None
        return new

    @classmethod
    def __torch_function__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Note what can be noted; compute the logits whole for anything else."""
        kwargs = kwargs or {}
        if func in _LOOKS:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **kwargs)
        noted = _noted(func, *args, **kwargs) if args and isinstance(args[0], DeferredLogits) else None
        if noted is not None:
            return noted
        args, kwargs = tree_map(lambda v: _whole(v, func) if isinstance(v, DeferredLogits) else v, (args, kwargs))
        return func(*args, **kwargs)

    @classmethod
    def __torch_dispatch__(cls, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Below autograd a gradient would be lost."""
        raise RuntimeError(f"Logits that are not computed yet reached {func} itself; pass logits.clone() to it.")


def _noted(func: Any, logits: Any, *rest: Any, **kwargs: Any) -> Any:
    """What the function gives without computing logits, or None where there is none."""
    if _exists(logits):
        return None
    made, others = (logits, func, rest, kwargs), (*rest, *kwargs.values())
    if func in _EACH and all(not isinstance(v, Tensor) or (v.dim() == 0 and v.is_leaf) for v in others):
        like = func(torch.empty(0, logits.shape[-1], dtype=logits.dtype, device=logits.device), *rest, **kwargs)
        return DeferredLogits(logits.call, logits.hidden, like, *made)
    if func in _SHAPES:
        shape = func(torch.empty(logits.shape, device="meta"), *rest, **kwargs).shape
        if shape[-1] == logits.shape[-1]:
            return DeferredLogits(logits.call, logits.hidden.reshape(*shape[:-1], -1), logits, *made)
    if func is F.cross_entropy and logits.dim() == 2:
        given = _CROSS_ENTROPY.bind(logits, *rest, **kwargs)
        given.apply_defaults()
        return _cross_entropy(**given.arguments)
    return None


def _cross_entropy(input: Any, target: Tensor, reduction: str, **given: Any) -> Any:
    unusual = any(given.pop(name) is not None for name in ("weight", "reduce", "size_average"))
    if unusual or reduction not in ("mean", "sum") or target.is_floating_point() or not target.numel():
        return None
    input.call.head.tell(f"takes its logits in chunks of {losses.CHUNK_BYTES >> 20} MiB at most")
    items = None if reduction == "mean" else 1
    with input.call.made() as head:
        steps = functools.partial(_replayed, input)
        return losses.linear_cross_entropy(head, input.hidden, target, transform=steps, num_items=items, **given)


def _replayed(logits: Any, y: Tensor) -> Tensor:
    """What was done to the head's output on the way to these logits, done to a chunk of it."""
    if not logits.made:
        return y
    former, func, rest, kwargs = logits.made
    y = _replayed(former, y)
    return func(y, *rest, **kwargs) if func in _EACH else y


def _exists(logits: Any) -> bool:
    return logits.computed is not None or bool(logits.made and _exists(logits.made[0]))


def _whole(logits: Any, asks: Any) -> Tensor:
    """The logits; computed once, and views of each other as the model meant them, since they may be written to."""
    if logits.computed is None and logits.made:
        former, func, rest, kwargs = logits.made
        logits.computed = func(_whole(former, asks), *rest, **kwargs)
    elif logits.computed is None:
        logits.call.head.tell(f"holds its logits whole: {getattr(asks, '__name__', asks)} asks for all of them")
        with logits.call.made() as head:
            logits.computed = head(logits.hidden)
    return logits.computed


@contextmanager
def deferred_logits(model: Any, tell: Tell = lambda told: None) -> Iterator[None]:
    """Within, losses of a model of transformers are computed in chunks of tokens, where the logits are many.

    Args:
        model: with ``get_output_embeddings``.
        tell: told in what way the loss treats its logits, each time.

    Examples:
        ``with rw.hf.deferred_logits(model): loss = model(**batch).loss``
    """
    module: Any = getattr(model, "get_output_embeddings", lambda: None)()
    if module is None or losses.sharded_alone(module):
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
    if shift_labels:
        labels = F.pad(labels, (0, 1), value=smoother.ignore_index)[..., 1:]
    given = {"ignore_index": smoother.ignore_index, "label_smoothing": smoother.epsilon, "reduction": "sum"}
    loss = F.cross_entropy(logits.float().reshape(-1, logits.shape[-1]), labels.reshape(-1), **given)
    items = labels.ne(smoother.ignore_index).sum() if num_items_in_batch is None else num_items_in_batch
    return loss / torch.as_tensor(items).to(loss.device)
