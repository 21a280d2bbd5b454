"""Time of a training step, forward and backward, over the floor, and against PEFT's same method.

One cell from the command line: ``python -m benchmarks.step_time --hidden 256 --dtype bf16 --methods lora,dora``.

The floor is the frozen model with a gradient to its input embeddings. ``linears`` runs the adapted
layers' own products alone (forward and gradient to the input): it prices arithmetic.
"""

import argparse
import gc
import statistics
from collections.abc import Callable, Sequence
from dataclasses import asdict
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks import models
from benchmarks.models import TARGETS, Case
from benchmarks.paired import Interval, Rounds, fixed_allocator, measure, median, overhead, quiet, ratio

DTYPES = {"fp32": "float32", "bf16": "bfloat16", "float32": "float32", "bfloat16": "bfloat16"}
OWN_DTYPE = ("lora", "dora")  # on a bfloat16 base, PEFT without its float32 copy of the factors is timed too


def adapted(base: nn.Module) -> list[Tensor]:
    """The weights of the adapted layers."""
    return [p for name, p in base.named_parameters() if name.split(".")[-2] in TARGETS]


def linears(base: nn.Module, case: Case) -> Callable[[], None]:
    """The products of the adapted layers alone: y = x W' and dx = dy W."""
    weights = adapted(base)
    tokens = case.batch * case.tokens
    rows = {w.shape[i]: torch.randn(tokens, w.shape[i]).to(w) for w in weights for i in (0, 1)}

    def run() -> None:
        with torch.no_grad():
            for w in weights:
                torch.mm(rows[w.shape[1]], w.mT)
                torch.mm(rows[w.shape[0]], w)

    return run


def share(base: nn.Module, rank: int) -> float:
    """LoRA's least arithmetic over the linear layers' own: sum of 6Tr(M+N) over sum of 4TMN."""
    shapes = [w.shape for w in adapted(base)]
    return sum(6 * rank * (m + n) for m, n in shapes) / sum(4 * m * n for m, n in shapes)


class _Hira(torch.autograd.Function):
    """HiRA by its dense weight, written out: 6TMN and three products of 2MNr."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, w: Tensor, a: Tensor, b: Tensor) -> Tensor:
        ctx.save_for_backward(x, w, a, b)
        return x @ (w + w * (b @ a).to(w.dtype)).mT

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        x, w, a, b = ctx.saved_tensors
        g = grads[0].flatten(0, -2)
        dense = g @ (w + w * (b @ a).to(w.dtype))
        inner = ((g.mT @ x.flatten(0, -2)) * w).to(a.dtype)
        return dense.view_as(x), None, b.mT @ inner, inner @ a.mT


class _HiraLinear(nn.Module):
    def __init__(self, weight: Tensor, a: Tensor, b: Tensor) -> None:
        super().__init__()
        self.weight, self.a, self.b = weight, nn.Parameter(a.clone()), nn.Parameter(b.clone())

    def forward(self, x: Tensor) -> Tensor:
        return _Hira.apply(x, self.weight, self.a, self.b)


def hira_bound(base: nn.Module, case: Case, name: str, adapter: Any) -> nn.Module:
    """The cheaper of HiRA's two forms, by hand: the other one multiplies by W once for each rank."""
    model = models.twin(base)
    for site, factors in adapter.items():
        parent = model.get_submodule(site.rpartition(".")[0])
        setattr(parent, site.rpartition(".")[2], _HiraLinear(model.get_submodule(site).weight, **factors))
    return model


def build(case: Case, methods: Sequence[str], full: bool, base: Any = None) -> dict[str, Any]:
    """The variants of a cell by name, each checked against its counterpart; on a base given, if one is."""
    torch.manual_seed(0)
    base = models.llama(case) if base is None else base
    found: dict[str, Any] = {"floor": base}
    if full:
        found["full"] = models.full(base)
    for name in methods:
        theirs = models.with_peft(base, case, name)
        ours, adapter = models.with_rankwise(base, case, name, theirs)
        models.agree(ours, theirs, case)
        found |= {f"rankwise {name}": ours, f"peft {name}": theirs}
        if case.dtype != "float32" and name in OWN_DTYPE:
            found[f"peft-own-dtype {name}"] = models.with_peft(base, case, name, autocast=False)
        if name == "hira" and case.dtype == "float32":
            found["bound hira"] = hira_bound(base, case, name, adapter)
            models.agree(found["bound hira"], theirs, case)
    return found


def compiled(model: Any) -> Any:
    """The model under ``torch.compile``; a PeftModel below its wrapper, as it is timed."""
    inner = model.get_base_model() if hasattr(model, "get_base_model") else model
    torch._dynamo.config.recompile_limit = 64  # the variants share the code of their forward
    return torch.compile(inner)


def step_cell(
    case: Case,
    methods: Sequence[str] = ("lora",),
    rounds: int = 31,
    full: bool = False,
    compile: bool = False,
    least: int = 1,
) -> dict[str, Any]:
    """Measure one cell: one interleaved set of variants, ``least`` times a round."""
    torch.set_num_threads(case.threads)
    found = build(case, methods, full)
    given = models.batch(case)
    run: dict[str, Callable[[], object]] = {
        name: models.stepper(compiled(model) if compile else model, given) for name, model in found.items()
    }
    run["linears"] = linears(found["floor"], case)
    seen = measure(run, rounds, least=least)
    row = {
        "case": asdict(case),
        "compiled": compile,
        "command": command(case, methods, rounds, full, compile, least),
        "rounds": rounds,
        "least": least,
        "cpu_over_wall": quiet(seen),
        "arithmetic_share": share(found["floor"], case.rank),
        "trained": {
            name: sum(p.numel() for p in m.parameters() if p.requires_grad) for name, m in found.items()
        },
        "minor_faults": {name: statistics.median(n) for name, n in seen.faults.items()},
        **{clock: ratios(seen, clock, case, share(found["floor"], case.rank)) for clock in ("cpu", "wall")},
    }  # fmt: skip
    del found, run
    gc.collect()
    return row


def command(case: Case, methods: Sequence[str], rounds: int, full: bool, compile: bool, least: int) -> str:
    """What measures this cell alone."""
    short = {long: name for name, long in DTYPES.items() if name != long}
    plain = Case()
    options = {"dropout": case.dropout, "layers": case.layers, "tokens": case.tokens, "device": case.device}
    words = [f"--hidden {case.hidden} --dtype {short[case.dtype]} --rank {case.rank} --threads {case.threads}"]
    words += [f"--{name} {value}" for name, value in options.items() if value != getattr(plain, name)]
    words += [f"--least {least}"] if least > 1 else []
    words += [f"--{name}" for name, on in (("full", full), ("compile", compile)) if on]
    return f"python -m benchmarks.step_time {' '.join(words)} --methods {','.join(methods)} --rounds {rounds}"


def ratios(seen: Rounds, clock: str, case: Case, minimum: float) -> dict[str, dict[str, Interval]]:
    """Per variant: its time, ratio to the floor and to our LoRA; for ours, ratio and overhead against PEFT's."""
    times: dict[str, list[float]] = getattr(seen, clock)
    floor, found = times["floor"], {}
    for name, own in times.items():
        row = found[name] = {"seconds": median(own)}
        if name in ("floor", "linears"):
            continue
        row["over_floor"] = ratio(own, floor)
        unit = [minimum * t for t in times["linears"]]
        row["over_arithmetic"] = overhead(own, own, floor, unit)
        library, _, method = name.partition(" ")
        if library == "rankwise" and "rankwise lora" in times:
            row["over_lora"] = ratio(own, times["rankwise lora"])
        for other in ("peft", "peft-own-dtype", "bound"):
            if library == "rankwise" and f"{other} {method}" in times:
                row[f"over_{other}"] = ratio(own, times[f"{other} {method}"])
                row[f"overhead_over_{other}"] = overhead(own, times[f"{other} {method}"], floor)
    return found


def show(row: dict[str, Any], clock: str) -> str:
    """A cell as a compact table."""
    columns = ("over_floor", "over_lora", "over_peft", "overhead_over_peft", "overhead_over_peft-own-dtype")
    lines = [f"{Case(**row['case'])}{', compiled' if row['compiled'] else ''}: {clock} time, {row['rounds']} rounds"]
    titles = ("step / floor", "/ our LoRA", "/ PEFT", "overhead / PEFT's", "/ PEFT in base dtype")
    heads = "".join(f"{title:>22}" for title in titles)
    lines.append(f"{'':24}{'ms':>9}{'faults':>8}{heads}")
    for name, values in row[clock].items():
        cells = "".join(
            f"{v['value']:8.3f} [{v['low']:.3f},{v['high']:.3f}]"[:22].rjust(22) if (v := values.get(c)) else " " * 22
            for c in columns
        )
        ms, faults = 1e3 * values["seconds"]["value"], row["minor_faults"][name]
        lines.append(f"{name:24}{ms:9.1f}{faults:8.0f}{cells}")
    return "\n".join(lines)


def main() -> None:
    """Time one cell and print it."""
    parser = argparse.ArgumentParser(prog="benchmarks.step_time", description=__doc__)
    parser.add_argument("--hidden", type=int, default=256)
    parser.add_argument("--dtype", choices=DTYPES, default="fp32")
    parser.add_argument("--methods", default="lora", help=f"of {', '.join(models.METHODS)}; loha@8 for another rank")
    parser.add_argument("--rounds", type=int, default=31)
    parser.add_argument("--least", type=int, default=1, help="times a round, of which the least counts")
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--dropout", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--layers", type=int, default=4)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--compile", action="store_true")
    parser.add_argument("--full", action="store_true", help="full fine-tuning too")
    parser.add_argument("--clock", choices=("cpu", "wall"), default="cpu")
    args = parser.parse_args()
    fixed_allocator()
    case = Case(
        args.hidden, DTYPES[args.dtype], args.rank, args.dropout, args.threads, args.layers,
        tokens=args.tokens, device=args.device,
    )  # fmt: skip
    row = step_cell(case, args.methods.split(","), args.rounds, args.full, args.compile, args.least)
    print(show(row, "wall" if args.device == "cuda" else args.clock))


if __name__ == "__main__":
    main()
