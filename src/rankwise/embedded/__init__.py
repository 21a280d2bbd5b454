"""The small English language model that the package ships, for demos, tests and first steps.

A Llama of 4.7 million parameters with its own byte-level tokenizer. ``MODEL_CARD.md`` beside the
weights says what it was trained on, and ``bits.json`` how well it predicts held-out text.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch
    from transformers import LlamaForCausalLM, PreTrainedTokenizerFast

__all__ = ["load", "path"]


def path() -> Path:
    """Return the folder of the model, as ``from_pretrained`` takes it."""
    return Path(__file__).parent / "model"


def load(dtype: torch.dtype | None = None) -> tuple[LlamaForCausalLM, PreTrainedTokenizerFast]:
    """Load the model, in evaluation mode, and its tokenizer.

    Args:
        dtype: Data type of the weights. They are stored as bfloat16; the default, float32, is
            better for training on a CPU.

    Returns:
        The model and the tokenizer.
    """
    import torch
    from transformers import AutoTokenizer, LlamaForCausalLM

    model = LlamaForCausalLM.from_pretrained(path(), dtype=dtype or torch.float32)
    return model, AutoTokenizer.from_pretrained(path())
