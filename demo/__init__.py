"""The demo: the main job on the embedded model, every method compared fairly, in minutes.

The shipped English model is adapted to Python (the standard library of the running Python, whole modules held out) by
five methods and by full fine-tuning; each gets a learning rate of its own, two seeds and a process of its own.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

METHODS = ("lora", "dora", "pissa", "lokr", "oft", "full")
PROMPT = "def read(self, path):\n"
ROOT = Path(__file__).parents[1]


def compare(folder: Path, methods: Sequence[str], say: Callable[[str], None]) -> dict[str, Any]:
    """Run every method in a process of its own, two at a time; return what each measured.

    Raises:
        TrainingError: a method's process failed.
    """
    from rankwise.errors import TrainingError

    waiting, running, found = list(methods), {}, {}
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    began = time.perf_counter()
    try:
        while waiting or running:
            while waiting and len(running) < min(2, os.cpu_count() or 1):
                method = waiting.pop(0)
                command = [sys.executable, "-m", "demo.arm", method, str(folder.resolve())]
                with (folder / f"{method}.log").open("w") as log:
                    running[method] = subprocess.Popen(command, cwd=ROOT, stderr=log, stdout=log, env=environment)
            time.sleep(0.2)
            for method in [m for m, p in running.items() if p.poll() is not None]:
                if running.pop(method).returncode:
                    raise TrainingError(f"{method} failed:\n{(folder / f'{method}.log').read_text()[-2000:]}")
                found[method] = json.loads((folder / f"{method}.json").read_text())
                say(f"{time.perf_counter() - began:4.0f} s  {method} done ({len(found)} of {len(methods)})")
    finally:
        for process in running.values():
            process.kill()
    return {m: found[m] for m in methods}


def verify(folder: Path, method: str) -> dict[str, Any]:
    """Load the saved adapter, generate from it, merge it; return the figures of each."""
    import torch

    import rankwise as rw
    from demo.arm import bits_per_byte
    from demo.corpus import texts
    from rankwise import embedded

    text = texts()
    model: Any
    model, tokenizer = embedded.load()
    found: dict[str, Any] = {
        "start": {k: bits_per_byte(model, text[n]) for k, n in (("python", "test"), ("english",) * 2)}
    }
    probe = text["test"].tokens[:4]
    prompt = tokenizer(PROMPT, return_tensors="pt")
    with torch.no_grad():
        base = model(input_ids=probe).logits
        rw.load(model, folder / method)
        loaded = model(input_ids=probe).logits
        found["reloaded"] = bits_per_byte(model, text["test"])
        torch.manual_seed(0)
        options = {"max_new_tokens": 64, "do_sample": True, "temperature": 0.7, "pad_token_id": tokenizer.pad_token_id}
        sample = model.generate(prompt.input_ids, attention_mask=prompt.attention_mask, **options)
        found["sample"] = tokenizer.decode(sample[0])
        found["merge"] = str(rw.merge(model))
        merged = model(input_ids=probe).logits
    return {**found, "effect": float((loaded - base).abs().max()), "merged": float((merged - loaded).abs().max())}


def run(folder: Path, methods: Sequence[str] = METHODS) -> dict[str, Any]:
    """The whole demo: train, compare, draw, merge, generate; returns what it printed as data."""
    from rich.console import Console

    from demo import report
    from demo.arm import quiet

    folder.mkdir(parents=True, exist_ok=True)
    screen, progress = Console(width=110, highlight=False), Console(stderr=True, highlight=False)
    progress.print(
        f"Adapting the embedded English model to Python: {len(methods)} methods, three learning rates tried and two "
        f"seeds for each; about three minutes on two cores."
    )
    found = compare(folder, methods, progress.print)
    quiet()
    adapters = [m for m in methods if (folder / m / "adapter.safetensors").exists()]
    best = min(adapters, key=lambda m: sum(seed["python"] for seed in found[m]["seeds"]))
    checked = verify(folder, best)
    rows = report.rows(found, checked["start"])
    screen.print(report.table(rows, checked["start"]))
    gains = {r["method"]: checked["start"]["python"] - r["python"] for r in rows}
    if {"full", "lora"} <= set(gains):
        screen.print(f"LoRA recovers {gains['lora'] / gains['full']:.0%} of full fine-tuning's gain.")
    screen.print(
        f"Best adapter: {report.NAMES.get(best, best)}. Reloaded {checked['reloaded']:.6f} bits per byte, when saved "
        f"{found[best]['seeds'][0]['python']:.6f}; logits merged - unmerged at most {checked['merged']:.1e}, of an "
        f"effect of {checked['effect']:.1f}."
    )
    screen.print(checked["merge"])
    screen.print("A sample from it:")
    screen.print(checked["sample"], markup=False, style="dim")
    picture = folder / "demo.png"
    report.draw(rows, checked["start"], found, picture)
    screen.print(f"Picture: {picture}")
    result = {"rows": rows, "best": best, **checked}
    (folder / "demo.json").write_text(json.dumps(result, indent=1))
    return result
