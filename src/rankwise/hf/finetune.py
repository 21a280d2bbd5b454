"""Fine-tuning from end to end: ``finetune(Run(model=..., data=..., out=...))``.

``out`` receives ``adapter.safetensors`` and the tokenizer, ``run.yaml`` (the run, whole),
``metrics.jsonl`` (a line a step, the last one the result), ``loss.png`` where matplotlib
is installed, and ``checkpoint-N``.
"""

from __future__ import annotations

import json
import math
from dataclasses import asdict, dataclass, replace
from importlib.util import find_spec
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from rankwise.attachment import Adapter, attach, disabled, targets
from rankwise.errors import DataError, OutputExists, UnknownName
from rankwise.hf.checkpoint import METRICS
from rankwise.hf.folder import claimed
from rankwise.hf.method import recipe_of
from rankwise.hf.models import config_of
from rankwise.hf.plots import loss_curve
from rankwise.hf.references import evaluating
from rankwise.hf.run import Result, Run
from rankwise.hf.tasks import PRETRAINING, TASKS, CausalLM, SequenceClassification, Task, TextTask
from rankwise.hf.trainer import Trainer
from rankwise.placement import TargetReport
from rankwise.stats import collect
from rankwise.version import __version__

__all__ = ["Listener", "Prepared", "Result", "Run", "finetune", "prepare", "scored", "task_of"]

STATISTICS_BATCHES = 64  # that an init sees which reads data; LoRA-GA and CorDA's authors take as many and more


class Listener(TrainerCallback):
    """Told how a run goes, between its stages as below, while it trains as every callback of transformers."""

    def doing(self, what: str) -> None:
        """A stage begins: "loading the model", "measuring before training"."""

    def read(self, run: Run, train: Any) -> None:
        """The data are read; the model comes next."""

    def planned(self, prepared: Prepared) -> None:
        """All is loaded; the first step comes next."""


QUIET = Listener()


@dataclass
class Prepared:
    """A run with everything loaded and the adapter attached, before the first step.

    Attributes:
        run: the run.
        task: what it is about.
        processor: the tokenizer, or what stands in its place.
        train: examples to learn from.
        validation: examples set aside, or None.
        own: text of the base's own kind, or None.
        model: the model, with the adapter on it.
        adapter: the adapter.
        report: what each pattern matched.
        lr: the learning rate.
    """

    run: Run
    task: Task
    processor: Any
    train: Any
    validation: Any
    own: Any
    model: Any
    adapter: Adapter
    report: TargetReport
    lr: float


def task_of(run: Run) -> Task:
    """The task of a run by its name.

    Raises:
        UnknownName: no such task.
        DataError: settings that the task does not have.
    """
    if run.task not in TASKS:
        raise UnknownName(f'A task is one of {", ".join(TASKS)}; found "{run.task}".')
    context = getattr(config_of(run.model).get_text_config(), "max_position_embeddings", None)
    length = run.max_length or min(1024, context or 1024)
    if TASKS[run.task] is CausalLM:
        return CausalLM(length, run.pack, run.task == PRETRAINING)
    if run.pack or run.base_text:
        raise DataError("pack and base_text belong to the task causal-lm; leave them out.")
    return SequenceClassification(length, run.labels)


@torch.no_grad()
def scored(task: Task, model: Any, examples: Any, processor: Any, batch: int = 8) -> dict[str, float]:
    """The task's measures over examples, with the model in evaluation mode."""
    own = torch.Generator()  # the loader draws a seed; training's numbers must not depend on what was measured
    loader = DataLoader(task.rows(examples), batch, collate_fn=task.collator(processor), generator=own)
    device = next(model.parameters()).device
    with evaluating(model):
        return task.score(model, (send_to_device(items, device) for items in loader), processor)


def prepare(run: Run, task: Task | None = None, listener: Listener = QUIET) -> Prepared:
    """Load data and model and attach the adapter; nothing is written.

    Raises:
        RankwiseError: whatever is wrong with the run, the data, the model or the method.
    """
    recipe = recipe_of(run)
    task = task or task_of(run)
    listener.doing("reading the data")
    processor = task.processor(run.model)
    train, held = task.examples(run.data, processor), None
    task = task.settled(train)
    run = replace(run, labels=getattr(task, "labels", None))
    if isinstance(run.validation, str):
        held = task.examples(run.validation, processor)
    elif run.validation:
        train, held = task.split(train, run.validation, run.seed)
    own = task.examples(run.base_text, processor) if run.base_text else None
    listener.read(run, train)
    listener.doing("loading the model")
    set_seed(run.seed)
    model = task.model(run.model, train, processor, base=recipe.base, dtype=run.dtype)
    recipe = recipe.with_(sites=task.sites(recipe.sites, model))
    report = targets(model, recipe)
    stats = None
    if recipe.init.needs:
        listener.doing("gathering statistics of the data")
        rows = DataLoader(task.rows(train), run.batch, collate_fn=task.collator(processor), generator=torch.Generator())
        stats = collect(model, islice(rows, STATISTICS_BATCHES), recipe)
    listener.doing("attaching the adapter")
    if run.init_seed is not None:
        set_seed(run.init_seed)  # the trainer seeds the order of the data again
    adapter = attach(model, recipe, stats=stats)
    lr = recipe.lr if isinstance(run.lr, str) else run.lr
    return Prepared(run, task, processor, train, held, own, model, adapter, report, lr)


def finetune(
    run: Run,
    *,
    task: Task | None = None,
    listener: Listener = QUIET,
    resume: bool = False,
    overwrite: bool = False,
    before: dict[str, Any] | None = None,
) -> Result:
    """Train an adapter and leave everything about it in ``run.out``.

    Args:
        run: the run.
        task: in place of the one that ``run.task`` names.
        listener: told how it goes.
        resume: go on from the last checkpoint in ``run.out``.
        overwrite: replace a former run there.
        before: the base's scores where another run has measured them, ``before`` and ``own_before`` of its result.

    Returns:
        What it came to.

    Raises:
        OutputExists: the folder is not empty or another process writes it.
        TrainingError: the loss became NaN, or a site gets no gradient.
        RankwiseError: whatever else is wrong with the run, the data, the model or the method.
    """
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
        return _train(prepared, out, listener, resume, before)


def _train(prepared: Prepared, out: Path, listener: Listener, resume: bool, before: dict[str, Any] | None) -> Result:
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
    if find_spec("matplotlib"):
        loss_curve(history, out / "loss.png", f"{adapter.recipe.name} on {Path(prepared.run.data).name}")
    return result


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
