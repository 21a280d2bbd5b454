"""Files to rows: which files are read, what a row may hold, and where each row came from."""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
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
        """Return what the row says, white space evened, for comparing rows."""
        values = [self.fields.get(key) or "" for key in ("text", "prompt", "completion", "messages")]
        said = [" ".join(str(m.get("content")) for m in v) if isinstance(v, list) else str(v) for v in values]
        return " ".join(" ".join(said).split())


@dataclass(frozen=True)
class Table:
    """The rows of a file or folder, all of one schema.

    Attributes:
        rows: The rows, in file order.
        schema: A key of `SCHEMAS`.
        skipped: Files of a folder that have another suffix than those of data.
    """

    rows: list[Row]
    schema: str
    skipped: tuple[str, ...] = ()

    def dataset(self) -> Any:
        """Return a `datasets.Dataset` of the schema's columns, as TRL's trainers take it."""
        from datasets import Dataset

        return Dataset.from_list([{key: row.fields[key] for key in sorted(SCHEMAS[self.schema])} for row in self.rows])


def read(path: str | Path, *, schema: str | None = None) -> Table:
    """Read a file, or every readable file of a folder, as rows of one schema.

    `.jsonl` and `.csv` hold a row a line, `.parquet` a table; a `.txt` file is *one document*.
    Blank lines are passed over, and so are hidden files of a folder.

    Args:
        path: A file, or a folder that is searched through all its levels.
        schema: A key of `SCHEMAS`; by default the columns tell.

    Returns:
        The rows, with the place that each came from.

    Raises:
        DataError: On a missing, empty or broken file, unknown or ambiguous columns, mixed schemas.
    """
    files = _files(Path(path))
    skipped = tuple(name for name, file in files.items() if file.suffix not in _READERS)
    if len(skipped) == len(files):
        found = f"at {str(path)!r} there is {', '.join(skipped[:5]) or 'nothing'}"
        raise DataError(f"data ends in {', '.join(_READERS)}; {found}: check the path, or rename plain text to .txt")
    rows = [row for name, file in files.items() if name not in skipped for row in _rows(name, file)]
    if not rows:
        raise DataError(f"data holds at least one row; {path} is empty: fill it, or pass another")
    kinds = {_schema(row, schema): row.where for row in rows}
    if len(kinds) > 1:
        found = " and ".join(f"{where} is {kind!r}" for kind, where in kinds.items())
        raise DataError(f"rows have one schema; {found}: separate them, or pass schema=")
    (kind,) = kinds
    for row in rows:
        for key in SCHEMAS[kind] - {"label"}:
            _check(row, key)
    return Table(rows, kind, skipped)


def _files(root: Path) -> dict[str, Path]:
    """Files by the name that errors give them: one, or those of a folder that are not hidden."""
    if root.is_file():
        return {root.name: root}
    inside = {file.relative_to(root).as_posix(): file for file in sorted(root.rglob("*")) if file.is_file()}
    return {name: file for name, file in inside.items() if "/." not in f"/{name}"}


def _rows(name: str, file: Path) -> Iterator[Row]:
    place = "its start"
    try:
        for place, fields in _READERS[file.suffix](file):
            fields = json.loads(fields) if isinstance(fields, bytes) else fields
            if not isinstance(fields, dict):
                raise ValueError("it is no JSON object")
            yield Row(fields, f"{name}, {place}" if place else name)
    except (ValueError, csv.Error) as error:  # broken JSON, UTF-8, Parquet; broken CSV
        found = f"{name} breaks at or after {place} ({error})".replace("line 1 column", "column")
        raise DataError(f"a data file is whole, and UTF-8; {found}: mend it there") from error


def _plain(file: Path) -> Iterator[tuple[str, Any]]:
    yield "", {"text": file.read_text(encoding="utf-8-sig")}


def _jsonl(file: Path) -> Iterator[tuple[str, Any]]:
    for number, line in enumerate(file.read_bytes().splitlines(), 1):
        if line.strip():
            yield f"line {number}", line


def _csv(file: Path) -> Iterator[tuple[str, Any]]:
    csv.field_size_limit(2**31 - 1)  # the default refuses documents above 128 KiB
    with file.open(newline="", encoding="utf-8-sig") as lines:
        reader = csv.DictReader(lines, strict=True)
        for fields in reader:
            if None in (*fields, *fields.values()):  # where DictReader puts what does not fit
                raise ValueError(f"line {reader.line_num} has other columns than the header")
            yield f"line {reader.line_num}", fields


def _parquet(file: Path) -> Iterator[tuple[str, Any]]:
    from pyarrow.parquet import read_table

    return ((f"row {number}", fields) for number, fields in enumerate(read_table(file).to_pylist(), 1))


_READERS = {".jsonl": _jsonl, ".csv": _csv, ".parquet": _parquet, ".txt": _plain}


def _schema(row: Row, wanted: str | None) -> str:
    fits = [kind for kind, need in SCHEMAS.items() if need <= row.fields.keys() and wanted in (None, kind)]
    best = [kind for kind in fits if not any(SCHEMAS[kind] < SCHEMAS[other] for other in fits)]
    if len(best) == 1:
        return best[0]
    known = ", ".join(f"{kind} ({' + '.join(sorted(need))})" for kind, need in SCHEMAS.items())
    which = " and ".join(best) or f"not {wanted or 'one of them'}"
    found = f"{row.where} has {' + '.join(sorted(row.fields))}, which is {which}"
    raise DataError(f"columns tell one schema, {known}; {found}: rename them, or pass schema=")


def _check(row: Row, key: str) -> None:
    """Raise unless a column holds text or a conversation."""
    value, kind, good = row.fields[key], "text", isinstance(row.fields[key], str)
    if key == "messages" or (key != "text" and isinstance(value, list)):
        kind = "a list of messages, each with a 'role' and 'content'"
        good = isinstance(value, list) and all(isinstance(m, dict) and isinstance(m.get("role"), str) for m in value)
    if not good:
        raise DataError(f"{key!r} is {kind}; {row.where} has {value!r:.80}: mend or remove it")
    if key != "prompt" and (not value or str(value).isspace() or (key == "chosen" and value == row.fields["rejected"])):
        raise DataError(f"a row teaches; {key!r} of {row.where} is empty, or equal to the rejected: mend or remove it")
