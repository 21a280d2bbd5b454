"""What the commands share: options, output, values from text."""

import json
import os
import sys
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

from typer import Argument, Option

from rankwise.errors import DataError, FileFormatError

MODEL = 'A folder that save_pretrained wrote, or "embedded" for the small model that comes along.'
ModelArg = Annotated[str, Argument(metavar="MODEL", help=MODEL)]
AdapterArg = Annotated[str, Argument(metavar="ADAPTER", help="Folder or file of an adapter.")]
Adapter = Annotated[str | None, Option(help="Folder or file of an adapter.")]
Method = Annotated[str | None, Option("--method", "-m", help="A method's name; see rankwise methods. (default: lora)")]
Structure = Annotated[str | None, Option(help="Its structure, in place of the method's.")]
Init = Annotated[str | None, Option(help="Where the factors start.")]
Solver = Annotated[str | None, Option(help="In which geometry a step is taken.")]
Ranks = Annotated[str | None, Option(help="How rank changes in time.")]
Rank = Annotated[int | None, Option("--rank", "-r", help="Rank. (default: the method's own)")]
Options = Annotated[
    list[str] | None, Option("--option", "-o", metavar="NAME=VALUE", help="Another argument of the method.")
]
Target = Annotated[
    list[str] | None, Option("--target", "-t", help="A pattern of layers: q_proj, '*.mlp.*', attention.")
]
Task = Annotated[str | None, Option(help="causal-lm or classification.")]
Base = Annotated[str | None, Option(help="Quantise the frozen weights: nf4 or int8.")]
Length = Annotated[int | None, Option(help="Longest example in tokens. (default: the model's, at most 1024)")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace what is in --out.")]
Json = Annotated[bool, Option("--json", help="Print the result as JSON.")]


def console() -> Any:
    """Standard output by rich; a file is not 80 columns wide."""
    from rich.console import Console

    return Console(highlight=False, width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else 110)


def show(as_json: bool, found: Any, *parts: Any) -> None:
    """Print a result: plain values as JSON, or else the parts, which are lines and tables."""
    if as_json:
        print(json.dumps(found, indent=2, default=str, ensure_ascii=False))
        return
    for part in parts:
        console().print(part, markup=False, soft_wrap=isinstance(part, str))


def table(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> Any:
    """A plain table: text to the left, numbers to the right."""
    from rich.box import SIMPLE_HEAD
    from rich.table import Table

    made = Table(box=SIMPLE_HEAD, pad_edge=False)
    body = [[str(cell) for cell in row] for row in rows]
    for name, *cells in zip(columns, *body, strict=True):
        made.add_column(name, justify="right" if all(c[:1] in "+-0123456789" for c in cells) else "left")
    for row in body:
        made.add_row(*row)
    return made


def scores(*measured: tuple[str, Mapping[str, float] | None, Mapping[str, float] | None]) -> Any:
    """A table of what was measured where, before and after training, with the change."""
    rows = []
    for where, before, after in measured:
        for name, old in (before or {}).items():
            changed = (f"{after[name]:.4f}", f"{after[name] - old:+.4f}") if after else ("", "")
            rows.append((f"{where}: {name.replace('_', ' ')}", f"{old:.4f}", *changed))
    return table(("", "base", "adapted", "change"), rows)


def size(count: float) -> str:
    """Bytes in words."""
    return f"{count / 1e6:,.3g} MB"


def pairs(texts: Iterable[str] | None) -> dict[str, Any]:
    """``["rank=32", "lr=1e-3"]`` as values: what JSON reads, and text otherwise.

    Raises:
        DataError: a text without "=".
    """
    found: dict[str, Any] = {}
    for text in texts or ():
        name, equals, value = text.partition("=")
        if not (name and equals):
            raise DataError(f"A change is written name=value; found {text!r}.")
        found[name.replace("-", "_")] = value
        with suppress(ValueError):
            found[name.replace("-", "_")] = json.loads(value)
    return found


def told(adapter: str | None) -> dict[str, Any]:
    """What run.yaml beside an adapter says, empty if there is none.

    Raises:
        FileFormatError: there is no such adapter.
    """
    if adapter is None:
        return {}
    from rankwise.hf.run import Run

    path = Path(adapter)
    if not path.exists():
        raise FileFormatError(f"There is no adapter at {adapter}.")
    file = (path if path.is_dir() else path.parent) / "run.yaml"
    return asdict(Run.read(file)) if file.is_file() else {}


def run_of(adapter: str | None, **given: Any) -> Any:
    """The run that made an adapter, with what is given in place of its own."""
    from rankwise.hf.run import Run

    plain = {"data": "-", "out": "-", **told(adapter), "pack": False, "base_text": None}
    return Run.of({**plain, **{name: value for name, value in given.items() if value is not None}})
