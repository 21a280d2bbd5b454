"""The nodes of a training step against the same maps written out, in float64, once and twice differentiated."""

import contextlib
import copy
from collections import Counter

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.autograd import gradcheck, gradgradcheck
from torch.utils.checkpoint import checkpoint
from torch.utils.flop_counter import FlopCounterMode
from transformers.pytorch_utils import Conv1D

import rankwise as rw
from rankwise.errors import TrainingError
from rankwise.ops import Dense, Fold, Hadamard, Kronecker, LinearOperator, Product, Scaled, Sparse, fused, whole
from rankwise.ops.form import Form, cheapest, costs
from rankwise.ops.kronecker import Beside
from rankwise.ops.operator import leaves
from rankwise.structures import DeLoRA, HiRA, LoHa, LoKr, LoRA, Magnitude
from rankwise.testing import randomise
from rankwise.testing.compare import Comparison


def tensor(*shape: int) -> torch.Tensor:
    return torch.randn(*shape, dtype=torch.float64).requires_grad_()


# -- the low-rank node ---------------------------------------------------------------------------


def parts_of(flat, batch, count, scaled, recompute):
    """Parts over a flat list of tensors, so that gradcheck can move each of them."""
    found = []
    for i in range(count):
        w, left, right, m = flat[4 * i : 4 * i + 4]
        norm = (1 + torch.arange(m.shape[-1]).double()).expand_as(m) if scaled else None
        given = (lambda norm=norm: norm) if scaled else None
        found.append(fused.Part(w, left, right, 0.5 + i, m if scaled else None, given, recompute))
    return found


def written_out(x, parts):
    for p in parts:
        y = x @ p.weight.mT + p.scale * x @ p.right.mT @ p.left.mT
        yield y if p.magnitude is None else y * (p.magnitude / p.norm()).unsqueeze(-2)


@pytest.mark.parametrize("recompute", [False, True])
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize(("count", "vector"), [(1, 1), (1, 16), (3, 16)])  # what is narrow lies as (T, r), or (r, T)
@pytest.mark.parametrize("batch", [(), (2,)])
@pytest.mark.parametrize("tokens", [2, 3])  # fewer than W is wide, in all, or more
def test_low_rank_parts(tokens, vector, batch, count, scaled, recompute, monkeypatch):
    monkeypatch.setattr(fused, "VECTOR", vector)
    monkeypatch.setattr(fused, "CACHED", 8)  # one token at a time, or two
    torch.manual_seed(0)
    x, flat = tensor(2, tokens, 5), []
    for i in range(count):
        rows, rank = 4 + i, 1 + i
        flat += [tensor(rows, 5), tensor(*batch, rows, rank), tensor(*batch, rank, 5), tensor(*batch, rows)]

    def node(x, *flat):
        return fused.run(x, parts_of(flat, batch, count, scaled, recompute))

    compare = Comparison("fused")
    for y, want in zip(node(x, *flat), written_out(x, parts_of(flat, batch, count, scaled, recompute)), strict=True):
        compare("written out", y, want)
    assert gradcheck(node, (x, *flat))
    assert gradgradcheck(node, (x, *flat))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
@pytest.mark.parametrize("dropout", [0.0, 0.3])
@pytest.mark.parametrize("scaled", [False, True])
def test_an_input_that_no_trained_factor_multiplies_is_not_kept(scaled, dropout, dtype):
    torch.manual_seed(0)
    x, flat = tensor(2, 3, 9).detach().to(dtype).requires_grad_(), []
    for rows in (4, 6):
        flat += [tensor(rows, 9), tensor(rows, 2), tensor(2, 9), tensor(rows)]
    flat = [t.detach().to(dtype).requires_grad_(i % 4 in (1, 3)) for i, t in enumerate(flat)]
    trained = [t for t in flat if t.requires_grad and (scaled or t.dim() > 1)]

    def node(x, *given):
        torch.manual_seed(1)
        it = iter(given)
        return fused.run(
            x, parts_of([next(it) if any(t is g for g in trained) else t for t in flat], (), 2, scaled, False), dropout
        )

    kept = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        node(x, *trained)
    assert not any(t.shape == x.shape for t in kept)
    if dtype is torch.float64:
        assert gradcheck(node, (x, *trained))
        assert gradgradcheck(node, (x, *trained))


def test_an_output_that_is_not_used_costs_no_gradient():
    x, flat = tensor(2, 3, 5), [tensor(4, 5), tensor(4, 1), tensor(1, 5), tensor(4)] * 2
    first, _ = fused.run(x, parts_of(flat, (), 2, False, False))
    g = torch.randn_like(first)
    want = torch.autograd.grad(next(written_out(x, parts_of(flat[:4], (), 1, False, False))), [x, flat[1]], g)
    for found, wanted in zip(torch.autograd.grad(first, [x, flat[1]], g), want, strict=True):
        torch.testing.assert_close(found, wanted)


def test_a_magnitude_of_zero_has_its_gradient():
    flat = [tensor(4, 5), tensor(4, 1), tensor(1, 5), torch.tensor([0.0, 1, 2, 3]).double().requires_grad_()]
    x = tensor(2, 3, 5)
    assert gradcheck(lambda m: fused.run(x, parts_of([*flat[:3], m], (), 1, True, False)), (flat[3],))


def test_dropout_is_made_again_from_its_seeds():
    torch.manual_seed(0)
    x, flat = tensor(2, 3, 5), [tensor(4, 5), tensor(4, 2), tensor(2, 5), tensor(4)]

    def node(*inputs):
        torch.manual_seed(1)
        return fused.run(inputs[0], parts_of(inputs[1:], (), 1, False, False), 0.3)

    assert gradcheck(node, (x, *flat))
    assert gradgradcheck(node, (x, *flat))


def test_dropout_has_its_rate_and_is_unbiased():
    torch.manual_seed(0)
    x, eye = torch.ones(64, 256), torch.eye(256)
    seen = [fused.run(x, [fused.Part(torch.zeros(256, 256), eye, eye)], 0.1)[0] for _ in range(40)]
    found = torch.stack(seen)
    share = (found == 0).double().mean()
    assert abs(share - 0.1) < 5 * (0.09 / found.numel()) ** 0.5
    assert torch.allclose(found[found != 0], torch.tensor(1 / 0.9))
    assert ((found == 0).double().mean(0) - 0.1).abs().max() < 0.4  # no entry that is always dropped


def test_outputs_may_be_changed_in_place():
    x, flat = tensor(2, 3, 5), [tensor(4, 5), tensor(4, 1), tensor(1, 5), tensor(4)] * 2
    first, second = fused.run(x, parts_of(flat, (), 2, False, False))
    first.mul_(2)
    (first + second).sum().backward()


@pytest.mark.parametrize("over", ["alone", "checkpoint", "offload"])
def test_an_output_that_a_magnitude_reads_may_be_changed_in_place(over):
    def gradients(recompute, change):
        torch.manual_seed(0)
        x, flat = tensor(2, 3, 5), [tensor(4, 5), tensor(4, 1), tensor(1, 5), tensor(4)]

        def block(x):
            (y,) = fused.run(x, parts_of(flat, (), 1, True, recompute))
            return change(y).tanh()

        with torch.autograd.graph.save_on_cpu() if over == "offload" else contextlib.nullcontext():
            y = checkpoint(block, x, use_reentrant=False) if over == "checkpoint" else block(x)
        first = torch.autograd.grad(y.sum(), (x, *flat), create_graph=over == "alone")
        second = torch.autograd.grad(first[0].square().sum(), (x, *flat)) if over == "alone" else ()
        return *first, *second

    wanted = gradients(False, lambda y: y * 3 + 1)
    for recompute in (False, True):
        torch.testing.assert_close(gradients(recompute, lambda y: y.mul_(3).add_(1)), wanted)


def test_an_output_changed_in_place_whose_origin_is_not_kept_is_refused():
    x, w, left, right, m = torch.ones(2, 5), torch.ones(4, 5), tensor(4, 1), torch.ones(1, 5), tensor(4)
    (y,) = fused.run(x.double(), parts_of([w.double(), left, right.double(), m], (), 1, True, False))
    with pytest.raises(TrainingError, match="changed in place"):
        y.mul_(2).sum().backward()


# -- the node by a matrix ------------------------------------------------------------------------


@pytest.mark.parametrize(
    "build",
    [
        lambda a, b, c, d: Hadamard(Product(Dense(a), Dense(b)), Product(Dense(c), Dense(d))),
        lambda a, b, c, d: Scaled(Hadamard(Dense(a @ b), Product(Dense(c), Dense(d))), -2.0),
        lambda a, b, c, d: Kronecker(Dense(a), Dense(d[:1])),
    ],
    ids=["hadamard", "gate", "kronecker"],
)
def test_by_a_matrix(build):
    torch.manual_seed(0)
    a, b, c, d = tensor(4, 1), tensor(1, 6), tensor(4, 2), tensor(2, 6)
    x, w = tensor(2, 3, 6), torch.randn(4, 6, dtype=torch.float64)

    def node(x, *factors):
        return whole.run(x, w, build(*factors))

    compare = Comparison("whole")
    compare("written out", node(x, a, b, c, d), x @ (w + build(a, b, c, d).dense()).mT)
    assert gradcheck(node, (x, a, b, c, d))
    assert gradgradcheck(node, (x, a, b, c, d))


class Stored:
    """A frozen weight in a format of its own."""

    def __init__(self, w: torch.Tensor) -> None:
        self.w = w

    def matmul(self, x: torch.Tensor) -> torch.Tensor:
        return x @ self.w.mT

    def dense(self) -> torch.Tensor:
        return self.w


@pytest.mark.parametrize("frozen", [False, True])
@pytest.mark.parametrize("right", ["dense", "low rank"])
@pytest.mark.parametrize("sizes", [(2, 3, 3, 2), (2, 5, 3, 2), (3, 2, 2, 5)])  # either factor first
def test_a_kronecker_product_beside_a_weight(sizes, right, frozen):
    torch.manual_seed(0)
    m1, m2, n1, n2 = sizes
    x, w, c = tensor(2, 3, n1 * n2), tensor(m1 * m2, n1 * n2), tensor(m1, n1)
    d = [tensor(m2, n2)] if right == "dense" else [tensor(m2, 1), tensor(1, n2)]
    stored = Stored(w.detach()) if frozen else w

    def node(x, w, c, *d):
        op = Kronecker(Dense(c), Dense(d[0]) if len(d) == 1 else Product(Dense(d[0]), Dense(d[1])))
        return Beside(stored if frozen else w, op, 1.5, leaves(op))(x)

    wide = torch.kron(c, d[0] if len(d) == 1 else d[0] @ d[1])
    Comparison("beside")("written out", node(x, w, c, *d), x @ (w + 1.5 * wide).mT)
    given = (x, w.detach() if frozen else w, c, *d)
    assert gradcheck(node, given)
    assert gradgradcheck(node, given)
    torch.testing.assert_close(node(*given).mul_(2), 2 * node(*given))  # a model may write on what it gets
    none = tensor(0, n1 * n2)  # the rows of an expert that no token chose
    assert all(not g.any() for g in torch.autograd.grad(node(none, *given[1:]).sum(), [c, *d]))


@pytest.mark.parametrize("sizes", [(16, 16), (16, 48), (48, 16)])
def test_lokr_keeps_its_input_alone(sizes):
    model = nn.Sequential(nn.Linear(*sizes, bias=False))
    moved(model, rw.Recipe(LoKr(4)))
    x, kept = torch.randn(2, 64, sizes[0], requires_grad=True), []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        model(x).sum().backward()
    assert [t is x for t in kept if t.numel() >= x.numel()] == [True]


def test_in_half_precision_a_small_update_survives():
    """W + op would round it away."""
    torch.manual_seed(0)
    x, w = torch.randn(1, 4, 32).bfloat16(), torch.randn(32, 32).bfloat16()
    op = Hadamard(Dense(torch.randn(32, 32) * 1e-4), Dense(torch.randn(32, 32)))
    moved = whole.run(x * 64, torch.zeros_like(w), op)
    assert moved.abs().max() > 0
    wide = x.double() @ (w.double() + op.dense().double()).mT
    base = x.double() @ w.double().mT
    apart = whole.run(x, w, op).double()
    assert (apart - wide).abs().mean() < (base.bfloat16().double() - wide).abs().mean() * 1.5


# -- which form ----------------------------------------------------------------------------------


def hadamard(m: int, n: int, r: int) -> Hadamard:
    return Hadamard(*(Product(Dense(torch.ones(m, r)), Dense(torch.ones(r, n))) for _ in range(2)))


def few(n: int, entries: int) -> Sparse:
    place = torch.randperm(n * n)[:entries]
    return Sparse(torch.ones(entries), place // n, place % n, (n, n))


def folded(n: int, rank: int) -> Product:
    return Product(Dense(torch.ones(n, rank)), Fold(n, rank, torch.ones(())))


@pytest.mark.parametrize(
    ("op", "tokens", "together", "form"),
    [
        (hadamard(256, 256, 16), 512, True, Form.WHOLE),
        (hadamard(256, 256, 8), 512, True, Form.LOW_RANK),
        (hadamard(1024, 1024, 8), 512, True, Form.LOW_RANK),
        (hadamard(1024, 1024, 16), 512, False, Form.LOW_RANK),
        (hadamard(256, 256, 16), 512, False, Form.WHOLE),
        (hadamard(256, 256, 16), 8, True, Form.LOW_RANK),
        (Kronecker(Dense(torch.ones(16, 16)), Dense(torch.ones(16, 16))), 512, True, Form.OWN),
        (folded(256, 16), 512, True, Form.LOW_RANK),
        (folded(256, 32), 512, True, Form.OWN),
        (few(1024, 2**15), 512, True, Form.WHOLE),
        (few(1024, 2**13), 512, True, Form.OWN),
        (few(1024, 2**15), 512, False, Form.OWN),
        (Hadamard(Dense(torch.ones(64, 64)), hadamard(64, 64, 2)), 512, True, Form.WHOLE),
    ],
)
def test_the_form_flips_with_width_rank_tokens_and_dtype(op, tokens, together, form):
    assert cheapest(op, tokens, together) is form


@settings(max_examples=25, deadline=None)
@given(m=st.sampled_from([8, 24]), n=st.sampled_from([12, 40]), r=st.integers(1, 4), tokens=st.integers(1, 64))
def test_what_a_form_costs_is_what_it_computes(m, n, r, tokens):
    """Against torch's own count of the products of forward and backward."""
    factors = [torch.randn(*shape).requires_grad_() for shape in ((m, r), (r, n)) * 2]
    op = Hadamard(*(Product(Dense(b), Dense(a)) for b, a in (factors[:2], factors[2:])))
    x, w = torch.randn(tokens, n).requires_grad_(), torch.randn(m, n)
    pair = op.lower()
    ways = {
        Form.LOW_RANK: lambda: fused.run(x, [fused.Part(w, pair.left, pair.right)])[0],
        Form.WHOLE: lambda: whole.run(x, w, op),
    }
    assert pair is not None
    for form, way in ways.items():
        with FlopCounterMode(display=False) as seen:
            torch.autograd.grad(way().sum(), [x, *(factors if form is Form.WHOLE else pair)])
        counted, foreseen = seen.get_total_flops() / 2, costs(op, tokens, together=True)[form]
        if form is Form.LOW_RANK:  # the frozen weight's own products accumulate in place, which torch does not count
            assert counted == foreseen
        else:
            assert counted - 2 * tokens * m * n == tokens * m * n + 8 * m * n * r <= foreseen


# -- siblings ------------------------------------------------------------------------------------


class Attention(nn.Module):
    """Three layers that read x; with ``other``, only the first does."""

    def __init__(self, dim: int = 8) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim).double() for _ in range(3))

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        read = x if other is None else other
        return self.q_proj(x) * self.k_proj(read) + self.v_proj(read)


class Merged(Attention):
    """Keys and values of two tensors, the queries of one."""

    def forward(self, x: torch.Tensor, other: torch.Tensor | None = None) -> torch.Tensor:
        return super().forward(x) + (0 if other is None else self.k_proj(other) * self.v_proj(other))


def nodes(y: torch.Tensor) -> Counter:
    """How many nodes of each name the graph of y has."""
    seen, todo = set(), [y.grad_fn]
    while todo:
        node = todo.pop()
        if node is not None and node not in seen:
            seen.add(node)
            todo += [n for n, _ in node.next_functions]
    return Counter(type(n).__name__ for n in seen)


def moved(model: nn.Module, recipe="lora", name="default") -> rw.Adapter:
    adapter = rw.attach(model, rw.recipes.get(recipe) if isinstance(recipe, str) else recipe, name)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn_like(p) * 0.1 + 0.3)
    return adapter


def grads(model: nn.Module, *inputs: torch.Tensor) -> dict[str, torch.Tensor]:
    model.zero_grad()
    model(*inputs).square().sum().backward()
    return {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}


STRUCTURES = [LoRA(2), Magnitude(LoRA(2)), LoHa(2), HiRA(2)]


def agree(found: dict[str, torch.Tensor], wanted: dict[str, torch.Tensor]) -> None:
    assert found.keys() == wanted.keys()
    for name, value in found.items():
        torch.testing.assert_close(value, wanted[name], rtol=1e-9, atol=1e-9)


def apart(model: nn.Module) -> nn.Module:
    """A copy whose layers know nothing of each other."""
    model = copy.deepcopy(model)
    for module in model.modules():
        if isinstance(module, nn.Linear):
            module.adapters.siblings = None
    return model


@pytest.mark.parametrize("structure", STRUCTURES, ids=str)
def test_siblings_are_one_node_and_the_same_map(structure):
    torch.manual_seed(0)
    model = Attention()
    moved(model, rw.Recipe(structure))
    x = tensor(2, 3, 8)
    together, alone = nodes(model(x)), nodes(apart(model)(x))
    if structure in STRUCTURES[:2]:
        assert (together["_FusedBackward"], alone["_FusedBackward"]) == (1, 3)
    agree(grads(model, x), grads(apart(model), x))


def test_siblings_that_read_different_tensors_run_alone():
    torch.manual_seed(0)
    model = Attention()
    moved(model, rw.Recipe(LoRA(2)))
    x, other = tensor(2, 3, 8), tensor(2, 3, 8)
    agree(grads(model, x, other), grads(apart(model), x, other))
    assert nodes(model(x, other))["_FusedBackward"] == 3  # and do not try again
    agree(grads(model, x, other), grads(apart(model), x, other))


@pytest.mark.parametrize("layer", [nn.Linear(8, 6), Conv1D(6, 8)], ids=["Linear", "Conv1D"])
def test_a_weight_whose_data_was_replaced_is_the_new_one(layer):
    """As ``model.to()`` replaces it, or offloading."""
    layer = copy.deepcopy(layer).requires_grad_(False)
    moved(layer, rw.Recipe(LoRA(2)))
    x = torch.randn(2, 3, 8, requires_grad=True)
    first = layer(x)
    layer.weight.data = layer.weight.data * 2
    w = layer.weight if isinstance(layer, nn.Linear) else layer.weight.mT
    torch.testing.assert_close(layer(x) - first, x @ (w / 2).mT)
    layer.double()
    assert layer(x.double()).dtype == torch.float64


def _a_factor_of_its_own(model):
    level = model.q_proj.adapters.default.layer
    name = next(iter(level._parameters))
    setattr(level, name, nn.Parameter(torch.randn_like(level._parameters[name])))


CHANGES = {
    "a step": lambda m: [p.data.add_(0.1) for n, p in m.named_parameters() if "adapters" in n],
    "another factor": _a_factor_of_its_own,
    "another weight": lambda m: setattr(m.q_proj, "weight", nn.Parameter(2 * m.q_proj.weight.detach(), False)),
    "other data of a weight": lambda m: setattr(m.k_proj.weight, "data", m.k_proj.weight.data * 3),
    "evaluation": nn.Module.eval,
    "a second adapter": lambda m: moved(m, rw.Recipe(LoRA(2)), "second"),
    "both": lambda m: rw.set_active(m, ("default", "second")),
    "the second": lambda m: rw.set_active(m, "second"),
}


@pytest.mark.parametrize("structure", [*STRUCTURES, LoKr(None)], ids=str)
def test_what_a_layer_keeps_between_steps_follows_every_change(structure):
    torch.manual_seed(0)
    model, x = Attention(), tensor(2, 3, 8)
    moved(model, rw.Recipe(structure))
    for change in (lambda m: None, *CHANGES.values()):
        change(model)
        for rows in (x, x, x[:1], tensor(9, 3, 8), x, x):
            agree(grads(model, rows), grads(apart(model), rows))


def test_a_tensor_changed_between_siblings_is_another_tensor():
    torch.manual_seed(0)
    model = Attention()
    moved(model, rw.Recipe(LoRA(2)))
    x = torch.randn(2, 3, 8, dtype=torch.float64)
    model.q_proj(x)
    x.mul_(2)
    torch.testing.assert_close(model.k_proj(x), apart(model).k_proj(x))


def test_a_choice_changed_between_siblings_is_seen():
    torch.manual_seed(0)
    model = Attention()
    moved(model, rw.Recipe(LoRA(2)), "one")
    moved(model, rw.Recipe(LoRA(2)), "two")
    x = tensor(2, 3, 8)
    rw.set_active(model, "one")
    model.q_proj(x)
    rw.set_active(model, "two")
    torch.testing.assert_close(model.k_proj(x), apart(model).k_proj(x))


def test_hooks_of_a_sibling_see_its_own_call():
    model = Attention()
    moved(model, rw.Recipe(LoRA(2)))
    seen = []
    model.k_proj.register_forward_hook(lambda m, args, y: seen.append(y) or y * 2)
    x = tensor(2, 3, 8)
    y = model(x)
    assert len(seen) == 1
    alone = apart(model)
    torch.testing.assert_close(y, alone(x))


def test_a_sibling_that_is_not_adapted_or_was_detached_runs_alone():
    torch.manual_seed(0)
    model = Attention()
    first = moved(model, rw.Recipe(LoRA(2), sites=rw.Sites(targets=("q_proj", "k_proj"))), "one")
    x = tensor(2, 3, 8)
    assert nodes(model(x))["_FusedBackward"] == 1
    agree(grads(model, x), grads(copy.deepcopy(model), x))
    first.detach()
    assert not nodes(model(x))["_FusedBackward"]


@pytest.mark.parametrize("structure", STRUCTURES[:2], ids=str)
def test_siblings_under_checkpointing_with_dropout(structure):
    torch.manual_seed(0)
    model = Attention()
    moved(model, rw.Recipe(structure, dropout=0.3)).model.train()
    x = tensor(2, 3, 8)
    found = {}
    for kind in ("plain", "checkpoint"):
        torch.manual_seed(7)
        model.zero_grad()
        y = model(x) if kind == "plain" else checkpoint(model, x, use_reentrant=False)
        y.square().sum().backward()
        found[kind] = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    agree(found["checkpoint"], found["plain"])


@pytest.mark.parametrize("structure", [LoRA(2), DeLoRA(2), DeLoRA(8), LoHa(2)], ids=str)
@pytest.mark.parametrize("kind", [Attention, Merged])
def test_siblings_that_part_under_checkpointing(kind, structure):
    """The call in which they do runs again as it ran."""
    torch.manual_seed(0)
    model, (x, other) = kind(), (tensor(2, 3, 8), tensor(2, 3, 8))
    moved(model, rw.Recipe(structure))
    for _ in range(3):
        wanted = grads(apart(model), x, other)
        model.zero_grad()
        checkpoint(model, x, other, use_reentrant=False).square().sum().backward()
        agree({n: p.grad for n, p in model.named_parameters() if p.grad is not None}, wanted)
    assert nodes(model(x, other))["_FusedBackward"] == nodes(apart(model)(x, other))["_FusedBackward"]


def test_a_deep_copy_has_siblings_of_its_own():
    model = Attention()
    moved(model, rw.Recipe(LoRA(2)))
    twin = copy.deepcopy(model)
    members = twin.q_proj.adapters.siblings.members
    assert members == (twin.q_proj, twin.k_proj, twin.v_proj)
    assert twin.k_proj.adapters.siblings is twin.q_proj.adapters.siblings


# -- DoRA's norm ---------------------------------------------------------------------------------


def test_the_norm_survives_cancellation():
    """A row that the update removes but for a thousandth: the three terms alone would lose it."""
    torch.manual_seed(0)
    layer = nn.Linear(64, 32, bias=False)
    adapter = moved(layer, rw.Recipe(Magnitude(LoRA(4, alpha=None))))
    factors = next(iter(adapter.sites.values()))
    with torch.no_grad():
        u, s, v = torch.linalg.svd(layer.weight, full_matrices=False)
        layer.weight.copy_((u[:, :4] * s[:4]) @ v[:4])  # of rank 4, so that the factors reach it
        factors.b.copy_(-(u[:, :4] * s[:4]))
        factors.a.copy_(v[:4])
        factors.b[3:] = 0
        factors.b[1] *= 0.999
    host = rw.host.host_of(layer, "layer")
    op: LinearOperator = factors.structure.inner.delta(factors.factors())
    exact = torch.linalg.vector_norm(layer.weight.double() + op.dense().double(), dim=-1)
    found = host.row_norm(op).double()
    assert (found[1] / exact[1] - 1).abs() < 1e-3
    assert (found[3:] / exact[3:] - 1).abs().max() < 1e-6


def test_the_norm_follows_a_weight_that_was_changed():
    layer = nn.Linear(8, 8, bias=False)
    adapter = moved(layer, rw.Recipe(Magnitude(LoRA(2))))
    x = torch.randn(3, 8)
    layer(x)
    with torch.no_grad():
        layer.weight.mul_(3)
    factors = next(iter(adapter.sites.values()))
    want = x @ factors.structure.weight(factors.factors(), layer.weight).mT
    torch.testing.assert_close(layer(x), want)


@pytest.mark.parametrize("recompute", [False, True])
def test_both_trades_of_a_magnitude_agree(recompute):
    torch.manual_seed(0)
    model = nn.Linear(8, 6, bias=False).double()
    adapter = moved(model, rw.Recipe(Magnitude(LoRA(2), recompute=recompute)))
    x = tensor(2, 3, 8)
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.shape) or t, lambda t: t):
        y = model(x)
    assert ((2, 3, 6) in saved) is not recompute
    g = torch.randn_like(y)
    found = torch.autograd.grad(y, [x, *adapter.parameters()], g)
    factors = next(iter(adapter.sites.values()))
    want = x @ factors.structure.weight(factors.factors(), model.weight).mT
    for one, two in zip(found, torch.autograd.grad(want, [x, *adapter.parameters()], g), strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize(
    ("layer", "structure", "x"),
    [
        (nn.Conv2d(4, 6, 3), LoRA(2), torch.randn(2, 4, 8, 8)),
        (nn.Linear(16, 16), rw.structures.LoKr(2), torch.randn(2, 3, 16)),
        (nn.Linear(16, 16), LoRA(2), torch.randn(2, 3, 16)),
    ],
    ids=["conv", "lokr", "linear"],
)
def test_dropout_keeps_no_copy_of_the_input(layer, structure, x):
    torch.manual_seed(0)
    layer = nn.Sequential(copy.deepcopy(layer))
    adapter = moved(layer, rw.Recipe(structure, dropout=0.5, sites=rw.Sites(targets=("0",))))
    layer.train()
    x = x.clone().requires_grad_()
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t) or t, lambda t: t):
        y = layer(x)
    assert {t.data_ptr() for t in saved if t.shape == x.shape and t.is_floating_point()} <= {x.data_ptr()}
    assert not any(t.dtype == torch.bool for t in saved)
    y.sum().backward()
    assert all(p.grad is not None for p in adapter.parameters())
    state = torch.random.get_rng_state()
    one = layer(x)
    torch.random.set_rng_state(state)
    assert torch.equal(one, layer(x))
    assert not torch.equal(one, layer(x))


@pytest.mark.parametrize("structure", [LoRA(2), Magnitude(LoRA(2)), HiRA(2)], ids=str)
def test_autocast_gives_what_the_casts_give(structure):
    """Under autocast a bfloat16 base has the node, a float32 base autocast's own products."""
    torch.manual_seed(0)
    x = torch.randn(2, 3, 32)
    for dtype in (torch.bfloat16, torch.float32):
        layer = nn.Linear(32, 32).to(dtype)
        moved(layer, rw.Recipe(structure))
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x.to(dtype))
        assert y.dtype == torch.bfloat16
        y.float().square().sum().backward()
        factors = next(iter(layer.adapters.default.children()))
        w = factors.structure.weight({k: f.double() for k, f in factors.factors().items()}, layer.weight.double())
        want = x.to(dtype).double() @ w.mT + layer.bias.double()
        assert (y.double() - want).norm() < 2**-6 * want.norm()
        if dtype == torch.bfloat16:
            assert torch.equal(y, layer(x.to(dtype)))


@pytest.mark.parametrize("method", ["lora", "dora", "pissa"])
def test_a_lone_token_without_a_batch(method):
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 4)).double()
    adapter = rw.attach(model, rw.recipe(method, rank=2))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(torch.randn_like(p) / 4)
    x = torch.randn(6, dtype=torch.float64)
    found = []
    for tokens in (x, x.unsqueeze(0)):
        model.zero_grad()
        y = model(tokens)
        y.square().sum().backward()
        found.append([y.flatten(), *(p.grad.clone() for p in adapter.parameters())])
    for one, two in zip(*found, strict=True):
        torch.testing.assert_close(one, two)


@pytest.mark.parametrize("method", ["lora", "dora"])
def test_a_model_may_write_on_the_output_of_a_layer(method):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(8, 6, bias=False), nn.ReLU(inplace=True), nn.Linear(6, 4))
    plain = nn.Sequential(base[0], nn.ReLU(), base[2])
    x = torch.randn(5, 8)

    def grads(model: nn.Module, again: bool = False) -> dict[str, torch.Tensor]:
        torch.manual_seed(1)
        adapter = rw.attach(copy.deepcopy(model), rw.recipe(method, rank=2))
        randomise(adapter, lambda: adapter.model(x))
        y = checkpoint(adapter.model, x, use_reentrant=False) if again else adapter.model(x)
        y.square().sum().backward()
        return {n: p.grad for n, p in adapter.named_parameters() if p.grad is not None}

    torch.testing.assert_close(grads(base), grads(plain))
    torch.testing.assert_close(grads(base, again=True), grads(plain))
