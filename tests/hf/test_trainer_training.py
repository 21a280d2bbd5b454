"""rw.hf.Trainer: one learning rate, penalties, rank plans, saving and resuming."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor
from trainer_models import adapted, arguments, equal, llama, nf4, rows, tokenizer, values

import rankwise as rw
import rankwise.hf
from rankwise.adapter import SiteFactors
from rankwise.errors import AttachError, FileFormatError, ModelTypeError, TrainingError
from rankwise.ranks import Plan, Ranks, masked, scores
from rankwise.ranks.ranks import Memory
from rankwise.solvers import AdamW


def trainer(model: Any, folder: Path, lr: float | None = None, **changes: Any) -> rw.hf.Trainer:
    evaluation = rows(4) if "eval_strategy" in changes else None
    args = arguments(folder, **changes)
    return rw.hf.Trainer(model, args, lr=lr, train_dataset=rows(), eval_dataset=evaluation)


def test_the_bridge_imports_nothing_heavy():
    code = "import sys, rankwise.hf as hf; print('transformers' in sys.modules, sorted(dir(hf)) != 0)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.split()[0] == "False"


def test_reference_is_the_function_whatever_was_imported_first():
    assert callable(rw.hf.reference)
    assert not hasattr(rw.hf, "nothing")


# -- one learning rate ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("lr", "given", "expected", "chooser"),
    [
        (3e-4, {"learning_rate": 1e-4}, 3e-4, "lr="),
        (None, {"learning_rate": 1e-4}, 1e-4, "the arguments"),
        (None, {}, 5e-4, "the recipe lora_plus"),
    ],
)
def test_one_learning_rate_printed_with_every_group(tmp_path, capsys, lr, given, expected, chooser):
    model, _ = adapted(method="lora_plus")
    optimizer = trainer(model, tmp_path, lr, **given).create_optimizer()
    assert [g["lr"] for g in optimizer.param_groups] == [expected, 16 * expected]
    line = capsys.readouterr().err
    assert f"learning rate {expected:.3g} (from {chooser})" in line
    assert "in side" in line
    assert f"out side {16 * expected:.3g}" in line


def test_arguments_that_would_be_ignored_are_refused(tmp_path):
    model, _ = adapted()
    with pytest.raises(TrainingError, match=r"weight_decay=0.1.*with_\(solver"):
        trainer(model, tmp_path, weight_decay=0.1)


def test_what_cannot_be_trained_is_refused(tmp_path):
    with pytest.raises(AttachError):
        trainer(llama(), tmp_path)
    with pytest.raises(ModelTypeError):
        trainer("a/name", tmp_path)
    model, adapter = adapted()
    rw.set_active(model, None)
    with pytest.raises(TrainingError, match="set_active"):
        trainer(model, tmp_path)
    rw.set_active(model, "default")
    adapter.requires_grad_(False)
    with pytest.raises(TrainingError, match="frozen"):
        trainer(model, tmp_path)
    adapter.requires_grad_(True)
    model.lm_head.weight.requires_grad_(True)
    with pytest.raises(TrainingError, match="lm_head.weight"):
        trainer(model, tmp_path)


# -- training -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"bf16": True},
        {"gradient_accumulation_steps": 2, "max_grad_norm": 0.1},
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
    ],
    ids=["plain", "bf16", "accumulation", "checkpointing", "reentrant"],
)
def test_every_factor_moves_and_the_base_does_not(tmp_path, changes):
    model, adapter = adapted()
    base = {n: p.clone() for n, p in model.named_parameters() if not p.requires_grad}
    before = values(adapter)
    trainer(model, tmp_path, **changes).train()
    after = values(adapter)
    assert all(not torch.equal(before[n], after[n]) for n in before)
    assert all(p.dtype == torch.float32 for p in after.values())
    assert all(torch.equal(p, base[n]) for n, p in model.named_parameters() if n in base)


def test_the_plain_trainer_gives_the_same_numbers(tmp_path):
    model, adapter = adapted()
    trainer(model, tmp_path / "ours", lr_scheduler_type="constant").train()
    twin, other = adapted()
    args = arguments(tmp_path / "plain", lr_scheduler_type="constant")
    data: Any = rows()  # a plain list, which it takes
    transformers.Trainer(
        twin, args, train_dataset=data, optimizers=(other.optimizer(), None), callbacks=[rw.hf.Watch()]
    ).train()
    assert equal(values(adapter), values(other))


def test_the_active_adapters_are_trained_and_no_other(tmp_path):
    model, first = adapted()
    second = rw.attach(model, rw.recipe("lora", rank=2), name="second")
    third = rw.attach(model, rw.recipe("lora", rank=2), name="third")
    rw.set_active(model, ["default", "third"])
    before = [values(a) for a in (first, second, third)]
    run = trainer(model, tmp_path, save_strategy="steps", save_steps=3)
    run.train()
    moved = [not equal(b, values(a)) for a, b in zip((first, second, third), before, strict=True)]
    assert moved == [True, False, True]
    folder = tmp_path / "checkpoint-3"
    assert sorted(p.parent.name for p in folder.glob("*/adapter.safetensors")) == ["default", "third"]
    third.recipe = third.recipe.with_(lr=1.0)
    with pytest.raises(TrainingError, match="lr="):
        trainer(model, tmp_path / "again")
    third.recipe = third.recipe.with_(solver=AdamW(weight_decay=0.1))
    with pytest.raises(TrainingError, match="share a solver"):
        trainer(model, tmp_path / "again")


@dataclasses.dataclass(frozen=True)
class Halve(Ranks):
    """Half of the rank after the second step, by score."""

    requires = frozenset()

    def plan(self, step: int, sites: Sequence[SiteFactors], memory: Memory) -> Plan | None:
        if step < 2:
            return None
        masks = {s: (v > v.median()).float() for s, v in scores(sites).items() if s.endswith("q_proj")}
        assert masks
        return Plan({m.site.name: masked(m, masks[m.site.name]) for m in sites if m.site.name in masks})


def test_rank_plans_are_carried_out(tmp_path):
    model, adapter = adapted(ranks=Halve())
    trainer(model, tmp_path).train()
    for site, factors in adapter.items():
        alive = factors["b"].ne(0).any(0).sum().item()
        assert alive == (2 if site.endswith("q_proj") else 4), site


@pytest.mark.parametrize("steps", [1, 4])
def test_penalties_join_the_loss_once_whatever_the_accumulation(tmp_path, steps):
    """d/da of 0.5 |a|^2 is a: with a base that gives b = 0 no gradient to a, that is all of it."""
    seen: list[Tensor] = []

    def penalty(adapter: Any, step: int) -> Tensor:
        return sum((0.5 * f["a"].square().sum() for f in adapter.values()), torch.zeros(()))

    class Look(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, *args: Any, **kwargs: Any) -> None:
            a = next(iter(adapter.values()))["a"]
            assert a.grad is not None
            seen.append((a.grad - a).abs().max())

    model, adapter = adapted(penalties=(penalty,))
    changes = {"max_steps": 1, "gradient_accumulation_steps": steps, "max_grad_norm": 0.0}
    run = trainer(model, tmp_path, **changes)
    run.add_callback(Look())
    run.train()
    assert seen[0] < 1e-6
    held: Any = rows(4)
    assert run.evaluate(held)["eval_loss"] < 4.5


# -- saving ---------------------------------------------------------------------------------------


def test_a_checkpoint_is_the_adapter_and_its_optimizer(tmp_path):
    model, adapter = adapted()
    run = trainer(model, tmp_path, save_strategy="steps", save_steps=2, save_total_limit=1)
    run.processing_class = tokenizer()
    run.train()
    run.save_model(str(tmp_path / "out"))
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]
    assert not (tmp_path / ".unfinished").exists()
    files = list((tmp_path / "checkpoint-3").iterdir())
    assert not {"model.safetensors", "training_args.bin", "pytorch_model.bin"} & {f.name for f in files}
    factors = sum(p.numel() * p.element_size() for p in adapter.parameters())
    size = sum(f.stat().st_size for f in files)
    assert size <= 1.2 * (3 * factors + 2**20)
    assert {"adapter.safetensors", "tokenizer.json"} <= {f.name for f in (tmp_path / "out").iterdir()}
    twin = llama()
    loaded = rw.load(twin, tmp_path / "out")
    assert equal(values(adapter), values(loaded))
    ids = torch.tensor([rows(1)[0]["input_ids"]])
    assert torch.equal(twin(ids).logits, model.eval()(ids).logits)


def test_saving_the_whole_model_still_works_after_training_on_a_quantised_base(tmp_path):
    pytest.importorskip("bitsandbytes")
    model, adapter = adapted(nf4(tmp_path / "base"))
    before = values(adapter)
    run = trainer(model, tmp_path, save_strategy="steps", save_steps=1, eval_strategy="steps", eval_steps=1)
    run.train()
    after = values(adapter)
    assert all(not torch.equal(before[n], after[n]) for n in before)
    assert all(p.dtype == torch.float32 for p in after.values())
    model.save_pretrained(tmp_path / "whole")
    assert "adapters" not in json.dumps(sorted(_keys(tmp_path / "whole")))
    again, other = adapted(nf4(tmp_path / "base"))
    trainer(again, tmp_path, save_strategy="steps", save_steps=1).train(str(tmp_path / "checkpoint-1"))
    assert equal(after, values(other))


def _keys(folder: Path) -> list[str]:
    from safetensors import safe_open

    with safe_open(folder / "model.safetensors", framework="pt") as archive:
        return list(archive.keys())


def test_the_best_checkpoint_is_loaded_at_the_end(tmp_path):
    model, adapter = adapted(lr=0.3)
    run = trainer(
        model,
        tmp_path,
        max_steps=8,
        save_strategy="steps",
        save_steps=2,
        eval_strategy="steps",
        eval_steps=2,
        load_best_model_at_end=True,
        metric_for_best_model="loss",
        greater_is_better=True,  # so that the last is not the best
        save_total_limit=2,
    )
    run.train()
    losses = {e["step"]: e["eval_loss"] for e in run.state.log_history if "eval_loss" in e}
    best = max(losses, key=losses.__getitem__)
    assert run.state.best_model_checkpoint == str(tmp_path / f"checkpoint-{best}")
    assert best != 8
    assert run.evaluate()["eval_loss"] == losses[best]
    assert equal(values(adapter), values(rw.load(llama(), tmp_path / f"checkpoint-{best}")))


@pytest.mark.parametrize("method", ["lora_plus", "pissa"])
def test_resuming_is_bit_exact(tmp_path, method):
    changes = {"max_steps": 7, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2}
    model, adapter = adapted(method=method, dropout=0.2)
    trainer(model, tmp_path, **changes).train()
    journal = (tmp_path / "metrics.jsonl").read_text()
    assert [json.loads(line)["step"] for line in journal.splitlines()] == [2, 4, 6]
    twin, other = adapted(method=method, dropout=0.2)
    for p in other.parameters():
        torch.nn.init.ones_(p)
    trainer(twin, tmp_path, **changes).train(str(tmp_path / "checkpoint-3"))
    assert equal(values(adapter), values(other))
    assert (tmp_path / "metrics.jsonl").read_text() == journal


def test_resuming_refuses_another_method_and_a_damaged_file(tmp_path):
    changes = {"save_strategy": "steps", "save_steps": 3}
    trainer(adapted()[0], tmp_path, **changes).train()
    with pytest.raises(TrainingError, match="structure and sites"):
        trainer(adapted(alpha=1.0)[0], tmp_path).train(True)
    file = tmp_path / "checkpoint-3" / "adapter.safetensors"
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.raises(FileFormatError, match="cannot be read"):
        trainer(adapted()[0], tmp_path).train(True)


def test_a_full_disk_leaves_nothing_half_written(tmp_path, monkeypatch):
    run = trainer(adapted()[0], tmp_path, save_strategy="steps", save_steps=1)

    def full(*args: Any) -> None:
        if run.state.global_step == 2:
            raise OSError(28, "No space left on device")

    monkeypatch.setattr(run, "_save_rng_state", full)
    with pytest.raises(rw.errors.SaveError, match="No space left"):
        run.train()
    assert [p.name for p in tmp_path.glob("checkpoint-*")] == ["checkpoint-1"]
    assert not (tmp_path / ".unfinished").exists()
