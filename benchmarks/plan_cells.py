"""The plan's peak against what torch allocates in real training: ``python -m benchmarks.plan_cells``.

Each cell is a model, a method, a batch and so on. The plan is made from the model's config. The truth
is two steps of ``rw.hf.Trainer`` on the CPU under torch's profiler: every block that the allocator
reports to be made there, until it dies, on top of the storages of the model that was there before. The
plan's own counting of storages has no part in it.
"""

from __future__ import annotations

import argparse
import functools
import gc
import sys
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass, field
from io import StringIO
from pathlib import Path
from tempfile import TemporaryDirectory
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from transformers import TrainingArguments

import rankwise as rw
from benchmarks.memory import most_allocated
from rankwise.hf.data import Collator
from rankwise.hf.method import recipe_of
from rankwise.hf.models import load_model
from rankwise.hf.prepare import task_of
from rankwise.hf.run import Run
from rankwise.select.skeleton import kind_of_model

WIDTH: dict[str, Any] = {"hidden_size": 256, "intermediate_size": 704, "num_hidden_layers": 4, "num_attention_heads": 8}
GROUPED: dict[str, Any] = {**WIDTH, "num_key_value_heads": 4, "max_position_embeddings": 1024}
MODELS: dict[str, Any] = {
    "llama": lambda: transformers.LlamaConfig(vocab_size=4096, **GROUPED),
    "large vocabulary": lambda: transformers.LlamaConfig(vocab_size=65536, **GROUPED),  # the loss goes in chunks
    "qwen3, tied": lambda: transformers.Qwen3Config(vocab_size=16384, head_dim=32, tie_word_embeddings=True, **GROUPED),
    "gemma3, sliding": lambda: transformers.Gemma3TextConfig(
        vocab_size=8192,
        head_dim=32,
        sliding_window=64,
        layer_types=["sliding_attention", "full_attention"] * 2,
        **GROUPED,
    ),
    "gpt2": lambda: transformers.GPT2Config(vocab_size=4096, n_embd=256, n_layer=4, n_head=8, n_positions=1024),
    "mixtral": lambda: transformers.MixtralConfig(
        vocab_size=4096, num_local_experts=4, num_experts_per_tok=2, **{**GROUPED, "intermediate_size": 256}
    ),
}


@dataclass(frozen=True)
class Cell:
    """One row of the table; ``settings`` are those of a run."""

    model: str
    method: str
    batch: int
    length: int
    dtype: str = "float32"
    settings: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        more = ", ".join(name if value is True else f"{name} {value}" for name, value in self.settings.items())
        plain = more.translate(str.maketrans("", "", "[]{}'"))
        return ", ".join([self.model, self.method, f"{self.batch} x {self.length}", self.dtype, *filter(None, [plain])])

    def run(self, folder: str) -> dict[str, Any]:
        """The settings of the run."""
        given = {"method": self.method, "batch": self.batch, "max_length": self.length, "dtype": self.dtype}
        return {"model": folder, **given, **self.settings}


CHECKPOINTED = {"checkpointing": True}
CELLS = [
    *(Cell("llama", method, 4, 128) for method in ("lora", "dora", "pissa", "lokr", "loha", "hira", "oft", "svd")),
    *(Cell("llama", method, 4, 128) for method in ("adalora", "lora_sam", "flat_lora", "bi_lora", "hidden_key")),
    Cell("llama", "lora", 4, 128, settings=CHECKPOINTED),
    Cell("llama", "dora", 4, 128, "bfloat16", CHECKPOINTED),
    Cell("llama", "lora", 1, 512, "bfloat16"),
    Cell("gpt2", "dora", 1, 512, settings=CHECKPOINTED),
    Cell("llama", "lora", 8, 64),
    Cell("llama", "lora", 2, 256, settings={"rank": 128}),
    Cell("llama", "lora_plus", 4, 128, settings={"accumulate": 2}),
    Cell("llama", "lora", 4, 128, settings={"pack": True}),
    Cell("llama", "lora", 4, 128, settings={"task": "classification"}),
    Cell("llama", "lora", 4, 128, settings={"base": "nf4"}),
    Cell("llama", "dora", 4, 128, settings={"base": "nf4", **CHECKPOINTED}),
    Cell("llama", "lora", 4, 128, settings={"base": "int8"}),
    Cell("large vocabulary", "lora", 4, 256),
    Cell("large vocabulary", "dora", 2, 512, "bfloat16", CHECKPOINTED),
    Cell("qwen3, tied", "lora", 4, 128),
    Cell("qwen3, tied", "dora", 2, 256, "bfloat16", CHECKPOINTED),
    Cell("gemma3, sliding", "lora", 4, 128),
    Cell("gemma3, sliding", "dora", 4, 128, "bfloat16"),
    Cell("gpt2", "lora", 4, 128),
    Cell("gpt2", "lora", 4, 128, settings={"options": {"dropout": 0.1}}),
    Cell("gpt2", "pissa", 2, 256, "bfloat16", CHECKPOINTED),
    Cell("mixtral", "lora", 4, 128),
    Cell("mixtral", "lora", 2, 256, "bfloat16", CHECKPOINTED),
    Cell("mixtral", "lora", 4, 128, settings={"target": ["*.experts.*"]}),
]


def folder_of(cell: Cell, parent: Path) -> str:
    """The cell's model as a folder of save_pretrained, of random weights."""
    folder = parent / cell.model.split(",")[0]
    if not folder.exists():
        config = MODELS[cell.model]()
        config.pad_token_id = 0
        transformers.AutoModelForCausalLM.from_config(config).save_pretrained(folder)
    return str(folder)


def planned(cell: Cell, folder: str) -> int:
    """The plan's peak, in bytes."""
    return rw.plan(**cell.run(folder), device="l4").peak


def measured(cell: Cell, folder: str) -> int:
    """The most that torch had allocated at once in two steps of training, in bytes."""
    run = Run.of({"data": "-", "out": "-", **cell.run(folder)})
    recipe, task = recipe_of(run), task_of(run)
    gc.collect()  # an earlier cell's model
    before = _storages()
    with redirect_stderr(StringIO()), redirect_stdout(StringIO()):
        model = load_model(kind_of_model(run), folder, base=run.base, dtype=run.dtype)
        model.config.pad_token_id = 0
        gc.collect()
        there = _storages() - before
        recipe = recipe.with_(sites=task.sites(recipe.sites, model))
        return there + most_allocated(functools.partial(_train, model, run, recipe))


def _train(model: Any, run: Run, recipe: rw.Recipe) -> None:
    """Two steps."""
    rw.attach(model, recipe)
    with TemporaryDirectory() as out:
        arguments = TrainingArguments(
            out, max_steps=2, per_device_train_batch_size=run.batch, gradient_accumulation_steps=run.accumulate,
            gradient_checkpointing=run.checkpointing, save_strategy="no", report_to="none", disable_tqdm=True,
            remove_unused_columns=False, use_cpu=True, dataloader_pin_memory=False,
        )  # fmt: skip
        collate = Collator(SimpleNamespace(pad_token_id=0, eos_token_id=0), packed=run.pack)
        rw.hf.Trainer(model, arguments, train_dataset=_rows(run), data_collator=collate).train()


def _storages() -> int:
    """Bytes of all storages that a tensor somewhere holds."""
    kinds = torch.Tensor, torch.nn.Parameter, *torch.nn.Parameter.__subclasses__()
    found = (t.untyped_storage() for t in gc.get_objects() if type(t) in kinds and t.device.type == "cpu")
    return sum({storage.data_ptr(): storage.nbytes() for storage in found}.values())


def _rows(run: Run) -> list[dict[str, Any]]:
    """Rows of the full length but for one a batch."""
    rows = []
    for i in range(2 * run.batch * run.accumulate):
        length = (run.max_length or 0) - (i % run.batch == 0) * 3 * (run.batch > 1)
        ids = [1 + (i + j) % 100 for j in range(length)]
        row = {"input_ids": ids, "labels": i % 2 if run.task == "classification" else ids}
        half = length // 2
        apart = {"position_ids": [*range(half), *range(length - half)]} if run.pack else {}
        rows.append(row | apart)
    return rows


def main() -> None:
    """Print the table and the worst cell."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", help="cells whose name has this in it", default="")
    only = parser.parse_args().only
    torch.set_num_threads(1)
    apart = {}
    print("| cell | plan, MiB | measured, MiB | difference |\n|---|--:|--:|--:|")
    with TemporaryDirectory() as parent:
        for cell in CELLS:
            if only not in cell.name:
                continue
            folder = folder_of(cell, Path(parent))
            plan, truth = planned(cell, folder), measured(cell, folder)
            apart[cell.name] = plan / truth - 1
            row = f"| {cell.name} | {plan / 2**20:.2f} | {truth / 2**20:.2f} | {apart[cell.name]:+.2%} |"
            print(row, flush=True)
    worst = max(apart, key=lambda name: abs(apart[name]))
    print(f"\n{len(apart)} cells; the worst is {worst}: {apart[worst]:+.2%}")
    sys.exit(abs(apart[worst]) > 0.05)


if __name__ == "__main__":
    main()
