"""What a comparison of losses leaves out: noisy labels, another domain, a merge into four bits."""

from __future__ import annotations

import json
import random
import re
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rankwise.attachment import disabled
from rankwise.errors import DataError
from rankwise.hf import data
from rankwise.hf.prepare import Prepared, scored
from rankwise.io import atomically
from rankwise.lifecycle import merge
from rankwise.select.ledger import Measure, digest
from rankwise.weights import prepare

__all__ = ["measures", "merge4", "noisy", "shift"]


def measures(shifted: str | None = None, merged: bool = False) -> dict[str, Measure]:
    """Measures for :meth:`rankwise.select.Ledger.done`, by names that say all that decides their value."""
    found: dict[str, Measure] = {}
    if shifted is not None:
        found[f"shift {digest(Path(shifted))[:8]}"] = partial(shift, file=shifted)
    if merged:
        found["merge4"] = merge4
    return found


def shift(prepared: Prepared, file: str) -> float:
    """By how much training changed the loss (nats) on a file of another domain."""
    task, model, processor = prepared.task, prepared.model, prepared.processor
    examples = task.examples(file, processor)
    after = scored(task, model, examples, processor, prepared.run.batch)["loss"]
    with disabled(model):
        return after - scored(task, model, examples, processor, prepared.run.batch)["loss"]


def merge4(prepared: Prepared) -> float:
    """By how much the loss (nats) on the validation data rises when the adapter is merged and the whole becomes NF4."""
    task, model, processor, batch = prepared.task, prepared.model, prepared.processor, prepared.run.batch
    before = scored(task, model, prepared.validation, processor, batch)["loss"]
    merge(model)
    with TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        rounded: Any = task.model(folder, prepared.train, processor, base="nf4")
    prepare(rounded.modules())  # or bitsandbytes repacks it, with scales rounded to bfloat16
    return scored(task, rounded, prepared.validation, processor, batch)["loss"] - before


def noisy(file: str, share: float, seed: int, folder: Path) -> str:
    """A copy of training data with a share of wrong answers.

    Classes become other classes; completions and last messages change places with those of other rows; of a plain text,
    words change places within their row.

    Args:
        file: the data.
        share: of the rows (of a plain text, the words) that become wrong.
        seed: of the choice.
        folder: for the copy.

    Returns:
        The copy, a JSONL file.

    Raises:
        DataError: rows of another kind.
    """
    table, draw = data.read(file), random.Random(seed)
    rows = [dict(row.fields) for row in table.rows]
    chosen = draw.sample(range(len(rows)), round(share * len(rows)))
    around = list(zip(chosen, [*chosen[1:], *chosen[:1]], strict=True))
    if table.schema == "label":
        names = sorted({str(row["label"]): row["label"] for row in rows}.items())
        for i in chosen:
            rows[i]["label"] = draw.choice([value for _, value in names if value != rows[i]["label"]])
    elif table.schema == "completion":
        wrong = {i: rows[j]["completion"] for i, j in around}
        for i, text in wrong.items():
            rows[i]["completion"] = text
    elif table.schema == "messages":
        last = {i: rows[j]["messages"][-1]["content"] for i, j in around}
        for i, text in last.items():
            rows[i]["messages"] = [*rows[i]["messages"][:-1], {**rows[i]["messages"][-1], "content": text}]
    elif table.schema == "text":
        rows = [{"text": _shuffled(row["text"], share, draw)} for row in rows]
    else:
        raise DataError(f"Noise is known for labels, completions, messages and text; {file} holds {table.schema}.")
    copy = folder / f"noise-{digest(Path(file))[:8]}-{share:g}-{seed}.jsonl"
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    atomically(copy, lambda temporary: temporary.write_text(lines, encoding="utf-8"))
    return str(copy)


def _shuffled(text: str, share: float, draw: random.Random) -> str:
    parts = re.split(r"(\s+)", text)
    words = [i for i, part in enumerate(parts) if part.strip()]
    chosen = draw.sample(words, round(share * len(words)))
    for i, part in zip(chosen, [parts[j] for j in (*chosen[1:], *chosen[:1])], strict=True):
        parts[i] = part
    return "".join(parts)
