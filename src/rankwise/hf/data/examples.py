"""Rows to examples: the loader, class numbers, what becomes of long rows, splits, and what must agree with a model.

Legend: T tokens of an example.
"""

import random
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from rankwise.errors import DataError
from rankwise.hf.data.mask import Encoder
from rankwise.hf.data.read import Row, read

IGNORE = -100  # the label that PyTorch's cross entropy leaves out
Label = str | int


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
    """

    input_ids: np.ndarray
    labels: np.ndarray | int
    row: Row
    tokens: int
    cut: str = ""

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
        label_names: For validation data, the `label_names` of the training data.
        template_kwargs: Passed to the chat template (for example `{"enable_thinking": False}`).

    Returns:
        The examples, each with at least one token to learn.

    Raises:
        DataError: On anything that cannot be learned from as it is; see also `read`.
    """
    table = read(path, schema=schema)
    if table.schema == "preference":
        raise DataError(f"load() takes single answers; {path} has pairs: use read(path).dataset()")
    how = on_long or ("split" if table.schema == "text" else "truncate")
    if how not in ("truncate", "split", "raise") or max_length < 2:
        raise DataError(f"on_long is truncate, split or raise, max_length > 1; found {how!r}, {max_length}: mend")
    names, classes = number(table.rows, label_names) if table.schema == "label" else ((), [])
    encoder, items = Encoder(tokenizer, template_kwargs or {}), []
    for i, row in enumerate(table.rows):
        for ids, learn in encoder(row, table.schema):
            cut = how if len(ids) > max_length else ""
            if cut == "raise":
                raise DataError(f"max_length is {max_length}; {row.where} has {len(ids)}: raise it")
            for kept in fit(learn, max_length, cut, int(ids[0] == tokenizer.bos_token_id)):
                if classes and ids[-1] in tokenizer.all_special_ids:
                    kept[-1] = len(ids) - 1  # a classifier's closing token survives a cut
                labels = np.where(learn, ids, IGNORE)[kept]
                labels[0] = IGNORE
                items.append(Example(ids[kept], classes[i] if classes else labels, row, len(ids), cut))
    return Examples(tuple(items), table.schema, names, table.skipped)


def fit(learn: np.ndarray, limit: int, cut: str, bos: int) -> list[np.ndarray]:
    """Cut a row to pieces of at most `limit` tokens, none without something to learn.

    "split" cuts it into consecutive pieces, and drops those that are all context. "truncate" keeps
    the head; where learning starts behind that, as after a long prompt, it keeps the BOS, the end
    of the prompt and the answer, of a very long answer as much as half of the limit.

    Args:
        learn: (T,) bool, which tokens of the row are learned.
        limit: The longest piece.
        cut: "split", "truncate", or "" for a row that is short enough.
        bos: How many tokens open the document: 0 or 1.

    Returns:
        For each piece the positions of its tokens in the row.
    """
    every = np.arange(len(learn))
    if not cut:
        return [every]
    if cut == "split":
        return [piece for piece in np.split(every, range(limit, len(every), limit)) if learn[piece[1:]].any()]
    if learn[1:limit].any():
        return [every[:limit]]
    first, last = 1 + np.flatnonzero(learn[1:])[[0, -1]]
    end = min(last + 1, first + limit // 2)
    return [np.concatenate([every[:bos], every[end - limit + bos : end]])]


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
        raise DataError(f"a split is 0 to 1 of two distinct rows; found {validation} of {len(distinct)}: mend that")
    random.Random(seed).shuffle(distinct)
    aside = set(distinct[: min(max(1, round(validation * len(distinct))), len(distinct) - 1)])

    def part(held: bool) -> Examples:
        return replace(examples, items=tuple(e for e in examples.items if (e.row.text() in aside) == held))

    return part(False), part(True)


def number(rows: Sequence[Row], names: Sequence[Label] | None = None) -> tuple[tuple[Label, ...], list[int]]:
    """Number the classes of labelled rows.

    Args:
        rows: Rows with a "label": all text, all integers or all booleans.
        names: The class names by number; by default those of the rows, sorted.

    Returns:
        The names, and each row's number.

    Raises:
        DataError: On a missing label, labels of mixed types, and labels that `names` lacks.
    """
    labels = [_label(row) for row in rows]
    kinds = {type(label): row.where for label, row in zip(labels, rows, strict=True)}
    if len(kinds) > 1:
        found = " and ".join(f"{kind.__name__} ({where})" for kind, where in kinds.items())
        raise DataError(f"labels are all of one type; found {found}: write them alike")
    known = tuple(sorted(set(labels)) if names is None else names)
    index = {repr(name): i for i, name in enumerate(known)}  # by repr: True is not 1, nor "1"
    unseen = [f"{label!r} ({row.where})" for label, row in zip(labels, rows, strict=True) if repr(label) not in index]
    if unseen:
        raise DataError(f"labels are of the training data's {known}; found {', '.join(unseen[:9])}: correct them")
    return known, [index[repr(label)] for label in labels]


def _label(row: Row) -> Label:
    value = row.fields["label"]
    if isinstance(value, float) and value.is_integer():  # pandas makes floats of gappy integers
        value = int(value)
    if not isinstance(value, str | int) or str(value).strip().lower() in ("", "nan"):
        raise DataError(f"a label is text or an integer; {row.where} has {value!r}: fill it in")
    return value


def check_model(tokenizer: Any, model: Any, examples: Any = None) -> None:
    """Raise unless the model has a row for each id and a position for each token.

    Some stock tokenizers know more special tokens than their model has rows (Gemma-3's image token,
    in the text model): given `examples`, such a token is refused only if it is used.

    Args:
        tokenizer: The tokenizer that made the ids.
        model: A `transformers` model.
        examples: What `load` returned.

    Raises:
        DataError: Where they differ.
    """
    items = examples.items if examples else ()
    try:
        rows = model.get_input_embeddings().weight.shape[0]
    except NotImplementedError:  # CANINE's, of hashed characters
        rows = float("inf")
    used = [(int(item.input_ids.max()), item.row.where) for item in items]
    top, where = max([(tokenizer.pad_token_id or 0, "its padding token"), *used])
    spare = sum(i >= rows for i in tokenizer.get_added_vocab().values()) if items else 0
    if top >= rows or len(tokenizer) - spare > rows:
        found = f"it has {rows}, the tokenizer {len(tokenizer)} ({where} uses number {top})"
        raise DataError(f"embeddings have a row a token; {found}: take the model's own, or resize_token_embeddings")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    size, where = max(((len(item), item.row.where) for item in items), default=(0, ""))
    if context is not None and size > context:
        raise DataError(f"the model's context is {context}; {where} has {size} tokens: load with max_length=")
