"""``rankwise merge``."""

from __future__ import annotations

import contextlib
import io
import shutil
from typing import Annotated, Any

import typer

from rankwise.cli import common


def merge(
    model: common.ModelArg,
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder or file.")],
    out: Annotated[str, typer.Option(help="Folder for the merged model.")],
    dtype: Annotated[
        str, typer.Option(help='Of the merged weights; "stored" for that of the base\'s file.')
    ] = "stored",
    overwrite: common.Overwrite = False,
    as_json: common.JsonFlag = False,
) -> None:
    """Write an adapter into the weights: an ordinary model, checked against the adapted one."""
    common.must_exist(adapter)
    common.quiet()
    from rankwise.cli import verify
    from rankwise.hf.folder import claimed
    from rankwise.hf.models import load_model
    from rankwise.lifecycle import merge as merged_into

    task, tokenizer = verify.task_for(model, adapter)
    with claimed(out, overwrite=overwrite) as folder:
        exact = task.model(model, None, tokenizer)
        common.load_adapter(exact, adapter)
        wanted = verify.probe(exact)
        del exact
        loaded: Any = task.model(model, None, tokenizer, dtype=dtype)
        with contextlib.redirect_stderr(io.StringIO()):  # it was said once
            common.load_adapter(loaded, adapter)
        report = merged_into(loaded)
        partial = folder / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            loaded.save_pretrained(partial)
            tokenizer.save_pretrained(partial)
            again = load_model(type(loaded), partial)
            outcome = verify.difference(wanted, verify.probe(again), loaded)
            verify.or_exit(outcome)
            for file in partial.iterdir():
                file.replace(folder / file.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    if as_json:
        found = {"out": out, "sites": [vars(s) for s in report.sites], "difference": vars(outcome)}
        common.print_json(found)
        return
    console = common.console()
    console.print(str(report), soft_wrap=True)
    console.print(str(outcome), soft_wrap=True)
    console.print(f"[bold]{out}[/] is an ordinary model folder", soft_wrap=True)
