"""A fine-tuning run as data: what run.yaml holds, and what it came to."""

from __future__ import annotations

import types
import typing
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, final

import yaml

from rankwise.errors import DataError, UnknownName


@final
@dataclass(frozen=True)
class Run:
    """One fine-tuning run, whole: the same file gives the same adapter.

    Where None is allowed, the text "none" says it. The command line shows these lines as its options' help.

    Attributes:
        model: folder of a model, or "embedded" for the small one that the package ships.
        data: file or folder of texts, completions, conversations or labelled texts.
        out: folder for the adapter, the metrics and this run.
        task: "causal-lm", "classification" or "pretraining", which also trains whole what the method leaves out.
        method: a method's name, see rankwise methods, or full: every weight trained; by default lora.
        structure: its structure by name, in place of the method's.
        init: where the factors start, by name.
        solver: in which geometry a step is taken, by name.
        ranks: how rank changes in time, by name.
        rank: of the structure; by default the method's own.
        options: another argument of the method, NAME=VALUE: alpha=32, dropout=0.05.
        target: a pattern of layers: q_proj, '*.mlp.*', attention; by default every linear layer but the head.
        base: quantise the frozen weights: "nf4" or "int8".
        dtype: of the weights: "auto" is bfloat16 on a GPU and float32 on a CPU.
        lr: learning rate, or "auto" for the method's.
        epochs: passes over the data, unless steps are given.
        steps: optimizer steps, in place of epochs.
        batch: examples a forward pass.
        accumulate: forward passes an optimizer step.
        checkpointing: compute activations again in the backward pass: a third slower, far less memory.
        max_length: longest example in tokens; by default the model's context, at most 1024.
        pack: lay documents side by side into full rows.
        validation: a file, or the share of the rows to set aside; "none" to measure nothing.
        base_text: a text of the base's own kind, to measure what training cost there.
        schedule: of the learning rate, after a short warm-up: "cosine", "linear", "constant" (that without warm-up).
        saves: checkpoints and validations along the way.
        seed: of everything drawn at random.
        init_seed: of the factors' start alone; by default the seed.
        labels: names of the classes, filled in by the run.
    """

    model: str
    data: str
    out: str
    task: str = "causal-lm"
    method: str | None = None
    structure: str | None = None
    init: str | None = None
    solver: str | None = None
    ranks: str | None = None
    rank: int | None = None
    options: dict[str, Any] = field(default_factory=dict)
    target: tuple[str, ...] = ()
    base: str | None = None
    dtype: str = "auto"
    lr: float | str = "auto"
    epochs: float = 3.0
    steps: int | None = None
    batch: int = 8
    accumulate: int = 1
    checkpointing: bool = False
    max_length: int | None = None
    pack: bool = False
    validation: float | str | None = 0.1
    base_text: str | None = None
    schedule: str = "cosine"
    saves: int = 5
    seed: int = 0
    init_seed: int | None = None
    labels: tuple[str | int, ...] | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Run:
        """A run from plain values, checked.

        Raises:
            UnknownName: a key that a run does not have.
            DataError: a value of the wrong kind.
        """
        hints = typing.get_type_hints(cls)
        if unknown := sorted(values.keys() - hints):
            raise UnknownName(f"A run says {', '.join(hints)}; found {', '.join(unknown)}.")
        if missing := [name for name in ("model", "data", "out") if not values.get(name)]:
            raise DataError(f"A run names a model, data and out; found no {', '.join(missing)}.")
        run = cls(**{name: _read(name, hints[name], value) for name, value in values.items()})
        for name in ("epochs", "steps", "batch", "accumulate", "saves", "rank"):
            if (value := getattr(run, name)) is not None and value <= 0:
                raise DataError(f"{name} is above 0; found {value}.")
        for name, words in {"lr": ("auto",), "schedule": ("cosine", "linear", "constant")}.items():
            if isinstance(value := getattr(run, name), str) and value not in words:
                raise DataError(f"{name} is {' or '.join(words)}{' or a number' * (name == 'lr')}; found {value!r}.")
        return run

    @classmethod
    def read(cls, path: str | Path, changes: Mapping[str, Any] | None = None) -> Run:
        """A run from a YAML file, with changes.

        Raises:
            DataError: no such file, not YAML, or a value of the wrong kind.
            UnknownName: a key that a run does not have.
        """
        try:
            values = dict(yaml.safe_load(Path(path).read_text(encoding="utf-8")))
        except (OSError, ValueError, TypeError, yaml.YAMLError) as error:
            raise DataError(f"A run is a YAML file of names and values; {path} is not ({error}).") from error
        return cls.of({**values, **(changes or {})})

    def write(self, path: Path, note: str = "") -> None:
        """Write the run as YAML.

        Raises:
            SaveError: the file cannot be written.
        """
        from rankwise.io import atomically  # brings torch, which the command line's help has no need of

        plain = {name: list(v) if isinstance(v, tuple) else v for name, v in asdict(self).items()}
        text = f"# {note}\n" + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)

        atomically(Path(path), lambda temporary: temporary.write_text(text, encoding="utf-8"))

    def differs(self, other: Run) -> list[str]:
        """The names in which two runs differ that a resumed run must share."""
        free = ("out", "epochs", "steps", "labels", "base_text")
        return [f.name for f in fields(self) if f.name not in free and getattr(self, f.name) != getattr(other, f.name)]


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        out: the folder.
        steps: optimizer steps.
        tokens: tokens seen.
        seconds: of training.
        parameters: trained ones.
        loss: training loss over the last tenth of the steps.
        before: scores of the base on the validation data.
        after: scores of the adapted model there.
        own_before: scores of the base on its own text.
        own_after: scores of the adapted model there.
    """

    out: str
    steps: int
    tokens: int
    seconds: float
    parameters: int
    loss: float
    before: dict[str, float] | None = None
    after: dict[str, float] | None = None
    own_before: dict[str, float] | None = None
    own_after: dict[str, float] | None = None


def _read(name: str, hint: Any, value: Any) -> Any:
    """A value as the field's type wants it: numbers from text (YAML reads 1e-3 as text), tuples from lists."""
    parts = typing.get_args(hint) if isinstance(hint, types.UnionType) else (hint,)
    kinds = [typing.get_origin(part) or part for part in parts]
    if value == "none" and types.NoneType in kinds:
        return None
    if tuple in kinds and isinstance(value, str | list):
        value = tuple(value.split(",") if isinstance(value, str) else value)
    if (int in kinds or float in kinds) and isinstance(value, str | int | float) and not isinstance(value, bool):
        with suppress(ValueError):
            value = float(value)
            value = int(value) if int in kinds and value.is_integer() else value
    elif str in kinds and isinstance(value, int | float):
        value = str(value)
    if type(value) not in kinds:
        words = " or ".join(kind.__name__ for kind in kinds if kind is not types.NoneType)
        raise DataError(f"{name} is {words}; found {value!r}.")
    return value
