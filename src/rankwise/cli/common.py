"""What the commands share: options, consoles, values from text."""

from __future__ import annotations

import contextlib
import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, is_dataclass
from pathlib import Path
from typing import Annotated, Any

import typer

from rankwise.errors import DataError, FileFormatError

MODEL = 'A folder that save_pretrained wrote, or "embedded" for the small model that comes along.'
JsonFlag = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
ModelArg = Annotated[str, typer.Argument(metavar="MODEL", help=MODEL)]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace what is in --out.")]
Method = Annotated[
    str | None, typer.Option("--method", "-m", help="A method's name; see rankwise methods. (default: lora)")
]
Structure = Annotated[str | None, typer.Option(help="Its structure, in place of the method's.")]
Init = Annotated[str | None, typer.Option(help="Where the factors start.")]
Solver = Annotated[str | None, typer.Option(help="In which geometry a step is taken.")]
Ranks = Annotated[str | None, typer.Option(help="How rank changes in time.")]
Rank = Annotated[int | None, typer.Option("--rank", "-r", help="Rank. (default: the method's own)")]
Options = Annotated[
    list[str] | None, typer.Option("--option", "-o", metavar="NAME=VALUE", help="Another argument of the method.")
]
Targets = Annotated[
    list[str] | None, typer.Option("--target", "-t", help="A pattern of layers: q_proj, '*.mlp.*', attention.")
]


def quiet() -> None:
    """Keep libraries from drawing their own bars and notes on the terminal."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from transformers.utils import logging as theirs

    theirs.disable_progress_bar()
    theirs.set_verbosity_error()
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)


def console(stderr: bool = False) -> Any:
    """A rich console on stdout (results) or stderr (progress)."""
    from rich.console import Console

    made = Console(stderr=stderr, highlight=False)
    if not made.is_terminal and "COLUMNS" not in os.environ:
        made.width = 110  # a file is not 80 columns wide
    return made


def print_json(value: Any) -> None:
    """Print plain values as JSON on stdout."""

    def plain(other: Any) -> Any:
        return asdict(other) if is_dataclass(other) and not isinstance(other, type) else str(other)

    print(json.dumps(value, indent=2, default=plain, ensure_ascii=False))


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]], title: str | None = None) -> Any:
    """A plain table: text to the left, numbers to the right."""
    from rich import box
    from rich.table import Table

    body = [[str(cell) for cell in row] for row in rows]
    made = Table(box=box.SIMPLE_HEAD, title=title, title_justify="left", pad_edge=False)
    for i, name in enumerate(columns):
        cells = [row[i] for row in body if row[i]]
        number = bool(cells) and all(c[0].isdigit() or c[0] in "+-~" for c in cells)
        made.add_column(name, justify="right" if number else "left", no_wrap=number)
    for row in body:
        made.add_row(*row)
    return made


def pairs(texts: Iterable[str]) -> dict[str, Any]:
    """``["rank=32", "lr=1e-3"]`` as values, read as YAML reads them.

    Raises:
        DataError: a text without "=".
    """
    import yaml

    found = {}
    for text in texts:
        name, equals, value = text.partition("=")
        if not equals or not name:
            raise DataError(f"A change is written name=value; found {text!r}.")
        try:
            read = yaml.safe_load(value)
        except yaml.YAMLError as error:
            raise DataError(f"The value of {name} cannot be read: {value!r}.") from error
        if isinstance(read, str):  # YAML reads 1e-3 as text
            with contextlib.suppress(ValueError):
                read = float(read)
        found[name.replace("-", "_")] = read
    return found


def run_of(adapter: str | None) -> Mapping[str, Any]:
    """What run.yaml beside an adapter says, empty if there is none."""
    from rankwise.hf.run import Run

    path = Path(adapter or ".")
    file = (path if path.is_dir() else path.parent) / "run.yaml"
    return asdict(Run.read(file)) if adapter and file.is_file() else {}


def must_exist(adapter: str | None) -> None:
    """Refuse a missing adapter before anything slow happens.

    Raises:
        FileFormatError: there is no such file or folder.
    """
    if adapter is not None and not Path(adapter).exists():
        raise FileFormatError(f"There is no adapter at {adapter}.")


def size(count: float) -> str:
    """Bytes in words."""
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000 or unit == "GB":
            return f"{count:.0f} {unit}" if unit == "B" else f"{count:.1f} {unit}"
        count /= 1000
    raise AssertionError


def load_adapter(model: Any, adapter: str) -> Any:
    """Put a saved adapter on a model; what was loaded is said on stderr."""
    from rankwise.attach import load

    return load(model, adapter)
