"""``rankwise finetune``."""

from dataclasses import asdict
from typing import Annotated, Any

from typer import Argument, Option

from rankwise.cli import common
from rankwise.errors import DataError
from rankwise.hf.run import Run

DATA = "JSONL, CSV, Parquet, text or a folder of them; then changes to the run."


@common.settings()
def finetune(
    model: Annotated[str, Argument(metavar="MODEL|run.yaml", help=f"{common.MODEL} Or a run to repeat.")],
    rest: Annotated[list[str] | None, Argument(metavar="[DATA] [NAME=VALUE]...", help=DATA)] = None,
    resume: Annotated[bool, Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: common.Overwrite = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Show what would be trained; stop.")] = False,
    any_size: Annotated[bool, Option("--any-size", help="Start even where the plan says it does not fit.")] = False,
    as_json: common.Json = False,
    **given: Any,
) -> None:
    """Train an adapter on your data.

    rankwise finetune embedded notes.txt --out notes -m dora --rank 8

    rankwise finetune notes/run.yaml rank=32 out=notes-32

    Every option can also be given as NAME=VALUE.
    """
    from rankwise.cli import progress
    from rankwise.hf import finetune

    changes = common.only(given) | common.pairs(text for text in rest or () if "=" in text)
    run = _run(model, [text for text in rest or () if "=" not in text], changes, dry_run)
    display = progress.Display(any_size)
    if dry_run:
        common.show(as_json, *progress.plan(finetune.prepare(run, listener=display)))
        return
    result = finetune.finetune(run, listener=display, resume=resume, overwrite=overwrite)
    common.show(as_json, asdict(result), *progress.outcome(result))


def _run(model: str, data: list[str], changes: dict[str, Any], dry_run: bool) -> Run:
    if model.endswith((".yaml", ".yml")):
        if data:
            raise DataError(f"A run says its own data; change it with data={data[0]}.")
        return Run.read(model, changes)
    if len(data) != 1 or not ("out" in changes or dry_run):
        raise DataError(f"finetune takes MODEL, one DATA and --out DIR; found {len(data)} data arguments.")
    return Run.of({"model": model, "data": data[0], "out": "(dry run)", **changes})
