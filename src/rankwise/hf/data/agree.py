"""What must agree: class names between rows and files, ids and lengths between data and model."""

from collections.abc import Sequence
from typing import Any

from rankwise.errors import DataError
from rankwise.hf.data.read import Row

Label = str | int


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
    rows, items = model.get_input_embeddings().weight.shape[0], examples.items if examples else ()
    used = [(int(item.input_ids.max()), item.row.where) for item in items]
    top, where = max([(tokenizer.pad_token_id or 0, "its padding token"), *used])
    spare = sum(i >= rows for i in tokenizer.get_added_vocab().values()) if items else 0
    if top >= rows or len(tokenizer) - spare > rows:
        found = f"it has {rows}, the tokenizer {len(tokenizer)} tokens ({where} uses number {top})"
        remedy = "use the model's own, or call model.resize_token_embeddings(len(tokenizer))"
        raise DataError(f"the model's embedding has a row for each token; {found}: {remedy}")
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    size, where = max(((len(item), item.row.where) for item in items), default=(0, ""))
    if context is not None and size > context:
        raise DataError(f"the model's context is {context}; {where} has {size} tokens: load with max_length=")
