"""``rankwise pretrain``."""

from dataclasses import asdict, replace
from tempfile import TemporaryDirectory
from typing import Annotated, Any

from typer import Argument, Option

from rankwise.cli import common

MODEL = "0.3M, 1M or 3M: a Llama of so many parameters; or a folder whose model is drawn anew. Or a run to repeat."


@common.settings()
def pretrain(
    model: Annotated[str, Argument(metavar="SIZE|MODEL|run.yaml", help=MODEL)],
    rest: common.RunRest = None,
    resume: Annotated[bool, Option("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: common.Overwrite = False,
    dry_run: Annotated[bool, Option("--dry-run", help="Show what would be trained; stop.")] = False,
    any_size: Annotated[bool, Option("--any-size", help="Start even where the plan says it does not fit.")] = False,
    as_json: common.Json = False,
    **given: Any,
) -> None:
    """Train a small model from random weights on a text, by any method.

    rankwise pretrain 1M text.txt --out small -m sltrain

    The fresh model lies in --out DIR/base, and what it learned is an adapter of it in DIR. By default the method is
    full, its rank a quarter of the width, and the text is packed into full rows.
    """
    from pathlib import Path

    from rankwise.cli import progress
    from rankwise.hf import finetune
    from rankwise.hf import pretrain as hf

    out = None if dry_run else "--out DIR"
    run = hf.settled(common.asked(model, rest or (), given, out, pack=True))
    display = progress.Display(any_size)
    if dry_run:
        with TemporaryDirectory() as folder:
            hf.fresh(run.model, Path(folder), run.seed)
            common.show(as_json, *progress.plan(finetune.prepare(replace(run, model=folder), listener=display)))
        return
    result = hf.pretrain(run, listener=display, resume=resume, overwrite=overwrite)
    common.show(as_json, asdict(result), *progress.outcome(result))
