"""Adapt a small forecaster to a series that it never saw: the oil temperature of ETTh1.

    python examples/timeseries/forecast.py --data ETTh1.csv

A patch transformer is trained on the six load columns (no pre-trained one is at hand), then adapted to the seventh,
the oil temperature, with a low-rank adapter. The task is one class, :class:`Forecast`; the rest is
``rankwise.hf.finetune``.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn

from rankwise.hf.finetune import Result, Run, finetune
from rankwise.hf.tasks import Task

PAST, FUTURE, PATCH = 96, 24, 8  # hours
TRAIN, TEST = (0, 8640), (11520, 14400)  # rows: the usual 12 months, and the 4 after 4 of validation
LOADS, TEMPERATURE = (0, 1, 2, 3, 4, 5), (6,)  # columns


class Forecaster(nn.Module):
    """A transformer over patches of one series (PatchTST; Nie et al. 2022, arXiv 2211.14730), with a loss.

    Each window is normalised by its own mean and deviation; the forecast is a change from the last value.
    """

    def __init__(self, width: int = 64, layers: int = 2) -> None:
        super().__init__()
        self.embed = nn.Linear(PATCH, width)
        self.position = nn.Parameter(torch.randn(PAST // PATCH, width) / 50)
        layer = nn.TransformerEncoderLayer(width, 4, 2 * width, 0.0, batch_first=True, norm_first=True)
        self.encoder = nn.TransformerEncoder(layer, layers, enable_nested_tensor=False)
        self.forecast = nn.Linear(PAST // PATCH * width, FUTURE)

    def forward(self, past: Tensor, future: Tensor | None = None) -> dict[str, Tensor]:
        """(batch, 96) to {"loss", "forecast" (batch, 24)}."""
        mean, std = past.mean(1, keepdim=True), past.std(1, keepdim=True) + 0.1
        patches = ((past - mean) / std).unflatten(1, (-1, PATCH))
        hidden = self.encoder(self.embed(patches) + self.position)
        found = past[:, -1:] + std * self.forecast(hidden.flatten(1))
        return {"forecast": found} if future is None else {"loss": (found - future).square().mean(), "forecast": found}


def windows(path: str | Path, columns: Sequence[int], rows: tuple[int, int], stride: int) -> list[dict[str, Tensor]]:
    """Windows of 96 hours and the 24 after them, in deviations of each column's training rows.

    Args:
        path: ETTh1.csv.
        columns: which, without the date.
        rows: first and last + 1 of those that are forecast; the past may reach back before them.
        stride: hours between windows.

    Returns:
        {"past" (96,), "future" (24,)} for each window and column.
    """
    table = np.loadtxt(path, delimiter=",", skiprows=1, usecols=range(1, 8), dtype=np.float32)
    known = table[slice(*TRAIN)]
    series = torch.tensor((table - known.mean(0)) / known.std(0))
    begins = range(max(rows[0] - PAST, 0), rows[1] - PAST - FUTURE + 1, stride)
    cuts = (series[i : i + PAST + FUTURE, c] for c in columns for i in begins)
    return [{"past": cut[:PAST], "future": cut[PAST:]} for cut in cuts]


def collate(rows: Sequence[Mapping[str, Tensor]]) -> dict[str, Tensor]:
    """Windows -> past (batch, 96), future (batch, 24)."""
    return {name: torch.stack([row[name] for row in rows]) for name in ("past", "future")}


def pretrain(path: str | Path, steps: int = 600, batch: int = 64, seed: int = 0) -> Forecaster:
    """A forecaster of the loads, trained from nothing on the training rows.

    Args:
        path: ETTh1.csv.
        steps: of AdamW.
        batch: windows a step.
        seed: of everything drawn.

    Returns:
        The model.
    """
    torch.manual_seed(seed)
    model, examples = Forecaster(), windows(path, LOADS, TRAIN, 1)
    optimizer = torch.optim.AdamW(model.parameters(), 1e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1e-3, total_steps=steps)
    for _ in range(steps):
        chosen = torch.randint(len(examples), (batch,)).tolist()
        optimizer.zero_grad()
        model(**collate([examples[i] for i in chosen]))["loss"].backward()
        optimizer.step()
        schedule.step()
    return model.eval()


@final
@dataclass(frozen=True)
class Forecast(Task):
    """The next day of the oil temperature from the four days before it.

    Attributes:
        stride: hours between windows.
    """

    stride: int = 4
    name = "forecast"

    def processor(self, model: str) -> None:
        return None

    def examples(self, path: str | Path, processor: Any) -> list[dict[str, Tensor]]:
        return [w for rows in (TRAIN, TEST) for w in windows(path, TEMPERATURE, rows, self.stride)]

    def split(self, examples: Any, share: float, seed: int) -> tuple[Any, Any]:
        first = len(range(0, TRAIN[1] - PAST - FUTURE + 1, self.stride))
        return examples[:first], examples[first:]

    def model(self, model: str, examples: Any, processor: Any, **options: Any) -> Forecaster:
        network = Forecaster()
        network.load_state_dict(torch.load(model, map_location="cpu", weights_only=True))
        return network.eval()

    def collator(self, processor: Any) -> Any:
        return collate

    def score(self, model: nn.Module, batches: Iterable[Mapping[str, Tensor]], processor: Any) -> dict[str, float]:
        ours, naive, count = 0.0, 0.0, 0
        for batch in batches:
            past, future = batch["past"], batch["future"]
            ours += float((model(past)["forecast"] - future).square().sum())
            naive += float((past[:, -1:] - future).square().sum())
            count += future.numel()
        return {"mse": ours / count, "loss": ours / count, "last_value": naive / count}


def adapt(base: str, data: str, task: Forecast, out: str, **settings: Any) -> Result:
    """Train an adapter and measure before and after.

    Args:
        base: file of the pre-trained forecaster.
        data: ETTh1.csv.
        task: the rest.
        out: folder for the adapter.
        **settings: of :class:`rankwise.hf.finetune.Run`.

    Returns:
        What it came to.
    """
    common = {"model": base, "data": data, "out": out, "method": "lora", "rank": 4, "lr": 1e-3}
    run = Run.of({**common, "batch": 64, "steps": 200, "saves": 1, **settings})
    return finetune(run, task=task, overwrite=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The script."""
    parser = argparse.ArgumentParser(description="Pre-train a forecaster on loads, adapt it to the oil temperature.")
    parser.add_argument("--data", required=True, help="ETTh1.csv")
    parser.add_argument("--out", default="forecast")
    parser.add_argument("--methods", nargs="+", default=["lora", "dora"])
    parser.add_argument("--rank", type=int, default=4)
    parser.add_argument("--pretrain-steps", type=int, default=600)
    parser.add_argument("--steps", type=int, default=200)
    given = parser.parse_args(arguments)
    base = Path(f"{given.out}-base.pt")
    torch.save(pretrain(given.data, given.pretrain_steps).state_dict(), base)
    for method in given.methods:
        settings = {"method": method, "rank": given.rank, "steps": given.steps}
        found = adapt(str(base), given.data, Forecast(), f"{given.out}-{method}", **settings)
        assert found.before is not None and found.after is not None
        print(
            f"{method:6} mse {found.before['mse']:.4f} -> {found.after['mse']:.4f} (last value "
            f"{found.after['last_value']:.4f}), {found.parameters:,} parameters, {found.seconds:.0f} s"
        )
        print(f"saved {given.out}-{method}", file=sys.stderr)


if __name__ == "__main__":
    main()
