"""The demo: the main job on the embedded model, every method compared fairly, in minutes.

The shipped English model is adapted to Python (the standard library of the running Python, whole
modules held out) by five methods and by full fine-tuning; each gets a learning rate of its own,
two seeds and a process of its own.
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
                log = (folder / f"{method}.log").open("w")
                command = [sys.executable, "-m", "rankwise.demo.arm", method, str(folder)]
                running[method] = subprocess.Popen(command, stderr=log, stdout=log, env=environment)
                log.close()
            time.sleep(0.2)
            for method in [m for m, p in running.items() if p.poll() is not None]:
                if running.pop(method).returncode:
                    tail = (folder / f"{method}.log").read_text()[-2000:]
                    raise TrainingError(f"The process of {method} failed:\n{tail}")
                found[method] = json.loads((folder / f"{method}.json").read_text())
                seconds = time.perf_counter() - began
                say(f"{seconds:4.0f} s  {method} done ({len(found)} of {len(methods)})")
    finally:
        for process in running.values():
            process.kill()
    return {m: found[m] for m in methods}


def verify(folder: Path, method: str) -> dict[str, Any]:
    """Load the saved adapter, merge it, generate from it; return the figures of each."""
    import torch

    import rankwise as rw
    from rankwise import embedded
    from rankwise.demo.arm import bits_per_byte, texts

    model, tokenizer = embedded.load()
    text, english = texts()
    start = {"python": bits_per_byte(model, text["test"]), "english": bits_per_byte(model, english)}
    probe = text["test"].tokens[:4]
    with torch.no_grad():
        base = model(input_ids=probe).logits
        rw.load(model, folder / method)
        loaded = model(input_ids=probe).logits
        reloaded = bits_per_byte(model, text["test"])
        prompt = tokenizer("def read(self, path):\n", return_tensors="pt").input_ids
        torch.manual_seed(0)
        sample = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=64,
            do_sample=True,
            temperature=0.7,
            pad_token_id=tokenizer.pad_token_id,
        )
        report = rw.merge(model)
        merged = model(input_ids=probe).logits
    return {
        "start": start,
        "effect": float((loaded - base).abs().max()),
        "merged": float((merged - loaded).abs().max()),
        "merge": str(report),
        "reloaded": reloaded,
        "sample": tokenizer.decode(sample[0]),
    }


def run(folder: Path, methods: Sequence[str] = METHODS) -> dict[str, Any]:
    """The whole demo: train, compare, draw, merge, generate; returns what it printed as data."""
    from rich.console import Console

    from rankwise.demo import report
    from rankwise.demo.arm import quiet

    folder.mkdir(parents=True, exist_ok=True)
    screen, progress = Console(), Console(stderr=True)
    progress.print(
        f"Adapting the embedded model to Python with {len(methods)} methods, three rates tried and "
        f"two seeds each; about three minutes on two cores."
    )
    found = compare(folder, methods, lambda line: progress.print(line, highlight=False))
    quiet()
    adapters = [m for m in methods if (folder / m / "adapter.safetensors").exists()]
    best = min(adapters, key=lambda m: found[m]["seeds"][0]["python"])
    checked = verify(folder, best)
    start = checked["start"]
    rows = report.rows(found, start)
    screen.print(report.table(rows, start))
    saved = found[best]["seeds"][0]["python"]
    gains = {r.method: start["python"] - r.python for r in rows}
    if "full" in gains and "lora" in gains:
        share = gains["lora"] / gains["full"]
        screen.print(f"LoRA recovers {share:.0%} of full fine-tuning's gain.")
    screen.print(
        f"Best adapter, {report.NAMES.get(best, best)}: reloaded {checked['reloaded']:.6f} bits per "
        f"byte, when saved {saved:.6f}; merged against unmerged at most {checked['merged']:.1e} in "
        f"the logits, of an effect of {checked['effect']:.1f}.",
        highlight=False,
    )
    screen.print(checked["merge"], highlight=False)
    screen.print("A sample from it:", highlight=False)
    screen.print(checked["sample"], markup=False, highlight=False, style="dim")
    picture = folder / "demo.png"
    report.draw(rows, start, found, picture)
    screen.print(f"Picture: {picture}", highlight=False)
    result = {"rows": [vars(r) for r in rows], "best": best, **checked}
    (folder / "demo.json").write_text(json.dumps(result, indent=1))
    return result
