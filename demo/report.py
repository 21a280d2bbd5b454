"""What the demo prints and draws."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean
from typing import Any

NAMES = {"lora": "LoRA", "dora": "DoRA", "pissa": "PiSSA", "lokr": "LoKr", "oft": "OFT", "full": "full fine-tuning"}


def verdict(mine: Sequence[float], lora: Sequence[float], gain: float) -> str:
    """Say better, worse or tie against LoRA, with the difference and what it is judged by.

    A difference counts when it exceeds both the larger spread of the two over their seeds and 2 % of LoRA's gain.
    """
    difference = mean(mine) - mean(lora)
    margin = max(max(mine) - min(mine), max(lora) - min(lora), 0.02 * gain)
    word = "tie" if abs(difference) <= margin else "better" if difference < 0 else "worse"
    return f"{word} ({difference:+.3f} ± {margin:.3f})"


def rows(found: Mapping[str, Any], start: Mapping[str, float]) -> list[dict[str, Any]]:
    """The table's rows: means over the seeds, and the verdict against LoRA."""
    lora = [s["python"] for s in found["lora"]["seeds"]] if "lora" in found else []
    table = []
    for method, data in found.items():
        seeds = data["seeds"]
        row = {key: mean(s[key] for s in seeds) for key in ("python", "english", "seconds", "memory")}
        judged = lora and method != "lora"
        said = verdict([s["python"] for s in seeds], lora, start["python"] - mean(lora)) if judged else "reference"
        table.append({**row, "method": method, "trained": data["trained"], "lr": data["lr"], "verdict": said})
    return table


def table(found: Sequence[Mapping[str, Any]], start: Mapping[str, float]) -> Any:
    """The comparison as a rich table."""
    from rich.table import Table

    view = Table(title="bits per byte on held-out text, and what it took", title_justify="left")
    for name in ("method", "Python", "English", "trained", "memory", "time", "rate", "against LoRA"):
        view.add_column(name, justify="left" if name in ("method", "against LoRA") else "right", no_wrap=True)
    view.add_row("before", f"{start['python']:.3f}", f"{start['english']:.3f}", *[""] * 5)
    for r in found:
        cells = (f"{r['python']:.3f}", f"{r['english']:.3f}", f"{r['trained']:,}", f"{r['memory']:.0f} MiB")
        view.add_row(
            NAMES.get(r["method"], r["method"]), *cells, f"{r['seconds']:.0f} s", f"{r['lr']:.1e}", r["verdict"]
        )
    return view


def draw(found: Sequence[Mapping[str, Any]], start: Mapping[str, float], data: Mapping[str, Any], path: Path) -> None:
    """Draw the comparison: what each method learned, and what it forgot."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    order = sorted(found, key=lambda r: -r["python"])
    labels = [NAMES.get(r["method"], r["method"]) for r in order]
    figure, axes = pyplot.subplots(1, 2, figsize=(10, 3.6), sharey=True, layout="constrained")
    for axis, key, title in zip(axes, ("python", "english"), ("Python", "English"), strict=True):
        values = [r[key] for r in order]
        axis.barh(labels, values, color=["#9aa5b1" if r["method"] == "full" else "#2f6f9f" for r in order], height=0.62)
        for i, r in enumerate(order):
            dots = [s[key] for s in data[r["method"]]["seeds"]]
            axis.plot(dots, [i] * len(dots), "o", color="#15212b", markersize=4, zorder=3)
            axis.annotate(f" {values[i]:.2f}", (0, i), xycoords=("axes fraction", "data"), va="center", color="white")
        axis.axvline(start[key], color="#c2410c", linestyle="--", label="before adapting")
        low, high = min(*values, start[key]), max(*values, start[key])
        axis.set_xlim(low - 0.3 * (high - low) - 0.02, high + 0.08 * (high - low) + 0.02)
        axis.set_xlabel(f"bits per byte on held-out {title} (lower is better)")
        axis.spines[["top", "right"]].set_visible(False)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)
