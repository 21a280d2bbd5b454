"""Fine-tuning from end to end: ``finetune(Run(model=..., data=..., out=...))``.

``out`` receives ``adapter.safetensors`` and the tokenizer, ``run.yaml`` (the run, whole),
``metrics.jsonl`` (a line a step, the last one the result), ``loss.png`` and ``checkpoint-N``.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import torch
from transformers import PrinterCallback, TrainerCallback, TrainingArguments, set_seed
from transformers.trainer_utils import get_last_checkpoint

from rankwise.attach import Adapter, attach, disabled, targets
from rankwise.errors import DataError, OutputExists, UnknownName
from rankwise.hf.checkpoint import METRICS
from rankwise.hf.folder import claimed
from rankwise.hf.method import compose
from rankwise.hf.models import config_of
from rankwise.hf.plots import loss_curve
from rankwise.hf.run import Listener, Result, Run
from rankwise.hf.tasks import TASKS, CausalLM, SequenceClassification, Task
from rankwise.hf.trainer import Trainer
from rankwise.targets import TargetReport
from rankwise.version import __version__

__all__ = ["Listener", "Prepared", "Result", "Run", "finetune", "prepare", "scored", "task_of"]


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
    if run.task == CausalLM.name:
        return CausalLM(length, run.pack)
    if run.pack or run.base_text:
        raise DataError("pack and base_text belong to the task causal-lm; leave them out.")
    return SequenceClassification(length, run.labels)


def scored(task: Task, model: Any, examples: Any, processor: Any, batch: int = 8) -> dict[str, float]:
    """The task's measures over examples, with the model in evaluation mode."""
    rows, collate = task.rows(examples), task.collator(processor)

    def batches() -> Iterator[Mapping[str, Any]]:
        for i in range(0, len(rows), batch):
            yield collate([rows[j] for j in range(i, min(i + batch, len(rows)))])

    training = model.training
    model.eval()
    try:
        return task.score(model, batches(), processor)
    finally:
        model.train(training)


def prepare(run: Run, task: Task | None = None, listener: Listener | None = None) -> Prepared:
    """Load data and model and attach the adapter; nothing is written.

    Raises:
        RankwiseError: whatever is wrong with the run, the data, the model or the method.
    """
    listener = listener or Listener()
    axes = {"structure": run.structure, "init": run.init, "solver": run.solver, "ranks": run.ranks}
    recipe = compose(run.method, axes, rank=run.rank, options=run.options, targets=run.target, base=run.base)
    task = task or task_of(run)
    listener.doing("reading the data")
    processor = task.processor(run.model)
    train, held, own = task.examples(run.data, processor), None, None
    if isinstance(task, SequenceClassification):
        task = task.learned(train)
        run = replace(run, labels=task.labels)
    if isinstance(run.validation, str):
        held = task.examples(run.validation, processor)
    elif run.validation:
        train, held = task.split(train, run.validation, run.seed)
    if run.base_text is not None:
        own = task.examples(run.base_text, processor)
    listener.doing("loading the model")
    set_seed(run.seed)
    model = task.model(run.model, train, processor, base=recipe.base, dtype=run.dtype)
    recipe = recipe.with_(sites=task.sites(recipe.sites, model))
    report = targets(model, recipe)
    listener.doing("attaching the adapter")
    set_seed(run.seed)
    adapter = attach(model, recipe)
    lr = recipe.lr if isinstance(run.lr, str) else run.lr
    return Prepared(run, task, processor, train, held, own, model, adapter, report, lr)


def finetune(
    run: Run,
    *,
    task: Task | None = None,
    listener: Listener | None = None,
    resume: bool = False,
    overwrite: bool = False,
) -> Result:
    """Train an adapter and leave everything about it in ``run.out``.

    Args:
        run: the run.
        task: in place of the one that ``run.task`` names.
        listener: told how it goes.
        resume: go on from the last checkpoint in ``run.out``.
        overwrite: replace a former run there.

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
        if resume and file.exists():
            _check_same(run, Run.read(file))
        prepared = prepare(run, task, listener)
        prepared.run.write(file, f"rankwise {__version__}, {prepared.adapter.recipe.name}, lr {prepared.lr:g}")
        if hasattr(prepared.processor, "save_pretrained"):
            prepared.processor.save_pretrained(out)
        listener.planned(prepared)
        return _train(prepared, out, listener, resume)


def _check_same(run: Run, former: Run) -> None:
    if names := run.differs(former):
        found = ", ".join(f"{n} {getattr(former, n)} and now {getattr(run, n)}" for n in names)
        raise OutputExists(
            f"A resumed run goes on as it began; found {found}. Repeat run.yaml "
            f"(rankwise finetune {run.out}/run.yaml --resume), or give another --out."
        )


def _train(prepared: Prepared, out: Path, listener: Listener, resume: bool) -> Result:
    run, task, model, adapter = prepared.run, prepared.task, prepared.model, prepared.adapter
    rows = task.rows(prepared.train)
    steps = run.steps or max(1, round(run.epochs * -(-len(rows) // (run.batch * run.accumulate))))
    every = max(1, -(-steps // run.saves))

    def measured(on: str, examples: Any, base: bool) -> dict[str, float] | None:
        if examples is None:
            return None
        listener.doing(f"measuring {'the base' if base else 'the adapted model'} on {on}")
        with disabled(model) if base else nullcontext():
            return scored(task, model, examples, prepared.processor, run.batch)

    before = measured("the validation data", prepared.validation, True)
    own_before = measured("its own text", prepared.own, True)
    validation = None if prepared.validation is None else task.rows(prepared.validation)
    arguments = TrainingArguments(
        str(out),
        max_steps=steps,
        per_device_train_batch_size=run.batch,
        per_device_eval_batch_size=run.batch,
        gradient_accumulation_steps=run.accumulate,
        lr_scheduler_type=run.schedule if run.schedule != "constant" else "constant_with_warmup",
        warmup_steps=0.03,  # below 1 a share of the steps
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="steps",
        save_steps=every,
        save_total_limit=2,
        eval_strategy="no" if validation is None else "steps",
        eval_steps=every,
        prediction_loss_only=True,
        seed=run.seed,
        include_num_input_tokens_seen="non_padding",
        dataloader_pin_memory=torch.cuda.is_available(),
        remove_unused_columns=False,
        report_to="none",
        disable_tqdm=True,
    )
    bridge = _Bridge(listener)
    trainer = Trainer(
        model,
        arguments,
        lr=None if run.lr == "auto" else prepared.lr,
        train_dataset=rows,
        eval_dataset=validation,
        data_collator=task.collator(prepared.processor),
        processing_class=prepared.processor,
        callbacks=[bridge],
    )
    trainer.remove_callback(PrinterCallback)
    last = get_last_checkpoint(str(out)) if resume else None
    begin = time.perf_counter()
    trainer.train(resume_from_checkpoint=last)
    seconds = time.perf_counter() - begin
    history = trainer.state.log_history
    losses = [row["loss"] for row in history if "loss" in row]
    tail = losses[-max(1, len(losses) // 10) :]
    after = measured("the validation data", prepared.validation, False)
    own_after = measured("its own text", prepared.own, False)
    saved = adapter.save(out)
    result = Result(
        out=str(out),
        measure=task.measure,
        before=before,
        after=after,
        own_before=own_before,
        own_after=own_after,
        steps=trainer.state.global_step,
        tokens=int(trainer.state.num_input_tokens_seen - bridge.start[1]),
        seconds=seconds,
        parameters=sum(p.numel() for p in adapter.parameters()),
        file_bytes=saved.stat().st_size,
        lr=prepared.lr,
        loss=sum(tail) / len(tail) if tail else None,
    )
    with (out / METRICS).open("a") as journal:
        journal.write(json.dumps({"result": asdict(result)}) + "\n")
    loss_curve(history, out / "loss.png", f"{adapter.recipe.name} on {Path(run.data).name}")
    return result


@dataclass
class _Bridge(TrainerCallback):
    """Passes what the Trainer says on to the listener."""

    listener: Listener
    start: tuple[float, float] = (0.0, 0.0)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.start = (time.perf_counter(), state.num_input_tokens_seen)
        self.listener.began(state.global_step, state.max_steps)

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs = kwargs.get("logs") or {}
        if "eval_loss" in logs:
            self.listener.validated(state.global_step, logs["eval_loss"])
        if "loss" in logs:
            seconds = time.perf_counter() - self.start[0]
            rate = (state.num_input_tokens_seen - self.start[1]) / max(seconds, 1e-9)
            self.listener.stepped(state.global_step, logs["loss"], rate)
