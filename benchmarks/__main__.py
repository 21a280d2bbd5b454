"""Measure speed and memory: ``python -m benchmarks [--quick] [--only step,...] [--dtype float32] [--device cuda]``.

Writes OUT/results.json after every cell, and OUT/benchmarks.md with plots at the end. The page of the
manual is made from kept results: ``python -m benchmarks.report OUT/results.json``. A model of the shape
of Llama-3-8B on a GPU has a table of its own: ``python -m benchmarks.large``.
"""

import argparse
import json
import sys
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from benchmarks import criteria, life, memory, report, together, where
from benchmarks.models import Case
from benchmarks.paired import conditions, fixed_allocator
from benchmarks.step_time import show, step_cell

GROUPS = ("memory", "life", "together", "where", "compiled", "step")  # the longest last
DTYPES = ("float32", "bfloat16")
EVERY = (
    "lora", "rslora", "dora", "dora_again", "pissa", "adalora", "loha", "loha@8", "lokr", "hira", "oft", "oft_exact",
)  # fmt: skip
LEAST, ROUNDS = {256: 3, 512: 2, 1024: 2}, {256: 91}  # of LoRA by width: the overhead is a small share of little time
Cell = tuple[Case, dict[str, Any]]


def step_cells(quick: bool, long: bool, device: str, threads: list[int], dtypes: Sequence[str]) -> Iterator[Cell]:
    """The default cells: two hours on two cores; on a CPU one layer stands for four from 1024 up."""
    if quick:
        yield Case(256, dtypes[-1], layers=2, device=device), {"methods": ("lora", "dora"), "rounds": 7}
        return
    for n in threads:
        for dtype in dtypes:
            for hidden in (256, 512, 1024, 2048):
                layers = 1 if hidden > 512 and device == "cpu" else 4
                case = Case(hidden, dtype, threads=n, layers=layers, device=device)
                often = {"least": LEAST.get(hidden, 1), "rounds": ROUNDS.get(hidden, 61)}
                yield case, {"methods": ("lora",), "full": hidden == 256, **often}
                if dtype == "bfloat16" and hidden <= 512:
                    dropped = Case(hidden, dtype, dropout=0.05, threads=n, device=device)
                    yield dropped, {"methods": ("lora",), "least": 2}
            yield Case(256, dtype, threads=n, device=device), {"methods": EVERY, "least": 2}
            if n == threads[0]:
                for rank in (8, 64):
                    yield Case(256, dtype, rank, device=device), {"methods": ("lora",), "least": 2}
        if long:
            for hidden in (512, 1024):
                for dtype in dtypes:
                    yield Case(hidden, dtype, threads=n, layers=1024 // hidden, device=device), {"methods": EVERY}


def compiled_cells(quick: bool, device: str, threads: list[int], dtypes: Sequence[str]) -> Iterator[Cell]:
    """Two layers, to keep compilation short."""
    for n in threads:
        for dtype in dtypes[-1:] if quick else dtypes:
            case = Case(256, dtype, layers=2, threads=n, device=device)
            yield case, {"methods": ("lora",), "compile": True, "rounds": 7 if quick else 31, "least": 3}


def main() -> None:
    """Run the groups asked for."""
    parser = argparse.ArgumentParser(prog="benchmarks", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a few small cells in three minutes: does it run at all?")
    parser.add_argument("--long", action="store_true", help="every method at widths 512 and 1024 too")
    parser.add_argument("--only", default="", metavar="GROUP,...", help=f"of {', '.join(GROUPS)}")
    parser.add_argument("--dtype", choices=DTYPES, nargs="+", default=DTYPES, help="of steps; bfloat16 needs its unit")
    parser.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
    parser.add_argument("--threads", type=int, nargs="+", help="default: 1 2; with --quick or on a GPU: 1")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args()
    groups = args.only.split(",") if args.only else [g for g in GROUPS if not (args.quick and g == "compiled")]
    if unknown := set(groups) - set(GROUPS):
        parser.error(f"no group named {sorted(unknown)}; there are {', '.join(GROUPS)}")
    fixed_allocator()
    warnings.simplefilter("ignore")  # of transformers and PEFT, at every model

    args.out.mkdir(parents=True, exist_ok=True)
    threads = args.threads or ([1] if args.quick or args.device == "cuda" else [1, 2])
    words = [f"--{name}" for name in ("quick", "long") if getattr(args, name)]
    words += [f"--only {args.only}"] if args.only else []
    words += [f"--dtype {' '.join(args.dtype)}"] if args.dtype != DTYPES else []
    words += [f"--threads {' '.join(map(str, args.threads))}"] if args.threads else []
    words += [f"--device {args.device}"] if args.device != "cpu" else []
    results: dict[str, Any] = {"command": " ".join(["python -m benchmarks", *words]), **conditions(args.device)}

    def keep() -> None:
        (args.out / "results.json").write_text(json.dumps(results, indent=1) + "\n")

    cells = {
        "step": lambda: step_cells(args.quick, args.long, args.device, threads, args.dtype),
        "compiled": lambda: compiled_cells(args.quick, args.device, threads, args.dtype),
    }
    whole = {
        "memory": lambda: memory.run(args.quick, args.device),
        "life": lambda: life.run(args.quick, args.device),
        "together": lambda: together.run(args.quick, args.device, threads, args.dtype),
        "where": lambda: where.run(args.quick),
    }
    for group in groups:
        for case, how in cells[group]() if group in cells else ():
            row = step_cell(case, **how)
            results.setdefault(group, []).append(row)
            print(show(row, criteria.clock(row["case"])), end="\n\n", flush=True)
            keep()
        if group in whole:
            results[group] = whole[group]()
            keep()
    report.write(results, args.out / "benchmarks.md", args.out / "img")
    print(report.verdicts(results))
    print(f"written to {args.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
