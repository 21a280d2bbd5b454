"""Solvers on factors in the bridge's Trainer."""

from __future__ import annotations

from typing import Any

import pytest
from trainer_models import adapted, arguments, equal, rows, values

import rankwise as rw
import rankwise.hf


@pytest.mark.parametrize("method", ["lora_rite", "riemannion", "lora_fa"])
def test_accumulation_clipping_and_a_schedule(tmp_path, method):
    """Two rows at a time and accumulated are one batch of four; a rate that ends at zero ends in no step."""
    found = []
    for size, parts in ((4, 1), (2, 2)):
        model, adapter = adapted(method=method)
        before = values(adapter)
        args = arguments(
            tmp_path / str(size),
            per_device_train_batch_size=size,
            gradient_accumulation_steps=parts,
            max_grad_norm=0.1,
            lr_scheduler_type="linear",
        )
        trainer = rw.hf.Trainer(model, args, train_dataset=rows())
        trainer.train()
        wrapped: Any = trainer.optimizer  # accelerate's
        optimizer = wrapped.optimizer
        assert optimizer.param_groups[0]["lr"] == 0.0
        after = values(adapter)
        assert not any(equal({n: before[n]}, {n: after[n]}) for n, p in adapter.named_parameters(trainable=True))
        found.append(
            {site: (f["b"] @ f["a"]).detach() for site, f in adapter.items()}
        )  # a retraction leaves signs free
    for site, product in found[0].items():
        assert (product - found[1][site]).norm() <= 1e-3 * product.norm()
