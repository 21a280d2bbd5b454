"""The rest of an adapter's life: attach, switch, optimiser step, merge, save, load, file size, import."""

import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from dataclasses import asdict, replace
from io import StringIO
from itertools import cycle
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

import rankwise as rw
from benchmarks import models
from benchmarks.models import Case
from benchmarks.paired import Interval, Rounds, interval, measure, median, quiet, ratio

Timed = Callable[[], object]


def rows(seen: Rounds, against: dict[str, str] | None = None) -> dict[str, Any]:
    """Seconds of every variant by both clocks, and ratios of those that have a counterpart."""
    found: dict[str, Any] = {"cpu_over_wall": quiet(seen), "rounds": len(next(iter(seen.cpu.values())))}
    for clock in ("cpu", "wall"):
        times: dict[str, list[float]] = getattr(seen, clock)
        found[clock] = {name: {"seconds": median(own)} for name, own in times.items()}
        for name, other in (against or {}).items():
            found[clock][name][f"over {other}"] = ratio(times[name], times[other])
    return found


class Stack(nn.Module):
    """Many equal linear layers."""

    def __init__(self, sites: int, width: int) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(width, width, bias=False) for _ in range(sites))


def attach(case: Case, rounds: int, sites: int) -> dict[str, Any]:
    """Attach to the Llama (also with PiSSA's start) and to many sites; the factors' first values are drawn."""
    base = models.llama(case)
    stack = Stack(sites, 256)

    def ours(name: str) -> Callable[[], Timed]:
        def prepare() -> Timed:
            model, recipe = models.twin(base), models.recipe(case, name)
            return lambda: rw.attach(model, recipe)

        return prepare

    def theirs(name: str) -> Callable[[], Timed]:
        def prepare() -> Timed:
            model = models.full(base).requires_grad_(False)
            config = models.METHODS[name].config(case.rank, 0.0)
            return lambda: peft.get_peft_model(model, config)

        return prepare

    def many(library: str) -> Callable[[], Timed]:
        def prepare() -> Timed:
            model = models.twin(stack)
            if library == "rankwise":
                recipe = rw.recipe("lora", rank=case.rank, sites=rw.Sites("layers.*"))
                return lambda: rw.attach(model, recipe)
            config = peft.LoraConfig(r=case.rank, target_modules=r"layers\.\d+")
            return lambda: peft.get_peft_model(model, config)

        return prepare

    found = {}
    for method in ("lora", "pissa"):
        found |= {f"rankwise {method}": ours(method), f"peft {method}": theirs(method)}
    found |= {f"{library} {sites} sites": many(library) for library in ("rankwise", "peft")}
    seen = measure(found, rounds, warmup=1, fresh=True)
    return rows(seen, {name: name.replace("rankwise", "peft") for name in found if "rankwise" in name})


def switch(rounds: int, counts: tuple[int, ...]) -> dict[str, Any]:
    """Change the active adapter with 1, 10, 100 attached; and a forward with that many, one active."""
    case = Case(64, layers=2, tokens=8, batch=1, rank=4)
    base, given = models.llama(case), models.batch(case)
    found: dict[str, Timed] = {}
    forward: dict[str, Timed] = {}
    for count in counts:
        model = models.twin(base)
        for i in range(count):
            rw.attach(model, models.recipe(case, "lora"), f"a{i}")
        names = cycle(["a0", f"a{count - 1}"])
        found[f"rankwise {count}"] = lambda model=model, names=names: rw.set_active(model, next(names))
        forward[f"rankwise forward {count}"] = lambda model=model: models.forward(model, given)
    least, most = counts[0], counts[-1]
    out = rows(measure(found, rounds, each=200), {f"rankwise {most}": f"rankwise {least}"})
    more = rows(measure(forward, rounds, each=5), {f"rankwise forward {most}": f"rankwise forward {least}"})
    return {**out, **{clock: out[clock] | more[clock] for clock in ("cpu", "wall")}}


def optimizer(case: Case, rounds: int) -> dict[str, Any]:
    """A step of the optimiser alone, with gradients in place."""
    base, given = models.llama(case), models.batch(case)
    theirs = models.with_peft(base, case, "lora")
    found: dict[str, Timed] = {}
    for name, changes in {"lora": {}, "lora_plus": {"solver": rw.recipe("lora_plus").solver}}.items():
        model = models.twin(base)
        adapter = rw.attach(model, replace(models.recipe(case, "lora"), **changes))
        models.stepper(model, given)()
        found[f"rankwise {name}"] = adapter.optimizer().step
    models.stepper(theirs, given)()
    trained = [p for p in theirs.parameters() if p.requires_grad]
    found["peft AdamW"] = torch.optim.AdamW(trained, lr=1e-4).step
    found["peft AdamW fused"] = torch.optim.AdamW(trained, lr=1e-4, fused=True).step
    whole = models.full(base)
    models.stepper(whole, given)()
    found["full AdamW"] = torch.optim.AdamW(whole.parameters(), lr=1e-5).step
    seen = measure(found, rounds, each=5)
    return rows(seen, {"rankwise lora": "peft AdamW", "rankwise lora_plus": "peft AdamW"})


def keep(case: Case, rounds: int, folder: Path) -> dict[str, Any]:
    """Merge, save, load, and the size of the file over the tensors in it."""
    base = models.llama(case)
    theirs = models.with_peft(base, case, "lora")
    _, adapter = models.with_rankwise(base, case, "lora", theirs)
    adapter.save(folder / "ours")
    theirs.save_pretrained(folder / "theirs")

    def copied(make: Callable[[Any], Timed]) -> Callable[[], Timed]:
        return lambda: make(models.full(base).requires_grad_(False))

    def merging(model: nn.Module) -> Timed:
        rw.load(model, folder / "ours")
        return lambda: rw.merge(model)

    def merging_theirs(model: nn.Module) -> Timed:
        wrapped = peft.PeftModel.from_pretrained(model, folder / "theirs")
        return lambda: wrapped.merge_and_unload()

    found: dict[str, Callable[[], Timed]] = {
        "rankwise merge": copied(merging),
        "peft merge": copied(merging_theirs),
        "rankwise save": lambda: lambda: adapter.save(folder / "ours"),
        "peft save": lambda: lambda: theirs.save_pretrained(folder / "theirs"),
        "rankwise load": copied(lambda model: lambda: rw.load(model, folder / "ours")),
        "peft load": copied(lambda model: lambda: peft.PeftModel.from_pretrained(model, folder / "theirs")),
    }
    with warnings.catch_warnings(), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        seen = measure(found, rounds, warmup=1, fresh=True)
    out = rows(seen, {name: name.replace("rankwise", "peft") for name in found if "rankwise" in name})
    tensors = sum(p.numel() * p.element_size() for p in adapter.parameters())
    for library, where in {"rankwise": folder / "ours", "peft": folder / "theirs"}.items():
        size = sum(f.stat().st_size for f in where.iterdir())
        out[f"{library}_file_over_tensors"] = size / tensors
    return out


PROGRAMS = {
    "python": ["-c", "pass"],
    "torch": ["-c", "import torch"],
    "torch and rankwise": ["-c", "import torch, rankwise"],
    "torch and rankwise, used": ["-c", "import torch, rankwise as r; r.attach, r.load, r.merge, r.recipe"],
    "torch and every public name": ["-c", "import torch, rankwise as r; [getattr(r, n) for n in r.__all__]"],
    "rankwise --help": ["-c", "import sys; sys.argv = ['rankwise', '--help']; from rankwise.cli import main; main()"],
}
CHECK = """
import contextlib, io, sys
sys.argv = ["rankwise", "--help"]
from rankwise.cli import main
with contextlib.suppress(SystemExit), contextlib.redirect_stdout(io.StringIO()):
    main()
print("torch" in sys.modules)
"""


def start(rounds: int) -> dict[str, Any]:
    """Wall seconds of a new process; what an import adds to torch's, by the best of all rounds."""
    times: dict[str, list[float]] = {name: [] for name in PROGRAMS}
    for _ in range(rounds):
        for name, words in PROGRAMS.items():
            began = time.perf_counter()
            subprocess.run([sys.executable, *words], check=True, capture_output=True)
            times[name].append(time.perf_counter() - began)

    def best(name: str, under: str | None = None) -> Interval:
        def least(picked: Any) -> float:
            less = min(times[under][i] for i in picked) if under else 0.0
            return min(times[name][i] for i in picked) - less

        return interval(least, rounds)

    done = subprocess.run([sys.executable, "-c", CHECK], check=True, capture_output=True, text=True)
    return {
        "rounds": rounds,
        "seconds": {name: best(name) for name in PROGRAMS},
        "over_torch": {name: best(name, "torch") for name in PROGRAMS if name.startswith("torch and")},
        "help_imports_torch": done.stdout.strip() == "True",
    }


def run(quick: bool, device: str) -> dict[str, Any]:
    """Everything on this page, on one thread."""
    torch.set_num_threads(1)
    case = Case(128, layers=2, device=device) if quick else Case(256, device=device)
    rounds, sites = (5, 100) if quick else (31, 1000)
    with tempfile.TemporaryDirectory() as folder:
        return {
            "case": asdict(case),
            "attach": attach(case, 3 if quick else 11, sites),
            "switch": switch(rounds, (1, 10) if quick else (1, 10, 100)),
            "optimizer": {dtype: optimizer(replace(case, dtype=dtype), rounds) for dtype in ("float32", "bfloat16")},
            "keep": keep(case, rounds, Path(folder)),
            "start": start(3 if quick else 7),
        }
