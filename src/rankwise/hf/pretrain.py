"""Pre-training from end to end, on the same bridge as fine-tuning: a fresh model, and an adapter that is its training.

``out`` receives ``base``, the model as it was drawn, with its tokenizer, and beside it what a fine-tuning leaves there.
"""

from __future__ import annotations

import shutil
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from transformers import AutoModelForCausalLM, LlamaConfig, set_seed

from rankwise.errors import OutputExists, RankwiseError
from rankwise.hf.finetune import Listener, finetune
from rankwise.hf.folder import claimed
from rankwise.hf.method import FULL
from rankwise.hf.models import EMBEDDED, config_of, tokenizer_of
from rankwise.hf.run import Result, Run
from rankwise.hf.tasks import PRETRAINING
from rankwise.methods import catalogue

__all__ = ["SIZES", "fresh", "pretrain", "settled"]

BASE = "base"
SIZES = {"0.3M": (64, 176, 3), "1M": (128, 344, 4), "3M": (192, 512, 6)}  # width, inner width, blocks
# what suits random weights, after GaLore's, APOLLO's and ReLoRA's papers; the other methods' own rates are such
RATES = {FULL: 2e-3, "galore": 1e-2, "apollo": 1e-2, "relora": 2e-3}
_TOLD = ("transformers_version", "dtype", "architectures", "_name_or_path")  # of a config, no part of the model


def outline(model: str) -> tuple[Any, Any]:
    """Config and tokenizer of a size (a Llama with the embedded model's tokenizer), or of a model's folder.

    Raises:
        ModelFileError: neither a size nor a folder.
    """
    if model not in SIZES:
        return config_of(model), tokenizer_of(model)
    tokenizer, (width, inner, blocks) = tokenizer_of(EMBEDDED), SIZES[model]
    config = LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=width,
        intermediate_size=inner,
        num_hidden_layers=blocks,
        num_attention_heads=width // 32,
        max_position_embeddings=256,
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        pad_token_id=tokenizer.pad_token_id,
    )
    return config, tokenizer


def fresh(model: str, folder: Path, seed: int) -> None:
    """Write a model with weights drawn from a seed, and its tokenizer, as ``save_pretrained`` does.

    Args:
        model: a size, or the folder whose config and tokenizer it shares.
        folder: where to.
        seed: of the weights.

    Raises:
        ModelFileError: neither a size nor a folder.
    """
    config, tokenizer = outline(model)
    set_seed(seed)
    AutoModelForCausalLM.from_config(config, dtype=torch.float32).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def settled(run: Run) -> Run:
    """The run with what pre-training sets where the user left it open: the task, the rank, the rate.

    The rank of a method that has one is a quarter of the width, as in the papers.

    Raises:
        ModelFileError: its model is neither a size nor a folder.
    """
    known, method = catalogue(), run.method or FULL
    if run.rank is None and method in known and "rank" in known[method].options and "rank" not in run.options:
        run = replace(run, rank=outline(run.model)[0].get_text_config().hidden_size // 4)
    lr = RATES.get(method, run.lr) if run.lr == "auto" else run.lr
    return replace(run, method=method, task=PRETRAINING, lr=lr)


def pretrain(run: Run, *, listener: Listener | None = None, resume: bool = False, overwrite: bool = False) -> Result:
    """Train a fresh model on a text, all of it: what the method does not reach, it trains whole.

    Args:
        run: the run, its model a size (0.3M, 1M, 3M) or the folder of a model to draw anew.
        listener: told how it goes.
        resume: go on from the last checkpoint in ``run.out``.
        overwrite: replace a former run there.

    Returns:
        What it came to.

    Raises:
        OutputExists: the folder is not empty, another process writes it, or it holds another model's run.
        RankwiseError: whatever else is wrong with the run, the data, the model or the method.
    """
    run, out = settled(run), Path(run.out)
    base = out / BASE
    wanted, _ = outline(run.model)
    with claimed(out, resume=resume, overwrite=overwrite):
        if not (resume and base.exists()):
            fresh(run.model, base, run.seed)
        elif other := _differs(config_of(str(base)).to_dict(), wanted.to_dict()):
            raise OutputExists(
                f"A resumed run goes on with its model; that in {base} has other values of {', '.join(other)} than "
                f"{run.model}. Give the model that it began with, or another --out."
            )
    try:
        return finetune(replace(run, model=str(base)), listener=listener, resume=True)
    except RankwiseError:
        if not (out / "run.yaml").exists():  # refused before it began
            shutil.rmtree(base)
            with suppress(OSError):
                out.rmdir()
        raise


def _differs(one: dict[str, Any], other: dict[str, Any]) -> list[str]:
    return sorted(name for name in one.keys() & other.keys() if name not in _TOLD and one[name] != other[name])
