"""``rankwise merge``."""

from typing import Annotated, Any

from typer import Option

from rankwise.cli import common


def merge(
    model: common.ModelArg,
    adapter: common.AdapterArg,
    out: Annotated[str, Option(help="Folder for the merged model.")],
    dtype: Annotated[str, Option(help="Of the merged weights; stored: that of the base's file.")] = "stored",
    overwrite: common.Overwrite = False,
    as_json: common.Json = False,
) -> None:
    """Write an adapter into the weights: an ordinary model, checked against the adapted one."""
    import rankwise as rw
    from rankwise.cli import verify
    from rankwise.hf.models import load_model
    from rankwise.hf.prepare import task_of

    task = task_of(common.run_of(adapter, model=model))
    processor = task.processor(model)
    with verify.whole(out, overwrite) as folder:
        loaded: Any = task.model(model, None, processor, dtype=dtype)
        rw.load(loaded, adapter)
        wanted = verify.probe(loaded)
        report = rw.merge(loaded)
        loaded.save_pretrained(folder)
        processor.save_pretrained(folder)
        said = verify.difference(wanted, load_model(type(loaded), folder, dtype="stored"))
    found = {"out": out, "sites": [vars(site) for site in report.sites], "difference": said}
    common.show(as_json, found, str(report), said, f"{out} is an ordinary model folder")
