"""Batches whose rows have adapters of their own: other structures, other ranks, other layers."""

import copy

import pytest
import torch
from law_cases import CONV, EMBEDDING, LEAVES, LINEAR, ROWS, TOKENS, WRAPPED, refusal
from torch import nn

import rankwise as rw
from rankwise.structures import OFT, LoKr, LoRA, Magnitude, TokenRows
from rankwise.testing import Layer, randomise

KINDS: tuple[Layer, ...] = (*LINEAR, *CONV[::3], *EMBEDDING)


def crowd(model: nn.Module, layer: Layer, structures) -> list[str]:
    """Attach every structure under a name of its own, its factors at random."""
    x, names = layer.inputs(3), []
    for i, structure in enumerate(structures):
        name = f"a{i}"
        adapter = rw.attach(model, rw.Recipe(structure, sites=layer.sites), name)
        randomise(adapter, lambda: model(x), i)
        names.append(name)
    return names


@torch.no_grad()
def check_rows(model: nn.Module, layer: Layer, names: list[str | None]) -> None:
    x = torch.cat([layer.inputs(3)] * (len(names) // 3 + 1))[: len(names)]
    with rw.route(model, names):
        got = model(x)
    for i, name in enumerate(names):
        with rw.set_active(model, name):
            alone = model(x[i : i + 1])
        torch.testing.assert_close(got[i : i + 1], alone, rtol=0, atol=1e-9)


@pytest.mark.parametrize("layer", KINDS, ids=lambda v: v.name)
def test_every_structure_in_one_batch(layer):
    torch.manual_seed(0)
    model = layer.make().double().eval()
    rank = (LoRA(1), LoRA(2), LoRA(3))
    extra = ROWS if layer in LINEAR else TOKENS[:3] if layer in EMBEDDING else ()
    leaves = [s for s in LEAVES if refusal(s, layer) is None]
    names = crowd(model, layer, (*leaves, *WRAPPED, *rank, *extra))
    mixed = [n for name in names for n in (name, None)][: 2 * len(names)]
    check_rows(model, layer, [*mixed, *reversed(names), names[0]])


def test_two_adapters_on_different_layers():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 6)).double().eval()
    layer = Layer("", lambda: model, lambda n: torch.randn(n, 4, 6).double(), rw.Sites())
    x = layer.inputs(3)
    for name, site in (("front", "0"), ("back", "2")):
        randomise(rw.attach(model, rw.Recipe(LoRA(2), sites=rw.Sites(site)), name), lambda: model(x))
    torch.manual_seed(1)
    x = torch.randn(3, 4, 6).double()
    with rw.route(model, ["front", None, "back"]):
        got = model(x)
    for i, name in enumerate(["front", None, "back"]):
        with rw.set_active(model, name):
            torch.testing.assert_close(got[i], model(x)[i], rtol=0, atol=1e-12)


class Flattening(nn.Module):
    """A block like those of OPT and of most mixtures: its second part sees the tokens of all rows one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.attention, self.mlp = nn.Linear(6, 6), nn.Linear(6, 6)

    def forward(self, x):
        x = x + self.attention(x).tanh()
        return x + self.mlp(x.flatten(0, 1)).tanh().view(x.shape)


@pytest.mark.parametrize("names", [["a0", None, "a1"], ["a0", "a0", "a1", "a1"], ["a1", "a2", None]], ids=str)
@pytest.mark.parametrize("tokens", [1, 4])
def test_tokens_of_all_rows_in_one_dim(names, tokens):
    torch.manual_seed(0)
    model = Flattening().double().eval()
    layer = Layer("", lambda: model, lambda n: torch.randn(n, tokens, 6).double(), rw.Sites())
    crowd(model, layer, (LoRA(2), LoRA(2), OFT(3)))
    check_rows(model, layer, names)


def test_tokens_of_unknown_rows_are_refused():
    model = Flattening().double()
    rw.attach(model, rw.Recipe(LoRA(2), sites=rw.Sites("mlp")), "one")  # whose tokens are whose is nowhere seen
    with rw.route(model, ["one", None]), pytest.raises(rw.errors.ActivityError, match=r"one adapter a row.*\(8, 6\)"):
        model(torch.randn(2, 4, 6).double())


def test_tokens_sent_to_one_expert_are_no_rows():
    class Sent(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.experts = nn.ModuleList([nn.Linear(6, 6), nn.Linear(6, 6)])

        def forward(self, x):
            tokens = x.flatten(0, 1)
            return torch.cat([self.experts[0](tokens[:2]), self.experts[1](tokens[2:])]).view(x.shape)

    model = Sent().double()
    rw.attach(model, rw.Recipe(LoRA(2)), "one")
    with rw.route(model, ["one", None]), pytest.raises(rw.errors.ActivityError, match=r"one adapter a row.*\(2, 6\)"):
        model(torch.randn(2, 4, 6).double())


def test_gradients_reach_each_rows_adapter_alone():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6)).double()
    one, two = (rw.attach(model, rw.Recipe(LoRA(2)), name) for name in ("one", "two"))
    for adapter in (one, two):
        rw.set_active(model, adapter.name)
        randomise(adapter, lambda: model(x_all))
    with rw.route(model, ["one", None, "two", "one"]):
        model(x_all)[:1].square().sum().backward()
    assert all(p.grad is not None and p.grad.any() for p in one.parameters())
    assert not any(p.grad is not None and p.grad.any() for p in two.parameters())


x_all = torch.linspace(-1, 1, 4 * 3 * 6, dtype=torch.float64).reshape(4, 3, 6)


def test_tied_head_and_rows_of_the_vocabulary():
    from rankwise.testing import LAYERS

    layer = next(layer for layer in LAYERS if layer.name == "tied head")
    torch.manual_seed(0)
    model = layer.make().double().eval()
    structures = (LoRA(2), OFT(4), Magnitude(LoRA(3)), TokenRows((0, 11)))
    names = crowd(model, layer, structures)
    check_rows(model, layer, [names[0], None, *names[1:], names[3], names[0]])


def test_what_cannot_be_routed_says_so():
    from rankwise.testing import LAYERS

    layer = next(layer for layer in LAYERS if layer.name == "experts")
    model = layer.make().double()
    rw.attach(model, rw.Recipe(LoRA(2)), "one")
    with rw.route(model, ["one", None]), pytest.raises(rw.errors.ActivityError, match="cannot be routed"):
        model(layer.inputs(2))
    with rw.route(model, [None, None]):
        model(layer.inputs(2))
    linear = nn.Sequential(nn.Linear(12, 8)).double()
    rw.attach(linear, rw.Recipe(LoRA(2)), "one")
    with rw.route(linear, ["one"]), pytest.raises(ValueError, match="one adapter a row"):
        linear(torch.randn(2, 3, 12).double())


def test_dropout_of_one_row_is_not_that_of_another():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 6)).double()
    rw.attach(model, rw.Recipe(LoRA(2), dropout=0.9), "dropped")
    rw.attach(model, rw.Recipe(LoRA(2)), "whole")
    randomise(rw.adapters(model)["whole"], lambda: model(x_all))
    model.train()
    with rw.route(model, ["dropped", "whole", "dropped", "whole"]):
        got = model(x_all)
    base = copy.deepcopy(model)
    with rw.set_active(base, "whole"):
        torch.testing.assert_close(got[1::2], base(x_all)[1::2], rtol=0, atol=1e-12)


@pytest.mark.parametrize("structure", [LoKr(2), LoRA(2)], ids=["own way", "node"])
def test_gradients_under_the_dropout_of_each_row(structure):
    """What runs again in backward must drop as it did, though another row's dropout came after."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16)).double()
    found = {}
    for name, p in (("a", 0.5), ("b", 0.0)):
        found[name] = rw.attach(model.eval(), rw.Recipe(structure, dropout=p), name)
        randomise(found[name], lambda: model(torch.ones(1, 3, 12, dtype=torch.float64)))
    model.train()
    x = torch.randn(2, 3, 12, dtype=torch.float64)
    grads = []
    for choose, rows in ((lambda: rw.route(model, ["a", "b"]), x), (lambda: rw.set_active(model, "a"), x[:1])):
        with choose():
            torch.manual_seed(3)
            y = model(rows)[:1]
        grads.append(torch.autograd.grad(y.square().sum(), [*found["a"].parameters()]))
    for routed, alone in zip(*grads, strict=True):
        torch.testing.assert_close(routed, alone)
