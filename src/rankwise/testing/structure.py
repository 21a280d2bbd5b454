"""L1 to L4 for a structure, on every kind of layer that it accepts."""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
from collections.abc import Iterable, Iterator, Sequence

import torch
from torch import Tensor, nn

from rankwise._recipe import Recipe
from rankwise.attachment import Adapter, attach, load, route, set_active
from rankwise.errors import TargetError
from rankwise.lifecycle import merge
from rankwise.structures import Structure
from rankwise.testing.compare import TOLERANCE, Figures, compare, note, randomise, truth, worst
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
    figures: Figures = {}
    where = f"{structure!r} on {layer.name}"
    base = layer.make().double().eval()
    x = layer.inputs(3)
    recipe = Recipe(structure, sites=layer.sites)
    model = copy.deepcopy(base)
    adapter = attach(model, recipe)
    if "moves_at_start" not in structure.traits:
        note(figures, "L2", compare("L2 identity", where, model(x), base(x), tolerance))
    figures["effect"] = randomise(adapter, lambda: model(x))
    _meaning(figures, where, base, model, adapter, x, tolerance)
    _batch(figures, where, adapter, tolerance)
    if layer.rowwise:
        _rows(figures, where, base, recipe, x, tolerance)
    _closure(figures, where, base, model, adapter, x, known, tolerance)
    return figures


def _meaning(
    figures: Figures, where: str, base: nn.Module, model: nn.Module, adapter: Adapter, x: Tensor, tolerance: float
) -> None:
    """L1, in both modes, and for the gradient with respect to the input."""
    dense = truth(base, adapter)
    for mode in (True, False):
        got, want = model.train(mode)(x), dense.train(mode)(x)
        state = f"{where}, {'training' if mode else 'evaluation'}"
        note(figures, "L1", compare("L1 meaning", state, got, want, tolerance))
    if x.is_floating_point():
        along = torch.randn_like(got)
        z = x.clone().requires_grad_()
        got, want = (torch.autograd.grad((m(z) * along).sum(), z)[0] for m in (model, dense))
        figure = compare("L1 meaning", f"{where}, gradient of x", got, want, tolerance)
        note(figures, "L1", figure)


@torch.no_grad()
def _batch(figures: Figures, where: str, adapter: Adapter, tolerance: float) -> None:
    """L3 for the dense form: stacked factors give stacked weights."""
    for module in adapter.sites.values():
        shape = [module.site.rows, module.site.cols]
        f = module.factors()
        if module.site.stack is None:
            f = {k: torch.stack([v, v + torch.randn_like(v) / 4]) for k, v in f.items()}
        count = next(iter(f.values())).shape[0]
        w = torch.randn(*([count] if module.site.stack else []), *shape, dtype=torch.float64)
        got = module.structure.weight(f, w)
        each = [
            module.structure.weight({k: v[i] for k, v in f.items()}, w[i] if w.dim() == 3 else w) for i in range(count)
        ]
        figure = compare("L3 batch", f"{where}, weight", got, torch.stack(each), tolerance)
        note(figures, "L3", figure)


@torch.no_grad()
def _rows(figures: Figures, where: str, base: nn.Module, recipe: Recipe, x: Tensor, tolerance: float) -> None:
    """L3 for the map: a batch of several adapters equals each row alone."""
    model = copy.deepcopy(base)
    names: list[str | None] = ["one", "two", None]
    for seed, name in enumerate(n for n in names if n):
        adapter = attach(model, recipe, name)
        randomise(adapter, lambda: model(x), seed)
    names = ["two", None, "one", "two"]
    x = torch.cat([x, x[:1]])
    with route(model, names):
        got = model(x)
    for i, name in enumerate(names):
        with set_active(model, name):
            want = model(x[i : i + 1])
        figure = compare("L3 batch", f"{where}, row {i}", got[i : i + 1], want, tolerance)
        note(figures, "L3", figure)


def _closure(
    figures: Figures,
    where: str,
    base: nn.Module,
    model: nn.Module,
    adapter: Adapter,
    x: Tensor,
    known: Iterable[type],
    tolerance: float,
) -> None:
    """L4: it trains a step, saves, loads to the same bits, merges."""
    train_step(where, model.train(), adapter, x)
    with torch.no_grad():  # attention takes another path where something has a gradient
        y = model.eval()(x)
    other = copy.deepcopy(base)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        adapter.save(folder)
        load(other, folder, known=known)
    with torch.no_grad():
        again = other(x)
    assert torch.equal(again, y), f"L4 closure: {where} is not bit-equal after loading"
    merge(other)
    note(figures, "L4", compare("L4 closure", f"{where}, merged", other(x), y, tolerance))
    assert all(torch.equal(p, q) for p, q in _pairs(base, model)), f"L4 closure: training {where} changed the base"


def _pairs(base: nn.Module, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    now = dict(model.named_parameters())
    return ((p, now[name]) for name, p in base.named_parameters())


def train_step(where: str, model: nn.Module, adapter: Adapter, x: Tensor) -> None:
    """One optimizer step, in which every trainable factor gets a gradient and moves.

    Args:
        where: for the error.
        model: the adapted model, in the mode that is meant.
        adapter: the adapter.
        x: a batch.
    """
    optimizer = adapter.optimizer(lr=1e-3)
    y = model(x)
    (y - torch.randn_like(y)).square().sum().backward()
    trained = {n: p for n, p in adapter.named_parameters(trainable=True) if p.numel()}
    silent = [n for n, p in trained.items() if p.grad is None or not p.grad.any()]
    assert not silent, f"L4 closure: {where} gives no gradient to {silent}"
    before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    optimizer.step()
    for name, p in adapter.named_parameters():
        moved = not torch.equal(p, before[name])
        assert moved == (name in trained), (
            f"L4 closure: a step {'moves' if moved else 'does not move'} {name} of {where}"
        )
