"""``rankwise convert``."""

from typing import Annotated

from typer import Option

from rankwise.cli import common
from rankwise.errors import DataError


def convert(
    adapter: common.AdapterArg,
    model: Annotated[str, Option(help=common.MODEL)],
    out: Annotated[str, Option(help="Folder for the converted adapter.")],
    to: Annotated[str | None, Option(help="Another tool's format: peft.")] = None,
    origin: Annotated[str | None, Option("--from", help="The format that ADAPTER has: peft.")] = None,
    rank: Annotated[
        int | None, Option(help="Truncate what the other tool has no method for to a LoRA of this rank.")
    ] = None,
    overwrite: common.Overwrite = False,
    as_json: common.Json = False,
) -> None:
    """Translate an adapter to or from another tool's files, and check that outputs stay."""
    if {to, origin} != {None, "peft"}:
        raise DataError("convert takes one of --to peft and --from peft.")
    import rankwise as rw
    from rankwise.cli import verify
    from rankwise.formats import peft
    from rankwise.hf.prepare import task_of

    task = task_of(common.run_of(adapter, model=model))
    processor = task.processor(model)
    read, read_again = (rw.load, peft.load) if to else (peft.load, rw.load)
    with verify.whole(out, overwrite) as folder:
        loaded, again = (task.model(model, None, processor) for _ in range(2))
        found = read(loaded, adapter)
        done = rw.export(found, folder, rank=rank) if to else found.save(folder)
        report = str(done).replace(str(folder), out)
        read_again(again, folder)
        said = verify.difference(verify.probe(loaded), again, exact=not getattr(done, "error", 0.0))
    common.show(as_json, {"out": out, "report": report, "difference": said}, report, said, f"written to {out}")
