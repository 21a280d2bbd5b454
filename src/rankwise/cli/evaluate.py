"""``rankwise evaluate``."""

from contextlib import nullcontext
from typing import Annotated, Any

from typer import Argument, Option

from rankwise.cli import common


@common.settings("task", "base", "max_length")
def evaluate(
    model: common.ModelArg,
    data: Annotated[str, Argument(metavar="DATA", help="A file or folder.")],
    adapter: common.Adapter = None,
    batch: Annotated[int, Option(help="Examples a forward pass.")] = 8,
    as_json: common.Json = False,
    **given: Any,
) -> None:
    """Measure a model on data, with and without an adapter; its run says the task and the base."""
    import rankwise as rw
    from rankwise.hf.prepare import scored, task_of

    run = common.run_of(adapter, model=model, data=data, **given)
    chosen = task_of(run)
    processor = chosen.processor(model)
    examples = chosen.examples(data, processor)
    loaded = chosen.model(model, examples, processor, base=run.base, dtype=run.dtype)
    after = None
    if adapter is not None:
        rw.load(loaded, adapter)
        after = scored(chosen, loaded, examples, processor, batch)
    with rw.disabled(loaded) if adapter else nullcontext():
        before = scored(chosen, loaded, examples, processor, batch)
    common.show(as_json, {"base": before, "adapted": after}, common.scores((data, before, after)))
