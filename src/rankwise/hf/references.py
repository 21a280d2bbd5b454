"""The reference policy of DPO, KTO and GRPO: the same weights with the trained adapters off."""

import copy
import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from rankwise.attachment import set_active


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """Every module in evaluation mode for a while; then each as it was."""
    training = [module for module in model.modules() if module.training]
    model.eval()
    try:
        yield
    finally:
        for module in training:
            module.training = True


@functools.cache
def _reference_class(base: type[nn.Module]) -> type[nn.Module]:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        # dropout and activation checkpointing off, as in a reference that is a model of its own
        # no_grad outermost: activity.py then knows that no re-run inside backward can be meant
        with evaluating(self), torch.no_grad(), set_active(self, self.reference_active):
            return base.__call__(self, *args, **kwargs)

    body = {"__call__": call, "__module__": base.__module__, "__qualname__": base.__qualname__}
    return type(base.__name__, (base,), body)


def reference(model: nn.Module, active: str | Sequence[str] | None = None) -> Any:
    """The model with its adapters off, as a second model object that shares every weight.

    Calling it runs the shared modules in eval mode, without gradient, and puts the choice of active
    adapters back afterwards. It costs no memory, and follows any change of the base.

    Args:
        model: with an attached adapter.
        active: adapters that stay on in the reference: an earlier one that is part of the policy's
            start, say. None for the base model.

    Returns:
        An object of the model's class; pass it as ``ref_model`` to TRL.

    Raises:
        AttachError: nothing is attached.
        UnknownName: a name that is not attached.

    Examples:
        >>> import torch, rankwise as rw
        >>> from rankwise.hf import reference
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4))
        >>> x = torch.ones(1, 4)
        >>> before = model(x)
        >>> adapter = rw.attach(model, rw.recipe("lora", rank=1))
        >>> _ = torch.nn.init.ones_(adapter["0"]["b"])
        >>> bool((model(x) == before).all()), bool((reference(model)(x) == before).all())
        (False, True)
    """
    with set_active(model, active):  # refuses an unknown name
        shared: Any = copy.copy(model)
    shared.reference_active = active
    shared.__class__ = _reference_class(type(model))
    return shared
