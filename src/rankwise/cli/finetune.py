"""``rankwise finetune``."""

from dataclasses import asdict
from typing import Annotated, Any

from typer import Argument, Context, Option

from rankwise.cli import common
from rankwise.errors import DataError

DATA = "JSONL, CSV, Parquet, text or a folder of them; then changes to the run."
VALIDATION = "A file, or the share of rows to set aside; none for none. (default: 0.1)"


def finetune(
    context: Context,
    model: Annotated[str, Argument(metavar="MODEL|run.yaml", help=f"{common.MODEL} Or a run to repeat.")],
    rest: Annotated[list[str] | None, Argument(metavar="[DATA] [NAME=VALUE]...", help=DATA)] = None,
    out: Annotated[str | None, Option(help="Folder for adapter, metrics and run.yaml.")] = None,
    method: common.Method = None,
    structure: common.Structure = None,
    init: common.Init = None,
    solver: common.Solver = None,
    ranks: common.Ranks = None,
    rank: common.Rank = None,
    option: common.Options = None,
    target: common.Target = None,
    task: common.Task = None,
    base: common.Base = None,
    lr: Annotated[str | None, Option(help="Learning rate. (default: auto: the method's)")] = None,
    epochs: Annotated[float | None, Option(help="Passes over the data. (default: 3)")] = None,
    steps: Annotated[int | None, Option(help="Optimizer steps, in place of epochs.")] = None,
    batch: Annotated[int | None, Option(help="Examples a forward pass. (default: 8)")] = None,
    max_length: common.Length = None,
    validation: Annotated[str | None, Option(help=VALIDATION)] = None,
    base_text: Annotated[str | None, Option(help="Text of the base's own kind, to measure what it lost.")] = None,
    seed: Annotated[int | None, Option(help="Of everything drawn at random. (default: 0)")] = None,
    resume: Annotated[bool, Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: common.Overwrite = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Show what would be trained; stop.")] = False,
    any_size: Annotated[bool, Option("--any-size", help="Start even where the plan says it does not fit.")] = False,
    as_json: common.Json = False,
) -> None:
    """Train an adapter on your data.

    rankwise finetune embedded notes.txt --out notes -m dora --rank 8

    rankwise finetune notes/run.yaml rank=32 out=notes-32

    NAME=VALUE also sets accumulate, checkpointing, pack, schedule, saves and dtype.
    """
    from rankwise.cli import progress
    from rankwise.hf import finetune

    ours = ("model", "rest", "option", "resume", "overwrite", "dry_run", "any_size", "as_json")
    given = {name: value for name, value in context.params.items() if name not in ours and value not in (None, [], ())}
    given |= {"options": common.pairs(option)} if option else {}
    given |= {"validation": None} if validation == "none" else {}
    run = _run(model, rest or [], {"out": "(dry run)", **given} if dry_run else given)
    display = progress.Display(any_size)
    if dry_run:
        common.show(as_json, *progress.plan(finetune.prepare(run, listener=display)))
        return
    result = finetune.finetune(run, listener=display, resume=resume, overwrite=overwrite)
    common.show(as_json, asdict(result), *progress.outcome(result))


def _run(model: str, rest: list[str], given: dict[str, Any]) -> Any:
    from rankwise.hf.run import Run

    data = [text for text in rest if "=" not in text]
    given |= common.pairs(text for text in rest if "=" in text)
    if model.endswith((".yaml", ".yml")):
        if data:
            raise DataError(f"A run says its own data; change it with data={data[0]}.")
        return Run.read(model, given)
    if len(data) != 1 or "out" not in given:
        raise DataError(f"finetune takes MODEL, one DATA and --out DIR; found {len(data)} data arguments.")
    return Run.of({"model": model, "data": data[0], **given})
