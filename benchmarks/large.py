"""The table for a GPU: a step of a model in the shape of Llama-3-8B, by rankwise and by PEFT.

``python -m benchmarks.large [--device cuda|cpu] [--quick] [--rounds N] [--methods lora,dora] [--out DIR]`` times
forward, backward and AdamW on 1 x 2048 tokens: a bfloat16 base of random weights, rank 16 on every linear layer but
the head. All variants share one copy of the base and start from the same factors; beside them stands the roofline of
the device. With ``--quick``, or on a CPU, a small stand-in of the same proportions shows that it runs, no more.
Writes OUT/large.json after every method.
"""

import argparse
import gc
import json
import re
import warnings
from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, LlamaConfig

import rankwise as rw
from benchmarks import criteria, memory, models
from benchmarks.models import Case
from benchmarks.paired import Interval, conditions, fixed_allocator, measure, median, ratio
from benchmarks.step_time import build
from rankwise.io import atomically
from rankwise.select.devices import DEVICES, Device, device_of, in_words
from rankwise.select.memory import footprint
from rankwise.select.skeleton import as_if_real

LARGE = Case(4096, "bfloat16", layers=32, batch=1, tokens=2048, vocabulary=128256)
STAND_IN = Case(128, "bfloat16", layers=2, batch=1, tokens=64, vocabulary=512)
SHARED = [name for name, method in models.METHODS.items() if not method.starts]  # the others rewrite the base
PLAIN_WORDS = {"nvidia", "tesla", "geforce", "amd", "instinct", "oam", "sxm4", "hbm3", "80gb"}


def llama(case: Case) -> nn.Module:
    """The frozen base in the proportions of Llama-3-8B, made where it stays and in its own dtype."""
    heads = min(32, case.hidden // 32)
    config = LlamaConfig(
        vocab_size=case.vocabulary, hidden_size=case.hidden, intermediate_size=case.hidden * 7 // 2,
        num_hidden_layers=case.layers, num_attention_heads=heads, num_key_value_heads=heads // 4,
        max_position_embeddings=8192, tie_word_embeddings=False, use_cache=False,
    )  # fmt: skip
    with torch.device(case.device):
        model = AutoModelForCausalLM.from_config(config, dtype=case.torch_dtype)
    return model.requires_grad_(False).train()


def device_named(name: str) -> Device | None:
    """The device of the table that a GPU's own name says; None where a word may mean another model of it."""
    words = set(re.split(r"[\s-]+", re.sub(r"\brtx ", "rtx", name.lower())))
    for key, device in DEVICES.items():
        if (said := set(key.split("-"))) <= words and words - said <= PLAIN_WORDS:
            return device
    return None


def device_at_hand(where: str) -> Device:
    """The GPU as its data sheet has it, or what is at hand as it is measured."""
    known = device_named(torch.cuda.get_device_name()) if where == "cuda" else None
    with patch.object(torch.cuda, "is_available", lambda: where == "cuda"):  # a CPU asked for beside a GPU
        return known or device_of()


def foreseen(case: Case, name: str, device: Device) -> dict[str, float]:
    """What our step takes by the device's roofline, and its bytes as a plan counts them, on fake tensors."""
    case = replace(case, device="cpu")
    attach = partial(rw.attach, recipe=models.recipe(case, name))
    with as_if_real():
        step = footprint(partial(llama, case), attach, partial(models.batch, case), full=True)
    rate = case.batch * case.tokens / (seconds := device.seconds(step.work))
    return {"seconds": seconds, "tokens_per_second": rate, "planned_bytes": sum(step.peak.values())}


def trainer(model: Any, given: dict[str, Tensor]) -> tuple[Callable[[], Tensor], torch.optim.Optimizer]:
    """Forward, backward and AdamW, and no gradient left behind; returns the loss before the step."""
    backward = models.stepper(model, given)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-4, fused=True)

    def step() -> Tensor:
        loss = backward()[0]
        optimizer.step()
        optimizer.zero_grad()
        return loss

    return step, optimizer


def compare(base: nn.Module, case: Case, name: str, rounds: int) -> dict[str, Any]:
    """One method in all variants, in one interleaved set."""
    found, given = build(case, (name,), full=False, base=base), models.batch(case)
    del found["floor"]
    rows: dict[str, dict[str, Any]] = {}
    steps: dict[str, Callable[[], Tensor]] = {}
    for variant, model in found.items():
        steps[variant], optimizer = trainer(model, given)
        peak = memory.peak(steps[variant], case.device)
        own = sum(t.nbytes for t in (*model.parameters(), *model.buffers()))
        held = sum(t.nbytes for state in optimizer.state.values() for t in state.values())
        rows[variant] = {
            "trained": sum(p.numel() for p in model.parameters() if p.requires_grad),
            "model_bytes": own, "optimizer_bytes": held, "peak_bytes": peak,
            "above_model_bytes": held + peak, "in_all_bytes": own + held + peak,
        }  # fmt: skip
    seen, tokens = measure(steps, rounds), case.batch * case.tokens
    times: dict[str, list[float]] = getattr(seen, criteria.clock(asdict(case)))
    for variant, row in rows.items():
        row["seconds"] = median(times[variant])
        row["tokens_per_second"] = median([tokens / t for t in times[variant]])
        row["loss"] = steps[variant]().item()
        if variant != (ours := f"rankwise {name}"):
            row["time_of_ours"] = ratio(times[ours], times[variant])
            row["memory_of_ours"] = rows[ours]["in_all_bytes"] / row["in_all_bytes"]
    return rows


def show(name: str, row: dict[str, Any], device: str) -> str:
    """One method as a compact table, its roofline below."""

    def span(found: Interval, digits: int) -> str:
        value, low, high = (f"{found[key]:,.{digits}f}" for key in ("value", "low", "high"))
        return f"{value} [{low}, {high}]"

    heads = ("", "ms a step", "tokens/s", "above the model", "in all", "time, ours / this", "memory, ours / this")
    lines: list[tuple[str, ...]] = [heads]
    for variant, own in row["variants"].items():
        sizes = (in_words(own[f"{which}_bytes"]) for which in ("above_model", "in_all"))
        over = (span(own["time_of_ours"], 3), f"{own['memory_of_ours']:.3f}") if "time_of_ours" in own else ("", "")
        speed = span(own["tokens_per_second"], 0)
        lines.append((variant, f"{1e3 * own['seconds']['value']:,.1f}", speed, *sizes, *over))
    seconds, tokens, planned = row["roofline"].values()
    reached = seconds / row["variants"][f"rankwise {name}"]["seconds"]["value"]
    last = f"roofline of our step on {device}: {1e3 * seconds:,.1f} ms, {tokens:,.0f} tokens/s (reached: {reached:.0%})"
    rows = ["{:22}{:>11}{:>26}{:>17}{:>12}{:>23}{:>21}".format(*line) for line in lines]
    return "\n".join([*rows, f"{last}; planned in all: {in_words(planned)}"])


def main(arguments: Sequence[str] | None = None) -> None:
    """Measure every method, print a table for each and write large.json."""
    parser = argparse.ArgumentParser(prog="benchmarks.large", description=__doc__)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--quick", action="store_true", help="the stand-in, on a GPU too")
    parser.add_argument("--rounds", type=int, help="default: 31; of the stand-in: 7")
    parser.add_argument("--methods", default="lora,dora", help=f"of {', '.join(SHARED)}; loha@8 for another rank")
    parser.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    args = parser.parse_args(arguments)
    names = args.methods.split(",")
    if unknown := [name for name in names if name.partition("@")[0] not in SHARED]:
        parser.error(f"a method is one of {', '.join(SHARED)}; found {', '.join(unknown)}")
    warnings.simplefilter("ignore")  # of transformers and PEFT, at every model
    small = args.quick or args.device == "cpu"
    case, rounds = replace(STAND_IN if small else LARGE, device=args.device), args.rounds or (7 if small else 31)
    torch.set_num_threads(case.threads)
    torch.manual_seed(0)
    if small:
        print("A STAND-IN of small size: it shows that the benchmark runs; its figures say nothing of the 8B model.")
    device, base = device_at_hand(args.device), llama(case)
    count = sum(p.numel() for p in base.parameters())
    print(f"{count:,} parameters, {case}, {case.batch} x {case.tokens} tokens, {rounds} rounds, on {device.name}")
    results: dict[str, Any] = {"benchmark": "large", "stand_in": small, **conditions(args.device), "case": asdict(case)}
    results |= {"rounds": rounds, "parameters": count, "roofline_device": asdict(device), "methods": {}}
    for name in names:
        row = {"variants": compare(base, case, name, rounds), "roofline": foreseen(case, name, device)}
        results["methods"][name] = row
        atomically(args.out / "large.json", lambda path: path.write_text(json.dumps(results, indent=1) + "\n"))
        print(f"\n{show(name, row, device.name)}", flush=True)
        gc.collect()
    print(f"\nwritten to {args.out / 'large.json'}")


if __name__ == "__main__":
    fixed_allocator()
    main()
