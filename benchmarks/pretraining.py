"""Pre-training on real text: ``python -m benchmarks.pretraining FOLDER``; every run is kept in FOLDER/ledger.jsonl.

Three sizes of Llama from random weights on Shakespeare, seven methods, two seeds: held-out loss against the bytes that
a method keeps through training, and its seconds. At each size each method's rate is chosen among four (seed 0), or
further out where the best is an end of them. Interrupted, it goes on where it was. The table is written as
FOLDER/pretraining.json and FOLDER/table.md.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Iterable
from dataclasses import replace
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch.utils.data import DataLoader

from rankwise.hf.method import recipe_of
from rankwise.hf.prepare import Prepared
from rankwise.hf.pretrain import SIZES, fresh, settled
from rankwise.hf.run import Run
from rankwise.select import Entry, Ledger

TEXT = Path(__file__).parents[2] / "shared" / "data" / "text_tinyshakespeare" / "input.txt"
METHODS = ("full", "galore", "apollo", "relora", "sltrain", "loro", "cola_act")
PLANNED = {"galore", "apollo", "relora", "loro"}  # do something every so often: here three times in a run
FACTORS = (0.5, 1.0, 2.0, 4.0)  # of a method's rate, to choose from
FURTHER = 2  # beyond an end
STEPS = {"0.3M": 150, "1M": 130, "3M": 100}
LEARNT, HELD_OUT = 400_000, 24_000  # characters


def _bytes(tensors: Iterable[torch.Tensor]) -> int:
    return sum(t.numel() * t.element_size() for t in tensors)


def kept(prepared: Prepared) -> float:
    """Bytes that training keeps from step to step: factors, the optimizer's state, and what it reads of the base.

    What it reads is found by asking all of the base for a gradient; a weight whose place the factors take has none.
    """
    model, adapter, task = prepared.model, prepared.adapter, prepared.task
    ours = {id(p) for p in adapter.parameters(trainable=False)}
    base = [p.requires_grad_() for p in model.parameters() if id(p) not in ours]
    rows = DataLoader(task.rows(prepared.train), prepared.run.batch, collate_fn=task.collator(prepared.processor))
    optimizer = adapter.optimizer(prepared.lr)
    for batch in islice(rows, 1):
        model.train()(**batch).loss.backward()
        optimizer.step()
    states = [v for own in optimizer.state.values() for v in own.values() if isinstance(v, torch.Tensor)]
    read = [p for p in base if p.grad is not None and p.grad.any()]
    return float(_bytes(adapter.parameters(trainable=False)) + _bytes(states) + _bytes(read))


KEPT = "bytes kept in a step"
MEASURES = {KEPT: kept}


def texts(folder: Path) -> tuple[Path, Path]:
    """The text to learn from, and its end."""
    text, parts = TEXT.read_text(), (folder / "train.txt", folder / "valid.txt")
    for file, part in zip(parts, (text[:LEARNT], text[-HELD_OUT:]), strict=True):
        if not file.exists():
            file.write_text(part)
    return parts


def main(folder: Path, sizes: list[str], seeds: int, most: int | None, methods: list[str]) -> None:
    """Run what the ledger lacks; write the table."""
    folder.mkdir(parents=True, exist_ok=True)
    ledger, (train, valid) = Ledger(folder / "ledger.jsonl"), texts(folder)

    def run(size: str, method: str, seed: int, factor: float) -> Run:
        base = folder / f"base-{size}-{seed}"
        if not base.exists():
            fresh(size, base, seed)
        steps = min(STEPS[size], most or STEPS[size])
        given = {"batch": 8, "max_length": 128, "pack": True, "saves": 1, "steps": steps, "validation": str(valid)}
        one = Run.of({"model": str(base), "data": str(train), "out": "-", "method": method, "seed": seed, **given})
        one = settled(replace(one, options={"every": max(1, steps // 3)} if method in PLANNED else {}))
        lr = recipe_of(one).lr if isinstance(one.lr, str) else one.lr
        return replace(one, lr=factor * lr)

    def tuned(size: str, method: str) -> float:
        tried: dict[float, Entry] = {}
        wanted, best = list(FACTORS), 1.0
        while wanted:
            tried |= {f: ledger.done(run(size, method, 0, f), MEASURES) for f in wanted}
            best = min(tried, key=lambda f: tried[f].loss)
            beyond = {min(tried): best / 2, max(tried): best * 2}
            wanted = [beyond[best]] if best in beyond and len(tried) < len(FACTORS) + FURTHER else []
        told = (f"{e.lr:.3g} ({e.loss:.3f})" for _, e in sorted(tried.items()))
        print(f"{size} {method}: rate {tried[best].lr:.3g} of", *told, flush=True)
        return best

    rows = []
    for method in methods:
        for size in sizes:
            best = tuned(size, method)
            for seed in range(seeds):
                entry = ledger.done(run(size, method, seed, best), MEASURES)
                held = (folder / f"base-{size}-{seed}" / "model.safetensors").stat().st_size
                found = {"base": held, "bytes": entry.measures.get(KEPT)}
                told = {"size": size, "method": method, "seed": seed, "lr": entry.lr, "steps": entry.steps}
                told |= {"loss": entry.loss, "seconds": entry.seconds, "parameters": entry.parameters, **found}
                rows.append(told | {"curve": entry.curve.get("training"), "resumed": entry.resumed})
                print(f"{size:5} {method:9} seed {seed}  loss {entry.loss:.3f}  {entry.seconds:.0f} s", flush=True)
    (folder / "pretraining.json").write_text(json.dumps({"torch": torch.__version__, "rows": rows}, indent=1))
    (folder / "table.md").write_text(table(rows))
    draw(rows, folder / "pretraining.png")
    print(table(rows))


def draw(rows: list[dict[str, Any]], file: Path) -> None:
    """Loss against bytes and against seconds, a mark for each run, a column of panels for each size."""
    import matplotlib.pyplot as plt

    sizes = list(dict.fromkeys(row["size"] for row in sorted(rows, key=lambda row: list(SIZES).index(row["size"]))))
    figure, axes = plt.subplots(2, len(sizes), figsize=(4 * len(sizes), 6), squeeze=False, sharey="col")
    for column, size in enumerate(sizes):
        for method in METHODS:
            own = [row for row in rows if (row["size"], row["method"]) == (size, method)]
            losses = [row["loss"] for row in own]
            axes[0, column].plot([row["bytes"] / 1e6 for row in own], losses, "o-", markersize=5, label=method)
            axes[1, column].plot([row["seconds"] for row in own], losses, "o-", markersize=5)
        axes[0, column].set(title=size, xlabel="kept from step to step, MB")
        axes[1, column].set(xlabel="seconds")
        for panel in axes[:, column]:
            panel.set_xlim(left=0)
            panel.spines[["top", "right"]].set_visible(False)
    for panel in axes[:, 0]:
        panel.set_ylabel("held-out loss")
    handles, names = axes[0, 0].get_legend_handles_labels()
    figure.legend(handles, names, ncol=len(names), loc="lower center", frameon=False)
    figure.tight_layout(rect=(0, 0.05, 1, 1))
    figure.savefig(file, dpi=110)


def table(rows: list[dict[str, Any]]) -> str:
    """The rows as a table, seeds side by side."""
    lines = [
        "| size | method | rate | trained | kept, MB | base, MB | seconds | loss |",
        "|---|---|--:|--:|--:|--:|--:|--:|",
    ]
    groups: dict[tuple[str, str], list[dict[str, Any]]] = {}
    for row in rows:
        groups.setdefault((row["size"], row["method"]), []).append(row)
    for (size, method), same in sorted(groups.items(), key=lambda item: list(SIZES).index(item[0][0])):
        one, losses = same[0], ", ".join(f"{row['loss']:.3f}" for row in same)
        seconds = sum(row["seconds"] for row in same) / len(same)
        held = (f"{one[name] / 1e6:.2f}" if one[name] else "" for name in ("bytes", "base"))
        cells = (size, method, f"{one['lr']:.2g}", f"{one['parameters']:,}", *held, f"{seconds:.0f}", losses)
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.pretraining", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("folder", type=Path, help="for the ledger and the table")
    parser.add_argument("--sizes", nargs="+", choices=list(STEPS), default=list(STEPS))
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=METHODS)
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--steps", type=int, help="the most steps of a run")
    options = parser.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    print(f"{len(options.methods)} methods, {', '.join(options.sizes)}", file=sys.stderr)
    main(options.folder, options.sizes, options.seeds, options.steps, options.methods)
