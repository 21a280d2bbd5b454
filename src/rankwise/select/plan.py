"""The plan of a run, from the model's config alone: what a step takes, how long, and what would make it fit."""

from __future__ import annotations

import time
from bisect import bisect_left
from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cached_property, partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any, final

import torch

from rankwise._recipe import inner_rank
from rankwise.attachment import Adapter, attach
from rankwise.errors import DataError, DoesNotFit, PlanError, RankwiseError
from rankwise.hf.method import recipe_of
from rankwise.hf.models import config_of, load_model
from rankwise.hf.prepare import task_of
from rankwise.hf.run import Run
from rankwise.hf.tasks import SequenceClassification
from rankwise.inits import Kaiming
from rankwise.select.devices import HERE, Device, device_of, in_words, size_of
from rankwise.select.memory import KINDS, Footprint, footprint, update
from rankwise.select.skeleton import as_if_real, kind_of_model, settle, skeleton

__all__ = ["Plan", "Remedy", "of_run", "plan"]


@final
@dataclass(frozen=True)
class Remedy:
    """One change that makes a run fit.

    Attributes:
        changes: to the run.
        peak: bytes at the peak of a step then.
    """

    changes: dict[str, Any]
    peak: int

    def __str__(self) -> str:
        return f"{' '.join(f'{name}={value}'.lower() for name, value in self.changes.items())} ({in_words(self.peak)})"


@final
@dataclass(frozen=True)
class Plan:
    """What one training step of a run takes; prints as two lines.

    Attributes:
        run: the run.
        length: tokens of the longest row.
        uniform: whether all rows are that long, so that none is padded.
        dtype: of the weights, by name.
        device: on which it is to run.
        memory: bytes that it may take there.
        step: bytes by kind and work, measured on fake tensors: forward and backward of one batch, and an update.
        remedies: where it does not fit, the single changes that make it fit, each planned itself.
        measured: seconds of a real step here, if they were asked for.
    """

    run: Run
    length: int
    uniform: bool
    dtype: str
    device: Device
    memory: int
    step: Footprint
    remedies: tuple[Remedy, ...] = ()
    measured: float | None = None

    @property
    def peak(self) -> int:
        """Bytes at the step's peak."""
        return sum(self.step.peak.values())

    @property
    def fits(self) -> bool:
        """Whether the peak is within the memory."""
        return self.peak <= self.memory

    @cached_property
    def seconds(self) -> float:
        """What a step takes by the device's roofline: what its figures would allow, not a forecast."""
        return self.device.seconds(self.step.work)

    def to_dict(self) -> dict[str, Any]:
        """Plain values; bytes, operations and seconds."""
        step, work = self.step, self.step.work.items()
        return {
            "fits": self.fits, "peak": self.peak, "memory": self.memory, "device": self.device.name,
            "at_peak": {kind: step.peak.get(kind, 0) for kind in KINDS},
            "weights": step.held["weights"], "factors": step.held["factors"], "optimizer": step.held["optimizer"],
            "gradients": step.gradients, "saved_for_backward": step.saved, "logits": step.logits,
            "adapter_file": step.file,
            "flops": sum(flops * count for (flops, _, _), count in work),
            "bytes_moved": sum(moved * count for (_, moved, _), count in work),
            "seconds_roofline": self.seconds, "seconds_measured": self.measured,
            "batch": self.run.batch, "length": self.length, "dtype": self.dtype, "base": self.run.base,
            "remedies": [{"changes": r.changes, "peak": r.peak} for r in self.remedies],
        }  # fmt: skip

    def __str__(self) -> str:
        size, most = max((size, kind) for kind, size in self.step.peak.items())
        said = (
            f"plan: a batch of {self.run.batch} x {self.length} tokens in {self.dtype} "
            f"{'fits' if self.fits else 'does not fit'}: {in_words(self.peak)} of {in_words(self.memory)} "
            f"({most} {in_words(size)})"
        )
        if self.fits:
            return said
        if self.remedies:
            return f"{said}\none of these changes makes it fit: {'; '.join(map(str, self.remedies))}"
        return f"{said}\nno single change makes it fit: take a smaller model, more memory, or two changes at once"

    def check(self) -> None:
        """Refuse a run that does not fit.

        Raises:
            DoesNotFit: it does not; says which changes would help.
        """
        if not self.fits:
            raise DoesNotFit(f"{self}.")


def plan(
    model: str | Path,
    data: str | Path | None = None,
    *,
    device: str | Device = HERE,
    memory: int | str | None = None,
    probe: bool = False,
    **settings: Any,
) -> Plan:
    """Plan a run of ``finetune``; the model's weights are neither loaded nor made.

    Args:
        model: folder with a config, a name on the hub, or "embedded".
        data: the training data, whose longest row decides the length; without it ``max_length`` does.
        device: a name of ``rankwise.select.DEVICES``, a device, or "here".
        memory: bytes, or "24GiB"; the device's own by default, and here what is free.
        probe: load the model after all, and time three real steps.
        **settings: of a run (:class:`rankwise.hf.Run`): method, rank, batch, max_length, base, checkpointing ...

    Returns:
        The plan.

    Raises:
        RankwiseError: whatever is wrong with the model, the data, the device or the settings.
        PlanError: the model does not run on tensors without values.
        DoesNotFit: the probe cannot be run.

    Examples:
        >>> import rankwise as rw
        >>> found = rw.plan("embedded", method="dora", rank=8, batch=4, max_length=128, device="l4")
        >>> found.fits
        True
    """
    run, examples = Run.of({"model": str(model), "data": str(data or "-"), "out": "-", **settings}), None
    if data is not None:
        task = task_of(run)
        examples = task.examples(data, task.processor(run.model))
    made = of_run(run, examples, device, memory)
    if probe:
        made.check()
    return replace(made, measured=_timed(made)) if probe else made


def of_run(run: Run, examples: Any = None, device: str | Device = HERE, memory: int | str | None = None) -> Plan:
    """Plan a run whose training examples are read, or need not be; see :func:`plan`."""
    task: Any = task_of(run)
    lengths = {task.max_length}
    if examples is not None:
        task = task.settled(examples)
        run = replace(run, labels=getattr(task, "labels", None))
        lengths = {len(row["input_ids"]) for row in task.rows(examples)} or lengths
    chosen = device if isinstance(device, Device) else device_of(device)
    limit = size_of(memory) if isinstance(memory, str) else chosen.memory if memory is None else memory
    gpu = torch.cuda.is_available() if device == HERE else True
    own = str(_config(run).dtype or torch.float32).removeprefix("torch.")
    dtype = {"auto": "bfloat16" if gpu else "float32", "stored": own}.get(run.dtype, run.dtype)
    if not isinstance(getattr(torch, dtype, None), torch.dtype):
        raise DataError(f"dtype is auto, stored or a dtype of torch, such as bfloat16; found {dtype!r}.")
    length, uniform = max(lengths), examples is not None and len(lengths) == 1
    made = Plan(run, length, uniform, dtype, chosen, limit, _step(run, length, dtype, uniform))
    return made if made.fits else replace(made, remedies=tuple(_remedies(made)))


def _config(run: Run) -> Any:
    config = config_of(run.model)
    if run.task == SequenceClassification.name:
        config.num_labels = len(run.labels or (0, 1))
        config.pad_token_id = config.pad_token_id or 0
    return config


def _batch(run: Run, length: int, device: Any = "cpu") -> dict[str, Any]:
    """A batch as the collator makes it, each row of full length."""
    ids = torch.ones(run.batch, length, dtype=torch.long, device=device)
    labels = ids[:, 0].clone() if run.task == SequenceClassification.name else ids.clone()
    if run.pack:
        return {"input_ids": ids, "labels": labels, "position_ids": torch.zeros_like(ids), "use_cache": False}
    return {"input_ids": ids, "labels": labels, "attention_mask": ids.clone()}


def _adapt(run: Run, model: Any) -> Adapter:
    recipe = recipe_of(run)
    if recipe.init.needs:  # it reads data, of which a plan has none; sizes do not depend on it
        recipe = recipe.with_(init=Kaiming())
    return attach(model, recipe.with_(sites=task_of(run).sites(recipe.sites, model)))


def _step(run: Run, length: int, dtype: str, uniform: bool) -> Footprint:
    full = not run.pack and (run.batch == 1 or uniform)
    build, batch = partial(skeleton, run, _config(run), getattr(torch, dtype)), partial(_batch, run, length)
    try:
        with as_if_real():
            return footprint(build, partial(_adapt, run), batch, accumulate=run.accumulate > 1, full=full)
    except RankwiseError:
        raise
    except (RuntimeError, ValueError, KeyError, AttributeError, TypeError) as error:  # code of the model's own
        reason = str(error).strip().split("\n")[0].rstrip(".")
        raise PlanError(
            f"A plan runs a step of {run.model} on tensors without values; found {type(error).__name__}: {reason}. "
            f"Measure a first step instead: rankwise finetune --steps 1."
        ) from error


# -- what would make it fit -------------------------------------------------------------------


def _halves(value: int, least: int) -> list[int]:
    return [value >> i for i in range(1, value.bit_length()) if value >> i >= least]


def _changes(made: Plan) -> Iterator[list[dict[str, Any]]]:
    """Kinds of change, each from the mildest to the strongest."""
    run = made.run
    if not run.checkpointing:
        yield [{"checkpointing": True}]
    yield [{"batch": b, "accumulate": run.accumulate * -(-run.batch // b)} for b in _halves(run.batch, 1)]
    yield [{"max_length": t} for t in _halves(made.length, 64)]
    if run.base is None and find_spec("bitsandbytes"):
        yield [{"base": "int8"}, {"base": "nf4"}]
    if rank := inner_rank(recipe_of(run).structure):
        yield [{"rank": r} for r in _halves(rank, 1)]


def _remedies(made: Plan) -> Iterator[Remedy]:
    """Of each kind the mildest change that fits; where the strongest does not, none does."""
    for options in _changes(made):
        tried: dict[int, Remedy] = {}

        def fits(i: int, options: Any = options, tried: Any = tried) -> bool:
            run, length = replace(made.run, **options[i]), options[i].get("max_length", made.length)
            try:
                peak = sum(_step(run, length, made.dtype, made.uniform).peak.values())
            except PlanError:  # not with this model: it has no checkpoints, say
                return False
            tried[i] = Remedy(options[i], peak)
            return peak <= made.memory

        if options and fits(len(options) - 1):
            yield tried[bisect_left(range(len(options) - 1), True, key=fits)]


# -- three real steps -------------------------------------------------------------------------


def _timed(made: Plan, steps: int = 3) -> float:
    """Seconds of a real step, the fastest of some, after one to warm up."""
    run, times = made.run, []
    config = {"num_labels": _config(run).num_labels} if run.task == SequenceClassification.name else {}
    model: Any = load_model(kind_of_model(run), run.model, base=run.base, dtype=made.dtype, **config)
    model.config.pad_token_id = _config(run).pad_token_id
    adapter = _adapt(run, settle(run, model))
    batch = _batch(run, made.length, model.device)
    optimizer = adapter.optimizer()
    for _ in range(steps + 1):
        start = time.perf_counter()
        loss = model(**batch).loss
        loss.backward()
        update(list(adapter.parameters()), optimizer)
        optimizer.zero_grad()
        loss.item()  # waits for the device
        times.append(time.perf_counter() - start)
    return min(times[1:])
