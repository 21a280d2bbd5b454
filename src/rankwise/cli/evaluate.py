"""``rankwise evaluate``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rankwise.cli import common


def evaluate(
    model: common.ModelArg,
    data: Annotated[str, typer.Argument(metavar="DATA", help="A file or folder.")],
    adapter: Annotated[str | None, typer.Option(help="Folder or file of an adapter.")] = None,
    task: Annotated[
        str | None, typer.Option(help="causal-lm or classification. (default: that of the adapter's run)")
    ] = None,
    base: Annotated[str | None, typer.Option(help="Quantise the weights: nf4 or int8.")] = None,
    max_length: Annotated[int | None, typer.Option(help="Longest example, in tokens.")] = None,
    batch: Annotated[int, typer.Option(help="Examples a forward pass.")] = 8,
    as_json: common.JsonFlag = False,
) -> None:
    """Measure a model on data, with and without an adapter."""
    common.must_exist(adapter)
    common.quiet()
    from rankwise.attach import disabled
    from rankwise.cli.progress import scores_table
    from rankwise.hf.finetune import Run, scored, task_of

    told = {**common.run_of(adapter), "model": model, "data": data, "out": ".", "base_text": None}
    given = {"task": task, "base": base, "max_length": max_length}
    run = Run.of({**told, "pack": False, **{k: v for k, v in given.items() if v is not None}})
    chosen = task_of(run)
    processor = chosen.processor(model)
    examples = chosen.examples(data, processor)
    loaded: Any = chosen.model(model, examples, processor, base=run.base, dtype=run.dtype)
    if adapter is None:
        before, after = scored(chosen, loaded, examples, processor, batch), None
    else:
        common.load_adapter(loaded, adapter)
        with disabled(loaded):
            before = scored(chosen, loaded, examples, processor, batch)
        after = scored(chosen, loaded, examples, processor, batch)
    if as_json:
        common.print_json({"base": before, "adapted": after})
    elif after is not None:
        common.console().print(scores_table([(data, before, after)]))
    else:
        rows = [(key.replace("_", " "), f"{value:.4f}") for key, value in before.items()]
        common.console().print(common.table((data, "base"), rows))
