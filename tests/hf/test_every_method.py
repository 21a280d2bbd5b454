"""Every method of the catalogue trains under the Trainer, from its own start and through a warm-up at rate 0."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from trainer_models import arguments, llama, rows

import rankwise as rw
from rankwise.errors import RankError
from rankwise.methods import catalogue

# what a model of width 32 asks for beside a rank of 4
SMALL: dict[str, dict[str, Any]] = {
    "adalora": {"budget": 4.0},
    "alora_alloc": {"most": 6},
    "fourierft": {"count": 50},
    "gralora": {"blocks": 2},
    "mora": {"rank": 2},
    "prolora": {"unshared": 1},
    "vblora": {"length": 8, "vectors": 16},
    "waveft": {"count": 50},
}


def made(name: str) -> rw.Recipe:
    """The method at rank 4 where it has one."""
    rank = {"rank": 4} if isinstance(catalogue()[name].options.get("rank"), int) else {}
    return rw.recipe(name, **{**rank, **SMALL.get(name, {})})


@pytest.mark.parametrize("name", catalogue())
def test_it_trains_from_its_start(name, tmp_path):
    torch.manual_seed(0)
    model = llama()
    try:
        recipe = made(name)
        batch = {"input_ids": torch.arange(16).view(2, 8), "labels": torch.arange(16).view(2, 8)}
        stats = rw.collect(model, [batch], recipe) if recipe.init.needs else None
        adapter = rw.attach(model, recipe, stats=stats)
    except RankError as error:
        pytest.fail(f"give {name} small options in SMALL: {error}")
    before = {key: p.detach().clone() for key, p in adapter.named_parameters(trainable=True)}
    settings = arguments(tmp_path, max_steps=5, warmup_steps=2, save_strategy="no")
    rw.hf.Trainer(model, settings, train_dataset=rows()).train()
    after = dict(adapter.named_parameters(trainable=True))
    still = [key for key, p in after.items() if p.numel() and torch.equal(p, before[key])]
    assert not still and all(p.isfinite().all() for p in after.values())
