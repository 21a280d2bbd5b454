"""Time and peak temporaries of every structure on one 1024 x 1024 layer, against LoRA and against PEFT's same method.

    python -m benchmarks.structures                # every method with a structure of its own
    python -m benchmarks.structures --only hra c3a

One linear layer, 512 tokens, forward and backward with a gradient to the input; every variant in one interleaved set.
Peaks are live bytes over what was held before the step, in units of W: LoRA's two are the output and three gradients of
half W each. PEFT's adapter is ours, exported and loaded by PEFT, so that both compute one map.
"""

import argparse
import json
import tempfile
import warnings
from collections.abc import Callable
from contextlib import redirect_stderr
from io import StringIO
from pathlib import Path
from typing import Any

import peft
import torch
from torch import nn

import rankwise as rw
from benchmarks.memory import peak
from benchmarks.paired import conditions, fixed_allocator, measure, quiet, ratio
from rankwise.errors import RankwiseError
from rankwise.methods import catalogue

WIDTH, RANK, TOKENS = 1024, 16, 512


def layer() -> nn.Sequential:
    """One layer, the same weights at every call."""
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(WIDTH, WIDTH, bias=False)).requires_grad_(False)


def own(names: list[str]) -> list[str]:
    """Methods of unlike structures, the first of the catalogue for each."""
    found: dict[str, str] = {}
    for name, entry in catalogue().items():
        found.setdefault(repr(type(entry.recipe.structure)) + str(entry.recipe.structure), name)
    chosen = {"lora", *found.values()}
    return [name for name in catalogue() if name in (names or chosen)]


def adapted(name: str) -> tuple[Any, rw.Adapter]:
    """The layer with a method at rank 16 where it has one, off its start."""
    options = catalogue()[name].options
    rank = {"rank": RANK} if "rank" in options and name != "krona" else {}
    recipe = rw.recipe(name, **rank)
    model = layer()
    if recipe.init.needs:
        recipe = recipe.with_(init=rw.recipe("lora").init)
    adapter = rw.attach(model, recipe)
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.02 * torch.randn(p.shape, generator=generator))
    return model, adapter


def theirs(adapter: rw.Adapter) -> Any:
    """PEFT's model of our adapter; None where it has no such method."""
    with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), redirect_stderr(StringIO()):
        warnings.simplefilter("ignore")
        try:
            kind = rw.export(adapter, Path(folder) / "a").method
        except RankwiseError:
            return None
        if kind == "LORA" and adapter.recipe.name not in ("lora", "dora", "rslora"):
            return None  # a conversion, and no method of PEFT's
        if kind == "BOFT":
            return None  # PEFT's needs a CUDA extension for more than one level
        return peft.PeftModel.from_pretrained(layer(), Path(folder) / "a", is_trainable=True)


def stepper(model: Any) -> Callable[[], None]:
    """Forward and backward, with a gradient to the input; no gradient is left behind."""
    x = torch.randn(TOKENS, WIDTH, generator=torch.Generator().manual_seed(2)).requires_grad_()
    trained = [p for p in model.parameters() if p.requires_grad]

    def run() -> None:
        model(x).square().sum().backward()
        for p in (x, *trained):
            p.grad = None

    return run


def row(name: str, rounds: int) -> dict[str, Any]:
    """One method against LoRA and PEFT."""
    model, adapter = adapted(name)
    variants = {"lora": stepper(adapted("lora")[0]), "ours": stepper(model)}
    other = theirs(adapter)
    if other is not None:
        x = torch.randn(4, WIDTH)
        with torch.no_grad():  # in evaluation mode, since some draw while training
            far, near = (other.eval()(x) - layer()(x)).abs().max(), (other(x) - model.eval()(x)).abs().max()
        model.train()
        other.train()
        assert near <= 1e-3 * far, f"{name}: PEFT's outputs differ from ours by {near / far:.1e} of the update"
        variants["peft"] = stepper(other)
    seen = measure(variants, rounds)
    size = 4 * WIDTH * WIDTH
    found: dict[str, Any] = {
        "trained": sum(p.numel() for p in adapter.parameters()),
        "over_lora": ratio(seen.wall["ours"], seen.wall["lora"]),
        "over_peft": ratio(seen.wall["ours"], seen.wall["peft"]) if other is not None else None,
        "cpu_over_wall": quiet(seen),
        "peak": {key: peak(run, "cpu") / size for key, run in variants.items()},
    }
    return found


def main() -> None:
    """Measure and print, a line a method; all of it as JSON at the end, where a file is given."""
    parser = argparse.ArgumentParser(prog="benchmarks.structures", description=__doc__)
    parser.add_argument("--only", nargs="*", default=[])
    parser.add_argument("--rounds", type=int, default=11)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    fixed_allocator()
    torch.set_num_threads(1)
    found: dict[str, Any] = {"conditions": conditions("cpu"), "rounds": given.rounds, "rows": {}}
    print(f"{'method':16}{'trained':>10}  {'over LoRA':22}{'over PEFT':22}peak, in units of W: ours, LoRA, PEFT")
    for name in own(given.only):
        found["rows"][name] = one = row(name, given.rounds)

        def said(value: Any) -> str:
            return "" if value is None else f"{value['value']:.2f} [{value['low']:.2f}, {value['high']:.2f}]"

        peaks = "".join(f"{one['peak'].get(key, float('nan')):8.2f}" for key in ("ours", "lora", "peft"))
        print(
            f"{name:16}{one['trained']:10,}  {said(one['over_lora']):22}{said(one['over_peft']):22}{peaks}", flush=True
        )
        if given.out:
            given.out.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
