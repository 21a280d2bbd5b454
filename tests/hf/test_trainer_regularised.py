"""rw.hf.Trainer under penalties: it resumes to the bit, takes SAM's two gradients, and saves what is served."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors import safe_open
from trainer_models import adapted, arguments, equal, llama, rows, values

import rankwise as rw
import rankwise.hf
from rankwise.errors import TrainingError
from rankwise.penalties import Balance, Dropout, MaxNorm, Sharpness, backward
from rankwise.steps import STEPS


def trainer(model: Any, folder: Path, **changes: Any) -> rw.hf.Trainer:
    return rw.hf.Trainer(model, arguments(folder, **changes), train_dataset=rows())


METHODS = {
    "bar": {"steps": 5, "strength": 50.0},
    "lora_sam": {"rho": 0.5},
    "flat_lora": {"steps": 5, "sigma": 0.5},
    "bi_lora": {"rho": 0.3},
    "lora_dropout": {},
    "hidden_key": {},
    "salora_struct": {"budget": 2.0},
    "autolora": {},
}


def names(folder: Path) -> list[str]:
    with safe_open(folder / "adapter.safetensors", framework="pt") as archive:
        return list(archive.keys())


@pytest.mark.parametrize("method", METHODS)
def test_resuming_is_bit_exact(tmp_path, method):
    options = METHODS[method]
    changes = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "gradient_accumulation_steps": 2}
    model, adapter = adapted(method=method, **options)
    run = trainer(model, tmp_path, **changes)
    run.train()
    twin, other = adapted(method=method, **options)
    for p in other.parameters():
        torch.nn.init.ones_(p)
    trainer(twin, tmp_path, **changes).train(str(tmp_path / "checkpoint-3"))
    assert equal(values(adapter), values(other))
    plain, third = adapted(penalties=(), dropout=0.0)
    trainer(plain, tmp_path / "plain", **changes | {"save_strategy": "no"}).train()
    ours = values(adapter)
    assert any((ours[name] - value).abs().max() > 1e-4 for name, value in values(third).items())

    run.save_model(str(tmp_path / "out"))
    assert not any("adversary" in name for name in names(tmp_path / "out"))
    assert any("adversary" in name for name in names(tmp_path / "checkpoint-3")) == (method == "bi_lora")
    bare = llama()
    rw.load(bare, tmp_path / "out")
    ids = torch.tensor([rows(1)[0]["input_ids"]])
    assert torch.equal(bare(ids).logits, model.eval()(ids).logits)
    checkpointed = llama()
    rw.load(checkpointed, tmp_path / "checkpoint-5")
    assert torch.equal(checkpointed(ids).logits, bare(ids).logits)


@pytest.mark.parametrize("method", ["lora_sam", "flat_lora", "bi_lora"])
def test_a_step_of_the_trainer_is_that_of_a_plain_loop(tmp_path, method):
    data = rows(2)
    options = METHODS[method] | ({"steps": None} if method == "flat_lora" else {})
    changes = {"max_steps": 2, "max_grad_norm": 0.0, "lr_scheduler_type": "constant", "learning_rate": 1e-2}
    model, adapter = adapted(moved=True, method=method, **options)
    run = rw.hf.Trainer(model, arguments(tmp_path, **changes), train_dataset=data)
    run.train()
    twin, other = adapted(moved=True, method=method, **options)
    twin.train()
    optimizer = other.optimizer(lr=1e-2)
    ids = torch.tensor([row["input_ids"] for row in data])
    for step in range(2):
        optimizer.zero_grad()
        backward(other, lambda: twin(input_ids=ids, labels=ids).loss, step)
        optimizer.step()
    theirs = values(other)
    for name, value in values(adapter).items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-3, atol=1e-5)


def test_penalties_act_once_a_step_and_after_clipping(tmp_path):
    model, adapter = adapted(moved=True, penalties=(MaxNorm(0.05), Balance("size", 1.0, 4)))
    run = trainer(model, tmp_path, gradient_accumulation_steps=4)
    run.train()
    assert run.optimizer.param_groups[0][STEPS] == 3
    sizes = [(f["b"] @ f["a"]).norm().item() for f in adapter.values()]
    assert max(sizes) == pytest.approx(0.05, rel=1e-4)


def test_activation_checkpointing_draws_the_same_masks(tmp_path):
    found = []
    for gradient_checkpointing in (False, True):
        model, adapter = adapted(moved=True, dropout=Dropout(0.4))
        more = {"gradient_checkpointing_kwargs": {"use_reentrant": False}} if gradient_checkpointing else {}
        trainer(model, tmp_path, gradient_checkpointing=gradient_checkpointing, **more).train()
        found.append(values(adapter))
    assert equal(*found)


def test_an_online_trainer_refuses_to_run_a_batch_twice(tmp_path):
    class Online(transformers.Trainer):
        def __init__(self, model: Any, args: Any, reward_funcs: Any = None) -> None:
            raise AssertionError("it should not come so far")

    class Ours(rw.hf.AdapterMixin, Online):
        pass

    model, _ = adapted(penalties=(Sharpness(),))
    with pytest.raises(TrainingError, match="online"):
        Ours(model, arguments(tmp_path), reward_funcs=len)
