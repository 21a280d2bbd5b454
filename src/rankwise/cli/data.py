"""``rankwise data``."""

from typing import Annotated

from typer import Argument, Option

from rankwise.cli import common


def data(
    model: common.ModelArg,
    file: Annotated[str, Argument(metavar="FILE", help="JSONL, CSV, Parquet, text, folder.")],
    validation: Annotated[str | None, Option(help="Look its rows up among FILE's.")] = None,
    max_length: Annotated[int, Option(help="Longest example, in tokens.")] = 1024,
    first: Annotated[int, Option(help="Show so many examples.")] = 3,
    as_json: common.Json = False,
) -> None:
    """Show what of a data file is learned, and what is cut, repeated or skipped."""
    from rankwise.hf import data
    from rankwise.hf.models import tokenizer_of

    tokenizer = tokenizer_of(model)
    train = data.load(file, tokenizer, max_length=max_length)
    names = train.label_names or None
    held = data.load(validation, tokenizer, max_length=max_length, label_names=names) if validation else None
    found = data.report(train, tokenizer, held, first=first)
    if as_json:
        common.show(True, found)
    else:
        data.render(found, common.console())
