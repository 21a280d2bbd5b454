"""Pictures of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.errors import MissingDependency
from rankwise.io import atomically


def loss_curve(history: Sequence[Mapping[str, Any]], path: str | Path, title: str = "") -> Path:
    """Draw training and validation loss over steps into a PNG file.

    Args:
        history: rows with "step" and "loss" or "eval_loss", as ``trainer.state.log_history``.
        path: the picture.
        title: above it.

    Returns:
        The path.

    Raises:
        MissingDependency: matplotlib is not installed.
        SaveError: the file cannot be written.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError as error:
        raise MissingDependency("pictures need matplotlib: pip install 'rankwise[plot]'") from error
    train = [(r["step"], r["loss"]) for r in history if "loss" in r]
    held = [(r["step"], r["eval_loss"]) for r in history if "eval_loss" in r]
    figure = Figure(figsize=(7, 4), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.add_subplot()
    if train:
        steps, losses = zip(*train, strict=True)
        axes.plot(steps, losses, color="#9db7d5", linewidth=1, label="training, each step")
        if len(train) >= 20:
            smooth = _smoothed(losses, max(2, len(train) // 20))
            axes.plot(steps, smooth, color="#1f5a99", linewidth=2, label="training, running mean")
    if held:
        axes.plot(*zip(*held, strict=True), "o-", color="#c8501e", markersize=4, label="validation")
    axes.set(xlabel="step", ylabel="loss (nats)", title=title)
    axes.grid(alpha=0.25)
    axes.spines[["top", "right"]].set_visible(False)
    axes.xaxis.set_major_locator(MaxNLocator(integer=True))
    if train or held:
        axes.legend(frameon=False)
    target = Path(path)
    atomically(target, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
    return target


def _smoothed(values: Sequence[float], width: int) -> list[float]:
    """The mean over the last ``width`` values at each place."""
    recent = [values[max(0, i - width + 1) : i + 1] for i in range(len(values))]
    return [sum(window) / len(window) for window in recent]
