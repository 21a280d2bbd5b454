"""A model from its config alone, on fake tensors: every layer, no values, quantised where that is asked for."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn
from torch._subclasses.fake_tensor import unset_fake_temporarily
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from rankwise.candidates import HEADS
from rankwise.hf.tasks import SequenceClassification


def skeleton(config: Any, task: str, dtype: torch.dtype, base: str | None) -> nn.Module:
    """The model as ``finetune`` has it, in training mode; call it under a ``FakeTensorMode``.

    Args:
        config: of transformers.
        task: as in a run.
        dtype: of the weights.
        base: "nf4", "int8" or None.

    Returns:
        The model.
    """
    kind = AutoModelForSequenceClassification if task == SequenceClassification.name else AutoModelForCausalLM
    model: Any = kind.from_config(config, dtype=dtype)
    model.config.use_cache = False  # as the trainer does
    if base is not None:
        for path, module in list(model.named_modules()):
            if type(module) is nn.Linear and not HEADS & set(path.split(".")):
                model.set_submodule(path, _quantised(module, base, dtype))
    return model.train()


def _quantised(linear: nn.Linear, base: str, dtype: torch.dtype) -> nn.Module:
    """The layer of bitsandbytes that takes this one's place, with its weight a plain parameter (fakes have no subclass)."""
    import bitsandbytes as bnb

    sizes, bias = (linear.in_features, linear.out_features), linear.bias is not None
    made: Any
    with unset_fake_temporarily():  # bitsandbytes' parameters are a subclass, as fakes are, and its tables have values
        bnb.functional.quantize_4bit(torch.zeros(64), compress_statistics=True)
        with torch.device("meta"):
            if base == "nf4":
                made = bnb.nn.Linear4bit(*sizes, bias, dtype, compress_statistics=True, quant_type="nf4")
            else:
                made = bnb.nn.Linear8bitLt(*sizes, bias, has_fp16_weights=False)
    if base == "nf4":
        data, state = bnb.functional.quantize_4bit(linear.weight.data, compress_statistics=True, quant_type="nf4")
        facts = {"quant_state": state}
        made.quant_state = state
    else:
        data, scale, _ = bnb.functional.int8_vectorwise_quant(linear.weight.data.half())
        facts = {"CB": data, "SCB": scale}
    del made.weight, made.bias
    made.weight, made.bias = nn.Parameter(data, requires_grad=False), linear.bias
    vars(made.weight).update(facts)
    return made
