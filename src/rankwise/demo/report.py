"""What the demo prints and draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

NAMES = {
    "lora": "LoRA",
    "dora": "DoRA",
    "pissa": "PiSSA",
    "lokr": "LoKr",
    "oft": "OFT",
    "full": "full fine-tuning",
    "scratch": "from random weights",
}


@dataclass(frozen=True)
class Row:
    """One method of the comparison; bits per byte are means over the seeds.

    Attributes:
        method: its name.
        python: bits per byte on held-out Python.
        spread: largest minus smallest of the seeds.
        english: bits per byte on held-out English, after adapting.
        trained: trained parameters.
        memory: peak memory over the resident base, MiB.
        seconds: of one training run.
        lr: learning rate chosen on the validation split.
        verdict: against LoRA.
    """

    method: str
    python: float
    spread: float
    english: float
    trained: int
    memory: float
    seconds: float
    lr: float
    verdict: str


def verdict(mine: Sequence[float], lora: Sequence[float], gain: float) -> str:
    """Say better, worse or tie against LoRA, with the difference and what it is judged by.

    A difference counts when it exceeds both the larger spread of the two over their seeds and 2 %
    of what LoRA gained.
    """
    difference = sum(mine) / len(mine) - sum(lora) / len(lora)
    margin = max(max(mine) - min(mine), max(lora) - min(lora), 0.02 * gain)
    word = "tie" if abs(difference) <= margin else "better" if difference < 0 else "worse"
    return f"{word} ({difference:+.3f}, margin {margin:.3f})"


def rows(found: Mapping[str, Any], start: Mapping[str, float]) -> list[Row]:
    """The table's rows, in the order of ``found``."""
    seeds = {m: [s["python"] for s in d["seeds"]] for m, d in found.items()}
    mean = {m: sum(v) / len(v) for m, v in seeds.items()}
    table = []
    for method, data in found.items():
        runs = data["seeds"]
        judged = "reference"
        if method != "lora" and "lora" in seeds:
            judged = verdict(seeds[method], seeds["lora"], start["python"] - mean["lora"])
        table.append(
            Row(
                method,
                mean[method],
                max(seeds[method]) - min(seeds[method]),
                sum(r["english"] for r in runs) / len(runs),
                data["trained"],
                max(r["memory"] for r in runs),
                sum(r["seconds"] for r in runs) / len(runs),
                data["lr"],
                judged,
            )
        )
    return table


def table(found: Sequence[Row], start: Mapping[str, float]) -> Any:
    """The comparison as a rich table."""
    from rich.table import Table

    view = Table(title="Adapting the embedded English model to Python", title_justify="left")
    for name in (
        "method",
        "Python bits/byte",
        "English bits/byte",
        "trained",
        "memory",
        "time",
        "rate",
        "against LoRA",
    ):
        view.add_column(
            name, justify="left" if name in ("method", "against LoRA") else "right", no_wrap=True
        )
    view.add_row("before", f"{start['python']:.3f}", f"{start['english']:.3f}", "", "", "", "", "")
    for r in found:
        view.add_row(
            NAMES.get(r.method, r.method),
            f"{r.python:.3f}",
            f"{r.english:.3f}",
            f"{r.trained:,}",
            f"{r.memory:.0f} MiB",
            f"{r.seconds:.0f} s",
            f"{r.lr:.1e}",
            r.verdict,
        )
    return view


def draw(
    found: Sequence[Row], start: Mapping[str, float], data: Mapping[str, Any], path: Path
) -> None:
    """Draw the comparison: what each method learned, and what it forgot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    order = sorted(found, key=lambda r: r.python, reverse=True)
    labels = [NAMES.get(r.method, r.method) for r in order]
    figure, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    colours = ["#9aa5b1" if r.method == "full" else "#2f6f9f" for r in order]
    for axis, key, title in (
        (left, "python", "held-out Python"),
        (right, "english", "held-out English"),
    ):
        values = [getattr(r, key) for r in order]
        axis.barh(labels, values, color=colours, height=0.62)
        for i, r in enumerate(order):
            dots = [s[key] for s in data[r.method]["seeds"]]
            axis.plot(dots, [i] * len(dots), "o", color="#15212b", markersize=4, zorder=3)
            axis.annotate(
                f"{values[i]:.2f}",
                (0.02, i),
                xycoords=("axes fraction", "data"),
                va="center",
                color="white",
                fontsize=9,
            )
        axis.axvline(start[key], color="#c2410c", linewidth=1.5, linestyle="--")
        axis.annotate(
            "before",
            (start[key], len(order) - 0.45),
            color="#c2410c",
            fontsize=9,
            ha="center",
            annotation_clip=False,
        )
        low = min(*values, start[key])
        high = max(*values, start[key])
        axis.set_xlim(low - 0.25 * (high - low) - 0.05, high + 0.08 * (high - low) + 0.02)
        axis.set_xlabel(f"bits per byte on {title} (lower is better)")
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
        axis.tick_params(axis="y", length=0)
    figure.savefig(path, dpi=150)
    plt.close(figure)
