"""Fine-tuning from end to end: ``finetune(Run(model=..., data=..., out=...))``.

``out`` receives ``adapter.safetensors`` and the tokenizer, ``run.yaml`` (the run, whole),
``metrics.jsonl`` (a line a step, the last one the result), ``loss.png`` where matplotlib
is installed, and ``checkpoint-N``.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments
from transformers.trainer_utils import get_last_checkpoint

from rankwise.attachment import disabled
from rankwise.errors import OutputExists
from rankwise.hf.checkpoint import METRICS
from rankwise.hf.folder import claimed
from rankwise.hf.plots import loss_curve
from rankwise.hf.prepare import Prepared, Stages, prepare, scored
from rankwise.hf.run import Result, Run
from rankwise.hf.tasks import Task, TextTask
from rankwise.hf.trainer import Trainer
from rankwise.version import __version__

__all__ = ["Listener", "Result", "Run", "finetune"]


class Listener(Stages, TrainerCallback):
    """Told how a run goes: between its stages, and while it trains as every callback of transformers."""


def finetune(
    run: Run,
    *,
    task: Task | None = None,
    listener: Listener | None = None,
    resume: bool = False,
    overwrite: bool = False,
    before: dict[str, Any] | None = None,
    picture: bool = True,
) -> Result:
    """Train an adapter and leave everything about it in ``run.out``.

    Args:
        run: the run.
        task: in place of the one that ``run.task`` names.
        listener: told how it goes.
        resume: go on from the last checkpoint in ``run.out``.
        overwrite: replace a former run there.
        before: the base's scores where another run has measured them, ``before`` and ``own_before`` of its result.
        picture: draw the losses, ``loss.png``, where matplotlib is installed.

    Returns:
        What it came to.

    Raises:
        OutputExists: the folder is not empty or another process writes it.
        TrainingError: the loss became NaN, or a site gets no gradient.
        RankwiseError: whatever else is wrong with the run, the data, the model or the method.
    """
    listener = listener or Listener()
    with claimed(run.out, resume=resume, overwrite=overwrite) as out:
        file = out / "run.yaml"
        if resume and file.exists() and (names := run.differs(former := Run.read(file))):
            found = ", ".join(f"{name} {getattr(former, name)} and now {getattr(run, name)}" for name in names)
            raise OutputExists(
                f"A resumed run goes on as it began; found {found}. Repeat run.yaml (rankwise finetune {file} "
                f"--resume), or give another --out."
            )
        prepared = prepare(run, task, listener)
        prepared.run.write(file, f"rankwise {__version__}, {prepared.adapter.recipe.name}, lr {prepared.lr:g}")
        if prepared.processor is not None:
            prepared.processor.save_pretrained(out)
        listener.planned(prepared)
        result, history = _train(prepared, out, listener, resume, before)
        if picture and find_spec("matplotlib"):
            loss_curve(history, out / "loss.png", f"{prepared.adapter.recipe.name} on {Path(run.data).name}")
        return result


def _train(
    prepared: Prepared, out: Path, listener: Listener, resume: bool, before: dict[str, Any] | None
) -> tuple[Result, list[dict[str, Any]]]:
    task, model, adapter = prepared.task, prepared.model, prepared.adapter

    def measured(when: str) -> dict[str, Any]:
        listener.doing(f"measuring {when} training")
        told = {when: prepared.validation, f"own_{when}": prepared.own}
        batch = prepared.run.batch
        return {key: scored(task, model, e, prepared.processor, batch) for key, e in told.items() if e is not None}

    with disabled(model):
        scores = measured("before") if before is None else dict(before)
    trainer = _trainer(prepared, out, listener)
    done = trainer.train(resume_from_checkpoint=get_last_checkpoint(str(out)) if resume else None)
    adapter.save(out)
    scores |= measured("after")
    history = trainer.state.log_history
    losses = [row["loss"] for row in history if "loss" in row]
    tail = losses[-max(1, len(losses) // 10) :]
    result = Result(
        out=str(out),
        steps=trainer.state.global_step,
        tokens=int(trainer.state.num_input_tokens_seen),
        seconds=done.metrics["train_runtime"],
        parameters=sum(p.numel() for p in adapter.parameters()),
        loss=sum(tail) / len(tail),
        **scores,
    )
    with (out / METRICS).open("a") as journal:
        journal.write(json.dumps({"result": asdict(result)}) + "\n")
    return result, history


def _trainer(prepared: Prepared, out: Path, listener: Listener) -> Trainer:
    run, task = prepared.run, prepared.task
    rows = task.rows(prepared.train)
    held = None if prepared.validation is None else task.rows(prepared.validation)
    steps = run.steps or max(1, round(run.epochs * math.ceil(len(rows) / (run.batch * run.accumulate))))
    every = math.ceil(steps / run.saves)
    arguments = TrainingArguments(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=run.batch,
        per_device_eval_batch_size=run.batch,
        gradient_accumulation_steps=run.accumulate,
        gradient_checkpointing=run.checkpointing,
        lr_scheduler_type=run.schedule,
        warmup_steps=0.03,  # below 1 a share of the steps
        logging_steps=1,
        save_steps=every,
        eval_strategy="no" if held is None or run.saves == 1 else "steps",  # at the end it is measured anyway
        eval_steps=every,
        seed=run.seed,
        include_num_input_tokens_seen="non_padding" if isinstance(task, TextTask) else "no",
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )
    trainer = Trainer(
        prepared.model,
        arguments,
        lr=None if run.lr == "auto" else prepared.lr,
        train_dataset=rows,
        eval_dataset=held,
        data_collator=task.collator(prepared.processor),
        processing_class=prepared.processor,
        callbacks=[listener],
    )
    trainer.remove_callback(PrinterCallback)
    return trainer
