"""What the commands share: options, output, values from text."""

import json
import os
import re
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, fields
from inspect import Parameter, Signature, signature
from pathlib import Path
from types import NoneType, UnionType
from typing import Annotated, Any, get_args, get_origin, get_type_hints

from typer import Argument, Option

from rankwise.errors import DataError, FileFormatError
from rankwise.hf.run import Run

MODEL = 'A folder that save_pretrained wrote, or "embedded" for the small model that comes along.'
ModelArg = Annotated[str, Argument(metavar="MODEL", help=MODEL)]
DATA = "JSONL, CSV, Parquet, text or a folder of them; then changes to the run."
RunArg = Annotated[str, Argument(metavar="MODEL|run.yaml", help=f"{MODEL} Or a run to repeat.")]
RunRest = Annotated[list[str] | None, Argument(metavar="[DATA] [NAME=VALUE]...", help=DATA)]
AdapterArg = Annotated[str, Argument(metavar="ADAPTER", help="Folder or file of an adapter.")]
Adapter = Annotated[str | None, Option(help="Folder or file of an adapter.")]
Overwrite = Annotated[bool, Option("--overwrite", help="Replace what is in --out.")]
Json = Annotated[bool, Option("--json", help="Print the result as JSON.")]
SHORT = {"method": "--method -m", "rank": "--rank -r", "options": "--option -o", "target": "--target -t"}


def settings(*names: str) -> Callable[[Any], Any]:
    """Give a command these settings of a run as options (by default all): kind, help and default are the run's own.

    The command takes them as ``**given``, each None where it was left out.
    """
    hints, told = get_type_hints(Run), dict(re.findall(r"^ +(\w+): (.+)$", Run.__doc__ or "", re.MULTILINE))
    chosen = names or hints.keys() - {"model", "data", "labels"}

    def option(name: str, default: Any) -> Parameter:
        kinds = {*(get_args(hints[name]) if isinstance(hints[name], UnionType) else [hints[name]])} - {NoneType}
        kind: Any = list[str] if get_origin(hints[name]) in (tuple, dict) else kinds.pop() if len(kinds) == 1 else str
        shown = str(default) if type(default) in (str, int, float) else False
        help_ = told[name][0].upper() + told[name][1:]
        made = Option(None, *SHORT.get(name, "").split(), help=help_, show_default=shown)
        return Parameter(name, Parameter.KEYWORD_ONLY, default=made, annotation=kind | None)

    def add(command: Any) -> Any:
        own = [p for p in signature(command).parameters.values() if p.kind is not Parameter.VAR_KEYWORD]
        command.__signature__ = Signature([*own, *(option(f.name, f.default) for f in fields(Run) if f.name in chosen)])
        return command

    return add


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
            raise DataError(
                f"A change to a run, and an argument of a method (-o), is written NAME=VALUE; found {text!r}. The "
                f"folder for the result is --out."
            )
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
    path = Path(adapter)
    if not path.exists():
        raise FileFormatError(f"There is no adapter at {adapter}.")
    file = (path if path.is_dir() else path.parent) / "run.yaml"
    return asdict(Run.read(file)) if file.is_file() else {}


def run_of(adapter: str | None, **given: Any) -> Run:
    """The run that made an adapter, with what is given in place of its own."""
    plain = {"data": "-", "out": "-", **told(adapter), "pack": False, "base_text": None}
    return Run.of({**plain, **only(given)})


def only(given: Mapping[str, Any]) -> dict[str, Any]:
    """The settings that were given, further options of the method as values."""
    found = {name: value for name, value in given.items() if value not in (None, [], ())}
    return found | ({"options": pairs(found["options"])} if "options" in found else {})


def asked(model: str, rest: Iterable[str], given: Mapping[str, Any], out: str | None = None, **defaults: Any) -> Run:
    """The run that a command line means: MODEL DATA [NAME=VALUE]..., or run.yaml [NAME=VALUE]...

    Args:
        model: the first argument.
        rest: the others.
        given: settings from options.
        out: how the folder is asked for, where the command needs one.
        **defaults: settings of a new run that the command has of its own.

    Returns:
        The run.

    Raises:
        DataError: no data or folder, or too much of it.
    """
    changes = only(given) | pairs(text for text in rest if "=" in text)
    data = [text for text in rest if "=" not in text]
    if model.endswith((".yaml", ".yml")):
        if data:
            raise DataError(f"A run says its own data; change it with data={data[0]}.")
        return Run.read(model, changes)
    if len(data) != 1 or (out and "out" not in changes):
        wanted = f"MODEL, one DATA and {out}" if out else "MODEL and one DATA"
        raise DataError(f"This command takes {wanted}; found {len(data)} data arguments.")
    return Run.of({"model": model, "data": data[0], "out": "-", **defaults, **changes})
