"""L1 to L4 for a structure, on every kind of layer that it accepts."""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from rankwise._recipe import Recipe
from rankwise.adapter import SiteFactors
from rankwise.attachment import Adapter, attach, load, route, set_active
from rankwise.errors import TargetError
from rankwise.lifecycle import merge
from rankwise.structures import Structure
from rankwise.testing.compare import TOLERANCE, Comparison, Figures, randomise, truth, worst
from rankwise.testing.layers import LAYERS, Layer


def accepts(structure: Structure, layer: Layer) -> bool:
    """Whether the structure can sit on the layer; it refuses with a TargetError."""
    try:
        attach(layer.make().double(), Recipe(structure, sites=layer.sites))
    except TargetError:
        return False
    return True


def check_structure(
    structure: Structure, layers: Sequence[Layer] = LAYERS, *, known: Iterable[type] = (), tolerance: float = TOLERANCE
) -> Figures:
    """L1 to L4 over every kind of layer that the structure accepts.

    Args:
        structure: the structure, of a rank that fits layers of 8 rows (4, say).
        layers: kinds of layer; those that it refuses with a TargetError are left out.
        known: classes that a saved recipe may name: the structure's own, if it is not ours.
        tolerance: of every comparison, in units of the largest value.

    Returns:
        The worst figure of each law, and the smallest effect of the random factors.
    """
    accepted = [layer for layer in layers if accepts(structure, layer)]
    assert accepted, f"{structure!r} accepts none of {[layer.name for layer in layers]}"
    return worst(check_on(structure, layer, known, tolerance) for layer in accepted)


def check_on(structure: Structure, layer: Layer, known: Iterable[type] = (), tolerance: float = TOLERANCE) -> Figures:
    """L1 to L4 on one kind of layer.

    Args:
        structure: the structure.
        layer: a kind of layer that it accepts.
        known: classes that a saved recipe may name.
        tolerance: of every comparison.

    Returns:
        The figure of each law, and the effect of the random factors.
    """
    torch.manual_seed(0)
    compare = Comparison(f"{structure!r} on {layer.name}", tolerance)
    base, x, recipe = layer.make().double().eval(), layer.inputs(3), Recipe(structure, sites=layer.sites)
    model = copy.deepcopy(base)
    adapter = attach(model, recipe)
    if "moves_at_start" not in structure.traits:
        compare("L2 identity", model(x), base(x))
    compare.figures["effect"] = randomise(adapter, lambda: model(x))
    _meaning(compare, model, truth(base, adapter), x)
    for factors in adapter.sites.values():
        _batch(compare, factors)
    if layer.rowwise:
        _rows(compare, copy.deepcopy(base), recipe, x)
    _closure(compare, base, adapter, x, known)
    return compare.figures


def _meaning(compare: Comparison, model: nn.Module, dense: nn.Module, x: Tensor) -> None:
    """L1, in both modes, and for the gradient with respect to the input."""
    for mode, name in ((True, "training"), (False, "evaluation")):
        compare("L1 meaning", model.train(mode)(x), dense.train(mode)(x), f", {name}")
    if x.is_floating_point():
        z = x.clone().requires_grad_()
        outputs = model(z), dense(z)
        along = torch.randn_like(outputs[0])
        got, want = (torch.autograd.grad(y, z, along)[0] for y in outputs)
        compare("L1 meaning", got, want, ", gradient of x")


@torch.no_grad()
def _batch(compare: Comparison, factors: SiteFactors) -> None:
    """L3 for the dense form: stacked factors give stacked weights."""
    weight, site, f = factors.structure.weight, factors.site, factors.factors()
    w = torch.randn(*([site.stack] if site.stack else []), site.rows, site.cols, dtype=torch.float64)
    if site.stack is None:
        f = {k: torch.stack([v, v + torch.randn_like(v) / 4]) for k, v in f.items()}
    every = range(site.stack or 2)
    each = [weight({k: v[i] for k, v in f.items()}, w[i] if site.stack else w) for i in every]
    compare("L3 batch", weight(f, w), torch.stack(each), ", weight")


@torch.no_grad()
def _rows(compare: Comparison, model: nn.Module, recipe: Recipe, x: Tensor) -> None:
    """L3 for the map: a batch of several adapters equals each row alone."""
    for seed, name in enumerate(("one", "two")):
        randomise(attach(model, recipe, name), lambda: model(x), seed)
    names, rows = ["two", None, "one", "two"], torch.cat([x, x[:1]])
    with route(model, names):
        got = model(rows)
    for i, name in enumerate(names):
        with set_active(model, name):
            compare("L3 batch", got[i : i + 1], model(rows[i : i + 1]), f", row {i}")


def _closure(compare: Comparison, base: nn.Module, adapter: Adapter, x: Tensor, known: Iterable[type]) -> None:
    """L4: it trains a step, saves, loads to the same bits, merges."""
    model, other, where = adapter.model, copy.deepcopy(base), compare.where
    train_step(where, model.train(), adapter, x)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        adapter.save(folder)
        load(other, folder, known=known)
    with torch.no_grad():  # attention takes another path where something has a gradient
        y, again = model.eval()(x), other(x)
    assert torch.equal(again, y), f"L4 closure: {where} is not bit-equal after loading"
    merge(other)
    compare("L4 closure", other(x), y, ", merged")
    now = dict(model.named_parameters())
    kept = all(torch.equal(p, now[name]) for name, p in base.named_parameters())
    assert kept, f"L4 closure: training {where} changed the base"


def train_step(where: str, model: nn.Module, adapter: Adapter, x: Tensor) -> None:
    """One optimizer step, in which every trainable factor gets a gradient and moves.

    Args:
        where: for the error.
        model: the adapted model, in the mode that is meant.
        adapter: the adapter.
        x: a batch.
    """
    optimizer, y = adapter.optimizer(lr=1e-3), model(x)
    (y - torch.randn_like(y)).square().sum().backward()
    trained = {n: p for n, p in adapter.named_parameters(trainable=True) if p.numel()}
    silent = [n for n, p in trained.items() if p.grad is None or not p.grad.any()]
    assert not silent, f"L4 closure: {where} gives no gradient to {silent}"
    before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    optimizer.step()
    moved = {n for n, p in adapter.named_parameters() if not torch.equal(p, before[n])}
    assert moved == trained.keys(), f"L4 closure: a step of {where} moves {moved}, not {trained.keys()}"
