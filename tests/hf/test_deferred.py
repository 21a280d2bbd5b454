"""Deferred logits: a model's own forward computes its loss in chunks, and nothing else changes."""

from __future__ import annotations

import copy
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
import trl
from datasets import Dataset
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trainer_models import adapted, arguments, llama, nf4, rows, tokenizer, values

import rankwise as rw
import rankwise.hf
from rankwise import losses
from rankwise.hf.deferred import DeferredLogits, deferred_logits

VOCABULARY, IDS = 64, torch.tensor([row["input_ids"] for row in rows(3)])
LABELS = IDS.masked_fill(torch.arange(8) < torch.tensor([[3], [0], [6]]), -100)
HEAD = rw.Sites(("attention", "lm_head"))


@pytest.fixture(autouse=True)
def _small_chunks(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * VOCABULARY * 3)


def tiny(name: str, **changes: Any) -> Any:
    torch.manual_seed(1)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=1,
        num_attention_heads=4,
        num_key_value_heads=2,
        **{"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, **changes},
    )
    return getattr(transformers, f"{name}ForCausalLM")(config).eval()


MODELS = {
    "llama": (lambda: llama(), {"sites": HEAD}),
    "dora": (lambda: llama(), {"sites": HEAD, "method": "dora"}),
    "tied": (lambda: llama(tie_word_embeddings=True), {"sites": rw.Sites("embed_tokens", tied="tie")}),
    "untied": (lambda: llama(tie_word_embeddings=True), {"sites": rw.Sites("embed_tokens", tied="untie")}),
    "whole head": (lambda: llama(), {"sites": rw.Sites("attention", train=("lm_head",))}),
    "softcap": (
        lambda: tiny("Gemma2", final_logit_softcapping=0.5, head_dim=8, tie_word_embeddings=False),
        {"sites": HEAD},
    ),
    "multiplied": (lambda: tiny("Cohere", logit_scale=0.25), {"sites": rw.Sites("attention")}),
    "divided": (lambda: tiny("Granite", logits_scaling=4.0), {"sites": HEAD}),
    "auxiliary loss": (lambda: tiny("Mixtral", output_router_logits=True), {"sites": HEAD}),
}


def gradients(model: Any, adapter: Any, chunked: bool, told: list[str], **inputs: Any) -> tuple[Any, list[Tensor]]:
    model.zero_grad(set_to_none=True)
    with deferred_logits(model, told.append) if chunked else nullcontext():
        output = model(**{"input_ids": IDS, "labels": LABELS, **inputs})
    (2 * output.loss).backward()
    return output, [p.grad.clone() for p in adapter.parameters() if p.grad is not None]


def close(one: list[Tensor], two: list[Tensor], tolerance: float = 1e-5) -> bool:
    return all((a - b).abs().max() <= tolerance * b.abs().max() for a, b in zip(one, two, strict=True))


class Held(TorchDispatchMode):
    """How many rows of logits the largest tensor holds, the model's own left out."""

    def __init__(self, model: Any) -> None:
        super().__init__()
        self.vocabulary, self.rows = model.config.vocab_size, 0
        self.own = {p.data_ptr() for p in model.parameters()}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor) or tensor.device.type == "meta" or tensor.data_ptr() in self.own:
                continue
            if self.vocabulary in tensor.shape:
                self.rows = max(self.rows, tensor.untyped_storage().nbytes() // (4 * self.vocabulary))
        return out


@pytest.mark.parametrize("case", MODELS)
@pytest.mark.parametrize("inputs", [{}, {"num_items_in_batch": 40}], ids=["mean", "items"])
def test_losses_and_gradients_are_the_models_own(case, inputs):
    make, axes = MODELS[case]
    model, adapter = adapted(make(), **axes)
    with torch.no_grad():
        for p in adapter.parameters():
            p += 0.1 * torch.randn_like(p)
    told: list[str] = []
    theirs, expected = gradients(model, adapter, False, told, **inputs)
    ours, found = gradients(model, adapter, True, told, **inputs)
    assert isinstance(ours.logits, DeferredLogits)
    assert told == ["takes its logits in chunks of 0 MiB at most"]
    torch.testing.assert_close(ours.loss, theirs.loss, rtol=1e-5, atol=0)
    assert close(found, expected)
    assert "forward" not in model.get_output_embeddings().__dict__


def test_a_quantised_head(tmp_path):
    pytest.importorskip("bitsandbytes")
    model, adapter = adapted(nf4(tmp_path), sites=HEAD, moved=True)
    head = type(model.model.layers[0].self_attn.q_proj)
    model.lm_head, told = copy.deepcopy(model.model.layers[0].mlp.gate_proj), []  # NF4, as wide as the vocabulary
    assert isinstance(model.lm_head, head.__mro__[2])
    assert model.lm_head.out_features == VOCABULARY
    ours, theirs = (gradients(model, adapter, chunked, told)[1] for chunked in (True, False))
    assert close(ours, theirs)
    assert told == ["takes its logits in chunks of 0 MiB at most"]


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_logits_are_never_held_whole(method, monkeypatch):
    """At most a chunk of five rows."""
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 640 * 5)
    model, adapter = adapted(llama(vocab_size=640), method, sites=HEAD)
    ids = torch.tensor([row["input_ids"] for row in rows(3, 64)])
    with Held(model) as held:
        gradients(model, adapter, True, [], input_ids=ids, labels=ids)
    assert held.rows == 5
    with Held(model) as held:
        gradients(model, adapter, False, [], input_ids=ids, labels=ids)
    assert held.rows == 192


def test_few_logits_are_left_to_the_model(monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", 2**20)
    model, adapter = adapted(sites=HEAD)
    told: list[str] = []
    ours, theirs = (gradients(model, adapter, chunked, told) for chunked in (True, False))
    assert torch.equal(ours[0].loss, theirs[0].loss)
    assert all(torch.equal(a, b) for a, b in zip(ours[1], theirs[1], strict=True))
    assert type(ours[0].logits) is Tensor
    assert told == ["holds its logits whole: they are few, less than 1 MiB"]


# -- whatever else a model does -------------------------------------------------------------------


def deferred(model: Any, told: list[str]) -> Any:
    with deferred_logits(model, told.append):
        return model(input_ids=IDS).logits


@pytest.mark.parametrize(
    "code",
    [
        lambda y: F.cross_entropy(y.transpose(1, 2), IDS),
        lambda y: F.cross_entropy(y.view(-1, VOCABULARY), IDS.view(-1), reduction="none").square().mean(),
        lambda y: F.cross_entropy(y.view(-1, VOCABULARY), IDS.view(-1), weight=torch.arange(VOCABULARY) / 9),
        lambda y: F.cross_entropy(y.view(-1, VOCABULARY), F.one_hot(IDS.view(-1), VOCABULARY).float()),
        lambda y: (torch.linspace(0, 1, VOCABULARY) * y).logsumexp(-1).mean(),
        lambda y: (y + y.mean(-1, keepdim=True)).square().sum(),
        lambda y: y[..., :5].log_softmax(-1).sum(),
        lambda y: y.view(3, 4, 2 * VOCABULARY)[..., 3:9].exp().sum(),
    ],
    ids=["classes second", "no reduction", "weights", "soft labels", "weighted", "added", "a part", "reshaped"],
)
def test_any_other_use_gives_what_it_gives_anyway_and_says_so(code):
    model, adapter = adapted(sites=HEAD, moved=True)
    told: list[str] = []
    ours, theirs = code(deferred(model, told)), code(model(input_ids=IDS).logits)
    wanted = list(adapter.parameters())
    torch.testing.assert_close(ours, theirs)
    assert close(list(torch.autograd.grad(ours, wanted)), list(torch.autograd.grad(theirs, wanted)), 1e-6)
    assert len(told) == 1
    assert "whole" in told[0]
    assert "asks for all of them" in told[0]


def test_logits_may_be_written_to():
    model, _ = adapted(sites=HEAD)
    plain = model(input_ids=IDS).logits.detach()
    promise = deferred(model, [])
    flat = promise.view(-1, VOCABULARY)
    with torch.no_grad():
        flat[:, 7] = -100.0
        promise[0] = 1.0
    plain[..., 7] = -100.0
    plain[0] = 1.0
    assert torch.equal(promise.clone(), plain)
    assert torch.equal(flat.clone(), plain.view(-1, VOCABULARY))
    loss = F.cross_entropy(flat, IDS.view(-1))  # after they exist, they are what counts
    assert torch.equal(loss, F.cross_entropy(plain.view(-1, VOCABULARY), IDS.view(-1)))


def test_logits_that_outlive_the_context_are_those_of_their_time():
    model, _ = adapted(sites=HEAD, moved=True)
    with rw.disabled(model), torch.autocast("cpu", torch.bfloat16):
        promise, plain = deferred(model, []), model(input_ids=IDS).logits
    assert not torch.equal(plain, model(input_ids=IDS).logits)
    assert promise.dtype == plain.dtype == torch.bfloat16
    assert torch.equal(promise.clone(), plain)


def test_a_look_costs_nothing():
    model, _ = adapted(sites=HEAD)
    told: list[str] = []
    promise = deferred(model, told)
    scaled = torch.tanh((2.0 * promise / 3).to(torch.float64)).contiguous()
    assert promise.shape == (3, 8, VOCABULARY)
    assert (scaled.dtype, scaled.dim(), scaled.device.type, scaled.size(-1)) == (torch.float64, 3, "cpu", VOCABULARY)
    assert not told


def test_a_model_without_an_output_head_says_so():
    told: list[str] = []
    with deferred_logits(torch.nn.Linear(2, 2), told.append):
        pass
    assert "no output head" in told[0]
    with deferred_logits(llama(), told.append):
        pass
    assert "never ran" in told[1]


# -- the trainer ----------------------------------------------------------------------------------


def train(folder: Path, monkeypatch: Any, chunked: bool, options: Any = None, **changes: Any) -> Any:
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * VOCABULARY * 3 if chunked else 2**30)
    model, adapter = adapted(sites=HEAD)
    args = arguments(folder / str(chunked), lr_scheduler_type="constant", **changes)
    run = rw.hf.Trainer(model, args, train_dataset=rows(), eval_dataset=rows(4), **(options or {}))
    run.train()
    return run, values(adapter)


@pytest.mark.parametrize(
    "changes",
    [
        {},
        {"gradient_accumulation_steps": 2},
        {"activation_checkpointing": True},
        {"activation_checkpointing": True, "activation_checkpointing_kwargs": {"use_reentrant": True}},
        {"label_smoothing_factor": 0.2},
        {"label_smoothing_factor": 0.2, "gradient_accumulation_steps": 2},
        {"eval_strategy": "steps", "eval_steps": 1},
    ],
    ids=[
        "plain",
        "accumulation",
        "checkpointing",
        "reentrant",
        "smoothing",
        "smoothing and accumulation",
        "evaluation",
    ],
)
def test_the_trainer_gives_the_same_numbers_in_chunks(tmp_path, monkeypatch, capsys, changes):
    whole, expected = train(tmp_path, monkeypatch, False, **changes)
    assert "the loss holds its logits whole: they are few" in capsys.readouterr().err
    chunked, found = train(tmp_path, monkeypatch, True, **changes)
    told = [line for line in capsys.readouterr().err.splitlines() if "the loss" in line]
    assert told == ["rankwise: the loss takes its logits in chunks of 0 MiB at most"]
    for one, two in zip(chunked.state.log_history, whole.state.log_history, strict=True):
        assert all(one[k] == pytest.approx(two[k], rel=1e-4) for k in ("loss", "eval_loss", "grad_norm") if k in one)
    assert all((found[n] - value).abs().max() < 1e-5 for n, value in expected.items())


@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_bfloat16(tmp_path, monkeypatch, capsys, smoothing):
    changes = {"bf16": True, "label_smoothing_factor": smoothing}
    losses_of = [
        [entry["loss"] for entry in train(tmp_path, monkeypatch, chunked, **changes)[0].state.log_history[:-1]]
        for chunked in (False, True)
    ]
    assert losses_of[1] == pytest.approx(losses_of[0], rel=1e-3)
    assert "asks for all" not in capsys.readouterr().err


def test_a_loss_of_ones_own_and_metrics_are_right_and_said(tmp_path, monkeypatch, capsys):
    def squared(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> Any:
        return outputs["logits"].square().mean()

    seen: list[Any] = []

    def metrics(prediction: Any) -> dict[str, float]:
        seen.append(prediction.predictions)
        return {"mean": float(prediction.predictions.mean())}

    whole, chunked = (
        train(tmp_path, monkeypatch, chunked, {"compute_loss_func": squared, "compute_metrics": metrics})
        for chunked in (False, True)
    )
    assert all((chunked[1][n] - value).abs().max() < 1e-6 for n, value in whole[1].items())
    assert "the loss holds its logits whole: square asks for all of them" in capsys.readouterr().err
    assert [run.evaluate()["eval_mean"] for run in (whole[0], chunked[0])][0] == pytest.approx(seen[0].mean(), abs=1e-6)
    assert seen[1] == pytest.approx(seen[0], abs=1e-5)


def test_trl_keeps_its_own_way(tmp_path, capsys):
    class SFT(rw.hf.AdapterMixin, trl.SFTTrainer):
        pass

    model, _ = adapted()
    SFT(
        model,
        arguments(tmp_path, trl.SFTConfig, max_steps=1),
        train_dataset=Dataset.from_list([{"text": "w1 w2 w3 w4"}] * 4),
        processing_class=tokenizer(),
    ).train()
    assert "the loss holds its logits whole: TRL has its own way with the model" in capsys.readouterr().err


def test_a_compiled_model_keeps_its_own_way(tmp_path, capsys):
    model, _ = adapted()
    model.compile(backend="eager")
    rw.hf.Trainer(model, arguments(tmp_path, max_steps=1), train_dataset=rows()).train()
    assert "the loss holds its logits whole: torch.compile has its own way" in capsys.readouterr().err
