"""A domain the embedded model has not seen: the Python source that comes with every Python.

Whole modules are held out, by the hash of their names: of every ten, two are for training, one for choosing the
learning rate and one for testing. A text is rows of LENGTH tokens (rows, LENGTH), and the number of its bytes.
"""

from __future__ import annotations

import hashlib
import sysconfig
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from rankwise import embedded
from rankwise.errors import DataError

LENGTH = 256
EVALUATED = 24  # rows


class Text(NamedTuple):
    """Tokens (rows, LENGTH) and how many bytes of UTF-8 they stand for."""

    tokens: Tensor
    bytes: int


def rows(text: str, tokenizer: Any, limit: int | None) -> Text:
    """A text in rows of LENGTH tokens, the first ``limit`` of them."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    count = min(limit or len(ids), len(ids) // LENGTH)
    ids = ids[: count * LENGTH]
    return Text(torch.tensor(ids).reshape(count, LENGTH), len(tokenizer.decode(ids).encode()))


def texts() -> dict[str, Text]:
    """Python to "train", choose ("valid") and "test" on, and held-out "english".

    Raises:
        DataError: this Python comes without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    modules = sorted(p for p in root.glob("*.py") if p.stat().st_size > 2000)
    if len(modules) < 40:
        raise DataError(
            f"The demo reads the standard library's own source; {root} holds {len(modules)} modules. Use a Python that "
            f"is installed with its sources."
        )
    parts: dict[str, list[str]] = {"train": [], "valid": [], "test": []}
    for path in modules:
        slot = hashlib.sha256(path.name.encode()).digest()[0] % 10
        name = {0: "test", 1: "valid", 2: "train", 3: "train"}.get(slot)
        if name is None:  # more than the demo reads in its few steps
            continue
        parts[name].append(path.read_text(encoding="utf-8", errors="replace"))
    _, tokenizer = embedded.load()
    limits = {"train": None, "valid": 16, "test": EVALUATED}
    found = {name: rows("\n".join(part), tokenizer, limits[name]) for name, part in parts.items()}
    english = (embedded.path() / "english_test.txt").read_text("utf-8")
    return {**found, "english": rows(english, tokenizer, EVALUATED)}
