"""``rankwise finetune``."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated, Any

import typer

from rankwise.cli import common
from rankwise.errors import DataError

Opt = typer.Option


def finetune(
    model: Annotated[str, typer.Argument(metavar="MODEL|run.yaml", help=f"{common.MODEL} Or a run to repeat.")],
    rest: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="[DATA] [NAME=VALUE]...", help="JSONL, CSV, Parquet, text or a folder of them; changes to the run."
        ),
    ] = None,
    out: Annotated[str | None, Opt(help="Folder for adapter, metrics and run.yaml.")] = None,
    method: common.Method = None,
    structure: common.Structure = None,
    init: common.Init = None,
    solver: common.Solver = None,
    ranks: common.Ranks = None,
    rank: common.Rank = None,
    option: common.Options = None,
    target: common.Targets = None,
    task: Annotated[str | None, Opt(help="causal-lm or classification. (default: causal-lm)")] = None,
    base: Annotated[str | None, Opt(help="Quantise the frozen weights: nf4 or int8.")] = None,
    lr: Annotated[str | None, Opt(help="Learning rate. (default: auto: the method's)")] = None,
    epochs: Annotated[float | None, Opt(help="Passes over the data. (default: 3)")] = None,
    steps: Annotated[int | None, Opt(help="Optimizer steps, in place of epochs.")] = None,
    batch: Annotated[int | None, Opt(help="Examples a forward pass. (default: 8)")] = None,
    accumulate: Annotated[int | None, Opt(help="Forward passes an optimizer step. (default: 1)")] = None,
    max_length: Annotated[
        int | None, Opt(help="Longest example, in tokens. (default: the model's context, at most 1024)")
    ] = None,
    pack: Annotated[bool | None, Opt("--pack", help="Fill rows with several documents.")] = None,
    validation: Annotated[
        str | None, Opt(help="A file, or the share of rows to set aside; none for none. (default: 0.1)")
    ] = None,
    base_text: Annotated[str | None, Opt(help="Text of the base's own kind, to measure what it lost.")] = None,
    seed: Annotated[int | None, Opt(help="Of everything drawn at random. (default: 0)")] = None,
    resume: Annotated[bool, Opt("--resume", help="Go on from the last checkpoint.")] = False,
    overwrite: common.Overwrite = False,
    dry_run: Annotated[bool, Opt("--dry-run", help="Show what would be trained; stop.")] = False,
    as_json: common.JsonFlag = False,
) -> None:
    """Train an adapter on your data.

    rankwise finetune embedded notes.txt --out notes -m dora --rank 8

    rankwise finetune notes/run.yaml rank=32 out=notes-32
    """
    given = {
        "out": out, "method": method, "structure": structure, "init": init, "solver": solver,
        "ranks": ranks, "rank": rank, "target": target, "task": task, "base": base, "lr": lr,
        "epochs": epochs, "steps": steps, "batch": batch, "accumulate": accumulate,
        "max_length": max_length, "pack": pack, "base_text": base_text, "seed": seed,
    }  # fmt: skip
    given = {name: value for name, value in given.items() if value is not None}
    if option:
        given["options"] = common.pairs(option)
    if validation is not None:
        given["validation"] = None if validation in ("none", "0") else validation
    run = _run(model, rest or [], given, needs_out=not dry_run)
    common.quiet()
    from rankwise.cli.progress import Display, show_result
    from rankwise.hf.finetune import finetune as train
    from rankwise.hf.finetune import prepare

    display = Display(as_json)
    if dry_run:
        display.planned(prepare(run, listener=display), stdout=True)
        return
    result = train(run, listener=display, resume=resume, overwrite=overwrite)
    if as_json:
        common.print_json(asdict(result))
    else:
        show_result(result)


def _run(model: str, rest: list[str], given: dict[str, Any], needs_out: bool) -> Any:
    from rankwise.hf.run import Run

    changes = common.pairs(text for text in rest if "=" in text)
    data = [text for text in rest if "=" not in text]
    if not needs_out:
        changes.setdefault("out", given.get("out", "(dry run)"))
    if model.endswith((".yaml", ".yml")):
        if data:
            raise DataError(f"A run says its own data; change it with data={data[0]}.")
        return Run.read(model, {**given, **changes})
    if len(data) != 1:
        raise DataError(f"finetune takes MODEL and one DATA; found {len(data)} data arguments.")
    if needs_out and "out" not in {**given, **changes}:
        raise DataError("A run has a folder for its adapter; give --out DIR.")
    return Run.of({"model": model, "data": data[0], **given, **changes})
