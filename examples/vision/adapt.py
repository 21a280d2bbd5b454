"""Adapt a ResNet-20 trained on CIFAR-10 to handwritten digits: LoRA on its convolutions.

    python examples/vision/adapt.py --weights resnet20-12fca82f.th \
        --images t10k-images-idx3-ubyte.gz --labels t10k-labels-idx1-ubyte.gz

The task is one class, :class:`Digits`; the rest is ``rankwise.hf.finetune``. The convolutions are frozen and get
LoRA, the classifier (64 x 10) is trained whole; both are in the one saved adapter.
"""

from __future__ import annotations

import argparse
import gzip
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, final

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, interpolate, pad, relu

from rankwise import Sites
from rankwise.hf.finetune import Result, Run, finetune
from rankwise.hf.tasks import Task

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # the checkpoint's own normalisation


class Block(nn.Module):
    """Two 3 x 3 convolutions around which x passes; where the width grows, with zeros added (option A)."""

    def __init__(self, before: int, after: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(before, after, 3, after // before, padding=1, bias=False)
        self.conv2 = nn.Conv2d(after, after, 3, padding=1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(after), nn.BatchNorm2d(after)
        self.grows = after - before

    def forward(self, x: Tensor) -> Tensor:
        """(batch, before, h, w) -> (batch, after, h', w')."""
        y = self.bn2(self.conv2(relu(self.bn1(self.conv1(x)))))
        if self.grows:
            x = pad(x[:, :, ::2, ::2], (0, 0, 0, 0, self.grows // 2, self.grows // 2))
        return relu(y + x)


class ResNet20(nn.Module):
    """The CIFAR ResNet-20 of He et al. 2015 (arXiv 1512.03385), with a loss."""

    main_input_name = "pixels"

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.bn1 = nn.Conv2d(3, 16, 3, padding=1, bias=False), nn.BatchNorm2d(16)
        widths = (16, 16, 32, 64)
        stages = [
            nn.Sequential(Block(a, b), Block(b, b), Block(b, b)) for a, b in zip(widths, widths[1:], strict=False)
        ]
        self.layer1, self.layer2, self.layer3 = stages
        self.linear = nn.Linear(64, 10)

    def forward(self, pixels: Tensor, labels: Tensor | None = None) -> dict[str, Tensor]:
        """(batch, 3, 32, 32) to {"loss", "logits" (batch, 10)}."""
        x = self.layer3(self.layer2(self.layer1(relu(self.bn1(self.conv1(pixels))))))
        logits = self.linear(x.mean((2, 3)))
        return {"logits": logits} if labels is None else {"loss": cross_entropy(logits, labels), "logits": logits}


def idx(path: str | Path) -> np.ndarray:
    """An array from a gzipped IDX file: a header of big-endian sizes, then bytes."""
    with gzip.open(path) as file:
        raw = file.read()
    dims = raw[3]
    return np.frombuffer(raw, np.uint8, offset=4 + 4 * dims).reshape(np.frombuffer(raw, ">u4", dims, 4))


@final
@dataclass(frozen=True)
class Digits(Task):
    """Images of digits, 28 x 28 grey, for a network that saw colour photographs of 32 x 32.

    Attributes:
        labels: IDX file of the labels.
        train: how many of the first images to learn from.
        test: how many of the last ones to measure on.
        convolutions: whether they are adapted; otherwise the classifier alone is trained.
    """

    labels: str
    train: int = 2000
    test: int = 1000
    convolutions: bool = True
    name = "digits"

    def processor(self, model: str) -> None:
        return None

    def examples(self, path: str | Path, processor: Any) -> list[dict[str, Any]]:
        images, labels = torch.tensor(idx(path)), idx(self.labels).astype(int)
        chosen = [*range(self.train), *range(len(images) - self.test, len(images))]
        return [{"pixels": images[i], "labels": int(labels[i])} for i in chosen]

    def split(self, examples: Any, share: float, seed: int) -> tuple[Any, Any]:
        return examples[: self.train], examples[self.train :]

    def model(self, model: str, examples: Any, processor: Any, **options: Any) -> ResNet20:
        saved = torch.load(model, map_location="cpu", weights_only=True)["state_dict"]
        network = ResNet20()
        network.load_state_dict({name.removeprefix("module."): value for name, value in saved.items()})
        with torch.random.fork_rng():
            torch.manual_seed(0)
            network.linear.reset_parameters()  # ten other classes: their scores mean nothing here
        return network.eval()

    def collator(self, processor: Any) -> Any:
        return collate

    def sites(self, sites: Sites, model: nn.Module) -> Sites:
        where = Sites(targets=nn.Conv2d if self.convolutions else (), train="linear")
        return replace(sites, targets=where.targets, train=where.train)

    def score(self, model: nn.Module, batches: Iterable[Mapping[str, Any]], processor: Any) -> dict[str, float]:
        loss, right, count = 0.0, 0, 0
        for batch in batches:
            labels, found = batch["labels"], model(**batch)
            loss += float(found["loss"]) * len(labels)
            right += int((found["logits"].argmax(-1) == labels).sum())
            count += len(labels)
        return {"accuracy": right / count, "loss": loss / count}


def collate(rows: Sequence[Mapping[str, Any]]) -> dict[str, Tensor]:
    """Bytes (28, 28) each -> pixels (batch, 3, 32, 32), normalised, and labels (batch,)."""
    grey = torch.stack([row["pixels"] for row in rows]).unsqueeze(1).float() / 255
    grown = interpolate(grey, size=(32, 32), mode="bilinear", align_corners=False)
    mean, std = (torch.tensor(values).view(1, 3, 1, 1) for values in (MEAN, STD))
    return {"pixels": (grown - mean) / std, "labels": torch.tensor([row["labels"] for row in rows])}


def adapt(weights: str, images: str, task: Digits, out: str, **settings: Any) -> Result:
    """Train an adapter and measure before and after.

    Args:
        weights: the checkpoint.
        images: IDX file of the images.
        task: the rest.
        out: folder for the adapter.
        **settings: of :class:`rankwise.hf.finetune.Run`.

    Returns:
        What it came to.
    """
    common = {"model": weights, "data": images, "out": out, "method": "lora", "rank": 8, "lr": 1e-2}
    run = Run.of({**common, "batch": 25, "epochs": 1.5, "saves": 1, **settings})
    return finetune(run, task=task, overwrite=True)


def main(arguments: Sequence[str] | None = None) -> None:
    """The script."""
    parser = argparse.ArgumentParser(description="Adapt a CIFAR-10 ResNet-20 to MNIST with LoRA on convolutions.")
    for name in ("weights", "images", "labels"):
        parser.add_argument(f"--{name}", required=True)
    parser.add_argument("--out", default="digits")
    parser.add_argument("--method", default="lora")
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--epochs", type=float, default=1.5)
    parser.add_argument("--train", type=int, default=2000, help="images to learn from")
    parser.add_argument("--test", type=int, default=1000, help="images to measure on")
    given = parser.parse_args(arguments)
    settings = {"method": given.method, "rank": given.rank, "epochs": given.epochs}
    for convolutions in (False, True):
        task = Digits(given.labels, given.train, given.test, convolutions)
        kind = f"{given.method} on convolutions" if convolutions else "classifier alone"
        out, lr = (given.out, 1e-2) if convolutions else (f"{given.out}-classifier", 3e-2)  # its best, of 1e-2, 3e-2
        found = adapt(given.weights, given.images, task, out, lr=lr, **settings)
        assert found.before is not None and found.after is not None
        print(
            f"{kind:24} accuracy {found.before['accuracy']:.3f} -> {found.after['accuracy']:.3f}, "
            f"{found.parameters:,} parameters, {found.seconds:.0f} s"
        )
    print(f"saved {given.out}", file=sys.stderr)


if __name__ == "__main__":
    main()
