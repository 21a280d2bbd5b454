"""Checkpoints that are whole or absent, and a journal of metrics that a resumed run continues.

A checkpoint folder holds the adapter's own file and what transformers needs to resume (optimizer,
scheduler, random states, trainer state); no weight of the base, and nothing that is unpickled.
"""

from __future__ import annotations

import json
import math
import os
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, final

import torch
from safetensors import SafetensorError, safe_open
from transformers import TrainerCallback

from rankwise import io
from rankwise.attach import Adapter
from rankwise.errors import FileFormatError, SaveError, TrainingError

UNFINISHED = ".unfinished"
METRICS = "metrics.jsonl"


def folders(folder: str | Path, adapters: Sequence[Adapter]) -> dict[Adapter, Path]:
    """Where each adapter lies: one in the folder itself, several in subfolders by name."""
    root = Path(folder)
    return {adapter: root / adapter.name if len(adapters) > 1 else root for adapter in adapters}


def save(adapters: Sequence[Adapter], folder: str | Path) -> None:
    """Write the adapters; every rank calls it.

    Raises:
        TrainingError: a factor holds NaN or infinity.
        SaveError: the disk is full or not writable.
    """
    for adapter in adapters:
        for name, parameter in adapter.named_parameters():
            if not torch.isfinite(parameter).all():
                raise TrainingError(
                    f"{name} holds NaN or infinity, so nothing was written and the last checkpoint "
                    f"is kept. Lower the learning rate, or set max_grad_norm."
                )
    for adapter, path in folders(folder, adapters).items():
        adapter.save(path)


@torch.no_grad()
def restore(adapters: Sequence[Adapter], folder: str | Path) -> None:
    """Put a checkpoint's values into the attached adapters, bit for bit.

    Raises:
        FileFormatError: no adapter there, or a damaged one.
        TrainingError: it was made with other sites or another structure.
        BaseMismatch: it was trained on another base.
    """
    for adapter, path in folders(folder, adapters).items():
        file = path / io.FILE
        try:
            with safe_open(file, framework="pt") as archive:
                header = archive.metadata() or {}
                values = {name: archive.get_tensor(name) for name in archive.keys()}  # noqa: SIM118
            placements, base = json.loads(header["placements"]), json.loads(header["base"])
        except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
            raise FileFormatError(
                f"A checkpoint holds {io.FILE}; {file} cannot be read ({error}). Resume from another one."
            ) from error
        live = dict(adapter.named_parameters())
        here = json.loads(json.dumps(io.encode_placements(adapter.placements)))
        if placements != here or values.keys() != live.keys():
            raise TrainingError(
                f"A run resumes with the structure and sites that it was started with; {file} was "
                f'made with others than "{adapter.name}" has. Attach the recipe of that run '
                f"(rw.load(model, path, trainable=True)), or start afresh in another output_dir."
            )
        io.check_base(adapter.model, adapter.placements, base, any_base=False)
        for name, parameter in live.items():
            parameter.copy_(values[name])


def whole_folder(final: Path, write: Callable[[Path], None], first: bool, wait: Any) -> None:
    """Have ``write`` fill a temporary folder, and move it to ``final`` when it is complete.

    Args:
        final: the folder to make; an older one of this name is replaced.
        write: fills the folder that it is given; every rank calls it.
        first: whether this is the rank that moves folders.
        wait: returns when every rank has called it.

    Raises:
        SaveError: the disk is full or not writable; nothing half-written is left.
    """
    temporary = final.parent / UNFINISHED / final.name
    try:
        if first:
            shutil.rmtree(temporary.parent, ignore_errors=True)
            temporary.mkdir(parents=True)
        wait()
        write(temporary)
        wait()
        if first:
            for file in temporary.rglob("*"):
                if file.is_file():
                    with file.open("rb") as handle:
                        os.fsync(handle.fileno())
            if final.exists():
                final.replace(temporary.parent / "replaced")
            temporary.replace(final)
            shutil.rmtree(temporary.parent, ignore_errors=True)
        wait()
    except OSError as error:
        shutil.rmtree(temporary.parent, ignore_errors=True)
        raise SaveError(
            f"{final} could not be written ({error}); nothing half-written is left, and the "
            f"checkpoints before it are whole. Free some space, then resume."
        ) from error


# -- what transformers keeps in memory alone ---------------------------------------------------


def progress(trainer: Any) -> dict[str, Any]:
    """Sums between two log lines: without them a resumed run logs other means."""
    return {
        "loss": trainer._tr_loss.item(),
        "logged": trainer._globalstep_last_logged,
        "tokens": getattr(trainer, "_total_train_tokens", None),  # TRL
        "metrics": getattr(trainer, "_metrics", {}).get("train", {}),  # TRL
    }


def go_on(trainer: Any, saved: dict[str, Any]) -> None:
    """Put back what ``progress`` returned."""
    trainer._tr_loss += saved["loss"]
    trainer._globalstep_last_logged = saved["logged"]
    if saved["tokens"] is not None:
        trainer._total_train_tokens = saved["tokens"]
        for name, values in saved["metrics"].items():
            trainer._metrics["train"][name] = list(values)


@final
class Journal(TrainerCallback):
    """``metrics.jsonl`` in the output folder: a line for each log, whatever was interrupted.

    Lines carry no times, so that equal runs have equal files.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self.resumed: dict[str, Any] | None = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Continue the sums of the resumed run, and drop the lines after its step."""
        if self.resumed is not None:
            go_on(self.trainer, self.resumed)
            self.resumed = None
        if not state.is_world_process_zero:
            return
        file = Path(str(args.output_dir)) / METRICS
        lines = file.read_text().splitlines(keepends=True) if file.exists() else []
        done = state.global_step or -1
        kept = "".join(line for line in lines if 0 <= _step(line) <= done)

        def write(path: Path) -> None:
            path.write_text(kept)

        io.atomically(file, write)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Append a line."""
        logs: dict[str, Any] = kwargs.get("logs") or {}
        if not state.is_world_process_zero or not logs or "train_loss" in logs:  # the end of the run
            return
        values = {
            k: v if not isinstance(v, float) or math.isfinite(v) else None  # JSON has no NaN
            for k, v in logs.items()
            if not k.endswith(("_runtime", "_per_second"))
        }
        file = Path(str(args.output_dir)) / METRICS
        file.parent.mkdir(parents=True, exist_ok=True)
        with file.open("a") as journal:
            journal.write(json.dumps({"step": state.global_step, **values}, default=float) + "\n")


def _step(line: str) -> int:
    """The step of a journal's line, -1 for a torn one."""
    try:
        return int(json.loads(line)["step"]) if line.endswith("\n") else -1
    except (ValueError, KeyError, TypeError):
        return -1
