"""Examples to batches, padded or packed.

Packed rows keep their documents apart by positions alone: the collator gives `position_ids` that
start again at 0 with every document and *no* attention mask, and transformers' `masking_utils` then
builds the block-diagonal causal mask itself, for eager, sdpa, flex and flash attention and for
sliding windows. It does so only without a cache, hence `use_cache` in the batch.

Legend: B rows of a batch, T tokens of its longest row.
"""

from bisect import bisect_left, insort
from collections.abc import Sequence
from dataclasses import dataclass
from operator import itemgetter
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.nn.utils.rnn import pad_sequence

from rankwise.errors import DataError
from rankwise.hf.data.examples import IGNORE, Example, Examples


def pack(examples: Examples, max_length: int = 1024) -> list[dict[str, np.ndarray]]:
    """Lay whole documents side by side into rows (best fit, longest first).

    Args:
        examples: What `load` returned.
        max_length: The longest row, in tokens; no less than that of `load`.

    Returns:
        A data set for `Trainer` with `Collator(packed=True)`: rows of the input_ids, labels and
        position_ids of whole documents, one after the other.
    """
    if examples.schema == "label":
        raise DataError("packed rows have a label a token; these have one a text: do not pack them")
    rows: list[tuple[int, list[Example]]] = []  # free tokens and documents, sorted by the former
    for item in sorted(examples.items, key=len, reverse=True):
        if len(item) > max_length:
            raise DataError(f"max_length is {max_length} tokens; {item.row.where} has {len(item)}: load with the same")
        at = bisect_left(rows, len(item), key=itemgetter(0))
        free, documents = rows.pop(at) if at < len(rows) else (max_length, [])
        insort(rows, (free - len(item), [*documents, item]), key=itemgetter(0))
    return [_joined(documents) for _, documents in rows]


def _joined(documents: Sequence[Example]) -> dict[str, np.ndarray]:
    columns = {"input_ids": [e.input_ids for e in documents], "labels": [e.labels for e in documents]}
    columns["position_ids"] = [np.arange(len(e)) for e in documents]
    return {name: np.concatenate(parts) for name, parts in columns.items()}


@dataclass(frozen=True)
class Collator:
    """Joins items of `Examples`, or with `packed=True` of `pack`, to a batch of tensors.

    Padding is marked by position, never by its id: a real end-of-sequence token keeps its label
    also where the tokenizer pads with it.

    Attributes:
        tokenizer: Gives the padding id.
        packed: Whether rows hold several documents. (`Trainer` removes the position_ids of a model
            whose forward takes none: such a model cannot be packed.)
    """

    tokenizer: Any
    packed: bool = False

    def __call__(self, features: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return input_ids (B, T) and labels (B, T), or (B,) for classes.

        Beside them stands attention_mask (B, T), or if packed position_ids (B, T) and use_cache.
        """
        filler = next(i for i in (self.tokenizer.pad_token_id, self.tokenizer.eos_token_id, 0) if i is not None)
        ids, labels = ([f[key] for f in features] for key in ("input_ids", "labels"))
        labels = torch.tensor(labels) if isinstance(labels[0], int) else _padded(labels, IGNORE)
        batch = {"input_ids": _padded(ids, filler), "labels": labels}
        if not self.packed:
            return {**batch, "attention_mask": _padded([np.ones(len(row)) for row in ids], 0)}
        if not all("position_ids" in f for f in features):
            raise DataError("packed rows have position_ids; these have none: use pack(examples)")
        # position 0 all along the padding: each of its tokens is a document of its own
        return {**batch, "position_ids": _padded([f["position_ids"] for f in features], 0), "use_cache": False}


def _padded(rows: Sequence[Any], fill: int) -> Tensor:
    return pad_sequence([torch.as_tensor(row) for row in rows], True, fill).long()


def check_packing(model: Any) -> None:
    """Raise unless the model keeps packed documents apart, by one tiny forward and backward pass.

    The outputs of the second of two documents must have no gradient in the first one's input.
    (An input that wants a gradient also keeps bitsandbytes 0.50 from repacking 4-bit weights.)

    Args:
        model: A causal language model of `transformers`, in any mode.

    Raises:
        DataError: If it mixes them (remote code, a recurrent state, another attention function).
    """
    ids = torch.arange(12, device=model.device).remainder(model.config.get_text_config().vocab_size)
    positions = torch.arange(6, device=model.device).repeat(1, 2)
    with torch.enable_grad():
        x = model.get_input_embeddings()(ids[None]).detach().requires_grad_()
        logits = model(inputs_embeds=x, position_ids=positions, use_cache=False).logits
        (grad,) = torch.autograd.grad(logits[0, 6:].float().square().sum(), x)
    leak = float(grad[0, :6].abs().max() / grad.abs().max())
    if not leak < 1e-3:
        raise DataError(f"packed texts are apart; a share of {leak:.1e} leaks here: do not pack")
