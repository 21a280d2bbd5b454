"""The laws: L1 to L4 for a structure on every kind of layer that it accepts, and those of the other axes."""

import contextlib
import copy
import io
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from rankwise._recipe import Recipe
from rankwise.adapter import SiteFactors
from rankwise.attachment import Adapter, attach, load, route, set_active
from rankwise.errors import IncompatibleAxes, StatisticsError, TargetError
from rankwise.inits import Init
from rankwise.lifecycle import merge
from rankwise.ranks import Constant
from rankwise.solvers import Solver
from rankwise.stats import collect
from rankwise.structures import Structure
from rankwise.testing.compare import TOLERANCE, Comparison, Figures, randomise, truth, worst
from rankwise.testing.layers import LAYERS, SAMPLES, Layer

Stats = Mapping[str, Any] | None

# -- structures ---------------------------------------------------------------------------------


def accepts(structure: Structure, layer: Layer) -> bool:
    """Whether the structure can sit on the layer; it refuses with a TargetError."""
    with contextlib.suppress(TargetError):
        attach(layer.make().double(), Recipe(structure, sites=layer.sites))
        return True
    return False


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
    if "not_mergeable" not in structure.traits:  # else it has no dense form, and its own tests say what it means
        _meaning(compare, model, truth(base, adapter), x, "samples" in structure.traits)
        for factors in adapter.sites.values():
            _batch(compare, factors)
    if layer.rowwise:
        _rows(compare, copy.deepcopy(base), recipe, x)
    _closure(compare, base, adapter, x, known)
    return compare.figures


def _meaning(compare: Comparison, model: nn.Module, dense: nn.Module, x: Tensor, samples: bool) -> None:
    """L1, in both modes (but for the trait), and for the gradient with respect to the input."""
    for mode, name in ((False, "evaluation"),) if samples else ((True, "training"), (False, "evaluation")):
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
        f = {
            k: torch.stack([v, v + torch.randn(v.shape).to(v) / 4 if v.is_floating_point() else v])
            for k, v in f.items()
        }
    each = [weight({k: v[i] for k, v in f.items()}, w[i] if site.stack else w) for i in range(site.stack or 2)]
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
    """L4: it trains a step, saves, loads to the same bits, merges (but for the trait)."""
    model, other, where = adapter.model, copy.deepcopy(base), compare.where
    train_step(where, model.train(), adapter, x)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        adapter.save(folder)
        load(other, folder, known=known)
    with torch.no_grad():  # attention takes another path where something has a gradient
        y, again = model.eval()(x), other(x)
    assert torch.equal(again, y), f"L4 closure: {where} is not bit-equal after loading"
    if "not_mergeable" not in adapter.recipe.structure.traits:
        merge(other)
    compare("L4 closure", other(x), y, ", merged")
    now = dict(model.named_parameters())
    kept = all(torch.equal(p, now[name]) for name, p in base.named_parameters())
    assert kept, f"L4 closure: training {where} changed the base"


def train_step(where: str, model: nn.Module, adapter: Adapter, x: Tensor) -> None:
    """One optimizer step (two where the solver ``alternates``), by which every trainable factor moves.

    Args:
        where: for the error.
        model: the adapted model, in the mode that is meant.
        adapter: the adapter.
        x: a batch.
    """
    draws = 8 if "samples" in adapter.recipe.structure.traits else 1  # in one alone all gates may be at a bound
    optimizer, y = adapter.optimizer(lr=1e-3), torch.stack([model(x) for _ in range(draws)]).sum(0)
    (y - torch.randn_like(y)).square().sum().backward()
    trained = {n: p for n, p in adapter.named_parameters(trainable=True) if p.numel()}
    silent = [n for n, p in trained.items() if p.grad is None or not p.grad.any()]
    assert not silent, f"L4 closure: {where} gives no gradient to {silent}"
    before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    for _ in range(1 + ("alternates" in adapter.recipe.solver.traits)):
        optimizer.step()
    moved = {n for n, p in adapter.named_parameters() if not torch.equal(p, before[n])}
    plans = not isinstance(adapter.recipe.ranks, Constant)  # a rank plan writes factors that are not trained too
    assert trained.keys() <= moved <= (before if plans else trained).keys(), (
        f"L4 closure: a step of {where} moves {moved}, not {trained.keys()}"
    )


# -- the other axes -----------------------------------------------------------------------------


def legal(structures: Sequence[Structure], **axis: Any) -> list[Recipe]:
    """Recipes of the structures that an axis accepts; all others must be refused at construction."""
    found: list[Recipe] = []
    for structure in structures:
        with contextlib.suppress(IncompatibleAxes):
            found.append(Recipe(structure, **axis))
    (value,) = axis.values()
    fits, taken = [s for s in structures if value.requires <= s.traits], [recipe.structure for recipe in found]
    assert taken == fits, f"L4 closure: {value!r} accepts {taken}; its traits are those of {fits}"
    assert found, f"{value!r} accepts none of {structures}"
    return found


def check_init(
    init: Init, structures: Sequence[Structure] = SAMPLES, *, stats: Stats = None, tolerance: float = TOLERANCE
) -> Figures:
    """An init gives every factor, finite, of its shape, the same for one seed, and keeps L2.

    Args:
        init: the init.
        structures: structures to try; those without its required traits must be refused.
        stats: for inits that read data; None gathers them on each kind of layer that has them.
        tolerance: of L2.

    Returns:
        The worst figure of L2.
    """
    cases = [(r.with_(sites=x.sites), x, stats) for r in legal(structures, init=init) for x in LAYERS]
    if init.needs and stats is None:
        cases = [(r, x, found) for r, x, _ in cases if (found := _gathered(r, x)) is not None]
    assert cases, f"{init!r} reads statistics that no kind of layer has"
    return worst(_start(recipe, layer, found, tolerance) for recipe, layer, found in cases)


def _gathered(recipe: Recipe, layer: Layer) -> Stats:
    """The statistics of one kind of layer, None where it has none; it refuses with a StatisticsError."""
    torch.manual_seed(0)
    model, batches = layer.make().double(), [layer.inputs(3), layer.inputs(3)]
    with contextlib.suppress(StatisticsError):
        found = collect(model, batches, recipe, lambda model, x: model(x).square().mean())
        attach(model, recipe, stats=found)
        return found
    return None


def _start(recipe: Recipe, layer: Layer, stats: Stats, tolerance: float) -> Figures:
    """The laws of an init on one kind of layer."""
    compare = Comparison(f"{recipe.init!r} with {recipe.structure!r} on {layer.name}", tolerance)
    torch.manual_seed(0)
    base, x = layer.make().double().eval(), layer.inputs(3)
    adapters = []
    for model in (copy.deepcopy(base), copy.deepcopy(base)):
        torch.manual_seed(1)
        adapters.append(attach(model, recipe, stats=stats))
    adapter, again = adapters
    for path, factors in adapter.sites.items():
        lead = () if factors.site.stack is None else (factors.site.stack,)
        for name, value in factors.factors().items():
            what, wanted = f"{compare.where}: {path}/{name}", lead + factors.described[name].shape
            assert value.shape == wanted, f"{what} has shape {tuple(value.shape)}, not {wanted}"
            assert value.isfinite().all(), f"{what} is not finite"
            assert value.equal(again[path][name]), f"{what} ignores the seed"
    if "moves_at_start" not in recipe.structure.traits | recipe.init.traits:
        compare("L2 identity", adapter.model(x), base(x))
    return compare.figures


def check_solver(solver: Solver, structures: Sequence[Structure] = SAMPLES) -> Figures:
    """A solver's groups hold each trainable factor once, and its steps lower a loss.

    Args:
        solver: the solver.
        structures: structures to try; those without its required traits must be refused.

    Returns:
        The largest ratio of the loss after 20 steps to the one before.
    """
    return {"loss": max(map(_descent, legal(structures, solver=solver)))}


def _descent(recipe: Recipe) -> float:
    """The laws of a solver with one structure; the ratio of the losses."""
    where = f"{recipe.solver!r} with {recipe.structure!r}"
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 8)).double()
    x, y = torch.randn(32, 12).double(), torch.randn(32, 8).double()
    adapter, losses = attach(model, recipe), []
    groups = adapter.groups(1e-3)
    assert all(group["params"] and group["name"] for group in groups), f"{where}: empty group"
    held = sorted(id(p) for group in groups for p in group["params"])
    assert held == sorted(map(id, adapter.parameters())), f"{where}: its groups do not hold each factor once"
    optimizer = adapter.optimizer(lr=3e-3)
    rates, before = [group["lr"] for group in optimizer.param_groups], model(x)
    for group in optimizer.param_groups:
        group["lr"] = 0.0  # as a warm-up begins
    (before - y).square().mean().backward()
    optimizer.step()
    moved = float((model(x) - before).detach().abs().max() / before.detach().abs().max())
    assert moved <= TOLERANCE, f"{where}: a step at rate 0 moves the outputs by {moved:.2g}"
    for group, rate in zip(optimizer.param_groups, rates, strict=True):
        group["lr"] = rate
    for _ in range(21):
        loss = (model(x) - y).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0], f"{where}: the loss went from {losses[0]} to {losses[-1]}"
    return losses[-1] / losses[0]
