"""A written model or adapter is kept only if it computes what it was made from."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import typer
from torch import Tensor

from rankwise.hf.folder import claimed

TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 3e-2, torch.float16: 5e-3}  # of the largest output


@contextmanager
def whole(out: str, overwrite: bool) -> Iterator[Path]:
    """A temporary folder, whose files move to ``out`` when nothing was raised."""
    with claimed(out, overwrite=overwrite) as folder, TemporaryDirectory(prefix=".", dir=folder) as partial:
        yield Path(partial)
        for file in Path(partial).iterdir():
            file.replace(folder / file.name)


@torch.no_grad()
def probe(model: Any) -> Tensor:
    """The model's output on a fixed batch of tokens (2, 32), in float32 on the CPU."""
    vocabulary = model.get_input_embeddings().weight.shape[0]
    ids = torch.randint(vocabulary, (2, 32), generator=torch.Generator().manual_seed(0))
    pad = model.config.pad_token_id
    ids = ids.masked_fill(ids == pad, (pad or 0) + 1) if pad is not None else ids
    return model(input_ids=ids.to(model.device)).logits.float().cpu()


def difference(wanted: Tensor, model: Any, exact: bool = True) -> str:
    """How far the model's output is from the wanted one, in words; exits with 4 where that is too far for the same."""
    found = probe(model)
    apart = float((wanted - found).abs().nan_to_num(float("inf")).max() / wanted.abs().max())
    limit = TOLERANCE[model.get_input_embeddings().weight.dtype]
    said = f"outputs on a probe batch differ by {apart:.1e} of the largest; as equal counts {limit:.0e}"
    if exact and apart > limit:
        print(f"rankwise: verification failed: {said}; nothing was kept.", file=sys.stderr)
        raise typer.Exit(4)
    return said
