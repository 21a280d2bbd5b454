"""Dropout inside the base's transformer layers, and two such passes made to agree. T tokens, K keys, V classes."""

import inspect
import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from rankwise.errors import IncompatibleAxes, TrainingError
from rankwise.penalties.penalty import Gradients, Perturbation, Trained

FEED_FORWARD = r"mlp|ffn|feed_forward|fc2|DenseReluDense|output\.dense"
_OTHER_TEXT = ("encoder_hidden_states", "key_value_states")  # arguments of an attention to another text


@final
@dataclass(frozen=True)
class HiddenKey(Perturbation):
    """Drops keys of attention and entries of what feed-forward networks return (arXiv 2403.00812).

    For models of transformers, while they train; the weights stay where they are.

    Attributes:
        keys: probability with which a token is no key of a layer's self-attention, for any other token and in any head
            (DropKey by columns, arXiv 2208.02646). Each token keeps itself, so that it has something to attend to.
        hidden: probability for each entry that a feed-forward network returns (HiddenCut by entries, arXiv 2106.00149).
        agree: weight of the Kullback-Leibler divergence between two passes with masks of their own, the mean of both
            directions; with it a step takes both, and the mean of their losses. 0 for one pass.
        feed_forward: how the path of a feed-forward network ends, a regular expression; inside attention it is ignored.
    """

    keys: float = 0.1
    hidden: float = 0.1
    agree: float = 1.0
    feed_forward: str = FEED_FORWARD

    def __post_init__(self) -> None:
        if not (0 <= self.keys < 1 and 0 <= self.hidden < 1):
            raise IncompatibleAxes(f"keys and hidden lie in [0, 1); found {self.keys} and {self.hidden}.")
        if not self.agree >= 0:
            raise IncompatibleAxes(f"agree is a weight, 0 for none; found {self.agree}.")

    @contextmanager
    def moved(self, adapter: Trained, gradients: Gradients, step: int) -> Iterator[None]:
        model: nn.Module = adapter.model
        masks = {path: _mask_of(module) for path, module in model.named_modules()}
        attending = {path: name for path, name in masks.items() if name is not None}
        returning: list[str] = []
        for path in masks:
            inside = "attention" in path or any(path.startswith(f"{p}.") for p in (*attending, *returning))
            if re.fullmatch(rf"(.*\.)?({self.feed_forward})", path) and not inside:
                returning.append(path)
        if (self.keys and not attending) or (self.hidden and not returning):
            raise TrainingError(
                f"HiddenKey drops inside layers as transformers has them: attention with is_causal and a mask, and "
                f"paths that end in {self.feed_forward}; found {len(attending)} and {len(returning)} in "
                f"{type(model).__name__}. Give feed_forward=, or set to 0 what the model does not have."
            )
        passes: set[str] = set()
        with ExitStack() as undo:
            for path, name in attending.items() if self.keys else ():
                hook = partial(_without_keys, self.keys, name)
                undo.callback(model.get_submodule(path).register_forward_pre_hook(hook, with_kwargs=True).remove)
            for path in returning if self.hidden else ():
                undo.callback(model.get_submodule(path).register_forward_hook(partial(_dropped, self.hidden)).remove)
            if self.agree:
                undo.callback(model.register_forward_hook(partial(self._twice, passes), with_kwargs=True).remove)
            yield
        if self.agree and not passes:
            raise TrainingError("HiddenKey compares what the model itself returns, and it was not called; set agree=0.")

    def _twice(self, passes: set[str], model: nn.Module, args: Any, kwargs: Any, output: Any) -> Any:
        """The output, its loss that of two passes and of their disagreement."""
        if not model.training or "second" in passes:
            return None
        labels = kwargs.get("labels")
        whole = all(getattr(output, name, None) is not None for name in ("loss", "logits"))
        if labels is None or labels.is_floating_point() or not whole:
            raise TrainingError(
                "HiddenKey compares the classes that two passes of a model predict where it is given labels, and adds "
                "to the loss that it returns; found no such labels, no loss or no logits (label smoothing, regression, "
                "an objective on logits, TRL's fused loss). Set agree=0."
            )
        passes |= {"first", "second"}
        other = model(*args, **kwargs)
        passes.remove("second")
        if getattr(model, "loss_type", None) == "ForCausalLM":  # where the next token is learned
            labels = F.pad(labels, (0, 1), value=-100)[..., 1:]
        learned, items = labels != -100, kwargs.get("num_items_in_batch")
        one, two = (found.logits.float().log_softmax(-1) for found in (output, other))
        both = (((one.exp() - two.exp()) * (one - two)).sum(-1) * learned).sum()
        output.loss = (output.loss + other.loss + self.agree * both / (learned.sum() if items is None else items)) / 2
        return output


def _mask_of(module: nn.Module) -> str | None:
    """What an attention of transformers calls its mask; None of any other module."""
    given = inspect.signature(module.forward).parameters if hasattr(module, "is_causal") else ()
    return next((name for name in ("attention_mask", "mask") if name in given), None)


def _without_keys(p: float, name: str, module: nn.Module, args: Any, kwargs: Any) -> Any:
    """The arguments with a mask that leaves keys out."""
    given = inspect.signature(module.forward).bind(*args, **kwargs)
    seen = {**given.arguments, **given.kwargs}
    if not module.training or any(seen.get(other) is not None for other in _OTHER_TEXT):
        return None
    x, mask = given.args[0], seen.get(name)
    if mask is None:
        mask = torch.ones(x.shape[-2], x.shape[-2], dtype=torch.bool, device=x.device)
        mask = (mask.tril() if module.is_causal else mask)[None, None]
        if getattr(getattr(module, "config", None), "_attn_implementation", None) == "eager":  # which adds its mask
            mask = torch.zeros_like(mask, dtype=x.dtype).masked_fill_(~mask, torch.finfo(x.dtype).min)
    if not isinstance(mask, Tensor) or mask.dim() != 4:
        raise TrainingError(
            "HiddenKey leaves keys out by a mask (batch, 1, T, K); found another kind. Load the model with "
            'attn_implementation="sdpa" or "eager", or set keys=0.'
        )
    t, k = mask.shape[-2:]
    itself = torch.ones(t, k, dtype=torch.bool, device=x.device).tril(k - t).triu(k - t)
    kept = itself | (torch.rand(x.shape[0], 1, 1, k, device=x.device) >= p)
    added = mask.dtype != torch.bool
    given.arguments[name] = mask.masked_fill(~kept, torch.finfo(mask.dtype).min) if added else mask & kept
    return given.args, given.kwargs


def _dropped(p: float, module: nn.Module, args: Any, output: Any) -> Any:
    if not module.training:
        return None
    if isinstance(output, tuple):
        return F.dropout(output[0], p), *output[1:]
    return F.dropout(output, p)
