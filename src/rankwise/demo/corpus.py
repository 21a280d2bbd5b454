"""A domain the embedded model has not seen: the Python source that comes with every Python.

Whole modules are held out: of every twenty modules, by the hash of their names, one is for testing
and one for choosing the learning rate.
"""

from __future__ import annotations

import hashlib
import sysconfig
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rankwise.errors import DataError

LENGTH = 256


@dataclass(frozen=True)
class Text:
    """Tokens of a text in rows of LENGTH, and how many bytes each row stands for.

    Attributes:
        tokens: (rows, LENGTH).
        bytes: of UTF-8 text in all rows.
    """

    tokens: Tensor
    bytes: int


def modules() -> list[Path]:
    """Modules of the standard library of the running Python, in a fixed order.

    Raises:
        DataError: this Python comes without its sources.
    """
    root = Path(sysconfig.get_path("stdlib"))
    found = sorted(p for p in root.glob("*.py") if p.stat().st_size > 2000)
    if len(found) < 40:
        raise DataError(
            f"The demo reads the standard library's own source; {root} holds {len(found)} modules. "
            f"Use a Python that is installed with its sources."
        )
    return found


def split(paths: list[Path]) -> dict[str, list[Path]]:
    """Modules for "train", "valid" and "test", by the hash of their names."""
    parts: dict[str, list[Path]] = {"train": [], "valid": [], "test": []}
    for path in paths:
        slot = hashlib.sha256(path.name.encode()).digest()[0] % 10
        parts["test" if slot == 0 else "valid" if slot == 1 else "train"].append(path)
    return parts


def rows(text: str, tokenizer: Any, limit: int | None = None) -> Text:
    """A text in rows of LENGTH tokens, the first ``limit`` of them."""
    ids = tokenizer(text, add_special_tokens=False)["input_ids"]
    count = len(ids) // LENGTH if limit is None else min(limit, len(ids) // LENGTH)
    tokens = torch.tensor(ids[: count * LENGTH]).reshape(count, LENGTH)
    size = len(tokenizer.decode(ids[: count * LENGTH]).encode())
    return Text(tokens, size)


def python(tokenizer: Any, limits: dict[str, int | None]) -> dict[str, Text]:
    """The splits as tokens; ``limits`` caps the rows of each."""
    parts = split(modules())
    texts = {
        name: "\n".join(p.read_text(encoding="utf-8", errors="replace") for p in paths)
        for name, paths in parts.items()
    }
    return {name: rows(text, tokenizer, limits.get(name)) for name, text in texts.items()}
