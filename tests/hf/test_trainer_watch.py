"""The checks while training: silent sites, idle experts, NaN."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from trainer_models import adapted, arguments, equal, llama, rows, values

import rankwise as rw
import rankwise.hf
from rankwise.errors import TrainingError


def trainer(model: Any, folder: Any, data: Any = None, **changes: Any) -> rw.hf.Trainer:
    args = arguments(folder, **changes)
    return rw.hf.Trainer(model, args, train_dataset=rows() if data is None else data)


def watch_of(run: rw.hf.Trainer) -> rw.hf.Watch:
    return next(c for c in run.callback_handler.callbacks if isinstance(c, rw.hf.Watch))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_pre_hooks) + len(m._forward_hooks) for m in model.modules())


def test_a_healthy_run_is_left_alone_and_leaves_no_hooks(tmp_path):
    model, _ = adapted(method="dora")
    before = hooks(model)
    run = trainer(model, tmp_path)
    run.train()
    assert watch_of(run).started
    assert watch_of(run).untouched == []
    assert hooks(model) == before


def test_a_site_that_is_read_past_its_forward_is_refused_after_step_one(tmp_path):
    model, adapter = adapted()
    layer: Any = model.model.layers[1].mlp.down_proj

    def past(module: Any, inputs: Any, output: Tensor) -> Tensor:
        return nn.functional.linear(inputs[0], layer.weight)

    layer.register_forward_hook(past)
    before = values(adapter)
    with pytest.raises(TrainingError, match=r"step 1 .*1 of 14 sites: model.layers.1.mlp.down"):
        trainer(model, tmp_path).train()
    assert equal(before, values(adapter))


def test_labels_that_are_all_masked_are_refused(tmp_path):
    model, _ = adapted()
    masked = [{**row, "labels": [-100] * 8} for row in rows()]
    with pytest.raises(TrainingError, match=r"masked"):
        trainer(model, tmp_path, masked).train()


def test_a_factor_without_gradient_is_refused_after_some_steps(tmp_path):
    model, adapter = adapted()
    idle = adapter["model.layers.0.self_attn.q_proj"]["a"]
    idle.register_hook(torch.zeros_like)
    run = trainer(model, tmp_path, max_steps=8)
    watch_of(run).steps = 5
    with pytest.raises(TrainingError, match=r"step 5 .*1 of 28 factors: .*layers.0.*q_proj/a"):
        run.train()


class Experts(nn.Module):
    """Two layers of which the second runs on the tokens above a threshold."""

    def __init__(self, threshold: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(64, 8)
        self.shared, self.expert, self.head = (nn.Linear(8, n) for n in (8, 8, 64))
        self.threshold = threshold

    def forward(self, input_ids: Tensor, labels: Tensor) -> dict[str, Tensor]:
        x = self.shared(self.embed(input_ids))
        routed = (input_ids >= self.threshold).nonzero(as_tuple=True)
        x = x.index_put(routed, self.expert(x[routed]))
        loss = nn.functional.cross_entropy(self.head(x).flatten(0, 1), labels.flatten())
        return {"loss": loss}


def test_an_expert_that_no_token_reaches_is_listed_not_refused(tmp_path, capsys):
    model = Experts(threshold=64)
    rw.attach(model, rw.recipe("lora", rank=2, sites=rw.Sites(("shared", "expert"))))
    run = trainer(model, tmp_path)
    watch_of(run).steps = 2
    run.train()
    assert watch_of(run).untouched == ["expert"]
    assert "no token has reached expert by step 2" in capsys.readouterr().err
    reached = Experts(threshold=30)
    rw.attach(reached, rw.recipe("lora", rank=2, sites=rw.Sites(("shared", "expert"))))
    run = trainer(reached, tmp_path)
    run.train()
    assert watch_of(run).untouched == []


def test_stacked_experts_that_were_never_routed_to_are_listed(tmp_path, capsys):
    config = transformers.MixtralConfig(
        vocab_size=64,
        hidden_size=16,
        intermediate_size=16,
        num_hidden_layers=1,
        num_attention_heads=2,
        num_key_value_heads=1,
        num_local_experts=3,
        num_experts_per_tok=1,
    )
    model = transformers.MixtralForCausalLM(config)
    gate: Any = model.model.layers[0].mlp.gate
    forward = gate.forward

    def route(x: Tensor) -> Any:
        logits, scores, index = forward(x)
        return logits, scores, torch.zeros_like(index)

    gate.forward = route
    rw.attach(model, rw.recipe("lora", rank=2, sites=rw.Sites("experts.down_proj")))
    run = trainer(model, tmp_path)
    watch_of(run).steps = 2
    run.train()
    name = "model.layers.0.mlp.experts.down_proj"
    assert watch_of(run).untouched == [f"{name}[1]", f"{name}[2]"]
    assert f"{name}[1]" in capsys.readouterr().err


# -- NaN ------------------------------------------------------------------------------------------


class At(transformers.TrainerCallback):
    """Does something at the beginning of a step (counted from 1)."""

    def __init__(self, step: int, act: Any) -> None:
        self.step, self.act = step, act

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if state.global_step + 1 == self.step:
            self.act()


def poison(tensor: Any) -> Any:
    def act() -> None:
        with torch.no_grad():
            tensor.view(-1)[0] = float("nan")

    return act


@pytest.mark.parametrize("where", ["factor", "activation", "gradient", "loss"])
def test_nan_stops_says_where_and_keeps_the_last_checkpoint(tmp_path, where):
    model, adapter = adapted()
    site = "model.layers.1.self_attn.v_proj"
    layer: Any = model.get_submodule(site)
    acts = {
        "factor": poison(adapter[site]["b"]),
        "activation": poison(layer.weight),
        "gradient": lambda: adapter[site]["b"].register_hook(lambda g: g * float("inf")),
        "loss": lambda: setattr(model, "loss_function", lambda *a, **k: torch.tensor(float("nan"))),
    }
    expected = {
        "factor": f"loss became nan at step 3: factor {site}/b is not finite",
        "activation": f"loss became nan at step 3: the output of {site} is not finite",
        "gradient": f"gradient became NaN or infinite at step 3, first at {site}/b",
        "loss": "every activation is finite, so it is the loss itself",
    }
    run = trainer(model, tmp_path, max_steps=5, save_strategy="steps", save_steps=1)
    if where == "loss":
        run.add_callback(At(3, lambda: setattr(run, "compute_loss_func", _nan)))
    else:
        run.add_callback(At(3, acts[where]))
    with pytest.raises(TrainingError) as error:
        run.train()
    assert expected[where] in str(error.value)
    assert f"last good checkpoint is {tmp_path}/checkpoint-2" in str(error.value)
    assert sorted(p.name for p in tmp_path.glob("checkpoint-*")) == ["checkpoint-1", "checkpoint-2"]
    saved = values(rw.load(llama(), tmp_path / "checkpoint-2"))
    assert all(torch.isfinite(v).all() for v in saved.values())
    if where != "factor":
        assert equal(saved, values(adapter))


def _nan(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Tensor:
    return outputs.logits.sum() * 0 + float("nan")


def test_factors_that_are_not_finite_are_never_saved(tmp_path):
    model, adapter = adapted()
    run = trainer(model, tmp_path)
    poison(next(adapter.parameters()))()
    with pytest.raises(TrainingError, match="nothing was written"):
        run.save_model(str(tmp_path / "out"))
    assert not (tmp_path / "out").exists()
