"""A tiny Llama with an adapter, rows and arguments, for the tests of trainers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import nn
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast, TrainingArguments

import rankwise as rw

WORDS = [f"w{i}" for i in range(60)]


def llama(seed: int = 1, **changes: Any) -> LlamaForCausalLM:
    """Two blocks of width 32, the same weights at every call."""
    torch.manual_seed(seed)
    config = LlamaConfig(
        **{
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            "bos_token_id": 1,
            "eos_token_id": 2,
            "pad_token_id": 0,
            **changes,
        }
    )
    return LlamaForCausalLM(config).eval()


def nf4(folder: Path) -> Any:
    """The same, loaded in NF4."""
    llama().save_pretrained(folder)
    config = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    return LlamaForCausalLM.from_pretrained(folder, quantization_config=config)


def adapted(model: Any = None, method: str = "lora", moved: bool = False, **axes: Any) -> Any:
    """A model with an adapter; ``moved``: not at its start, so that it differs from the base."""
    model = llama() if model is None else model
    torch.manual_seed(3)
    adapter = rw.attach(model, rw.recipe(method, rank=4, **axes))
    if moved:
        for values in adapter.values():
            nn.init.normal_(values["b"], std=0.2)
    return model, adapter


def tokenizer() -> PreTrainedTokenizerFast:
    """A word a token."""
    from tokenizers import Tokenizer, models, pre_tokenizers

    vocabulary = {w: i for i, w in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    raw = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    raw.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(
        tokenizer_object=raw, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def rows(n: int = 16, length: int = 8) -> list[dict[str, list[int]]]:
    """Random tokens that are their own labels."""
    draw = torch.Generator().manual_seed(2)
    ids = torch.randint(4, 64, (n, length), generator=draw).tolist()
    return [{"input_ids": row, "labels": row} for row in ids]


def _text(i: int) -> str:
    return " ".join(WORDS[(i * 7 + j * (i + 3)) % 60] for j in range(4))


def preferences(n: int = 8) -> Dataset:
    """Prompt, chosen, rejected."""
    keys = ("prompt", "chosen", "rejected")
    return Dataset.from_list([{k: _text(3 * i + j) for j, k in enumerate(keys)} for i in range(n)])


def arguments(folder: Path, cls: Any = TrainingArguments, **changes: Any) -> Any:
    """Three steps on the CPU that say nothing and save nothing."""
    return cls(
        str(folder),
        **{
            "max_steps": 3,
            "per_device_train_batch_size": 2,
            "logging_steps": 1,
            "save_strategy": "no",
            "report_to": "none",
            "disable_tqdm": True,
            "use_cpu": True,
            "seed": 0,
            **changes,
        },
    )


def values(adapter: Any) -> dict[str, torch.Tensor]:
    """A copy of every factor."""
    return {name: p.detach().clone() for name, p in adapter.named_parameters()}


def equal(one: dict[str, torch.Tensor], two: dict[str, torch.Tensor]) -> bool:
    """Bit for bit."""
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)
