"""Paired timing: all variants in one process, a round of each in random order, medians of ratios.

Machines drift; a ratio inside one round drifts much less than a time. CPU time of the process is
reported beside wall time, and minor page faults with it, since the allocator alone can decide a
comparison (see ``fixed_allocator``).
"""

import json
import os
import platform
import random
import resource
import statistics
import sys
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from pathlib import Path

import torch

RESULTS = Path(__file__).parent / "results"
ALLOCATOR = {"MALLOC_TRIM_THRESHOLD_": "1073741824", "MALLOC_MMAP_THRESHOLD_": "1073741824"}


def fixed_allocator() -> None:
    """Start the process again with malloc's thresholds fixed (glibc reads them once, at start)."""
    if any(os.environ.get(key) != value for key, value in ALLOCATOR.items()):
        os.execve(sys.executable, [*sys.orig_argv], {**os.environ, **ALLOCATOR})


@dataclass
class Rounds:
    """Per variant: seconds of wall and CPU time and minor faults, one entry a round."""

    wall: dict[str, list[float]] = field(default_factory=dict)
    cpu: dict[str, list[float]] = field(default_factory=dict)
    faults: dict[str, list[int]] = field(default_factory=dict)


def measure(variants: Mapping[str, Callable[[], object]], rounds: int, warmup: int = 3) -> Rounds:
    """Time every variant once a round, in an order drawn anew each round."""
    out = Rounds(*({name: [] for name in variants} for _ in range(3)))
    order, shuffle = list(variants), random.Random(0)
    for step in range(warmup + rounds):
        shuffle.shuffle(order)
        for name in order:
            faults = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            wall, cpu = time.perf_counter(), time.process_time()
            variants[name]()
            wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
            if step >= warmup:
                out.wall[name].append(wall)
                out.cpu[name].append(cpu)
                now = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
                out.faults[name].append(now - faults)
    return out


def interval(
    statistic: Callable[[list[int]], float], n: int, draws: int = 2000, level: float = 0.95
) -> dict[str, float]:
    """A statistic of n rounds with its percentile bootstrap interval, rounds drawn as a whole."""
    rng = random.Random(0)
    values = sorted(statistic(rng.choices(range(n), k=n)) for _ in range(draws))
    tail = (1 - level) / 2
    return {
        "value": statistic(list(range(n))),
        "low": values[int(tail * draws)],
        "high": values[int((1 - tail) * draws) - 1],
    }


def ratio(times: dict[str, list[float]], over: str, under: str) -> dict[str, float]:
    """Median over rounds of time(over) / time(under)."""
    pairs = [a / b for a, b in zip(times[over], times[under], strict=True)]
    return interval(lambda rows: statistics.median(pairs[i] for i in rows), len(pairs))


def overhead(times: dict[str, list[float]], over: str, under: str, floor: str) -> dict[str, float]:
    """What ``over`` adds to the floor as a share of what ``under`` adds, from medians."""

    def share(rows: list[int]) -> float:
        a, b, c = (statistics.median(times[k][i] for i in rows) for k in (over, under, floor))
        return (a - c) / (b - c)

    return interval(share, len(times[floor]))


def conditions(*packages: str) -> dict[str, object]:
    """What a reader needs to judge the numbers."""
    return {
        "versions": {name: version(name) for name in packages},
        "python": platform.python_version(),
        "machine": platform.machine(),
        "cores": os.cpu_count(),
        "threads": torch.get_num_threads(),
        "allocator": {key: os.environ.get(key, "default") for key in ALLOCATOR},
    }


def write(name: str, result: Mapping[str, object]) -> Path:
    """Store a result as benchmarks/results/NAME.json."""
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}.json"
    path.write_text(json.dumps(result, indent=2) + "\n")
    return path
