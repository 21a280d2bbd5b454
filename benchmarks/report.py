"""The page of the manual from results: ``python -m benchmarks.report RESULTS.json [--beside OTHER.json]``.

Writes docs/benchmarks.md, its plots in docs/img and, beside the page, the results that it shows. Those of another
machine have a section of their own.
"""

import argparse
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from benchmarks import criteria
from benchmarks.criteria import clock, judge
from benchmarks.models import Case

DOCS = Path(__file__).parent.parent / "docs"
OURS, THEIRS, GREY = "#3f51b5", "#e07b39", "#9e9e9e"

HEAD = """# Benchmarks

<!-- made by python -m benchmarks.report; measure again, or change benchmarks/, not this page -->

Speed and memory of training against PEFT and full fine-tuning, measured by `{command}` (`make bench` runs the default).
Every table ends with the command that measures it.
"""

HOW = """## How it is measured

- **A step** is forward and backward of a Llama from its configuration (4 layers unless said, feed-forward 2.75
  times as wide, heads of 64, vocabulary 1024, 4 x 128 tokens), all seven linear layers of a block adapted. On a CPU
  one layer stands for four at hidden 1024 and 2048.
- **The floor** is the frozen model with a gradient to its input embeddings; *overhead* is what a method adds to it.
- **One function**: before anything is timed, both libraries hold the same factors and must agree on the loss and on
  the gradient to the input. All variants share one copy of the frozen weights. PEFT is called below its outer
  wrapper, in its favour. PiSSA compares both libraries' own start.
- **Pairs**: all variants of a cell run in one process, in an order drawn anew each round. A variant's entry of a round
  is its time, or the least of two or three (`--least`), since what disturbs a machine only adds. A figure is the
  median over rounds of the ratio inside a round, with its bootstrap 95 % interval; an overhead share is a ratio of
  such medians less one, its rounds drawn together.
- **Clock**: CPU time of the process on one thread, wall time on two or on a GPU. Both are in the results.
- **Allocator**: glibc's thresholds are fixed ({allocator}), since page faults alone can decide a comparison; minor
  faults are in the results.
- **Types**: our factors are float32, on any base, as `rw.attach` makes them. PEFT's are float32 by default; "PEFT,
  base dtype" is `autocast_adapter_dtype=False`.
- **Least arithmetic** of LoRA is 6Tr(M+N) flops a layer beside the base's 4TMN, at the rate at which this machine
  runs the base's own products ("linears").
- **HiRA's bound** is the dense form written out by hand (W' = W + W * BA, three products of T, M, N in a step):
  applying W once for each rank costs r times as much, so the dense form is the cheaper of the two.
"""


def number(value: float) -> str:
    """Three figures."""
    return f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.3g}" if abs(value) < 0.1 else f"{value:.2f}"


def span(found: Mapping[str, float] | None) -> str:
    """A value with its interval, plain where there is no noise."""
    if found is None:
        return ""
    value, low, high = (number(found[k]) for k in ("value", "low", "high"))
    return value if low == high else f"{value} ({low}, {high})"


def table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    """A Markdown table: text to the left, columns of numbers to the right."""
    rows = [list(row) for row in rows]
    line = ["---:" if any(row[i][:1].isdigit() for row in rows) and i else "---" for i in range(len(heads))]
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (list(heads), line, *rows)) + "\n"


def fence(*commands: str) -> str:
    """Commands to type."""
    return "```bash\n" + "\n".join(commands) + "\n```\n"


def of_criteria(results: Mapping[str, Any], only_measured: bool = False) -> str:
    """Every criterion, its bound, the worst cell, and whether it holds; then the commands."""
    rows, found = [], [v for v in judge(results) if v.worst or not only_measured]
    for v in found:
        c, verdict = v.criterion, {None: "not measured", True: "yes", False: "**no**"}[v.holds]
        where, value = v.worst or ("", None)
        high = number(value["high"]) if value else ""
        kept = f"{v.kept} of {v.cells}" if v.cells else ""
        rows.append([c.text, number(c.bound), span(value), high, where, kept, verdict])
    heads = ("criterion", "at most", "worst value (95 %)", "its worse end", "worst cell", "cells kept", "holds")
    commands = sorted({v.criterion.command for v in found if v.worst})
    return table(heads, rows) + ("\n" + fence(*commands) if commands else "")


CRITERIA = """## Criteria

A criterion holds when the worse end of the interval keeps the bound in every cell that it speaks of.

"""
BESIDE = """## On another processor

"""


def of_lora(rows: Sequence[Mapping[str, Any]], title: str, image: str = "") -> str:
    """LoRA in every cell that has only LoRA."""
    body, commands = [], []
    for row in rows:
        found = row[clock(row["case"])]
        if not criteria.of_lora(row):
            continue
        ours = found["rankwise lora"]
        over = [found.get(name, {}).get("over_floor") for name in ("rankwise lora", "peft lora", "full")]
        shares = [ours.get(f"overhead_over_{name}") for name in ("peft", "peft-own-dtype")]
        body.append([str(Case(**row["case"])), *map(span, over), *map(span, shares), span(ours["over_arithmetic"])])
        commands.append(row["command"])
    heads = (
        "cell", "rankwise / floor", "PEFT / floor", "full / floor", "overhead / PEFT's", "/ PEFT, base dtype",
        "overhead / least arithmetic",
    )  # fmt: skip
    return f"## {title}\n\n{image}{table(heads, body)}\n{fence(*commands)}" if body else ""


def of_methods(rows: Sequence[Mapping[str, Any]], image: str = "") -> str:
    """Every method in the cells that compare methods."""
    parts = []
    for row in rows:
        found = row[clock(row["case"])]
        names = [name.removeprefix("rankwise ") for name in found if name.startswith("rankwise ")]
        if len(names) < 2:
            continue
        body = []
        for name in names:
            ours = found[f"rankwise {name}"]
            theirs = found[f"peft {name}"]
            ratios = [ours["over_floor"], theirs["over_floor"], ours["over_peft"], ours.get("over_lora")]
            trained = f"{row['trained'][f'rankwise {name}']:,}"
            body.append([f"`{name}`", *map(span, ratios), span(ours.get("over_bound")), trained])
        heads = ("method", "rankwise / floor", "PEFT / floor", "rankwise / PEFT", "/ our LoRA", "/ bound", "trained")
        parts.append(f"### {Case(**row['case'])}\n\n{table(heads, body)}\n{fence(row['command'])}")
    said = """`loha@8` is LoHa at rank 8, which trains as many parameters as LoRA at 16; `oft` sums five terms of the
series as PEFT does by default, `oft_exact` inverts.

"""
    return "## Methods\n\n" + said + image + "\n".join(parts) if parts else ""


def of_memory(rows: Sequence[Mapping[str, Any]], image: str = "") -> str:
    """Bytes of a step."""
    body = []
    for row in rows:
        case, found = Case(**row["case"]), row["variants"]
        where = f"hidden {case.hidden}, {case.dtype}" + (f", dropout {case.dropout:g}" if case.dropout else "")
        for name, ours in found.items():
            method = name.removeprefix("rankwise ")
            if name == method:
                continue
            mib = [found[f"{who} {method}"]["saved"] / 2**20 for who in ("rankwise", "peft")]
            ratios = [ours.get(f"saved_over_{k}") for k in ("peft", "peft-own-dtype", "full")]
            peaks = [ours.get(f"{k}") for k in ("packed_over_peft", "peak_over_peft", "peak_over_full")]
            cells = ["" if v is None else f"{v:.2f}" for v in (*ratios, *peaks)]
            body.append([where, f"`{method}`", *(f"{v:.1f}" for v in mib), *cells])
    heads = (
        "cell", "method", "rankwise, MiB", "PEFT, MiB", "/ PEFT", "/ PEFT, base dtype", "/ full", "packed / PEFT",
        "peak / PEFT", "peak / full",
    )  # fmt: skip
    said = """Bytes that the graph holds when backward begins: distinct storages of saved tensors, parameters and
buffers aside. *Packed* also counts what forward saved and dropped again. *Peak* is the most that torch's allocator
held during a step over what it held before it (weights aside, gradients within). Bytes carry no noise.

"""
    return (
        f"## Memory\n\n{said}{image}{table(heads, body)}\n{fence('python -m benchmarks --only memory')}" if body else ""
    )


def seconds(found: Mapping[str, Any], names: Mapping[str, str], by: str) -> list[list[str]]:
    """Milliseconds of variants, with the ratio to their counterpart."""
    rows = []
    for name, title in names.items():
        if row := found[by].get(name):
            over = [(k, v) for k, v in row.items() if k.startswith("over")]
            ratio = f"{span(over[0][1])} {over[0][0]}" if over else ""
            rows.append([title, span({k: 1e3 * v for k, v in row["seconds"].items()}), ratio])
    return rows


def of_life(life: Mapping[str, Any] | None) -> str:
    """Attach, switch, optimiser, merge, save, load, start of a process."""
    if life is None:
        return ""
    rows: list[list[str]] = []
    by = clock(life["case"])
    for part in ("attach", "switch", "keep"):
        names = life[part][by]
        rows += seconds(life[part], {n: f"{'attach ' if part == 'attach' else ''}{n}" for n in names}, by)
        if part == "switch":
            rows[-len(names) :] = [[f"adapters attached: {row[0]}", *row[1:]] for row in rows[-len(names) :]]
    for dtype, found in life["optimizer"].items():
        rows += seconds(found, {n: f"optimiser step, {n}, {dtype} base" for n in found[by]}, by)
    start = life["start"]
    rows += [
        [f"new process, wall: {name}", span({k: 1e3 * v for k, v in value.items()}), ""]
        for name, value in start["seconds"].items()
    ]
    size = [f"{life['keep'][f'{who}_file_over_tensors']:.3f}" for who in ("rankwise", "peft")]
    said = f"""
A saved adapter takes {size[0]} of its trained tensors' bytes, PEFT's {size[1]}. `rankwise --help` \
{"imports torch" if start["help_imports_torch"] else "does not import torch"}.

"""
    case = f"Of LoRA on the Llama of {Case(**life['case'])}, unless said; {by} time.\n\n"
    heads = ("what", "milliseconds (95 %)", "ratio")
    return f"## The rest of an adapter's life\n\n{case}{table(heads, rows)}{said}" + fence(
        "python -m benchmarks --only life"
    )


def of_together(rows: Sequence[Mapping[str, Any]]) -> str:
    """k adapters in one batch."""
    body = []
    for row in rows:
        found = row[clock(row["case"])]
        case = Case(**row["case"])
        where = f"{row['k']} adapters x {row['b']} rows of {case.tokens} tokens, {case}"
        body.append([where, *(span(found[n]["over one"]) for n in ("together", "together, one optimizer", "apart"))])
    heads = ("cell", "together / one adapter", "together, one optimiser / one", "one after another / one")
    said = "Forward, backward, optimiser: a batch routed to k adapters by `rw.route`, over one adapter on it.\n\n"
    end = fence("python -m benchmarks --only together")
    return f"## Several adapters in one batch\n\n{said}{table(heads, body)}\n{end}" if body else ""


def conditions(results: Mapping[str, Any]) -> str:
    """The machine, and what speaks against trusting this run."""
    versions = ", ".join(f"{name} {v}" for name, v in results["versions"].items())
    machine = f"{results['machine']} ({results['capability']}), {results['cores']} cores, device {results['device']}"
    lines = [f"Machine: {machine}. Python {results['python']}, {versions}."]
    single = [r for r in results.get("step", ()) if r["case"]["threads"] == 1 and r["case"]["device"] == "cpu"]
    if worst := min((r["cpu_over_wall"] for r in single), default=None):
        lines.append(f"CPU time over wall time of the busiest one-thread cell: {worst:.2f} (1 on an idle machine).")
        if worst < 0.95:
            lines.append("**The machine was busy: do not quote these times.**")
    if "--quick" in results["command"]:
        lines.append("**A quick run: few rounds, small cells; it shows that the harness runs, no more.**")
    lines += [results["note"]] if "note" in results else []
    missing = [g for g in ("step", "compiled", "memory", "life", "together", "where") if g not in results]
    if missing:
        lines.append(f"Not measured in this run: {', '.join(missing)}.")
    return "\n".join(lines) + "\n"


WHERE = """## Where the time goes

Milliseconds of a step on one thread: matrix products, other kernels, and the rest, which is Python and dispatch; each
the least that was seen (`python -m benchmarks.where`). What stands between LoRA and its least arithmetic:

- **Thin products.** Multiplying by A and B adds four products of the width of the rank a layer and two that ride on
  the large ones. They read all of x and of the output's gradient for few operations, and find neither in the cache.
- **Python and dispatch.** A node, the module's call and what the engine does for it cost the same however wide the
  layer is, so they weigh most at 256. PEFT pays as much.

What is gone are the other kernels: the sums of base and correction, casts of x, scaling, dropout's mask, and the sums
of gradients to an input that several layers read.
"""


def of_where(rows: Sequence[Mapping[str, Any]]) -> str:
    """Products, other kernels and the rest, of every variant."""
    if not rows:
        return ""
    kinds = ("step", "products", "others", "rest")
    body = [
        [str(Case(**row["case"])), name, *(number(spent[kind]) for kind in kinds)]
        for row in rows
        for name, spent in row["rows"].items()
    ]
    return WHERE + "\n" + table(["cell", "", *kinds], body)


def verdicts(results: Mapping[str, Any]) -> str:
    """The criteria as lines for a terminal."""
    marks = {None: "?", True: "ok", False: "MISSED"}
    return "\n".join(
        f"{marks[v.holds]:7}{v.criterion.text}: at most {number(v.criterion.bound)}"
        + (f", worst {span(v.worst[1])} at {v.worst[0]}" if v.worst else ", not measured")
        for v in judge(results)
    )


def bars(path: Path, title: str, labels: Sequence[str], series: Mapping[str, Sequence[float | None]]) -> str:
    """Grouped bars, written as PNG; returns the Markdown that shows them."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 3.6), layout="constrained")
    axes = figure.subplots()
    width = 0.8 / len(series)
    for i, ((name, values), colour) in enumerate(zip(series.items(), (OURS, THEIRS, GREY), strict=False)):
        places = [k + (i - (len(series) - 1) / 2) * width for k, v in enumerate(values) if v is not None]
        axes.bar(places, [v for v in values if v is not None], width, label=name, color=colour)
    axes.set_xticks(range(len(labels)), labels, fontsize=8)
    axes.set_title(title, fontsize=10)
    axes.spines[["top", "right"]].set_visible(False)
    axes.legend(frameon=False, fontsize=8)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    return f"![{title}](img/{path.name})\n\n"


def plots(results: Mapping[str, Any], folder: Path) -> dict[str, str]:
    """One picture a section, as Markdown by section."""
    found: dict[str, str] = {}
    single = [r for r in results.get("step", ()) if r["case"]["threads"] == 1]
    methods = [r for r in single if not criteria.of_lora(r)]
    plain = [r for r in single if r not in methods and r["case"]["rank"] == 16 and not r["case"]["dropout"]]
    if plain:
        over = {
            label: [100 * (r[clock(r["case"])][f"{who} lora"]["over_floor"]["value"] - 1) for r in plain]
            for label, who in {"rankwise": "rankwise", "PEFT": "peft"}.items()
        }
        labels = [f"{r['case']['hidden']}\n{r['case']['dtype']}" for r in plain]
        title = "LoRA: time added to the floor's step, percent, one thread"
        found["lora"] = bars(folder / "benchmark-lora.png", title, labels, over)
    if methods:
        values = methods[0][clock(methods[0]["case"])]
        names = [n.removeprefix("rankwise ") for n in values if n.startswith("rankwise ")]
        over = {
            label: [values[f"{who} {n}"]["over_floor"]["value"] for n in names]
            for label, who in {"rankwise": "rankwise", "PEFT": "peft"}.items()
        }
        title = f"Step over the floor, {Case(**methods[0]['case'])}"
        found["methods"] = bars(folder / "benchmark-methods.png", title, names, over)
    if rows := [r for r in results.get("memory", ()) if r["case"]["dtype"] == "bfloat16"]:
        row = rows[0]["variants"]
        names = [n.removeprefix("rankwise ") for n in row if n.startswith("rankwise ")]
        series = {
            label: [row[f"{who} {n}"]["saved"] / row["full"]["saved"] for n in names]
            for label, who in {"rankwise": "rankwise", "PEFT": "peft"}.items()
        }
        title = f"Saved for backward over full fine-tuning, hidden {rows[0]['case']['hidden']}, bfloat16"
        found["memory"] = bars(folder / "benchmark-memory.png", title, names, series)
    return found


def write(results: Mapping[str, Any], page: Path, images: Path, beside: Mapping[str, Any] | None = None) -> None:
    """The page and its plots; ``beside`` are results of another machine."""
    shown = plots(results, images)
    allocator = ", ".join(f"`{k}={v}`" for k, v in results["allocator"].items())
    step = results.get("step", ())
    parts = [
        HEAD.format(command=results["command"]), conditions(results), CRITERIA + of_criteria(results),
        beside and BESIDE + conditions(beside) + "\n" + of_criteria(beside, only_measured=True),
        beside and of_lora(beside.get("step", ()), "LoRA on that processor"),
        of_lora(step, "LoRA", shown.get("lora", "")), of_methods(step, shown.get("methods", "")),
        of_lora(results.get("compiled", ()), "Compiled"), of_memory(results.get("memory", ()), shown.get("memory", "")),
        of_life(results.get("life")), of_together(results.get("together", ())),
        of_where(results.get("where", ())), HOW.format(allocator=allocator),
    ]  # fmt: skip
    page.write_text("\n".join(part for part in parts if part))


def main() -> None:
    """Make the manual's page."""
    parser = argparse.ArgumentParser(prog="benchmarks.report", description=__doc__)
    parser.add_argument("results", type=Path)
    parser.add_argument("--beside", type=Path, help="results of another machine")
    args = parser.parse_args()
    results, beside = (path and json.loads(path.read_text()) for path in (args.results, args.beside))
    write(results, DOCS / "benchmarks.md", DOCS / "img", beside)
    for name, kept in (("benchmarks", results), ("benchmarks-beside", beside)):
        if kept is not None:
            (DOCS / f"{name}.json").write_text(json.dumps(kept, indent=1) + "\n")


if __name__ == "__main__":
    main()
