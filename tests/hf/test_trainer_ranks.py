"""Rank plans under the Trainer: carried out, saved and resumed to the bit."""

from __future__ import annotations

import contextlib
from typing import Any

import pytest
import torch
from torch.optim.lr_scheduler import LambdaLR
from trainer_models import adapted, arguments, equal, llama, rows, values
from transformers import TrainerCallback

import rankwise as rw
import rankwise.hf
from rankwise.ranks import ablations, carry_out, jagged_cosine, reallocated
from rankwise.steps import STEPS

METHODS: dict[str, dict[str, Any]] = {
    "adalora": {"budget": 2, "steps": 7, "warmup": 1, "final": 2},
    "dylora": {},
    "sora": {"threshold": 0.01},
    "relora": {"every": 2, "prune": 0.9},
    "cola_chain": {"every": 2, "links": 2},
    "periodic_lora": {"every": 2, "keep": 0.5},
    "xgblora": {"every": 2, "blocks": 1, "links": 8},
    "delta_lora": {"start": 3},
    "scalora": {"every": 2},
    "prilora": {"every": 2},
}


def trainer(model: Any, folder: Any, **changes: Any) -> rw.hf.Trainer:
    options = {key: changes.pop(key) for key in ("optimizers",) if key in changes}
    args = arguments(folder, max_steps=7, save_strategy="steps", save_steps=3, **changes)
    return rw.hf.Trainer(model, args, train_dataset=rows(), **options)


@pytest.mark.parametrize("method", METHODS)
def test_stopping_and_resuming_is_bit_exact(tmp_path, method):
    dropout = {} if method == "delta_lora" else {"dropout": 0.2}
    model, adapter = adapted(method=method, **METHODS[method], **dropout)
    trainer(model, tmp_path).train()
    twin, other = adapted(method=method, **METHODS[method], **dropout)
    for p in other.parameters(trainable=False):
        torch.nn.init.ones_(p)
    run = trainer(twin, tmp_path)
    run.train(str(tmp_path / "checkpoint-3"))
    assert equal(values(adapter), values(other))
    assert run.optimizer.optimizer.param_groups[0][STEPS] == 7
    assert equal(values(adapter), values(rw.load(llama(), tmp_path / "checkpoint-7")))


@pytest.mark.parametrize("method", METHODS)
def test_a_plan_changes_what_is_trained(tmp_path, method):
    """The same run without its plan ends elsewhere."""
    model, adapter = adapted(method=method, **METHODS[method])
    plain, other = adapted(method=method, **METHODS[method])
    other.recipe = other.recipe.with_(ranks=rw.Recipe(other.recipe.structure).ranks)
    for one, folder in ((model, "one"), (plain, "two")):
        trainer(one, tmp_path / folder).train()
    assert not equal(values(adapter), values(other))


class Moving(TrainerCallback):
    """ALoRA's: every second step two components move."""

    def __init__(self, adapter: Any) -> None:
        self.adapter, self.ids = adapter, torch.tensor([row["input_ids"] for row in rows(4)])

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step % 2:
            return
        sites, model = self.adapter.sites.values(), self.adapter.model.eval()
        scores = ablations(sites, lambda: model(input_ids=self.ids, labels=self.ids).loss)
        memory = kwargs["optimizer"].state
        carry_out(sites, reallocated(sites, scores, 2, memory, state.global_step), kwargs["optimizer"])
        model.train()


def test_components_that_move_in_a_callback_are_saved_and_resumed(tmp_path):
    def run(folder: Any = None) -> Any:
        model, adapter = adapted(method="alora_alloc", most=6)
        train = trainer(model, tmp_path)
        train.add_callback(Moving(adapter))
        train.train(folder)
        return adapter

    one = run()
    two = run(str(tmp_path / "checkpoint-3"))
    assert equal(values(one), values(two))
    opened = [int(f["e"].sum()) for f in one.values()]
    assert len(set(opened)) > 1
    assert sum(opened) == 4 * len(opened)
    assert equal(values(one), values(rw.load(llama(), tmp_path / "checkpoint-7")))


@contextlib.contextmanager
def own_optimizer(adapter: Any) -> Any:
    optimizer = adapter.optimizer()
    yield optimizer, LambdaLR(optimizer, jagged_cosine(7, 3, warmup=1, again=1))


def test_a_schedule_of_ones_own_with_the_adapters_optimizer(tmp_path):
    model, adapter = adapted(method="relora", every=3)
    with own_optimizer(adapter) as (optimizer, schedule):
        run = trainer(model, tmp_path, optimizers=(optimizer, schedule))
        run.train()
    assert optimizer.param_groups[0][STEPS] == 7
    rates = [row["learning_rate"] for row in run.state.log_history if "learning_rate" in row]
    assert rates[0] == 0
    assert rates[3] == 0
    assert min(rates[1:3]) > 0
    assert adapter[next(iter(adapter))]["past"].any()


def test_a_chain_beside_the_layers_that_read_the_same_tensor():
    """In training mode q, k and v run as one node: before a restart, after it, and merged, the loss is one."""
    model, adapter = adapted(method="cola_chain", moved=True, every=1, links=2)
    ids = torch.tensor([row["input_ids"] for row in rows(8)])
    optimizer = adapter.optimizer(0.0)  # steps that do nothing but restart
    model.train()
    losses = []
    for _ in range(3):
        losses.append(model(input_ids=ids, labels=ids).loss)
        losses[-1].backward()
        optimizer.step()
    assert all(f["past_b"].any(0).sum() == 4 for f in adapter.values())
    torch.testing.assert_close(losses[1], losses[0], rtol=0, atol=1e-6)
    torch.testing.assert_close(losses[2], losses[0], rtol=0, atol=1e-6)
    with rw.merged(model):
        torch.testing.assert_close(model(input_ids=ids, labels=ids).loss, losses[0], rtol=0, atol=1e-5)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing.*:FutureWarning")  # PEFT 0.21 asks for it
def test_a_chain_is_exported_as_lora_of_the_summed_rank(tmp_path):
    peft = pytest.importorskip("peft")
    model, adapter = adapted(method="cola_chain", moved=True, links=2)
    for factors in adapter.values():
        torch.nn.init.normal_(factors["past_a"], std=0.2)
        torch.nn.init.normal_(factors["past_b"], std=0.2)
    rw.export(adapter, tmp_path, to="peft")
    theirs: Any = peft.PeftModel.from_pretrained(llama(), str(tmp_path))
    assert theirs.peft_config["default"].r == 12
    ids = torch.tensor([rows(1)[0]["input_ids"]])
    torch.testing.assert_close(theirs(ids).logits, model(ids).logits, rtol=0, atol=1e-5)
