"""Which adapters are active: captured by each forward, and right or refused in every backward."""

from __future__ import annotations

import copy
import gc
import threading
from collections.abc import Callable
from typing import Any, TypeAlias, cast

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rankwise as rw
from rankwise.errors import ActivityError, UnknownName
from tiny_models import llama, plain, shake, tokens

Grads: TypeAlias = dict[str, Tensor | None]


class Stack(nn.Module):
    """Three residual blocks, checkpointed or not."""

    def __init__(self, reentrant: bool | None, dropout: float = 0.0) -> None:
        super().__init__()
        self.reentrant = reentrant
        self.first = nn.Linear(12, 12)
        self.blocks = nn.ModuleList(
            nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Dropout(dropout), nn.Linear(16, 12)) for _ in range(3)
        )

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for block in self.blocks:
            if self.reentrant is None:
                x = x + block(x)
            else:
                x = x + cast(Tensor, checkpoint(block, x, use_reentrant=self.reentrant))
        return x


pytestmark = pytest.mark.filterwarnings(
    "ignore:None of the inputs have requires_grad:UserWarning"  # reentrant, under no_grad
)
MODES = pytest.mark.parametrize("reentrant", [True, False], ids=["reentrant", "non-reentrant"])


def stack(reentrant: bool | None, method: str = "lora", dropout: float = 0.0, p: float = 0.0) -> Stack:
    """A stack with the adapters A and B, off their start; A is active."""
    torch.manual_seed(1)
    model = Stack(reentrant, dropout)
    axes = {"dropout": p} if p else {}
    for name, scale in (("A", 0.1), ("B", 0.2)):
        shake(rw.attach(model, rw.recipe(method, rank=2, **axes), name), scale)
    rw.set_active(model, "A")
    return model.train()


def inputs() -> Tensor:
    return torch.randn(5, 12, generator=torch.Generator().manual_seed(7))


def grads(model: nn.Module) -> Grads:
    """A copy of every gradient; None where there is none."""
    return {n: None if p.grad is None else p.grad.clone() for n, p in model.named_parameters() if p.requires_grad}


def equal(one: Grads, two: Grads) -> bool:
    def same(a: Tensor | None, b: Tensor | None) -> bool:
        zero = [t is None or not t.any() for t in (a, b)]
        return all(zero) or (a is not None and b is not None and torch.allclose(a, b, atol=1e-6))

    return one.keys() == two.keys() and all(same(one[n], two[n]) for n in one)


def expected(names: Any, method: str = "lora", reference: bool = False) -> Grads:
    """The gradients without checkpointing, the context left after backward."""
    model = stack(None, method)
    with rw.set_active(model, names):
        loss(model).backward()
    return grads(model)


def loss(model: nn.Module) -> Tensor:
    return model(inputs()).square().mean()


# -- leaving the context before backward ------------------------------------------------------


@MODES
@pytest.mark.parametrize("method", ["lora", "dora"])
@pytest.mark.parametrize("names", ["A", "B", ["A", "B"]])
def test_leaving_the_context_before_backward(reentrant: bool, method: str, names: Any) -> None:
    model = stack(reentrant, method)
    rw.set_active(model, None)
    with rw.set_active(model, names):
        value = loss(model)
    value.backward()
    assert equal(grads(model), expected(names, method))


@MODES
@pytest.mark.parametrize("order", ["before", "between", "both"])
def test_policy_and_reference(reentrant: bool, order: str) -> None:
    model = stack(reentrant)

    def reference() -> None:
        with torch.no_grad(), rw.disabled(model):
            loss(model)

    for _ in range(3):
        model.zero_grad()
        if order != "between":
            reference()
        value = loss(model)
        if order != "before":
            reference()
        value.backward()
        assert equal(grads(model), expected("A"))


@MODES
def test_reference_with_the_contexts_the_other_way_round(reentrant: bool) -> None:
    model = stack(reentrant)
    value = loss(model)
    with rw.disabled(model), torch.no_grad():
        loss(model)
    right_or_refused(value.backward, model, expected("A"))


def right_or_refused(run: Callable[[], Any], model: nn.Module, truth: Grads) -> None:
    """Either ActivityError, or the very gradients."""
    try:
        run()
    except ActivityError as error:
        assert "use_reentrant=False" in str(error)
        return
    assert equal(grads(model), truth)


@MODES
def test_two_graphs_alive_at_once(reentrant: bool) -> None:
    model = stack(reentrant)
    with rw.set_active(model, "A"):
        a = loss(model)
    with rw.set_active(model, "B"):
        b = loss(model)
    both = {n: (expected("A")[n], expected("B")[n]) for n in grads(model)}
    truth = {n: x if x is not None and x.any() else y for n, (x, y) in both.items()}
    right_or_refused((a + b).backward, model, truth)


@MODES
def test_two_graphs_inside_their_contexts(reentrant: bool) -> None:
    # the second graph is built while the first is alive, and each is used inside its own context
    model = stack(reentrant)
    a = loss(model)
    with rw.set_active(model, "B"):
        b = loss(model)
        right_or_refused(b.backward, model, expected("B"))
    model.zero_grad()
    right_or_refused(a.backward, model, expected("A"))


@MODES
def test_one_adapter_after_the_other(reentrant: bool) -> None:
    model = stack(reentrant)
    for names in ("A", "B", "A"):
        rw.set_active(model, names)
        model.zero_grad()
        value = loss(model)
        right_or_refused(value.backward, model, expected(names))
        del value
        gc.collect()


def test_one_adapter_after_the_other_without_reentrance_never_raises() -> None:
    model = stack(False)
    for names in ("A", "B", ["B", "A"], "A"):
        model.zero_grad()
        with rw.set_active(model, names):
            value = loss(model)
        value.backward()
        assert equal(grads(model), expected(names))


@MODES
def test_evaluation_in_between(reentrant: bool) -> None:
    model = stack(reentrant)
    value = loss(model)
    model.eval()
    with torch.no_grad():
        loss(model)
    model.train()
    value.backward()
    assert equal(grads(model), expected("A"))


@MODES
def test_an_evaluation_of_another_adapter_first(reentrant: bool) -> None:
    model = stack(reentrant)
    with torch.no_grad(), rw.set_active(model, "B"):
        loss(model)
    loss(model).backward()
    assert equal(grads(model), expected("A"))


# -- dropout and second derivatives -------------------------------------------------------


@MODES
@pytest.mark.parametrize("method", ["lora", "dora"])
def test_checkpointing_with_dropout(reentrant: bool, method: str) -> None:
    found = []
    for mode in (None, reentrant):
        model = stack(mode, method, dropout=0.2, p=0.3)
        torch.manual_seed(11)
        with rw.set_active(model, "A"):
            value = loss(model)
        value.backward()
        found.append(grads(model))
    assert equal(*found)
    assert not equal(found[0], expected("A", method))


@MODES
def test_checkpointing_in_transformers(reentrant: bool) -> None:
    found = []
    for mode in (None, reentrant):
        torch.manual_seed(1)
        model = llama()
        if mode is not None:
            model.gradient_checkpointing_enable({"use_reentrant": mode})
        adapter = rw.attach(model, rw.recipe("dora", rank=2))
        model.enable_input_require_grads()
        shake(adapter)
        model.train()
        with rw.set_active(model, "default"):
            value = model(input_ids=tokens(), labels=tokens()).loss
        with torch.no_grad(), rw.disabled(model):
            model(tokens())
        value.backward()
        found.append(grads(model))
    assert equal(*found)


@pytest.mark.parametrize("method", ["lora", "svd", "lokr", "loha", "hira", "oft"])
def test_second_derivatives(method: str) -> None:
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    options = {"block": 2} if method == "oft" else {"rank": 2}
    adapter = rw.attach(model, rw.recipe(method, **options))
    shake(adapter, 0.3)
    named = dict(adapter.named_parameters())
    places = {n: next(k for k, p in model.named_parameters() if p is q) for n, q in named.items()}

    def run(x: Tensor, *values: Tensor) -> Tensor:
        state = dict(zip(places.values(), values, strict=True))
        return torch.func.functional_call(model, state, (x,))

    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    values = [p.detach().clone().requires_grad_() for p in named.values()]
    assert torch.autograd.gradcheck(run, (x, *values))
    assert torch.autograd.gradgradcheck(run, (x, *values))


def test_second_derivatives_of_dora() -> None:
    # the norm is a constant of the backward pass (as in the paper), so only x and m can be checked
    model = nn.Sequential(nn.Linear(4, 4), nn.Tanh(), nn.Linear(4, 3)).double()
    shake(rw.attach(model, rw.recipe("dora", rank=2)), 0.3)
    names = [n for n, _ in model.named_parameters() if n.endswith("magnitude")]

    def run(x: Tensor, *values: Tensor) -> Tensor:
        state = dict(zip(names, values, strict=True))
        return torch.func.functional_call(model, state, (x,))

    x = torch.randn(2, 4, dtype=torch.float64, requires_grad=True)
    held = dict(model.named_parameters())
    values = [held[n].detach().clone().requires_grad_() for n in names]
    assert torch.autograd.gradcheck(run, (x, *values))
    assert torch.autograd.gradgradcheck(run, (x, *values))


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_double_backward_equals_a_dense_model(method: str) -> None:
    # a gradient penalty on x: its gradient in the factors against the same map written densely
    found = []
    for dense in (False, True):
        torch.manual_seed(1)
        layer = nn.Linear(6, 5).double()
        adapter = rw.attach(layer, rw.recipe(method, rank=2))
        shake(adapter, 0.3)
        x = torch.linspace(-1, 1, 12, dtype=torch.float64).reshape(2, 6).requires_grad_()
        if dense:
            f = adapter[""]
            w = layer.weight + f["b"] @ f["a"]
            if method == "dora":
                w = (f["magnitude"] / w.norm(dim=1).detach()).unsqueeze(1) * w
            y = x @ w.T + layer.bias
        else:
            y = layer(x)
        (slope,) = torch.autograd.grad(y.tanh().sum(), x, create_graph=True)
        slope.square().sum().backward()
        found.append(grads(layer))
    assert equal(*found) and any(g is not None and g.any() for g in found[0].values())


# -- threads, rows, names ---------------------------------------------------------------------


def test_a_second_thread_is_refused() -> None:
    model = plain()
    rw.attach(model, rw.recipe("lora", rank=2))
    x, raised = torch.randn(3, 16), []

    def other() -> None:
        for call in (lambda: model(x), lambda: rw.set_active(model, None), lambda: rw.disabled(model).__enter__()):
            try:
                call()
            except ActivityError as error:
                raised.append(str(error))

    with rw.set_active(model, "default"):
        thread = threading.Thread(target=other)
        thread.start()
        thread.join()
        model(x)
    assert len(raised) == 3 and all("one thread at a time" in text for text in raised)
    thread = threading.Thread(target=other)  # nobody is inside: any thread may
    thread.start()
    thread.join()
    assert len(raised) == 3


def test_contexts_nest_and_are_restored_after_an_error() -> None:
    model = stack(None)
    with torch.no_grad():
        a = model(inputs())
        with rw.disabled(model):
            base = model(inputs())
            with rw.set_active(model, "A"):
                assert torch.equal(model(inputs()), a)
            with pytest.raises(RuntimeError), rw.route(model, ["A"] * 5):
                assert torch.allclose(model(inputs()), a, atol=1e-6)
                raise RuntimeError
            assert torch.equal(model(inputs()), base)
        assert torch.equal(model(inputs()), a)
        rw.set_active(model, "B")
        assert not torch.equal(model(inputs()), a)
    with pytest.raises(UnknownName, match="attached: \\['A', 'B'\\]"):
        rw.set_active(model, "C")


def test_rows_are_routed_to_their_adapters() -> None:
    model = stack(None)
    rows = ["B", None, "A", "A", "B"]
    with torch.no_grad():
        with rw.route(model, rows):
            y = model(inputs())
        for i, row in enumerate(rows):
            with rw.set_active(model, row):
                assert torch.allclose(model(inputs())[i], y[i], atol=1e-6)
        with rw.route(model, ["A"] * 4), pytest.raises(ValueError, match=r"4 names.*\(5, 12\)"):
            model(inputs())


@MODES
def test_routing_and_checkpointing(reentrant: bool) -> None:
    found = []
    for mode in (None, reentrant):
        model = stack(mode)
        with rw.route(model, ["B", None, "A", "A", "B"]):
            value = loss(model)
        value.backward()
        found.append(grads(model))
    assert equal(*found)


# -- torch.compile ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("method", "choices"), [("lora", ("A", "B", None, ["A", "B"], "A")), ("dora", ("A", None, ["A", "B"]))]
)
def test_compiled_switching(method: str, choices: tuple[str | list[str] | None, ...]) -> None:
    torch._dynamo.reset()
    model = stack(None, method)
    model.blocks = model.blocks[:1]  # tracing all three takes three times as long
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True)
    for names in choices:
        with rw.set_active(model, names):
            found = []
            for run in (model, compiled):
                model.zero_grad()
                value = loss(run)
                if names is not None:
                    value.backward()
                found.append((value, grads(model)))
            assert torch.allclose(found[0][0], found[1][0], atol=1e-6) and equal(found[0][1], found[1][1])
    with torch.no_grad(), rw.disabled(model):
        assert torch.allclose(compiled(inputs()), model(inputs()), atol=1e-6)
    torch._dynamo.reset()


@pytest.mark.parametrize("order", ["blocks", "mixed"])
@pytest.mark.parametrize("method", ["lora", "dora", "lokr", "loha", "oft"])
def test_adapters_trained_together_are_those_trained_apart(method, order):
    """Each on its rows of every batch, three steps, with an optimizer each."""
    torch.manual_seed(0)
    names = ["a", "a", "b", "b", "c", "c"] if order == "blocks" else ["a", "b", "c", "c", "a", "b"]
    steps = [torch.randint(0, 64, (6, 12)) for _ in range(3)]
    base = llama()

    def loss(model, ids):
        logits = model(input_ids=ids).logits[:, :-1]
        return nn.functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten(), reduction="sum")

    def made(names):
        model, found = copy.deepcopy(base), {}
        for name in names:
            torch.manual_seed(ord(name))
            found[name] = rw.attach(model, rw.recipe(method), name)
        return model, found

    model, together = made("abc")
    optimizers = [adapter.optimizer() for adapter in together.values()]
    for ids in steps:
        with rw.route(model, names):
            loss(model, ids).backward()
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    for name, adapter in together.items():
        alone, found = made(name)
        optimizer = found[name].optimizer()
        start = [p.clone() for p in found[name].parameters()]
        for ids in steps:
            loss(alone, ids[[i for i, n in enumerate(names) if n == name]]).backward()
            optimizer.step()
            optimizer.zero_grad()
        for one, two, before in zip(adapter.parameters(), found[name].parameters(), start, strict=True):
            assert not torch.equal(two, before)
            torch.testing.assert_close(one, two, rtol=1e-5, atol=1e-5)
