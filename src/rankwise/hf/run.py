"""A fine-tuning run as data: what run.yaml holds, what it came to, and who is told."""

from __future__ import annotations

import difflib
import types
import typing
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, final

import yaml

from rankwise.errors import DataError, UnknownName
from rankwise.io import atomically


@final
@dataclass(frozen=True)
class Run:
    """One fine-tuning run, whole: the same file gives the same adapter.

    Attributes:
        model: folder of a model, or "embedded" for the small one that the package ships.
        data: file or folder of texts, completions, conversations or labelled texts.
        out: folder for the adapter, the metrics and this run.
        task: "causal-lm" or "classification".
        method: name of the catalogue; None for "lora".
        structure: by name, in place of the method's; see :func:`rankwise.hf.method.compose`.
        init: as structure.
        solver: as structure.
        ranks: as structure.
        rank: of the structure; None for the method's own.
        options: further arguments of the method, such as {"alpha": 32, "dropout": 0.05}.
        target: patterns of the layers to adapt; none for every linear layer but the head.
        base: "nf4" or "int8": quantise the frozen weights.
        dtype: of the weights: "auto" is bfloat16 on a GPU and float32 on a CPU.
        lr: learning rate, or "auto" for the method's.
        epochs: passes over the data, unless steps are given.
        steps: optimizer steps.
        batch: examples a forward pass.
        accumulate: forward passes an optimizer step.
        max_length: longest example in tokens; None for the model's context, at most 1024.
        pack: lay documents side by side into full rows.
        validation: a file, or the share of the rows to set aside; None to measure nothing.
        base_text: a text of the base's own kind, to measure what training cost there.
        schedule: of the learning rate, after a short warm-up: "cosine", "linear", "constant".
        saves: checkpoints and validations along the way.
        seed: of everything drawn at random.
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
    max_length: int | None = None
    pack: bool = False
    validation: float | str | None = 0.1
    base_text: str | None = None
    schedule: str = "cosine"
    saves: int = 5
    seed: int = 0
    labels: tuple[str | int, ...] | None = None

    @classmethod
    def of(cls, values: Mapping[str, Any]) -> Run:
        """A run from plain values, checked.

        Raises:
            UnknownName: a key that a run does not have.
            DataError: a value of the wrong kind.
        """
        hints = typing.get_type_hints(cls)
        for key in values:
            if key not in hints:
                close = difflib.get_close_matches(str(key), hints, n=2)
                hint = f"Nearest: {', '.join(close)}." if close else f"It has: {', '.join(hints)}."
                raise UnknownName(f'A run has no "{key}". {hint}')
        missing = [name for name in ("model", "data", "out") if not values.get(name)]
        if missing:
            raise DataError(f"A run names a model, data and out; found no {', '.join(missing)}.")
        run = cls(**{key: _coerced(key, hints[key], value) for key, value in values.items()})
        for name in ("epochs", "steps", "batch", "accumulate", "saves", "rank"):
            if (value := getattr(run, name)) is not None and value <= 0:
                raise DataError(f"{name} is above 0; found {value}.")
        if isinstance(run.lr, str) and run.lr != "auto":
            raise DataError(f'lr is a number or "auto"; found {run.lr!r}.')
        if run.schedule not in ("cosine", "linear", "constant"):
            raise DataError(f"schedule is cosine, linear or constant; found {run.schedule!r}.")
        return run

    @classmethod
    def read(cls, path: str | Path, changes: Mapping[str, Any] | None = None) -> Run:
        """A run from a YAML file, with changes.

        Raises:
            DataError: no such file, not YAML, or a value of the wrong kind.
            UnknownName: a key that a run does not have.
        """
        try:
            values = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
        except (OSError, UnicodeDecodeError, yaml.YAMLError) as error:
            raise DataError(f"A run is a YAML file; {path} cannot be read ({error}).") from error
        if not isinstance(values, dict):
            raise DataError(f"A run is a YAML file of names and values; {path} is not.")
        return cls.of({**values, **(changes or {})})

    def write(self, path: Path, note: str = "") -> None:
        """Write the run as YAML.

        Raises:
            SaveError: the file cannot be written.
        """
        plain = {k: list(v) if isinstance(v, tuple) else v for k, v in asdict(self).items()}
        text = f"# {note}\n" + yaml.safe_dump(plain, sort_keys=False, allow_unicode=True)

        def put(temporary: Path) -> None:
            temporary.write_text(text, encoding="utf-8")

        atomically(path, put)

    def differs(self, other: Run) -> list[str]:
        """The names in which two runs differ that a resumed run must share."""
        free = ("out", "epochs", "steps", "labels", "base_text")
        names = [f.name for f in fields(Run) if f.name not in free]
        return [name for name in names if getattr(self, name) != getattr(other, name)]


@dataclass(frozen=True)
class Result:
    """What a run came to.

    Attributes:
        out: the folder.
        measure: the key of the scores that counts.
        before: scores of the base on the validation data.
        after: scores of the adapted model there.
        own_before: scores of the base on its own text.
        own_after: scores of the adapted model there.
        steps: optimizer steps.
        tokens: tokens seen, since the last checkpoint where one was resumed.
        seconds: of training.
        parameters: trained ones.
        file_bytes: size of the adapter file.
        lr: learning rate.
        loss: training loss over the last tenth of the steps.
    """

    out: str
    measure: str
    before: dict[str, float] | None
    after: dict[str, float] | None
    own_before: dict[str, float] | None
    own_after: dict[str, float] | None
    steps: int
    tokens: int
    seconds: float
    parameters: int
    file_bytes: int
    lr: float
    loss: float | None


class Listener:
    """Told how a run goes; the command line draws it. Every method may be left as it is."""

    def doing(self, what: str) -> None:
        """A stage begins: "loading the model", "measuring the base"."""

    def planned(self, prepared: Any) -> None:
        """All is loaded; the first step comes next."""

    def began(self, step: int, steps: int) -> None:
        """Training begins, or goes on from a checkpoint at ``step``."""

    def stepped(self, step: int, loss: float | None, rate: float) -> None:
        """An optimizer step is done; ``rate`` is in tokens a second."""

    def validated(self, step: int, loss: float) -> None:
        """The validation loss along the way."""


def _coerced(name: str, hint: Any, value: Any) -> Any:
    union = isinstance(hint, types.UnionType) or typing.get_origin(hint) is typing.Union
    kinds = typing.get_args(hint) if union else (hint,)
    if value is None and types.NoneType in kinds:
        return None
    for kind in kinds:
        origin = typing.get_origin(kind) or kind
        if origin is tuple and isinstance(value, list | tuple):
            return tuple(value)
        if origin is tuple and isinstance(value, str):
            return tuple(value.split(","))
        if origin is dict and isinstance(value, Mapping):
            return dict(value)
        if isinstance(value, bool):
            if origin is bool:
                return value
            continue
        if origin in (int, float) and isinstance(value, int | float | str):
            try:
                number = float(value)
            except ValueError:
                continue
            if origin is float or number.is_integer():
                return origin(number)
        if origin is str and isinstance(value, str | int | float):
            return str(value)
    words = " or ".join(getattr(k, "__name__", str(k)) for k in kinds if k is not types.NoneType)
    raise DataError(f"{name} is {words}; found {value!r}.")
