"""Gradients, first and second, against the dense weight in float64, in every form that an operator has."""

import pytest
import torch
from law_cases import CASES, CONV, LINEAR
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.checkpoint import checkpoint

import rankwise as rw
from rankwise.host import host_of, linear
from rankwise.ops.form import Form, costs
from rankwise.structures import Structure
from rankwise.testing import Layer, randomise
from rankwise.testing.compare import Comparison

CHOSEN = [
    (structure, layer)
    for structure, layer in CASES
    if layer in (*LINEAR[:1], *LINEAR[2:4], CONV[0]) and "not_mergeable" not in structure.traits
]
FORMS = {"cheapest": None, **{form.value: form for form in Form}}
EVERY = [(*case, form) for case in CHOSEN for form in FORMS if form == "cheapest" or case[1] is LINEAR[0]]


def built(structure: Structure, layer: Layer, dtype: torch.dtype) -> tuple[nn.Module, nn.Module, rw.Adapter]:
    torch.manual_seed(0)
    base = layer.make().to(dtype).requires_grad_(False)
    model = layer.make().to(dtype)
    model.load_state_dict(base.state_dict())
    adapter = rw.attach(model, rw.Recipe(structure, sites=layer.sites))
    model.train("samples" not in structure.traits)
    randomise(adapter, lambda: model(layer.inputs(2).to(dtype)))
    return base, model, adapter


def dense(base: nn.Module, adapter: rw.Adapter, x: Tensor, dtype: torch.dtype) -> Tensor:
    """The base with the adapted weight in place of its own."""
    ((name, site),) = adapter.sites.items()
    host = host_of(base.get_submodule(name), "layer")
    f = {n: v.to(dtype) if v.is_floating_point() else v for n, v in site.factors().items()}
    w = site.structure.weight(f, host.weight().to(dtype))
    changed = {**{n: p.to(dtype) for n, p in base.named_parameters()}, f"{name}.weight": host.tensor(w)}
    return functional_call(base, changed, (x,))


def twice(y: Tensor, inputs: list[Tensor]) -> list[Tensor]:
    """First derivatives of a function of y, and second ones in a direction."""
    first = torch.autograd.grad(y.sin().sum(), inputs, create_graph=True)
    torch.manual_seed(1)
    along = sum((g * torch.randn(g.shape, dtype=g.dtype)).sum() for g in first)  # randn_like would follow strides
    second = torch.autograd.grad(along, inputs, allow_unused=True)
    return [*first, *(torch.zeros_like(i) if s is None else s for s, i in zip(second, inputs, strict=True))]


@pytest.mark.parametrize(("structure", "layer", "form"), EVERY, ids=lambda v: getattr(v, "name", repr(v)))
def test_gradients_are_those_of_the_dense_weight(structure, layer, form, monkeypatch):
    chosen = FORMS[form]
    if chosen is not None:
        monkeypatch.setattr(
            linear, "cheapest", lambda *a: chosen if chosen in costs(*a) else min(costs(*a), key=costs(*a).get)
        )
    base, model, adapter = built(structure, layer, torch.float64)
    x = layer.inputs(3).requires_grad_()
    inputs = [x, *adapter.parameters()]
    y, want = model(x), dense(base, adapter, x, torch.float64)
    compare = Comparison("gradients")
    compare("output", y, want)
    for found, wanted in zip(twice(y, inputs), twice(want, inputs), strict=True):
        compare("derivatives", found, wanted)


@pytest.mark.parametrize(("dtype", "bound"), [(torch.float32, 1e-5), (torch.bfloat16, 0.03)])
@pytest.mark.parametrize(
    ("structure", "layer"), [c for c in CHOSEN if c[1] is LINEAR[0]], ids=lambda v: getattr(v, "name", repr(v))
)
def test_gradients_are_within_the_dtypes_error(structure, layer, dtype, bound):
    base, model, adapter = built(structure, layer, dtype)
    x = layer.inputs(8).to(dtype).requires_grad_()
    wide = x.detach().double().requires_grad_()
    g = torch.randn(model(x).shape, dtype=torch.float64).to(dtype)
    found = torch.autograd.grad(model(x), [x, *adapter.parameters()], g)
    y = dense(base.double(), adapter, wide, torch.float64)
    wanted = torch.autograd.grad(y, [wide, *adapter.parameters()], g.double())
    for one, two in zip(found, wanted, strict=True):
        assert (one.double() - two).norm() <= bound * two.norm()


class Reading(nn.Module):
    """Three layers that read one tensor."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(12, 16) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        return self.q_proj(x) * self.k_proj(x) + self.v_proj(x)


@pytest.mark.parametrize("structure", [s for s, layer in CHOSEN if layer is LINEAR[0]], ids=repr)
def test_a_first_step_under_a_checkpoint_is_the_same_step(structure):
    """What layers find out at their first call, the run again in backward must not find out differently."""
    found, x = [], torch.randn(5, 12, requires_grad=True)
    for again in (False, True):
        torch.manual_seed(0)
        model = Reading()
        adapter = rw.attach(model, rw.Recipe(structure))
        randomise(adapter, lambda model=model: model(x))
        with torch.autocast("cpu", torch.bfloat16):
            y = checkpoint(model, x, use_reentrant=False) if again else model(x)
        found.append(torch.autograd.grad(y.float().square().sum(), [x, *adapter.parameters()]))
    assert all(torch.equal(one, two) for one, two in zip(*found, strict=True))
