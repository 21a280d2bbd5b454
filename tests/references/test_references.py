"""Every method is what its paper says: its weight against the equation in NumPy, its size against the formula."""

import importlib
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import rankwise as rw
from rankwise.methods import catalogue

HERE = Path(__file__).parent
REFERENCES = {}
for file in sorted(HERE.glob("dense_*.py")):
    found = importlib.import_module(file.stem).REFERENCES
    assert not REFERENCES.keys() & found.keys()
    REFERENCES |= found
SHAPES = ((16, 24), (24, 16), (32, 32))
CASES = [(name, {**r.options}) for name, r in REFERENCES.items()]
CASES += [(name, {**options}) for name, r in REFERENCES.items() for options in r.more]


def attached(name, options, shape):
    """An adapter on a float64 layer of this shape (out, in), trained factors moved at random; W; the options."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(torch.nn.Linear(shape[1], shape[0], bias=False)).double()
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
    ours = adapter.sites[site].structure.weight(f, w).numpy()
    theirs = REFERENCES[name].weight(w.numpy(), {key: value.numpy() for key, value in f.items()}, known)
    assert theirs.dtype == np.float64 and theirs.shape == w.shape
    assert np.abs(theirs - w.numpy()).max() > 1e-3
    assert np.abs(ours - theirs).max() <= 1e-9 * np.abs(theirs).max()
    x = torch.randn(5, shape[1], dtype=torch.float64)
    assert np.abs(model(x).detach().numpy() - x.numpy() @ theirs.T).max() <= 1e-9 * np.abs(x.numpy() @ theirs.T).max()


@pytest.mark.parametrize(("name", "options"), CASES, ids=[f"{n} {o}" for n, o in CASES])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_the_size_is_the_formula(name, options, shape):
    _, adapter, _, known = attached(name, options, shape)
    assert sum(p.numel() for p in adapter.parameters()) == REFERENCES[name].count(*shape, known)
