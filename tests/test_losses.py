"""Cross-entropy in chunks of tokens: equal to F.cross_entropy, and never all logits at once."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import checkpoint

import rankwise as rw
from rankwise import losses
from rankwise.errors import ActivityError, AttachError, TrainingError
from tiny_models import METHODS, llama, shake, tokens

WIDTH, VOCABULARY = 32, 300


def adapted(method: str = "lora", **axes: Any) -> tuple[nn.Sequential, rw.Adapter]:
    torch.manual_seed(5)
    model = nn.Sequential(nn.Linear(WIDTH, VOCABULARY))
    adapter = rw.attach(model, rw.recipe(method, **{**METHODS[method], **axes}))
    shake(adapter)
    return model, adapter


def batch(dtype: torch.dtype = torch.float32) -> tuple[Tensor, Tensor]:
    g = torch.Generator().manual_seed(6)
    hidden = torch.randn(3, 7, WIDTH, generator=g, dtype=dtype).requires_grad_()
    labels = torch.randint(VOCABULARY, (3, 7), generator=g)
    labels[0, :4] = -100
    labels[2, 2] = -100
    return hidden, labels


def whole(head: nn.Module, hidden: Tensor, labels: Tensor, items: Any = None, **options: Any) -> Tensor:
    """The same without chunks."""
    scale, softcap = options.pop("scale", 1.0), options.pop("softcap", None)
    logits = head(hidden).float() * scale
    logits = logits if softcap is None else softcap * torch.tanh(logits / softcap)
    reduction = "mean" if items is None else "sum"
    loss = F.cross_entropy(logits.flatten(0, -2), labels.flatten(), reduction=reduction, **options)
    return loss if items is None else loss / items


def gradients(loss: Tensor, wanted: list[Tensor]) -> list[Tensor]:
    """Of three times the loss, so that the factor of backward is looked at."""
    return list(torch.autograd.grad(3 * loss, wanted))


def close(one: list[Tensor], two: list[Tensor], tolerance: float = 1e-5) -> bool:
    return all((a - b).abs().max() <= tolerance * b.abs().max() for a, b in zip(one, two, strict=True))


def trained(adapter: rw.Adapter) -> list[Tensor]:
    return [p for p in adapter.parameters() if p.requires_grad]


# -- equality -------------------------------------------------------------------------------------


@pytest.mark.parametrize("method", METHODS)
def test_values_and_gradients_of_every_method_are_those_of_cross_entropy(method):
    head, adapter = adapted(method)
    hidden, labels = batch()
    wanted = [hidden, *trained(adapter)]
    ours, theirs = rw.linear_cross_entropy(head, hidden, labels, chunk=4), whole(head, hidden, labels)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert close(gradients(ours, wanted), gradients(theirs, wanted))


@pytest.mark.parametrize(
    "options",
    [
        {"softcap": 2.0},
        {"scale": 0.25},
        {"scale": 4.0, "softcap": 3.0},
        {"label_smoothing": 0.1},
        {"label_smoothing": 0.1, "softcap": 2.0, "num_items": 50},
        {"num_items": 1},
        {"num_items": torch.tensor(40)},
        {"ignore_index": 7},
    ],
    ids=str,
)
def test_options(options):
    head, adapter = adapted()
    hidden, labels = batch()
    if "ignore_index" in options:
        labels = torch.where(labels == -100, 7, labels)
    wanted = [hidden, *trained(adapter)]
    ours = rw.linear_cross_entropy(head, hidden, labels, chunk=4, **options)
    given = {"items" if name == "num_items" else name: value for name, value in options.items()}
    theirs = whole(head, hidden, labels, **given)
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=0)
    assert close(gradients(ours, wanted), gradients(theirs, wanted))


def test_shift_compares_each_position_with_the_next_label():
    head, _ = adapted()
    hidden, labels = batch()
    ours = rw.linear_cross_entropy(head, hidden, labels, shift=True)
    torch.testing.assert_close(ours, whole(head, hidden[:, :-1], labels[:, 1:]), rtol=1e-5, atol=0)


@pytest.mark.parametrize("tied", ["tie", "untie"])
def test_a_head_that_shares_the_embedding(tied):
    model = llama(tie_word_embeddings=True)
    adapter = rw.attach(model, rw.recipe("lora", rank=2, sites=rw.Sites(("embed_tokens", "attention"), tied=tied)))
    shake(adapter)
    ids = tokens(3, 9)

    def of(loss: Callable[..., Tensor], **options: Any) -> list[Tensor]:
        hidden = model.model(input_ids=ids).last_hidden_state
        return gradients(loss(model.lm_head, hidden, ids, **options), trained(adapter))

    assert close(of(rw.linear_cross_entropy, chunk=4), of(whole))


def test_a_head_whose_own_weight_is_trained():
    head = nn.Linear(WIDTH, VOCABULARY)
    hidden, labels = batch()
    wanted = [hidden, head.weight, head.bias]
    ours = gradients(rw.linear_cross_entropy(head, hidden, labels, chunk=4), wanted)
    assert close(ours, gradients(whole(head, hidden, labels), wanted))


def test_a_frozen_head_and_a_frozen_input():
    hidden, labels = batch()
    frozen = nn.Linear(WIDTH, VOCABULARY).requires_grad_(False)
    ours = gradients(rw.linear_cross_entropy(frozen, hidden, labels, chunk=4), [hidden])
    assert close(ours, gradients(whole(frozen, hidden, labels), [hidden]))
    head, adapter = adapted()
    ours = gradients(rw.linear_cross_entropy(head, hidden.detach(), labels, chunk=4), trained(adapter))
    assert close(ours, gradients(whole(head, hidden.detach(), labels), trained(adapter)))
    assert rw.linear_cross_entropy(frozen, hidden.detach(), labels).grad_fn is None


def test_chunks_of_a_bfloat16_weight_are_summed_in_float32():
    head, exact = nn.Linear(WIDTH, VOCABULARY).bfloat16(), nn.Linear(WIDTH, VOCABULARY)
    exact.load_state_dict(head.state_dict())
    hidden, labels = torch.randn(400, WIDTH).bfloat16(), torch.randint(VOCABULARY, (400,))
    truth = torch.autograd.grad(whole(exact, hidden.float(), labels), exact.weight)[0]
    loss = rw.linear_cross_entropy(head, hidden, labels, chunk=1)
    naive = torch.zeros_like(head.weight)
    for x, y in zip(hidden.split(1), labels.split(1), strict=True):
        naive += torch.autograd.grad(whole(head, x, y, items=400), head.weight)[0]
    errors = [(g.float() - truth).norm() / truth.norm() for g in (torch.autograd.grad(loss, head.weight)[0], naive)]
    assert loss.dtype == torch.float32
    assert errors[0] < min(0.01, errors[1] / 2), errors


def test_autocast():
    head, adapter = adapted("dora")
    hidden, labels = batch()
    wanted = [hidden, *trained(adapter)]
    with torch.autocast("cpu", torch.bfloat16):
        ours, theirs = rw.linear_cross_entropy(head, hidden, labels, chunk=4), whole(head, hidden, labels)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=0)
    assert close(gradients(ours, wanted), gradients(theirs, wanted), 2e-2)


def test_without_any_label_gradients_are_zero_not_missing():
    head, adapter = adapted()
    hidden, labels = batch()
    nothing = torch.full_like(labels, -100)
    loss = rw.linear_cross_entropy(head, hidden, nothing, num_items=5)
    assert loss == 0
    assert all(not g.any() for g in gradients(loss, [hidden, *trained(adapter)]))
    assert rw.linear_cross_entropy(head, hidden, nothing).isnan()  # as F.cross_entropy's mean


def test_dropout_is_the_same_in_value_and_gradient():
    """A central difference along the gradient, with every chunk's mask drawn again."""
    head, adapter = adapted(dropout=0.5)
    head.train()
    hidden, labels = batch()
    torch.manual_seed(0)
    first = rw.linear_cross_entropy(head, hidden, labels, chunk=4)
    torch.manual_seed(0)
    again = rw.linear_cross_entropy(head, hidden, labels, chunk=4)
    assert torch.equal(first, again)
    b = adapter["0"]["b"]
    g = torch.autograd.grad(first, b)[0]
    step = 1e-2 * g / g.norm()
    with torch.no_grad():
        ends = []
        for sign in (1, -1):
            torch.manual_seed(0)
            b += sign * step
            ends.append(rw.linear_cross_entropy(head, hidden, labels, chunk=4))
            b -= sign * step
    torch.testing.assert_close((ends[0] - ends[1]) / 2e-2, g.norm(), rtol=2e-2, atol=0)


def test_gradients_accumulate_and_backward_runs_twice():
    head, adapter = adapted()
    hidden, labels = batch()
    loss = rw.linear_cross_entropy(head, hidden, labels, chunk=4)
    loss.backward(retain_graph=True)
    once = [p.grad.clone() for p in trained(adapter)]
    (0.5 * loss).backward()
    assert close([p.grad for p in trained(adapter)], [1.5 * g for g in once])


# -- memory ---------------------------------------------------------------------------------------


class Largest(TorchDispatchMode):
    """The largest storage that any operation makes."""

    def __init__(self) -> None:
        super().__init__()
        self.numbers = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        sizes = [t.untyped_storage().nbytes() // 4 for t in tree_leaves(out) if isinstance(t, Tensor)]
        self.numbers = max(self.numbers, *sizes, 0)
        return out


@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("follow", [True, False])
def test_no_tensor_of_tokens_by_vocabulary_is_ever_alive(method, follow, monkeypatch):
    monkeypatch.setattr(losses, "CHUNK_BYTES", 4 * 8 * VOCABULARY)
    head, _ = adapted(method)
    hidden = torch.randn(4, 256, WIDTH, requires_grad=True)
    labels = torch.randint(VOCABULARY, (4, 256))
    with torch.set_grad_enabled(follow), Largest() as seen:
        loss = rw.linear_cross_entropy(head, hidden, labels)
        if follow:
            loss.backward()
    held = max(1024 * WIDTH, 8 * VOCABULARY)  # hidden states or a chunk
    assert seen.numbers <= held < 1024 * VOCABULARY / 8
    with Largest() as seen:
        whole(head, hidden, labels)
    assert seen.numbers >= 1024 * VOCABULARY  # the measure sees what it is for


def test_masked_tokens_never_reach_the_head():
    head, _ = adapted()
    hidden, labels = batch()
    widths: list[int] = []
    head.register_forward_pre_hook(lambda module, args: widths.append(len(args[0])))
    rw.linear_cross_entropy(head, hidden, labels, chunk=5)
    assert sum(widths) == (labels != -100).sum()
    assert max(widths) == 5


# -- which adapters -------------------------------------------------------------------------------


@pytest.mark.parametrize("reentrant", [False, True])
def test_the_choice_of_the_first_run_holds_inside_a_checkpoint(reentrant):
    model, first = adapted()
    second = rw.attach(model, rw.recipe("lora", rank=2), "second")
    shake(second, 0.3)
    hidden, labels = batch()

    def run(h: Tensor) -> Tensor:
        return rw.linear_cross_entropy(model, h, labels, chunk=4)

    def under(name: str, checkpointed: bool) -> list[Tensor]:
        with rw.set_active(model, name):
            loss = checkpoint(run, hidden, use_reentrant=reentrant) if checkpointed else run(hidden)
        model.zero_grad()
        hidden.grad = None
        loss.backward()  # outside of the context
        return [p.grad.clone() for p in (hidden, *trained(second))]

    assert close(under("second", True), under("second", False), 1e-6)
    assert all(p.grad is None for p in trained(first))


def test_two_choices_under_one_head_stay_apart_or_raise():
    model, _ = adapted()
    second = rw.attach(model, rw.recipe("lora", rank=2), "second")
    shake(second, 0.3)
    hidden, labels = batch()

    def run(h: Tensor) -> Tensor:
        return rw.linear_cross_entropy(model, h, labels, chunk=4)

    with rw.set_active(model, "second"):
        one = checkpoint(run, hidden, use_reentrant=False)
    with rw.disabled(model):
        two = checkpoint(run, hidden, use_reentrant=False)
    with pytest.raises(ActivityError, match="may have been"):
        (one + two).backward()


def test_each_row_of_a_routed_batch_meets_its_own_adapter():
    model, first = adapted()
    second = rw.attach(model, rw.recipe("lora", rank=2), "second")
    shake(second, 0.3)
    hidden, labels = batch()
    wanted = [hidden, *trained(first), *trained(second)]
    with rw.route(model, ["default", None, "second"]):
        ours, theirs = rw.linear_cross_entropy(model, hidden, labels, chunk=2), whole(model, hidden, labels)
    assert close(gradients(ours, wanted), gradients(theirs, wanted))


# -- errors ---------------------------------------------------------------------------------------


def test_a_second_derivative_raises():
    head, _ = adapted()
    hidden, labels = batch()
    with pytest.raises(TrainingError, match="create_graph=True"):
        torch.autograd.grad(rw.linear_cross_entropy(head, hidden, labels), hidden, create_graph=True)


def test_what_does_not_fit_is_refused():
    head, _ = adapted()
    hidden, labels = batch()
    with pytest.raises(ValueError, match=r"\(3, 7, 32\) and labels \(21,\)"):
        rw.linear_cross_entropy(head, hidden, labels.flatten())
    with pytest.raises(ValueError, match="one at least"):
        rw.linear_cross_entropy(head, hidden[:0], labels[:0])
    sharded = type("FSDPModule", (nn.Linear,), {})(WIDTH, VOCABULARY)
    with pytest.raises(AttachError, match="parent's fully_shard"):
        rw.linear_cross_entropy(sharded, hidden, labels)
