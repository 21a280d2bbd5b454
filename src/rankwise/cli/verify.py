"""Whether a written model or adapter computes what it was made from."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import torch
import typer
from torch import Tensor

from rankwise.cli import common
from rankwise.hf.finetune import Run, task_of
from rankwise.hf.tasks import Task

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}


def task_for(model: str, adapter: str) -> tuple[Task, Any]:
    """The task that an adapter was trained on, and the model's tokenizer."""
    told = common.run_of(adapter)
    kept = {k: told[k] for k in ("task", "labels", "max_length") if k in told}
    task = task_of(Run.of({"model": model, "data": "-", "out": "-", **kept}))
    return task, task.processor(model)


@torch.no_grad()
def probe(model: Any) -> Tensor:
    """The model's output on a fixed batch of tokens (2, 32), in float32 on the CPU."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (2, 32), generator=torch.Generator().manual_seed(0))
    pad = getattr(model.config, "pad_token_id", None)
    ids = ids.masked_fill(ids == pad, (pad or 0) + 1) if pad is not None else ids
    mask = torch.ones_like(ids).to(model.device)
    return model(input_ids=ids.to(model.device), attention_mask=mask).logits.float().cpu()


@dataclass(frozen=True)
class Difference:
    """How far two outputs are apart.

    Attributes:
        largest: absolute difference.
        scale: largest absolute value of the first output.
        tolerance: of largest / scale.
    """

    largest: float
    scale: float
    tolerance: float

    @property
    def good(self) -> bool:
        """Whether they count as equal."""
        return self.largest <= self.tolerance * self.scale

    def __str__(self) -> str:
        sign = "within" if self.good else "ABOVE"
        return (
            f"largest difference of outputs on a probe batch {self.largest:.1e} "
            f"(outputs up to {self.scale:.1f}), {sign} {self.tolerance:.0e} of that"
        )


def difference(wanted: Tensor, found: Tensor, model: Any) -> Difference:
    """Compare outputs by the precision of the model's weights."""
    dtype = model.get_input_embeddings().weight.dtype
    apart = float((wanted - found).abs().nan_to_num(float("inf")).max())
    return Difference(apart, float(wanted.abs().max()), TOLERANCE.get(dtype, 5e-2))


def or_exit(outcome: Difference) -> None:
    """Exit with 4 where the verification failed."""
    if not outcome.good:
        print(f"rankwise: verification failed: {outcome}; nothing was kept.", file=sys.stderr)
        raise typer.Exit(4)
