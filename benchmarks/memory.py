"""Memory of a training step: bytes saved for backward, and the peak of live bytes.

``python -m benchmarks.memory lora lora_fa vera`` prints what methods of the catalogue save.
"""

import argparse
import json
import os
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks
from torch.profiler import ProfilerActivity, profile

import rankwise as rw
from benchmarks import models
from benchmarks.models import Case
from benchmarks.step_time import build


class _Held:
    """What the graph holds in place of a saved tensor; dies with its node."""

    def __init__(self, tensor: Tensor) -> None:
        self.tensor = tensor


def saved(model: nn.Module, given: Mapping[str, Tensor]) -> dict[str, int]:
    """Bytes saved for backward: distinct storages, parameters and buffers aside.

    ``saved`` is what the graph holds when backward begins; ``packed`` has also what was saved in
    forward by parts of the graph that were dropped again (the norm that PEFT's DoRA detaches).
    """
    own = {t.untyped_storage().data_ptr() for t in [*model.parameters(), *model.buffers()]}
    held: WeakSet[_Held] = WeakSet()
    packed: list[Tensor] = []  # alive until the end, so that no address is used twice

    def pack(tensor: Tensor) -> _Held:
        packed.append(tensor.detach())
        held.add(found := _Held(tensor.detach()))  # an output that held its own node would never die
        return found

    with saved_tensors_hooks(pack, lambda found: found.tensor):
        loss, _ = models.forward(model, given)
    found = {}
    for name, tensors in {"saved": [h.tensor for h in held], "packed": packed}.items():
        sizes = {s.data_ptr(): s.nbytes() for s in (t.untyped_storage() for t in tensors)}
        found[name] = sum(size for where, size in sizes.items() if where not in own)
    del loss
    return found


@contextmanager
def silent() -> Iterator[None]:
    """Nothing on stderr, not even from C++: the profiler's library greets at every start."""
    kept = os.dup(2)
    with open(os.devnull, "w") as nowhere:
        os.dup2(nowhere.fileno(), 2)
        try:
            yield
        finally:
            os.dup2(kept, 2)
            os.close(kept)


def peak(step: Callable[[], object], device: str) -> int:
    """Most bytes that torch's allocator held during a step over what it held before (second step: warm)."""
    step()
    if device != "cuda":
        return most_allocated(step)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    step()
    torch.cuda.synchronize()
    return torch.cuda.max_memory_allocated() - before


def most_allocated(run: Callable[[], object]) -> int:
    """Most bytes that blocks of the CPU allocator, made in ``run``, take at once, by the profiler's record.

    The profiler remembers the size of every block that it saw being made, and sees none die outside of a session: what
    is made there at the same address dies, in a later session, with that old size. So only blocks of ``run`` count.
    """
    with TemporaryDirectory() as folder, silent():
        with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as seen:
            run()
        seen.export_chrome_trace(path := f"{folder}/trace.json")
        events = json.loads(Path(path).read_text())["traceEvents"]
    made: dict[int, int] = {}  # address -> bytes
    live = most = 0
    for event in sorted((e for e in events if e["name"] == "[memory]"), key=lambda e: e["ts"]):
        where, size = event["args"]["Addr"], event["args"]["Bytes"]
        if size > 0:
            made[where] = size
            live += size
            most = max(most, live)
        else:
            live -= made.pop(where, 0)
    return most


def memory_cell(case: Case, methods: tuple[str, ...]) -> dict[str, Any]:
    """Bytes of every variant of a cell, one step each, and ours as a share of the others'."""
    given = models.batch(case)
    rows: dict[str, dict[str, float]] = {}
    for name, model in build(case, methods, full=True).items():
        step = models.stepper(model, given)
        rows[name] = {**saved(model, given), "peak": peak(step, case.device)}
        model.zero_grad(set_to_none=True)
    for name in methods:
        ours = rows[f"rankwise {name}"]
        for other in (f"peft {name}", f"peft-own-dtype {name}", "full"):
            if other in rows:
                key = other.partition(" ")[0]
                ours |= {f"{what}_over_{key}": ours[what] / rows[other][what] for what in ("saved", "packed", "peak")}
    return {"case": asdict(case), "variants": rows}


def cells(quick: bool, device: str) -> list[tuple[Case, tuple[str, ...]]]:
    """What is measured by default; bytes do not depend on the number of threads."""
    if quick:
        return [(Case(128, "bfloat16", layers=2, device=device), ("lora", "dora"))]
    bf16, fp32 = "bfloat16", "float32"
    every = ("lora", "dora", "dora_again", "adalora", "loha", "lokr", "hira", "oft")
    return [
        *(
            (Case(h, bf16, device=device), every if h == 256 else ("lora", "dora", "dora_again"))
            for h in (256, 512, 1024)
        ),
        *((Case(h, bf16, dropout=0.05, device=device), ("lora", "dora")) for h in (256, 512)),
        (Case(256, fp32, device=device), ("lora", "dora")),
    ]


def run(quick: bool, device: str) -> list[dict[str, Any]]:
    """All cells."""
    return [memory_cell(case, methods) for case, methods in cells(quick, device)]


def main() -> None:
    """Print the bytes that methods save on the Llama of width 256."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.memory", description=(__doc__ or "").split("\n")[0])
    parser.add_argument("methods", nargs="+")
    names = parser.parse_args().methods
    for dtype in ("float32", "bfloat16"):
        case = Case(256, dtype)
        base, given, found = models.llama(case), models.batch(case), {}
        for name in names:
            model = models.twin(base)
            rw.attach(model, rw.recipe(name, rank=case.rank))
            found[name] = saved(model, given)["saved"]
            share = found[name] / found[names[0]]
            print(f"{dtype:9} {name:12} {found[name] / 2**20:6.1f} MiB  {share:.2f} of {names[0]}")


if __name__ == "__main__":
    main()
