"""``rankwise data``."""

from __future__ import annotations

from typing import Annotated

import typer

from rankwise.cli import common


def data(
    model: common.ModelArg,
    file: Annotated[str, typer.Argument(metavar="FILE", help="JSONL, CSV, Parquet, text, folder.")],
    validation: Annotated[str | None, typer.Option(help="Look its rows up among FILE's.")] = None,
    max_length: Annotated[int, typer.Option(help="Longest example, in tokens.")] = 1024,
    first: Annotated[int, typer.Option(help="Show so many examples.")] = 3,
    as_json: common.JsonFlag = False,
) -> None:
    """Show what of a data file is learned, and what is cut, repeated or skipped."""
    common.quiet()
    from rankwise.hf.data import load, render, report
    from rankwise.hf.models import tokenizer_of

    tokenizer = tokenizer_of(model)
    train = load(file, tokenizer, max_length=max_length)
    held = None
    if validation is not None:
        names = train.label_names or None
        held = load(validation, tokenizer, max_length=max_length, label_names=names)
    found = report(train, tokenizer, held, first=first)
    if as_json:
        common.print_json(found)
    else:
        render(found, common.console())
