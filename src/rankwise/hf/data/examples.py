"""Rows to examples: the loader, what becomes of long rows, and splits.

Legend: T tokens of an example.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import count
from pathlib import Path
from typing import Any

import numpy as np

from rankwise.errors import DataError
from rankwise.hf.data.agree import Label, number
from rankwise.hf.data.mask import Encoder, Tokens
from rankwise.hf.data.read import Row, read

IGNORE = -100  # the label that PyTorch's cross entropy leaves out

_ON_LONG = ("truncate", "split", "raise")


@dataclass(frozen=True, eq=False, slots=True)
class Example:
    """Tokens to learn from.

    Attributes:
        input_ids: (T,) int32.
        labels: (T,) int32, `IGNORE` where nothing is learned, always so at the first token, which
            nothing predicts; for classification the number of the class.
        row: Where the tokens come from.
        tokens: How many tokens there were before a long row was cut.
        cut: "truncate" or "split" if it was cut so, else "".
        part: 0, then 1, 2 ... for the further examples of one row.
    """

    input_ids: np.ndarray
    labels: np.ndarray | int
    row: Row
    tokens: int
    cut: str = ""
    part: int = 0

    def __len__(self) -> int:
        return len(self.input_ids)

    @property
    def learned(self) -> int:
        """How many tokens carry loss (for classification 1, the class)."""
        return 1 if isinstance(self.labels, int) else int((self.labels != IGNORE).sum())


@dataclass(frozen=True, eq=False)
class Examples(Sequence[dict[str, Any]]):
    """A data set for transformers' `Trainer`: an item is `{"input_ids": [...], "labels": ...}`.

    Attributes:
        items: The examples; `items[i].row.where` tells where the i-th comes from.
        schema: A key of `read.SCHEMAS`.
        label_names: For classification, the names by class number.
        skipped: Files of a folder that were passed over.
    """

    items: tuple[Example, ...]
    schema: str
    label_names: tuple[Label, ...] = ()
    skipped: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return replace(self, items=self.items[index])
        item = self.items[index]
        labels = item.labels if isinstance(item.labels, int) else item.labels.tolist()
        return {"input_ids": item.input_ids.tolist(), "labels": labels}


def load(
    path: str | Path,
    tokenizer: Any,
    *,
    max_length: int = 1024,
    on_long: str | None = None,
    schema: str | None = None,
    suffix: str | None = None,
    label_names: Sequence[Label] | None = None,
    template_kwargs: Mapping[str, Any] | None = None,
) -> Examples:
    """Read a file or folder as examples that a model can learn from.

    Args:
        path: See `read`.
        tokenizer: The model's own `transformers` tokenizer.
        max_length: The longest example, in tokens.
        on_long: What becomes of a longer row: "split" or "truncate" (see `fit`) or "raise". By
            default a text is split and everything else truncated. Pieces of a labelled text keep
            its label.
        schema: See `read`.
        suffix: See `read`.
        label_names: For validation data, the `label_names` of the training data.
        template_kwargs: Passed to the chat template (for example `{"enable_thinking": False}`).

    Returns:
        The examples, each with at least one token to learn.

    Raises:
        DataError: On anything that cannot be learned from as it is; see also `read`.
    """
    table = read(path, schema=schema, suffix=suffix)
    if table.schema == "preference":
        raise DataError(f"load() takes single answers; {path} has pairs: use read(path).dataset()")
    how = on_long or ("split" if table.schema == "text" else "truncate")
    if how not in _ON_LONG or max_length < 2:
        raise DataError(f"on_long is in {_ON_LONG}, max_length > 1; found {how!r}, {max_length}: mend")
    names, classes = number(table.rows, label_names) if table.schema == "label" else ((), None)
    encoder, items = Encoder(tokenizer, template_kwargs or {}), []
    for i, row in enumerate(table.rows):
        part = count()
        for tokens in encoder(row, table.schema):
            size = len(tokens.ids)
            cut = how if size > max_length else ""
            if cut == "raise":
                raise DataError(f"max_length is {max_length}; {row.where} has {size}: raise it")
            for piece in fit(tokens, max_length, how, tokenizer.bos_token_id):
                ids = np.array(piece.ids, dtype=np.int32)
                if classes is not None and tokens.ids[-1] in tokenizer.all_special_ids:
                    ids[-1] = tokens.ids[-1]  # a classifier's closing token survives a cut
                labels = np.where(piece.learn, ids, IGNORE).astype(np.int32)
                labels[0] = IGNORE
                target = labels if classes is None else classes[i]
                items.append(Example(ids, target, row, size, cut, next(part)))
    return Examples(tuple(items), table.schema, names, table.skipped)


def fit(tokens: Tokens, limit: int, how: str, bos: int | None = None) -> list[Tokens]:
    """Cut a row to pieces of at most `limit` tokens, none without something to learn.

    "split" cuts it into consecutive pieces, and drops those that are all context. "truncate" keeps
    the head; where learning starts behind that, as after a long prompt, it keeps the BOS, the end
    of the prompt and the answer, of a very long answer as much as half of the limit.

    Args:
        tokens: The row.
        limit: The longest piece.
        how: "split" or "truncate".
        bos: The token that opens a document, if there is one.

    Returns:
        The pieces.
    """
    ids, learn = tokens
    if len(ids) <= limit:
        return [tokens]
    if how == "split":
        starts = range(0, len(ids), limit)
        pieces = [Tokens(ids[s : s + limit], learn[s : s + limit]) for s in starts]
        return [piece for piece in pieces if any(piece.learn[1:])]
    if any(learn[1:limit]):
        return [Tokens(ids[:limit], learn[:limit])]
    first = learn.index(True, 1)
    last = len(learn) - learn[::-1].index(True)
    end = min(last, first + max(limit // 2, 1))
    kept = 1 if ids[0] == bos else 0
    start = end - limit + kept
    return [Tokens(ids[:kept] + ids[start:end], learn[:kept] + learn[start:end])]


def split(examples: Examples, validation: float = 0.1, seed: int = 0) -> tuple[Examples, Examples]:
    """Set a share of the rows aside; the examples of one row, and equal rows, stay together.

    Args:
        examples: What `load` returned.
        validation: The share of distinct rows to set aside, between 0 and 1.
        seed: Which ones.

    Returns:
        The examples for training and those for validation, each in file order.
    """
    distinct = sorted({item.row.text() for item in examples.items})
    if not 0 < validation < 1 or len(distinct) < 2:
        found = f"{validation} of {len(distinct)}"
        raise DataError(f"a split is 0 to 1 of two distinct rows or more; found {found}: mend that")
    random.Random(seed).shuffle(distinct)
    aside = set(distinct[: min(max(1, round(validation * len(distinct))), len(distinct) - 1)])
    train = tuple(item for item in examples.items if item.row.text() not in aside)
    held_out = tuple(item for item in examples.items if item.row.text() in aside)
    return replace(examples, items=train), replace(examples, items=held_out)
