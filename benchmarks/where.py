"""Where the time of a step goes: products, other kernels, and the rest, which is Python and dispatch.

``python -m benchmarks.where --hidden 256 --dtype fp32``. Kernels are those of torch's profiler, self time on the CPU,
the least of several steps; the rest is the least CPU time of a step without the profiler, less the kernels.
"""

import argparse
import warnings
from collections import defaultdict
from collections.abc import Callable
from dataclasses import asdict
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import models
from benchmarks.memory import silent
from benchmarks.models import Case
from benchmarks.paired import fixed_allocator, measure
from benchmarks.step_time import DTYPES, build

PRODUCTS = {"aten::mm", "aten::addmm", "aten::addmm_", "aten::bmm", "aten::baddbmm"}
STEPS = 8


def kernels(step: Callable[[], object]) -> dict[str, float]:
    """Milliseconds of products and of other kernels in a step."""
    found: list[dict[str, float]] = []
    for _ in range(5):
        with silent(), profile(activities=[ProfilerActivity.CPU]) as seen:
            for _ in range(STEPS):
                step()
        spent: dict[str, float] = defaultdict(float)
        for event in seen.key_averages():
            if event.key.startswith("aten::"):
                spent["products" if event.key in PRODUCTS else "others"] += event.self_cpu_time_total / 1e3 / STEPS
        found.append(spent)
    return {kind: min(spent[kind] for spent in found) for kind in ("products", "others")}


def where_cell(case: Case, method: str = "lora") -> dict[str, Any]:
    """Milliseconds of a step of every variant by what they are spent on."""
    torch.set_num_threads(1)
    given = models.batch(case)
    steps = {name: models.stepper(model, given) for name, model in build(case, [method], full=False).items()}
    whole = measure(steps, 31)
    rows = {}
    for name, step in steps.items():
        spent, least = kernels(step), 1e3 * min(whole.cpu[name])
        rows[name] = {"step": least, **spent, "rest": least - sum(spent.values())}
    return {"case": asdict(case), "rows": rows}


def run(quick: bool) -> list[dict[str, Any]]:
    """All cells; on one thread of a CPU, whatever the device."""
    if quick:
        return [where_cell(Case(128, layers=1))]
    return [where_cell(Case(hidden, dtype)) for hidden in (256, 512) for dtype in ("float32", "bfloat16")]


def main() -> None:
    """Print the table of one cell."""
    parser = argparse.ArgumentParser(prog="benchmarks.where", description=__doc__)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--method", default="lora")
    args = parser.parse_args()
    fixed_allocator()
    warnings.simplefilter("ignore")
    case = Case(args.hidden, DTYPES[args.dtype], layers=args.layers)
    print(f"{case}: milliseconds of CPU time, the least of each")
    print(f"{'':24}{'step':>10}{'products':>10}{'others':>10}{'rest':>10}")
    for name, spent in where_cell(case, args.method)["rows"].items():
        print(f"{name:24}" + "".join(f"{value:10.1f}" for value in spent.values()))


if __name__ == "__main__":
    main()
