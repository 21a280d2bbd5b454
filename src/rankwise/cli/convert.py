"""``rankwise convert``."""

from __future__ import annotations

import shutil
from typing import Annotated

import typer

from rankwise.cli import common
from rankwise.errors import DataError


def convert(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder of the adapter.")],
    model: Annotated[str, typer.Option(help=common.MODEL)],
    out: Annotated[str, typer.Option(help="Folder for the converted adapter.")],
    to: Annotated[str | None, typer.Option(help="Another tool's format: peft.")] = None,
    origin: Annotated[str | None, typer.Option("--from", help="The format that ADAPTER has: peft.")] = None,
    rank: Annotated[int | None, typer.Option(help="Cut to this rank what the other tool does not have.")] = None,
    dtype: Annotated[str, typer.Option(help="Of the base, while checking.")] = "auto",
    overwrite: common.Overwrite = False,
    as_json: common.JsonFlag = False,
) -> None:
    """Translate an adapter to or from another tool's files, and check that outputs stay."""
    if (to is None) == (origin is None):
        raise DataError("convert takes one of --to peft and --from peft.")
    if (to or origin) != "peft":
        raise DataError(f"The formats of other tools here are: peft; found {to or origin}.")
    common.must_exist(adapter)
    common.quiet()
    from rankwise.attach import adapters, load
    from rankwise.cli import verify
    from rankwise.formats import export, peft
    from rankwise.hf.folder import claimed

    task, tokenizer = verify.task_for(model, adapter)
    with claimed(out, overwrite=overwrite) as folder:
        loaded = task.model(model, None, tokenizer, dtype=dtype)
        partial = folder / ".partial"
        shutil.rmtree(partial, ignore_errors=True)
        try:
            if origin is not None:
                peft.load(loaded, adapter).save(partial)
                said = [f"read {adapter}"]
            else:
                load(loaded, adapter)
                report = export(adapters(loaded)["default"], partial, to="peft", rank=rank)
                said = str(report).splitlines()
                said[0] = said[0].replace(str(partial), out)
            wanted = verify.probe(loaded)
            again = task.model(model, None, tokenizer, dtype=dtype)
            (load if origin is not None else peft.load)(again, partial)
            outcome = verify.difference(wanted, verify.probe(again), again)
            if rank is None:  # a cut to a rank is meant to differ, and says by how much
                verify.or_exit(outcome)
            for file in partial.iterdir():
                file.replace(folder / file.name)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    if as_json:
        common.print_json({"out": out, "report": said, "difference": vars(outcome)})
        return
    console = common.console()
    for line in [*said, str(outcome), f"written to {out}"]:
        console.print(line, markup=False, soft_wrap=True)
