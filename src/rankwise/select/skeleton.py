"""A model from its config alone, on fake tensors: every layer, no values, quantised where that is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any
from unittest.mock import patch

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification, masking_utils

from rankwise.candidates import HEADS
from rankwise.errors import MissingDependency
from rankwise.hf.run import Run
from rankwise.hf.tasks import SequenceClassification


def skeleton(run: Run, config: Any, dtype: torch.dtype) -> nn.Module:
    """The model as ``finetune`` trains it; call it under a ``FakeTensorMode``.

    Args:
        run: says the task, the format of the weights and checkpointing.
        config: of transformers.
        dtype: of the weights.

    Returns:
        The model, in training mode.
    """
    model: Any = kind_of_model(run).from_config(config, dtype=dtype)
    if run.base is not None:
        for path, module in list(model.named_modules()):
            if type(module) is nn.Linear and not HEADS & set(path.split(".")):
                model.set_submodule(path, _quantised(module, run.base, dtype))
    return settle(run, model)


@contextmanager
def as_if_real() -> Iterator[None]:
    """Let transformers look at a fake attention mask, as at a real one, before it builds one of its own."""
    with patch.object(masking_utils, "is_tracing", lambda *_: False, create=True):
        yield


def kind_of_model(run: Run) -> Any:
    """The class of transformers that loads the run's model."""
    return AutoModelForSequenceClassification if run.task == SequenceClassification.name else AutoModelForCausalLM


def settle(run: Run, model: Any) -> Any:
    """The model as the trainer sets it."""
    model.config.use_cache = False
    if run.checkpointing:  # the older name is deprecated in transformers 5.23
        (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    return model.train()


def _quantised(linear: nn.Linear, base: str, dtype: torch.dtype) -> nn.Module:
    """The layer of bitsandbytes that takes this one's place; its weight is a plain parameter."""
    if find_spec("bitsandbytes") is None:
        raise MissingDependency(f"A base in {base} needs bitsandbytes: pip install 'rankwise[quant]'.")
    import bitsandbytes as bnb
    from bitsandbytes import functional

    sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
    made: Any
    with unset_fake_temporarily():  # bitsandbytes' parameters are a subclass, as fakes are, and its tables have values
        functional.quantize_4bit(torch.zeros(64), compress_statistics=True)
        with torch.device("meta"):
            if base == "nf4":
                made = bnb.nn.Linear4bit(*sizes, bias, dtype, compress_statistics=True, quant_type="nf4")
            else:
                made = bnb.nn.Linear8bitLt(*sizes, bias, has_fp16_weights=False)
    if base == "nf4":
        data, state = functional.quantize_4bit(linear.weight.data, compress_statistics=True, quant_type="nf4")
        facts = {"quant_state": state}
        made.quant_state = state
    else:
        data, scale, _ = functional.int8_vectorwise_quant(linear.weight.data.half())
        facts = {"CB": data, "SCB": scale}
    del made.weight, made.bias
    made.weight, made.bias = nn.Parameter(data, requires_grad=False), linear.bias
    vars(made.weight).update(facts)
    return made
