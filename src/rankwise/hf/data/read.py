"""Files to rows: which files are read, what a row may hold, and where each row came from."""

import csv
import json
import re
import sys
from collections.abc import Iterator
from dataclasses import dataclass
from itertools import filterfalse
from pathlib import Path
from typing import Any

from rankwise.errors import DataError

# The columns that each schema needs; other columns may stand beside them and are ignored.
SCHEMAS: dict[str, set[str]] = {
    "preference": {"prompt", "chosen", "rejected"},
    "completion": {"prompt", "completion"},
    "messages": {"messages"},
    "label": {"text", "label"},
    "text": {"text"},
}


@dataclass(frozen=True, eq=False, slots=True)
class Row:
    """One row of a file, and the place where a person finds it again ("train.jsonl, line 3")."""

    fields: dict[str, Any]
    where: str

    def text(self) -> str:
        """Return what the row says, white space evened and no system prompt, for comparing rows."""
        words = []
        for key in ("text", "prompt", "completion", "messages"):
            value = self.fields.get(key) or ""
            if isinstance(value, list):
                value = "\n".join(str(m.get("content")) for m in value if m["role"] != "system")
            words += value.split()
        return " ".join(words)


@dataclass(frozen=True)
class Table:
    """The rows of a file or folder, all of one schema.

    Attributes:
        rows: The rows, in file order.
        schema: A key of `SCHEMAS`.
        skipped: Files of a folder that have another suffix.
    """

    rows: list[Row]
    schema: str
    skipped: tuple[str, ...] = ()

    def dataset(self) -> Any:
        """Return a `datasets.Dataset` of the schema's columns, as TRL's trainers take it."""
        from datasets import Dataset

        names = sorted(SCHEMAS[self.schema])
        return Dataset.from_list([{key: row.fields[key] for key in names} for row in self.rows])


def read(path: str | Path, *, schema: str | None = None, suffix: str | None = None) -> Table:
    """Read a file, or every readable file of a folder, as rows of one schema.

    `.jsonl` and `.csv` hold a row a line, `.parquet` a table; a `.txt` file is *one document*.
    Blank lines and blank documents are passed over, and so are hidden files of a folder.

    Args:
        path: A file, or a folder that is searched through all its levels.
        schema: A key of `SCHEMAS`; by default the columns tell.
        suffix: In a folder, read only files of this suffix; a file is read as if it had it. One
            without a format of its own (".py", ".md") is read as plain text, like ".txt".

    Returns:
        The rows, with the place that each came from.

    Raises:
        DataError: On a missing, empty or broken file, unknown or ambiguous columns, mixed schemas.
    """
    root, suffix = Path(path), f".{suffix.lstrip('.')}" if suffix else None
    rows, kinds = [], {}
    files, skipped = _files(root, suffix)
    for name in files:
        for row in _rows(root / name if root.is_dir() else root, name, suffix):
            kind = _schema(row, schema)
            kinds.setdefault(kind, row.where)
            if len(kinds) > 1:
                found = " and ".join(f"{where} is {kind!r}" for kind, where in kinds.items())
                raise DataError(f"rows have one schema; {found}: separate them, or pass schema=")
            for key in SCHEMAS[kind] - {"label"}:
                _check(row, key)
            rows.append(row)
    if not rows:
        raise DataError(f"data holds at least one row; {path} is empty: fill it, or pass another")
    return Table(rows, next(iter(kinds)), tuple(skipped))


def _files(root: Path, suffix: str | None) -> tuple[list[str], list[str]]:
    known = (suffix,) if suffix else tuple(_READERS)
    names = [file.relative_to(root).as_posix() for file in root.rglob("*") if file.is_file()]
    names = [root.name] if root.is_file() else sorted(filterfalse(_HIDDEN.search, names))
    files = [n for n in names if n.endswith(known) or (suffix and root.is_file())]
    if not files:
        found = f"at {str(root)!r} there is {', '.join(names[:5]) or 'nothing'}"
        remedy = "check the path, or pass suffix= to read other files as plain text"
        raise DataError(f"data ends in {', '.join(known)}; {found}: {remedy}")
    return files, sorted({*names} - {*files})


def _rows(file: Path, name: str, suffix: str | None) -> Iterator[Row]:
    place = "its start"
    try:
        for place, fields in _READERS.get(suffix or file.suffix, _plain)(file):
            if isinstance(fields, bytes):
                fields = json.loads(fields)
            if not isinstance(fields, dict):
                raise ValueError("it is no JSON object")
            yield Row(fields, f"{name}, {place}" if place else name)
    except (ValueError, csv.Error) as error:  # broken JSON, UTF-8, Parquet; broken CSV
        found = f"{name} breaks at or after {place} ({error})".replace("line 1 column", "column")
        raise DataError(f"a data file is whole, and UTF-8; {found}: mend it there") from error


def _plain(file: Path) -> Iterator[tuple[str, Any]]:
    text = file.read_text(encoding="utf-8-sig")
    if text.strip():
        yield "", {"text": text}


def _jsonl(file: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if line.strip():
            yield f"line {number}", line


def _csv(file: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(sys.maxsize)  # the default refuses documents above 128 KiB
    with file.open(newline="", encoding="utf-8-sig") as lines:
        reader = csv.DictReader(lines, strict=True)
        for fields in reader:
            if None in (*fields, *fields.values()):  # where DictReader puts what does not fit
                raise ValueError(f"line {reader.line_num} has other columns than the header")
            yield f"line {reader.line_num}", fields


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow.parquet import read_table

    for number, fields in enumerate(read_table(file).to_pylist(), 1):
        yield f"row {number}", fields


_READERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet, ".txt": _plain}
_HIDDEN = re.compile(r"(^|/)(\.|__pycache__/)")


def _schema(row: Row, wanted: str | None) -> str:
    have = set(row.fields)
    fits = [kind for kind, need in SCHEMAS.items() if need <= have and wanted in (None, kind)]
    best = [kind for kind in fits if not any(SCHEMAS[kind] < SCHEMAS[other] for other in fits)]
    if len(best) == 1:
        return best[0]
    known = ", ".join(f"{kind} ({' + '.join(sorted(SCHEMAS[kind]))})" for kind in SCHEMAS)
    fits = " and ".join(best) or f"not {wanted or 'one of them'}"
    found = f"{row.where} has {' + '.join(sorted(have))}, which is {fits}"
    raise DataError(f"columns tell one schema, {known}; {found}: rename them, or pass schema=")


def _check(row: Row, key: str) -> None:
    """Raise unless a column holds text or a conversation."""
    value = row.fields[key]
    empty, found = not value or str(value).isspace(), f"{row.where} has {value!r:.80}"
    if isinstance(value, list) and key != "text":
        if not all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value):
            raise DataError(f"a message has a 'role' and 'content'; {found}: rename its keys")
    elif key == "messages" or not isinstance(value, str):
        kind = "a list of messages" if key == "messages" else "text"
        raise DataError(f"{key!r} is {kind}; {found}: mend or remove it")
    if (empty and key != "prompt") or (key == "chosen" and value == row.fields["rejected"]):
        fault = f"{key!r} of {row.where} is {'empty' if empty else 'equal to the rejected'}"
        raise DataError(f"a row has something to learn; {fault}: mend or remove it")
