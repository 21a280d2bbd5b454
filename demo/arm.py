"""One method of the demo, in a process of its own: choose the rate, train two seeds, measure.

``python -m demo.arm METHOD FOLDER`` writes ``FOLDER/METHOD.json`` and, for an adapter,
``FOLDER/METHOD/adapter.safetensors`` of its first seed. METHOD is a recipe's name, "full" (every parameter trained) or
"scratch" (the same from random weights).
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import rankwise as rw
from demo.corpus import Text, texts
from rankwise import embedded

STEPS, PROBE, BATCH = 36, 9, 4
RATES = (1.0, 3.0, 9.0)  # times the recipe's own, which is meant for longer runs
SEEDS = (0, 1)
FULL_RATE = 1e-3


def memory(reset: bool = False) -> float:
    """Peak resident memory of this process in MiB, since the last reset where Linux allows one."""
    with suppress(OSError, StopIteration):
        if reset:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith("VmHWM")) / 1024
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


@torch.no_grad()
def bits_per_byte(model: nn.Module, text: Text) -> float:
    """Mean negative log2-likelihood of the text a byte, each row on its own."""
    model.eval()
    nats = 0.0
    for chunk in text.tokens.split(8):
        logits = model(input_ids=chunk).logits[:, :-1].float().flatten(0, 1)
        nats += float(nn.functional.cross_entropy(logits, chunk[:, 1:].flatten(), reduction="sum"))
    return nats / math.log(2) / text.bytes


def train(model: nn.Module, optimizer: torch.optim.Optimizer, tokens: Tensor, steps: int, seed: int) -> None:
    """Train on random rows; the rate falls linearly to a tenth."""
    model.train()
    order = torch.Generator().manual_seed(seed)
    schedule = torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.1, steps)
    for _ in range(steps):
        batch = tokens[torch.randint(len(tokens), (BATCH,), generator=order)]
        optimizer.zero_grad()
        model(input_ids=batch, labels=batch).loss.backward()
        nn.utils.clip_grad_norm_([p for p in model.parameters() if p.requires_grad], 1.0)
        optimizer.step()
        schedule.step()


def build(method: str, rate: float, seed: int) -> tuple[nn.Module, torch.optim.Optimizer, Any]:
    """A fresh model with this method on it, its optimizer, and its adapter if it has one."""
    torch.manual_seed(seed)
    model, _ = embedded.load()
    if method in ("full", "scratch"):
        model = model if method == "full" else type(model)(model.config)
        return model, torch.optim.AdamW(model.parameters(), FULL_RATE * rate, weight_decay=0.0), None
    adapter = rw.attach(model, rw.recipe(method))
    return model, adapter.optimizer(adapter.recipe.lr * rate), adapter


def run(method: str, folder: Path) -> dict[str, Any]:
    """Everything about one method, as plain data."""
    text = texts()
    tuned, peak = {}, 0.0
    for rate in RATES:
        model, optimizer, _ = build(method, rate, 0)
        rest = memory(reset=True)
        train(model, optimizer, text["train"].tokens, PROBE, 0)
        peak = peak or memory() - rest  # of the first: later ones find memory that the process holds already
        tuned[rate] = bits_per_byte(model, text["valid"])
    best = min(tuned, key=lambda r: tuned[r])
    found: dict[str, Any] = {"method": method, "tuned": {f"{r:.3g}": v for r, v in tuned.items()}, "seeds": []}
    for seed in SEEDS:
        model, optimizer, adapter = build(method, best, seed)
        found["lr"] = optimizer.param_groups[0]["lr"]
        found["trained"] = sum(p.numel() for p in model.parameters() if p.requires_grad)
        began = time.perf_counter()
        train(model, optimizer, text["train"].tokens, STEPS, seed)
        result = {"seconds": time.perf_counter() - began, "memory": peak}
        result |= {"python": bits_per_byte(model, text["test"]), "english": bits_per_byte(model, text["english"])}
        if adapter is not None and seed == SEEDS[0]:
            adapter.save(folder / method)
        found["seeds"].append(result)
    return found


def quiet() -> None:
    """Keep transformers' own progress bars and warnings off the demo's screen."""
    from transformers.utils import logging

    logging.set_verbosity_error()
    logging.disable_progress_bar()


if __name__ == "__main__":
    torch.set_num_threads(1)
    quiet()
    name, where = sys.argv[1], Path(sys.argv[2])
    (where / f"{name}.json").write_text(json.dumps(run(name, where), indent=1))
