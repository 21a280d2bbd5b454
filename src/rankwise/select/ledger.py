"""The ledger: a line for every run, appended and never changed. What stands there is not run again.

A run is known by its key, a digest of all that decides its outcome: the code, torch and transformers, the device, the
recipe and every setting, and the contents of the model and the data (not where they lie).
"""

from __future__ import annotations

import functools
import hashlib
import json
import math
import os
import shutil
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import asdict, dataclass, field, replace
from datetime import UTC, datetime
from io import StringIO
from pathlib import Path
from typing import TYPE_CHECKING, Any, final

import torch
import transformers

from rankwise.errors import SaveError, TrainingError
from rankwise.hf.method import recipe_of
from rankwise.hf.models import config_of, locate
from rankwise.hf.prepare import Prepared, prepare
from rankwise.hf.run import Run
from rankwise.io import FILE
from rankwise.registry import encode
from rankwise.version import __version__

if TYPE_CHECKING:
    from rankwise.hf.finetune import Listener

__all__ = ["Entry", "Ledger", "Measure", "code", "digest", "key_of"]

Measure = Callable[[Prepared], float]  # of a trained adapter, beside the scores of the run
_PACKAGE = Path(__file__).parents[1]
_WEIGHTLESS = {"cli", "select"}  # packages that decide which run is made, not what comes of it
_BASE = ("before", "own_before")  # scores that no training changes
_POINTS = 100  # of the training curve that a line keeps


@final
@dataclass(frozen=True)
class Entry:
    """One run of the ledger.

    Attributes:
        key: digest of what decides the outcome.
        run: the settings.
        code: versions of what ran.
        recipe: the method, as in an adapter's file.
        digests: of model and data, SHA-256.
        seed: of the run.
        lr: learning rate.
        steps: optimizer steps.
        curve: "training" and "validation": pairs of step and loss, thinned to about a hundred.
        seconds: of training; of the rest of it alone where the run was resumed.
        bytes: of the adapter's file.
        parameters: trained ones.
        scores: by when ("before", "after", "own_before", "own_after"), then by name.
        measures: what was measured of the trained adapter besides.
        resumed: whether the run went on from a checkpoint.
        error: why it has no scores, where training failed.
        at: when it ended, UTC.
    """

    key: str
    run: dict[str, Any]
    code: str
    recipe: dict[str, Any]
    digests: dict[str, str]
    seed: int
    lr: float
    steps: int = 0
    curve: dict[str, list[Any]] = field(default_factory=dict)
    seconds: float = 0.0
    bytes: int = 0
    parameters: int = 0
    scores: dict[str, dict[str, float]] = field(default_factory=dict)
    measures: dict[str, float] = field(default_factory=dict)
    resumed: bool = False
    error: str | None = None
    at: str = ""

    @property
    def loss(self) -> float:
        """Loss on the validation data after training; infinite where training failed."""
        return self.scores["after"]["loss"] if self.scores else math.inf


@final
class Ledger:
    """A JSONL file of runs.

    Runs that are under way lie beside it, in ``NAME.runs/KEY``, and are removed when their line is written.

    Args:
        path: the file; it need not exist.

    Examples:
        >>> Ledger("nowhere.jsonl").entries()
        {}
    """

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        self._before: dict[str, dict[str, Any]] = {}  # the base's scores, by what decides them
        self._read: tuple[Any, dict[str, Entry]] = None, {}  # the file's size and time, and what it held then

    def entries(self) -> dict[str, Entry]:
        """The runs by key. A line that was torn by a crash is passed over with a warning."""
        facts = self.path.stat() if self.path.exists() else None
        now = facts and (facts.st_size, facts.st_mtime_ns)
        if now is None or self._read[0] != now:
            self._read = now, self._parsed(self.path.read_bytes() if now else b"")
        return dict(self._read[1])

    def _parsed(self, text: bytes) -> dict[str, Entry]:
        found: dict[str, Entry] = {}
        for number, line in enumerate(text.splitlines(), 1):
            try:
                entry = Entry(**json.loads(line))
            except (ValueError, TypeError):
                warnings.warn(f"{self.path}, line {number} is not a whole entry and was passed over.", stacklevel=2)
                continue
            found[entry.key] = entry
        return found

    def append(self, entry: Entry) -> None:
        """Write a line, all of it at once, and wait until it is on the disk.

        Raises:
            SaveError: it cannot be written.
        """
        line = json.dumps(asdict(entry), ensure_ascii=False).encode() + b"\n"
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            handle = os.open(self.path, os.O_RDWR | os.O_APPEND | os.O_CREAT, 0o644)
            try:
                size = os.fstat(handle).st_size
                torn = size and os.pread(handle, 1, size - 1) != b"\n"
                os.write(handle, b"\n" * torn + line)
                os.fsync(handle)
            finally:
                os.close(handle)
        except OSError as error:
            raise SaveError(f"The ledger {self.path} cannot be written ({error}); choose another file.") from error

    def done(self, run: Run, measures: Mapping[str, Measure] | None = None, listener: Listener | None = None) -> Entry:
        """The entry of a run: from the ledger, or else the run is made, or gone on with where it was interrupted.

        Args:
            run: the run; its ``out`` is not used.
            measures: further measures of the trained adapter by name; the name says all that decides the value.
            listener: told how training goes.

        Returns:
            The entry. Where training failed (a loss that is NaN) it has an error and no scores.

        Raises:
            RankwiseError: whatever else is wrong with the run.
        """
        recipe = recipe_of(run)
        run = replace(run, lr=recipe.lr) if isinstance(run.lr, str) else run
        key = key_of(run, tuple(measures or ()))
        if found := self.entries().get(key):
            return found
        from transformers.trainer_utils import get_last_checkpoint  # imports PEFT where it is, in seconds

        folder = self.path.with_name(f"{self.path.name}.runs") / key
        settings = json.loads(json.dumps(asdict(replace(run, out="-"))))  # as they are read again
        run = replace(run, out=str(folder))
        resumed = folder.is_dir() and get_last_checkpoint(str(folder)) is not None
        blank = Entry(key, settings, code(), encode(recipe), _digests(run), run.seed, float(run.lr), resumed=resumed)
        try:
            base = _key_of_base(run)
            entry = _made(blank, run, measures or {}, listener, self._before.get(base))
            self._before[base] = {name: entry.scores[name] for name in _BASE if name in entry.scores}
        except TrainingError as error:
            entry = replace(blank, error=str(error))
        entry = replace(entry, at=datetime.now(UTC).isoformat(timespec="seconds"))
        self.append(entry)
        shutil.rmtree(folder, ignore_errors=True)
        return entry


def _made(
    blank: Entry, run: Run, measures: Mapping[str, Measure], listener: Listener | None, before: dict[str, Any] | None
) -> Entry:
    from rankwise.hf import checkpoint
    from rankwise.hf.finetune import finetune  # with transformers' trainer, which only a run needs

    with redirect_stderr(StringIO()):  # what one run says of itself is too much of many; its line holds the rest
        result = finetune(run, listener=listener, resume=True, before=before, picture=False)
    folder, found = Path(run.out), {}
    for name, measure in measures.items():
        prepared = prepare(run)
        checkpoint.restore([prepared.adapter], folder)
        found[name] = measure(prepared)
    rows = [json.loads(line) for line in (folder / checkpoint.METRICS).read_text().splitlines()]
    learnt, held = ([[r["step"], r[k]] for r in rows if k in r] for k in ("loss", "eval_loss"))
    thinned = learnt[:: math.ceil(len(learnt) / _POINTS)]
    held = held or ([[result.steps, result.after["loss"]]] if result.after else [])
    when = (*_BASE, "after", "own_after")
    return replace(
        blank,
        steps=result.steps,
        curve={"training": thinned, "validation": held},
        seconds=result.seconds,
        bytes=(folder / FILE).stat().st_size,
        parameters=result.parameters,
        scores={name: value for name in when if (value := getattr(result, name)) is not None},
        measures=found,
    )


# -- what decides an outcome ------------------------------------------------------------------


def key_of(run: Run, measures: tuple[str, ...] = ()) -> str:
    """The key of a run, 16 hexadecimal digits: settings and contents, neither ``out`` nor where files lie."""
    settings = {**asdict(run), **_digests(run), "out": None, "labels": None}
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "cpu"
    said = {"code": code(), "device": device, "recipe": encode(recipe_of(run)), "run": settings, "measures": measures}
    return hashlib.sha256(json.dumps(said, sort_keys=True).encode()).hexdigest()[:16]


def _key_of_base(run: Run) -> str:
    """What decides the base's own scores: the data that is held back, how it is read, a new head's start; no method."""
    how = (run.task, run.max_length, run.pack, run.dtype, run.base, run.batch, run.validation, run.labels, run.seed)
    return json.dumps([_digests(run), how])


@functools.cache
def code() -> str:
    """Versions of rankwise, with a digest of those of its sources that train, of torch and of transformers."""
    made = hashlib.sha256()
    for file in sorted(_PACKAGE.rglob("*.py")):
        if file.relative_to(_PACKAGE).parts[0] not in _WEIGHTLESS:
            made.update(file.relative_to(_PACKAGE).as_posix().encode() + file.read_bytes())
    ours = f"{__version__}+{made.hexdigest()[:8]}"
    return f"rankwise {ours} torch {torch.__version__} transformers {transformers.__version__}"


def _digests(run: Run) -> dict[str, str]:
    where = Path(locate(run.model))
    model = digest(where) if where.exists() else str(config_of(run.model)._commit_hash)  # of the hub
    files = {name: getattr(run, name) for name in ("data", "validation", "base_text")}
    return {"model": model} | {name: digest(Path(path)) for name, path in files.items() if isinstance(path, str)}


def digest(path: Path) -> str:
    """SHA-256 of a file, or of the names and contents of a folder's files; "" where there is nothing."""
    files = sorted(file for file in path.rglob("*") if file.is_file()) if path.is_dir() else [path]
    known = [(file, file.stat()) for file in files if file.exists()]
    return _digest(path, tuple((file, facts.st_mtime_ns, facts.st_size) for file, facts in known)) if known else ""


@functools.lru_cache(256)
def _digest(root: Path, files: tuple[tuple[Path, int, int], ...]) -> str:
    made = hashlib.sha256()
    for file, _, size in files:
        made.update(f"{file.relative_to(root).as_posix()} {size}\n".encode())
        with file.open("rb") as handle:
            while block := handle.read(1 << 20):
                made.update(block)
    return made.hexdigest()
