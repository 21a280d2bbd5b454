"""A run up to its first step: its task, data and model read, the adapter attached, and what it scores."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import islice
from typing import Any

import torch
from accelerate.utils import send_to_device, set_seed
from torch.utils.data import DataLoader

from rankwise.attachment import Adapter, attach, targets
from rankwise.errors import DataError, TrainingError, UnknownName
from rankwise.hf.method import recipe_of
from rankwise.hf.models import config_of
from rankwise.hf.references import evaluating
from rankwise.hf.run import Run
from rankwise.hf.tasks import PRETRAINING, TASKS, CausalLM, SequenceClassification, Task
from rankwise.placement import TargetReport
from rankwise.stats import collect

__all__ = ["Prepared", "Stages", "prepare", "scored", "task_of"]

STATISTICS_BATCHES = 64  # that an init sees which reads data; LoRA-GA and CorDA's authors take as many and more


class Stages:
    """Told how a run goes between its stages; this one keeps it to itself."""

    def doing(self, what: str) -> None:
        """A stage begins: "loading the model", "measuring before training"."""

    def read(self, run: Run, train: Any) -> None:
        """The data are read; the model comes next."""

    def planned(self, prepared: Prepared) -> None:
        """All is loaded; the first step comes next."""


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


def prepare(run: Run, task: Task | None = None, listener: Stages | None = None) -> Prepared:
    """Load data and model and attach the adapter; nothing is written.

    Raises:
        RankwiseError: whatever is wrong with the run, the data, the model or the method.
    """
    recipe, listener = recipe_of(run), listener or Stages()
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
    if run.checkpointing and not getattr(model, "supports_gradient_checkpointing", False):
        raise TrainingError(f"{type(model).__name__} has no activation checkpointing; leave out --checkpointing.")
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
