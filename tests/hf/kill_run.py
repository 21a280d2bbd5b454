"""Run by test_trainer_kill.py: one run is killed ten times and resumed, another is left alone.

Each attempt is a child of a process that has imported everything already.
"""

from __future__ import annotations

import os
import random
import signal
import sys
from pathlib import Path
from typing import Any

import torch
import transformers
from trainer_models import adapted, arguments, rows

import rankwise.hf

torch.set_num_threads(1)
STEPS = 20


def die() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


class Killer(transformers.TrainerCallback):
    """Kills its process at the beginning of a step."""

    def __init__(self, at: int) -> None:
        self.at = at

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step == self.at:
            die()


def kill_inside_write(at: int, which: int) -> None:
    """Kill in the middle of the torch.save number ``which`` of the checkpoint after step ``at``."""
    real, calls = torch.save, [0]

    def save(value: Any, file: Any, *args: Any, **kwargs: Any) -> None:
        real(value, file, *args, **kwargs)
        if f"checkpoint-{at}" in str(file):
            calls[0] += 1
            if calls[0] == which:
                os.truncate(file, os.path.getsize(file) // 2)
                die()

    torch.save = save


def train(folder: Path, at: int | None = None, which: int = 0) -> None:
    """One attempt, from the last checkpoint if there is one."""
    model, _ = adapted(method="lora_plus", dropout=0.1)
    args = arguments(
        folder,
        max_steps=STEPS,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=2,
        logging_steps=3,
        gradient_accumulation_steps=2,
        eval_strategy="steps",
        eval_steps=4,
    )
    run = rankwise.hf.Trainer(model, args, train_dataset=rows(20), eval_dataset=rows(4))
    if at is not None and which:
        kill_inside_write(at, which)
    elif at is not None:
        run.add_callback(Killer(at))
    run.train(resume_from_checkpoint=True if list(folder.glob("checkpoint-*")) else None)
    run.save_model(str(folder / "out"))


def attempt(folder: Path, at: int | None = None, which: int = 0) -> int:
    """Train in a child; its exit status, negative for a signal."""
    child = os.fork()
    if child == 0:
        try:
            train(folder, at, which)
        except BaseException as error:
            print(f"{type(error).__name__}: {error}", file=sys.stderr, flush=True)
            os._exit(1)
        os._exit(0)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def main(folder: Path, seed: int) -> None:
    draw = random.Random(seed)
    assert attempt(folder / "whole") == 0
    steps = sorted(draw.sample(range(1, STEPS), 10))
    writes = set(draw.sample(range(10), 4))  # these die while they write a checkpoint
    for i, step in enumerate(steps):
        which = draw.randint(1, 3) if i in writes else 0
        at = step + step % 2 if which else step  # checkpoints are written at even steps
        status = attempt(folder / "killed", at, which)
        assert status == -signal.SIGKILL, (i, at, which, status)
        print(f"killed at step {at}{f', inside write {which}' if which else ''}", flush=True)
    assert attempt(folder / "killed") == 0


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]))
