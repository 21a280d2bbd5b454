"""Methods from names, runs as data, and tasks that are not text."""

import math
from dataclasses import dataclass
from types import SimpleNamespace
from typing import final

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.errors import DataError, IncompatibleAxes, TrainingError, UnknownName
from rankwise.hf.finetune import Run, finetune
from rankwise.hf.method import compose
from rankwise.hf.plots import loss_curve
from rankwise.hf.prepare import prepare
from rankwise.hf.tasks import SequenceClassification, Task
from rankwise.inits import Gaussian, Kaiming, Principal
from rankwise.solvers import AdamW, LoRAPlus
from rankwise.structures import Anchored, LoRA, Magnitude, SVDForm


def test_compose_by_name():
    assert compose().name == "lora"
    assert compose("dora", rank=4).structure == Magnitude(LoRA(4, 4))
    assert compose("lora", options={"dropout": 0.1, "alpha": 8}).dropout == 0.1


def test_compose_axis_by_axis():
    made = compose(None, {"structure": "svd", "init": "principal", "solver": "lora_plus"}, rank=4)
    assert made.structure == Anchored(SVDForm(4, 4.0))
    assert isinstance(made.init, Principal) and isinstance(made.solver, LoRAPlus)
    assert made.lr == 2e-4  # that of pissa_lora_plus, the nearest method
    assert compose(None, {"structure": "magnitude(svd_form)"}).structure == Magnitude(SVDForm())
    assert compose("dora", {"init": "gaussian"}).init == Gaussian()
    assert compose("lora_plus", {"structure": "lokr", "solver": "adamw"}).solver == AdamW()
    assert isinstance(compose("pissa", {"structure": "lora"}).init, Kaiming)


def test_compose_refuses():
    with pytest.raises(UnknownName, match="No init"):
        compose(None, {"init": "nope"})
    with pytest.raises(IncompatibleAxes, match="takes"):
        compose(None, {"structure": "oft"}, rank=3)
    with pytest.raises(IncompatibleAxes):
        compose(None, {"structure": "oft", "solver": "lora_plus"})


def test_run_of_plain_values():
    given = {"model": "m", "data": "d", "out": "o", "lr": "1e-3", "validation": "0.2"}
    run = Run.of({**given, "target": "q_proj,v_proj", "steps": 5.0, "labels": ["a", 1]})
    assert (run.lr, run.validation, run.steps) == (1e-3, 0.2, 5)
    assert run.target == ("q_proj", "v_proj") and run.labels == ("a", 1)
    for wrong in ({"rank": "x"}, {"steps": 1.5}, {"pack": "yes"}, {"batch": 0}, {"lr": "high"}):
        with pytest.raises(DataError):
            Run.of({**given, **wrong})
    with pytest.raises(UnknownName, match="rank"):
        Run.of({**given, "rnak": 1})


def test_run_survives_its_file(tmp_path):
    run = Run.of({"model": "m", "data": "d", "out": "o", "options": {"alpha": 2}, "labels": ["a"]})
    run.write(tmp_path / "run.yaml", "note")
    assert Run.read(tmp_path / "run.yaml") == run
    assert Run.read(tmp_path / "run.yaml", {"rank": 3}).differs(run) == ["rank"]


class Regressor(nn.Module):
    """A model that is no language model: y = W2 tanh(W1 x)."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 16), nn.Linear(16, 2)

    def forward(self, x, labels=None):
        y = self.second(torch.tanh(self.first(x)))
        loss = None if labels is None else (y - labels).square().mean()
        return SimpleNamespace(loss=loss, logits=y) if loss is None else {"loss": loss, "logits": y}


@final
@dataclass(frozen=True)
class Regression(Task):
    name = "regression"

    def processor(self, model):
        return None

    def examples(self, path, processor):
        g = torch.Generator().manual_seed(int(path))
        x = torch.randn(64, 6, generator=g)
        return [{"x": row, "labels": row[:2].sin()} for row in x]

    def model(self, model, examples, processor, **options):
        torch.manual_seed(0)
        return Regressor()

    def collator(self, processor):
        return lambda rows: {k: torch.stack([r[k] for r in rows]) for k in rows[0]}

    def score(self, model, batches, processor):
        with torch.no_grad():
            losses = [float(model(**batch)["loss"]) for batch in batches]
        mean = sum(losses) / len(losses)
        return {"loss": mean, "rmse": math.sqrt(mean)}


def test_a_task_from_outside_that_is_not_text(tmp_path):
    run = Run.of({"model": "-", "data": "1", "out": str(tmp_path / "o"), "steps": 30, "rank": 2,
                  "lr": 0.05, "target": "first,second", "validation": 0.25})  # fmt: skip
    result = finetune(run, task=Regression())
    assert result.before and result.after
    assert result.after["rmse"] < 0.8 * result.before["rmse"]
    assert (tmp_path / "o" / "adapter.safetensors").exists()


def test_checkpointing_of_a_model_that_has_none(tmp_path):
    run = Run.of({"model": "-", "data": "1", "out": str(tmp_path / "o"), "rank": 1, "checkpointing": True})
    with pytest.raises(TrainingError, match="Regressor has no activation checkpointing; leave out"):
        prepare(run, Regression())


def test_only_the_outermost_head_of_a_classifier_is_trained_whole():
    """ModernVBERT's image tower has a head of its own."""
    model = nn.Sequential()
    model.add_module("tower", nn.Sequential())
    model.tower.add_module("score", nn.Linear(4, 4))
    model.add_module("score", nn.Linear(4, 2))
    adapter = rw.attach(
        model, rw.recipe("lora", rank=1, sites=SequenceClassification().sites(rw.Sites("tower.score"), model))
    )
    assert sorted(adapter) == ["score.bias", "score.weight", "tower.score"]


@pytest.mark.parametrize("method", ["eva", "lora_ga", "lora_sb"])
def test_a_start_that_reads_data_gathers_it_first(method, tmp_path):
    run = Run.of({"model": "-", "data": "1", "out": str(tmp_path / "o"), "method": method, "rank": 1, "batch": 16})
    task, made = Regression(), prepare(run, Regression())
    rows = [task.collator(None)(made.train[i : i + 16]) for i in range(0, len(made.train), 16)]
    model, recipe = task.model(None, None, None), made.adapter.recipe
    adapter = rw.attach(model, recipe, stats=rw.collect(model, rows, recipe))
    assert made.adapter.keys() == adapter.keys()
    for site, factors in adapter.items():
        for name, value in factors.items():
            torch.testing.assert_close(made.adapter[site][name], value)


def test_loss_curve_without_points(tmp_path):
    loss_curve([], tmp_path / "x.png")
    assert (tmp_path / "x.png").read_bytes().startswith(b"\x89PNG")
