"""``rankwise race``."""

import json
import re
import sys
from pathlib import Path
from statistics import fmean
from typing import Annotated, Any

from typer import Option

from rankwise.cli import common
from rankwise.cli import tune as tuning
from rankwise.cli.tune import SETTINGS

NOT_OURS = ("method", "structure", "init", "solver", "ranks", "options", "init_seed", "lr")


@common.settings(*(name for name in SETTINGS if name not in NOT_OURS), "saves", "base_text")
def race(
    model: common.RunArg,
    rest: common.RunRest = None,
    methods: Annotated[
        str,
        Option(
            "--methods", "-m", help='Names with commas between, options in brackets: "dora,relora(every=50)"; or "all".'
        ),
    ] = "dora,pissa",
    out: Annotated[Path, Option(help="Folder for race.json and race.png.")] = Path("race"),
    seeds: Annotated[int, Option(help="Final runs of each method.")] = 3,
    match: Annotated[str | None, Option(help="Make equal: params, seconds or bytes (of the adapter's file).")] = None,
    test: Annotated[str | None, Option(help="A file for the final losses.")] = None,
    noise: Annotated[float, Option(help="Train once more with such a share of wrong answers.")] = 0.0,
    shifted: Annotated[str | None, Option(help="A file of another domain to measure on.")] = None,
    merge4: Annotated[bool, Option("--merge4", help="Measure after merging and rounding to four bits.")] = False,
    rates: tuning.Rates = 4,
    span: tuning.Span = 64.0,
    rungs: tuning.Rungs = "0.25,0.5,1",
    brackets: tuning.Brackets = 1,
    refinements: tuning.Refinements = 1,
    tune_seeds: tuning.TuneSeeds = 1,
    ledger: tuning.LedgerFile = Path("ledger.jsonl"),
    dry_run: tuning.DryRun = False,
    as_json: common.Json = False,
    **given: Any,
) -> None:
    """Compare methods on your model and data, each tuned alike, against tuned LoRA.

    rankwise race embedded notes.txt --methods dora,pissa --steps 200 --seeds 5 --match params

    Differences are shares of what full fine-tuning gains; an interrupted race goes on where it was.
    """
    from rankwise.io import atomically
    from rankwise.methods import catalogue
    from rankwise.select.ledger import Ledger
    from rankwise.select.matching import sizes
    from rankwise.select.race import Checks, arms
    from rankwise.select.race import race as run_race

    run = common.asked(model, rest or (), given)
    how = tuning.settings(rates, span, rungs, brackets, refinements, tune_seeds)
    chosen = list(catalogue()) if methods == "all" else re.findall(r"[^,()]+(?:\([^()]*\))?", methods)
    if dry_run:
        found = {name: {"rank": one.rank or "", **sizes(one)} for name, one in arms(run, chosen, match).items()}
        rows = [(name, o["rank"], f"{o['params']:,}", common.size(o["bytes"])) for name, o in found.items()]
        finals = len(found) * seeds * (2 if noise else 1)
        shown = common.table(("method", "rank", "parameters", "file"), rows)
        common.show(as_json, found, shown, tuning.cost(how), f"{finals} final runs of {len(found)} methods")
        return
    made = run_race(
        run,
        chosen,
        Ledger(ledger),
        seeds=seeds,
        tuning=how,
        match=match,
        test=test,
        checks=Checks(noise, shifted, merge4),
        say=lambda text: print(text, file=sys.stderr),
    )
    plain = made.to_dict()
    atomically(out / "race.json", lambda path: path.write_text(json.dumps(plain, indent=1, ensure_ascii=False)))
    made.draw(out / "race.png")
    common.show(as_json, plain, *screen(made), f"{out / 'race.json'}, {out / 'race.png'}; every run is in {ledger}")


def screen(made: Any) -> tuple[Any, ...]:
    """A race as a table and a line."""
    checks = [name for name in ("noise", "shift", "forget", "merge4") if any(name in row.robust for row in made.rows)]
    rows = []
    for row in made.rows:
        v = row.verdict
        share = f"{v.difference:+.1%} [{v.low:+.1%}, {v.high:+.1%}]" if v else ""
        rate = f"{row.run.lr:.2g}{'*' * row.edge}"
        cells = (row.method, rate, f"{row.parameters:,}", common.size(row.bytes), f"{row.seconds:.3g}")
        extra = (f"{row.robust[name]:+.3f}" if name in row.robust else "" for name in checks)
        rows.append((*cells, f"{fmean(row.losses):.4f}", share, row.word, *extra))
    columns = ("method", "rate", "parameters", "file", "seconds", "loss", "better by", "verdict", *checks)
    edge = " A rate with * is an end of what was tried." if any(row.edge for row in made.rows) else ""
    return (
        common.table(columns, rows),
        f"Base {made.base:.4f}; full fine-tuning gains {made.gain:.4f} nats, the unit of the differences to tuned "
        f"LoRA; {len(made.seeds)} seeds, Holm-corrected.{edge}",
    )
