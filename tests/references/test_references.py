"""Every method is what its paper says: its weight against the equation in NumPy, its size against the formula."""

import importlib
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import rankwise as rw
from rankwise.methods import catalogue
from rankwise.structures import Structure

HERE = Path(__file__).parent
REFERENCES = {}
SAME = {}  # methods that differ from another in an axis other than the structure: name -> the other
for file in sorted(HERE.glob("dense_*.py")):
    module = importlib.import_module(file.stem)
    assert not REFERENCES.keys() & module.REFERENCES.keys()
    REFERENCES |= module.REFERENCES
    SAME |= {name: other for other, names in getattr(module, "SAME", {}).items() for name in names.split()}
SHAPES = ((16, 24), (24, 16), (32, 32))
CASES = [(name, {**r.options}) for name, r in REFERENCES.items()]
CASES += [(name, {**options}) for name, r in REFERENCES.items() for options in r.more]


def attached(name, options, shape):
    """An adapter on a float64 layer of this shape (out, in), trained factors moved at random; W; the options."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0], bias=False)).double().eval()
    w = model[0].weight.detach().clone()
    recipe = replace(rw.recipe(name, **options), init=rw.recipe("lora").init) if _free(name, options) else None
    adapter = rw.attach(model, recipe or rw.recipe(name, **options))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter) / 3)
    return model, adapter, w, catalogue()[name].options | options


def _free(name, options):
    """Whether the start is of no account and would need data."""
    return bool(rw.recipe(name, **options).init.needs)


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n} {o}" for n, o in CASES])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_weight_is_the_papers(name, options, shape):
    model, adapter, w, known = attached(name, options, shape)
    (site,) = adapter
    f = {key: value.detach() for key, value in adapter[site].items()}
    arrays, reference, x = {k: v.numpy() for k, v in f.items()}, REFERENCES[name], torch.randn(5, shape[1]).double()
    if reference.output is not None:
        y = reference.output(x.numpy(), arrays, known)
        assert y.dtype == np.float64 and np.abs(model(x).detach().numpy() - y).max() <= 1e-9 * np.abs(y).max()
        return
    ours = adapter.sites[site].structure.weight(f, w).numpy()
    theirs = reference.weight(w.numpy(), arrays, known)
    assert theirs.dtype == np.float64 and theirs.shape == w.shape
    assert np.abs(theirs - w.numpy()).max() > 1e-3
    assert np.abs(ours - theirs).max() <= 1e-9 * np.abs(theirs).max()
    assert np.abs(model(x).detach().numpy() - x.numpy() @ theirs.T).max() <= 1e-9 * np.abs(x.numpy() @ theirs.T).max()


def kinds(structure):
    """The classes that a structure is made of, from outside in."""
    inner = [getattr(structure, f.name) for f in fields(structure)]
    return [type(structure).__name__, *(kind for s in inner if isinstance(s, Structure) for kind in kinds(s))]


def test_every_method_has_a_reference():
    known = catalogue()
    assert known.keys() == REFERENCES.keys() | SAME.keys() and not REFERENCES.keys() & SAME.keys()
    for name, other in SAME.items():
        assert kinds(known[name].recipe.structure) == kinds(known[other].recipe.structure), (name, other)


def test_no_two_names_are_one_method():
    """Of one reference, they differ in start, solver, rank plan, penalties or dropout."""
    points = {}
    for name, entry in catalogue().items():
        r = entry.recipe
        rest = (r.init, r.solver, r.ranks, r.penalties, r.dropout, getattr(r.structure, "links", None))
        points.setdefault((SAME.get(name, name), repr(rest)), []).append(name)
    assert not [names for names in points.values() if len(names) > 1]


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n} {o}" for n, o in CASES])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_size_is_the_formula(name, options, shape):
    _, adapter, _, known = attached(name, options, shape)
    assert sum(p.numel() for p in adapter.parameters()) == REFERENCES[name].count(*shape, known)
