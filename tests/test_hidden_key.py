"""HiddenKey: which keys and entries are dropped, the loss of two passes, and what it leaves behind."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
import transformers
from torch import Tensor, nn
from torch.nn import functional as F

import rankwise as rw
from rankwise import losses
from rankwise.errors import IncompatibleAxes, TrainingError
from rankwise.hf import deferred_logits
from rankwise.penalties import HiddenKey, backward, perturbed
from tiny_models import llama

SMALL = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
SMALL |= {"hidden_dropout_prob": 0.0, "attention_probs_dropout_prob": 0.0}
IDS = torch.arange(24).reshape(2, 12)
PADDED = torch.tensor([[0] * 3 + [1] * 9, [1] * 12])


def gpt2(implementation: str) -> Any:
    config = transformers.GPT2Config(vocab_size=64, n_embd=32, n_layer=2, n_head=4, resid_pdrop=0, attn_pdrop=0)
    config.embd_pdrop = 0.0
    return transformers.AutoModelForCausalLM.from_config(config, attn_implementation=implementation)


def bert(implementation: str) -> Any:
    config = transformers.BertConfig(vocab_size=64, num_labels=3, **SMALL)
    model: Any = transformers.AutoModelForSequenceClassification.from_config(config, attn_implementation=implementation)
    nn.init.normal_(model.classifier.weight)
    return model


def t5(implementation: str) -> Any:
    config = transformers.T5Config(vocab_size=64, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4)
    config.dropout_rate, config.decoder_start_token_id = 0.0, 0
    return transformers.AutoModelForSeq2SeqLM.from_config(config, attn_implementation=implementation)


def small_llama(implementation: str, **changes: Any) -> Any:
    return llama(attn_implementation=implementation, **changes)


def adapted(make: Any, implementation: str = "sdpa", **options: Any) -> tuple[Any, rw.Adapter]:
    torch.manual_seed(3)
    model = make(implementation).train()
    adapter = rw.attach(model, rw.recipe("hidden_key", rank=2, **options))
    with torch.no_grad():
        for p in adapter.parameters():
            p.normal_(std=0.3)
    return model, adapter


def during(adapter: rw.Adapter, run: Any, seed: int = 5) -> Any:
    """What a forward gives while the model is as a step has it; masks by the seed."""
    torch.manual_seed(seed)
    return perturbed([adapter], run, 0)


def drop(p: float) -> dict[str, float]:
    return {"keys": p, "hidden": 0.0, "agree": 0.0}


@pytest.mark.parametrize(
    ("make", "causal"), [(small_llama, True), (gpt2, True), (bert, False)], ids=["llama", "gpt2", "bert"]
)
@pytest.mark.parametrize("mask", [None, PADDED], ids=["whole", "padded"])
def test_a_key_is_dropped_for_all_other_tokens_and_the_rest_takes_its_weight(make, causal, mask):
    model, adapter = adapted(make, "eager", **drop(0.4))
    given = {"input_ids": IDS, "output_attentions": True, "attention_mask": mask}
    plain, kept = model(**given).attentions, []
    for seed in range(20):
        first, second = (w[-1] for w in during(adapter, lambda: model(**given), seed).attentions)  # of the unpadded row
        dropped = (first == 0) & (plain[0][-1] != 0)  # (heads, queries, keys)
        for keys in (dropped, (second == 0) & (first.new_ones(12, 12).tril().bool() if causal else True)):
            assert (keys == keys[0]).all()  # in every head
            column = keys[0].any(0)
            others = torch.ones(12, 12).tril(-1).bool() if causal else ~torch.eye(12).bool()
            assert torch.equal(keys[0], others & column)
            kept.append(column)
        wanted = plain[0][-1].masked_fill(dropped, 0)
        torch.testing.assert_close(first, wanted / wanted.sum(-1, keepdim=True))
    drawn = torch.stack(kept)[:, :-1].float()  # nobody follows the last one of a causal row
    assert abs(drawn.mean() - 0.4) < 4 * (0.24 / drawn.numel()) ** 0.5
    assert not torch.equal(drawn[::2], drawn[1::2])  # layers draw their own


@pytest.mark.parametrize("make", [small_llama, gpt2, bert], ids=["llama", "gpt2", "bert"])
def test_masks_of_any_kind_drop_alike(make):
    found = []
    for implementation in ("eager", "sdpa"):
        for mask in (None, torch.ones_like(IDS), PADDED):
            model, adapter = adapted(make, implementation, **drop(0.5))
            found.append(during(adapter, lambda: model(input_ids=IDS, attention_mask=mask).logits))  # noqa: B023
            assert found[-1].isfinite().all()
    torch.testing.assert_close(found[0], found[1], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0], found[3], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[0], found[4], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[2][1], found[5][1], rtol=1e-4, atol=1e-5)
    model, _ = adapted(make)
    assert (model(input_ids=IDS).logits - found[0]).abs().max() > 1e-3


@pytest.mark.parametrize(
    ("make", "paths"),
    [
        (small_llama, ["model.layers.0.mlp", "model.layers.1.mlp"]),
        (gpt2, ["transformer.h.0.mlp", "transformer.h.1.mlp"]),
        (bert, ["bert.encoder.layer.0.output.dense", "bert.encoder.layer.1.output.dense"]),
    ],
    ids=["llama", "gpt2", "bert"],
)
def test_entries_of_feed_forward_outputs_are_dropped_and_nothing_else(make, paths):
    model, adapter = adapted(make, keys=0.0, hidden=0.3, agree=0.0)
    made: dict[str, list[Tensor]] = {}

    def run() -> Tensor:
        hooks = [m.register_forward_hook(lambda m, i, o, n=n: made.setdefault(n, []).append(o)) for n, m in modules]
        found = model(input_ids=IDS).logits
        for hook in hooks:
            hook.remove()
        return found

    modules = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.Linear) or n in paths]
    during(adapter, run)
    zeros = {n: float((outs[0] == 0).float().mean()) for n, outs in made.items() if isinstance(outs[0], Tensor)}
    assert {n for n, share in zeros.items() if share > 0} == set(paths)
    assert all(abs(zeros[n] - 0.3) < 0.05 for n in paths)
    before = dict(made)
    made.clear()
    run()
    first, now = before[paths[0]][0], made[paths[0]][0]
    torch.testing.assert_close(first, torch.where(first == 0, 0, now / 0.7))


@pytest.mark.parametrize("make", [small_llama, bert, t5], ids=["llama", "bert", "t5"])
@pytest.mark.parametrize("items", [None, 40], ids=["mean", "of_40"])
def test_the_loss_is_that_of_two_passes_and_their_divergence(make, items, monkeypatch):
    """Against two forwards of the same masks, written out; logits that are deferred make no difference."""
    labels = torch.tensor([0, 2]) if make is bert else IDS.masked_fill(IDS % 5 == 0, -100)
    given = {"input_ids": IDS, "labels": labels} | ({"num_items_in_batch": items} if items else {})
    model, adapter = adapted(make, keys=0.3, hidden=0.2, agree=0.0)
    one, two = during(adapter, lambda: (model(**given), model(**given)))
    if make is small_llama:
        logits = [o.logits[:, :-1][labels[:, 1:] != -100] for o in (one, two)]
    else:
        logits = [o.logits[labels != -100] for o in (one, two)]
    first, second = (x.log_softmax(-1) for x in logits)
    given_as = {"log_target": True, "reduction": "sum"}
    divergence = F.kl_div(first, second, **given_as) + F.kl_div(second, first, **given_as)
    wanted = (one.loss + two.loss) / 2 + 0.7 * divergence / 2 / (items or len(first))
    assert divergence > 1e-3
    wanted.backward()
    gradients = {name: p.grad for name, p in adapter.named_parameters()}
    monkeypatch.setattr(losses, "CHUNK_BYTES", 1024)
    for chunked in (False, True):
        model, adapter = adapted(make, keys=0.3, hidden=0.2, agree=0.7)
        torch.manual_seed(5)
        with deferred_logits(model) if chunked else torch.enable_grad():
            found = backward(adapter, lambda: model(**given).loss, 0)  # noqa: B023
        torch.testing.assert_close(found, wanted.detach())
        for name, p in adapter.named_parameters():
            torch.testing.assert_close(p.grad, gradients[name], rtol=1e-3, atol=1e-6)


def test_it_leaves_the_model_as_it_was_and_evaluation_alone():
    model, adapter = adapted(small_llama, keys=0.5, hidden=0.5)
    hooks = lambda: sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())  # noqa: E731
    before, plain = hooks(), model(input_ids=IDS, labels=IDS)
    backward(adapter, lambda: model(input_ids=IDS, labels=IDS).loss, 0)
    with pytest.raises(TrainingError, match="agree=0"):
        backward(adapter, lambda: model(input_ids=IDS).logits.sum(), 0)
    assert hooks() == before
    after = model(input_ids=IDS, labels=IDS)
    assert torch.equal(after.logits, plain.logits)
    seen = perturbed([rw.attach(model, rw.recipe("hidden_key", agree=0.0), name="b")], lambda: quiet(model), 0)
    assert torch.equal(seen, quiet(model))


def quiet(model: nn.Module) -> Tensor:
    """Logits in evaluation mode."""
    model.eval()
    with torch.no_grad():
        found = model(input_ids=IDS).logits
    model.train()
    return found


def test_checkpointing_draws_the_same_masks():
    found = []
    for checkpointing in (False, True):
        model, adapter = adapted(small_llama, keys=0.4, hidden=0.4)
        if checkpointing:
            model.gradient_checkpointing_enable({"use_reentrant": False})
        torch.manual_seed(7)
        backward(adapter, lambda: model(input_ids=IDS, labels=IDS, use_cache=False).loss, 0)  # noqa: B023
        found.append([p.grad for p in adapter.parameters()])
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))


def test_a_compiled_model_drops_too():
    model, adapter = adapted(partial(small_llama, num_hidden_layers=1), keys=0.4, hidden=0.4, agree=0.0)
    compiled: Any = torch.compile(model, backend="eager")
    runs = [during(adapter, lambda: compiled(input_ids=IDS).logits, seed) for seed in (1, 1, 2)]
    torch.testing.assert_close(runs[0], runs[1])
    assert (runs[0] - runs[2]).abs().max() > 1e-2
    assert (runs[0] - model(input_ids=IDS).logits).abs().max() > 1e-2


# -- bad input ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options", [{"keys": 1.0}, {"hidden": -0.1}, {"agree": -1.0}, {"agree": float("nan")}], ids=str
)
def test_options_are_checked(options):
    with pytest.raises(IncompatibleAxes, match=f"found.*{next(iter(options.values()))}"):
        HiddenKey(**options)


def test_a_model_without_such_layers_is_refused():
    model = nn.Sequential(nn.Linear(4, 4))
    adapter = rw.attach(model, rw.recipe("hidden_key", rank=2))
    with pytest.raises(TrainingError, match="found 0 and 0 in Sequential"):
        backward(adapter, lambda: model(torch.ones(2, 4)).sum(), 0)


@pytest.mark.parametrize(
    "loss",
    [
        lambda model: model(input_ids=IDS).logits.sum(),
        lambda model: F.cross_entropy(model(input_ids=IDS).logits.flatten(0, 1), IDS.flatten()),
        lambda model: model.model(input_ids=IDS).last_hidden_state.sum(),
    ],
    ids=["no labels", "own loss", "past the model"],
)
def test_an_objective_that_it_cannot_add_to_is_refused(loss):
    model, adapter = adapted(small_llama)
    with pytest.raises(TrainingError, match="Set agree=0|set agree=0"):
        backward(adapter, lambda: loss(model), 0)


def test_an_attention_without_such_a_mask_is_refused():
    model, adapter = adapted(small_llama, **drop(0.1))
    model.config._attn_implementation = "flash_attention_2"  # whose mask is that of the batch, (batch, T)
    with pytest.raises(TrainingError, match="attn_implementation"):
        during(adapter, lambda: model(input_ids=IDS, attention_mask=PADDED).logits)
