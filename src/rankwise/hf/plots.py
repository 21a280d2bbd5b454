"""Pictures of a run."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.io import atomically


def loss_curve(history: Sequence[Mapping[str, Any]], path: Path, title: str = "") -> None:
    """Draw training and validation loss over steps into a PNG file.

    Args:
        history: rows with "step" and "loss" or "eval_loss", as ``trainer.state.log_history``.
        path: the picture.
        title: above it.

    Raises:
        SaveError: the file cannot be written.
    """
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot(xlabel="step", ylabel="loss (nats)", title=title)
    axes.grid(alpha=0.25)
    points = {key: [(r["step"], r[key]) for r in history if key in r] for key in ("loss", "eval_loss")}
    steps, losses = [step for step, _ in points["loss"]], [loss for _, loss in points["loss"]]
    width = max(2, len(losses) // 20)
    means = [sum(part) / len(part) for part in (losses[max(0, i - width) : i] for i in range(1, len(losses) + 1))]
    axes.plot(steps, losses, color="#9db7d5", linewidth=1, label="training, each step")
    axes.plot(steps, means, color="#1f5a99", linewidth=2, label="training, running mean")
    if points["eval_loss"]:
        axes.plot(*zip(*points["eval_loss"], strict=True), "o-", color="#c8501e", markersize=4, label="validation")
    axes.legend(frameon=False)
    atomically(path, lambda temporary: figure.savefig(temporary, dpi=150, format="png"))
