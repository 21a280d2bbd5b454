"""``rankwise tune``."""

import sys
from dataclasses import asdict, fields
from pathlib import Path
from typing import Annotated, Any

from typer import Option

from rankwise.cli import common
from rankwise.hf.run import Run

SETTINGS = [f.name for f in fields(Run) if f.name not in ("model", "data", "out", "saves", "labels", "base_text")]
Rates = Annotated[int, Option(help="Learning rates to begin with.")]
Span = Annotated[float, Option(help="The highest rate over the lowest; the method's own lies in the middle.")]
Rungs = Annotated[str, Option(help="Lengths of the rungs, as shares of the run; half of the rates goes on.")]
Brackets = Annotated[int, Option(help="Times to do so; after the first, Optuna proposes the rates.")]
Refinements = Annotated[int, Option(help="Times to try the best rate's two neighbours, nearer each time.")]
TuneSeeds = Annotated[int, Option("--tune-seeds", help="Runs for each rate and rung.")]
LedgerFile = Annotated[Path, Option("--ledger", help="Where every run is kept; what it holds is not run again.")]
DryRun = Annotated[bool, Option("--dry-run", help="Show what would be run; stop.")]


@common.settings(*SETTINGS)
def tune(
    model: common.RunArg,
    rest: common.RunRest = None,
    rates: Rates = 4,
    span: Span = 64.0,
    rungs: Rungs = "0.25,0.5,1",
    brackets: Brackets = 1,
    refinements: Refinements = 1,
    tune_seeds: TuneSeeds = 1,
    ledger: LedgerFile = Path("ledger.jsonl"),
    write: Annotated[Path | None, Option(help="Write the run with the best rate there, for finetune.")] = None,
    dry_run: DryRun = False,
    as_json: common.Json = False,
    **given: Any,
) -> None:
    """Find the learning rate of a method on your model and data.

    rankwise tune embedded notes.txt -m dora --steps 200 --write dora.yaml

    rankwise finetune dora.yaml out=notes
    """
    from rankwise.select.ledger import Ledger
    from rankwise.select.tune import tune as find

    run = common.asked(model, rest or (), given)
    tuning = settings(rates, span, rungs, brackets, refinements, tune_seeds)
    if dry_run:
        common.show(as_json, {"runs": sum(tuning.runs().values()), "cost": tuning.cost()}, cost(tuning))
        return
    found = find(run, Ledger(ledger), tuning, lambda text: print(text, file=sys.stderr))
    if write is not None:
        found.run.write(write, f"the rate is the best of {len(found.trials)} trials, see {ledger}")
    rows = [(f"{t.lr:.3g}", f"{t.share:.0%}", f"{t.loss:.4f}") for t in found.trials]
    plain = {"lr": found.run.lr, "loss": found.loss, "edge": found.edge, "trials": [asdict(t) for t in found.trials]}
    note = "; it is an end of what was tried, so a better one may lie outside: give it as --lr" * found.edge
    best = f"the best rate is {found.run.lr:.3g}, loss {found.loss:.4f}{note}"
    common.show(as_json, plain, common.table(("rate", "of the run", "loss"), rows), best)


def settings(rates: int, span: float, rungs: str, brackets: int, refinements: int, seeds: int) -> Any:
    """How to tune, from options.

    Raises:
        DataError: values that make no tuning.
    """
    from rankwise.errors import DataError
    from rankwise.select.tune import Tuning

    try:
        shares = tuple(float(share) for share in rungs.split(","))
    except ValueError as error:
        raise DataError(f"Rungs are shares with commas between, such as 0.25,0.5,1; found {rungs!r}.") from error
    return Tuning(rates, span, shares, brackets, seeds, refinements=refinements)


def cost(tuning: Any) -> str:
    """What it takes to tune a method, in words."""
    runs, work = tuning.runs(), f"as much work as {tuning.cost():g} whole runs"
    rungs = ", ".join(f"{n} at {share:.0%}" for share, n in runs.items())
    return f"{sum(runs.values())} runs to tune a method ({rungs} of the length), {work}"
