"""The laws of the other axes: inits, solvers, ranks."""

from __future__ import annotations

import contextlib
import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rankwise._recipe import Recipe
from rankwise.attachment import attach
from rankwise.errors import IncompatibleAxes
from rankwise.inits import Init
from rankwise.ranks import Ranks, carry_out
from rankwise.solvers import Solver
from rankwise.structures import Anchored, LoHa, LoKr, LoRA, Magnitude, Structure, SVDForm
from rankwise.testing.compare import TOLERANCE, Comparison, Figures, worst
from rankwise.testing.layers import LAYERS, Layer

SAMPLES = (LoRA(4), SVDForm(4), LoKr(4), LoHa(4), Magnitude(LoRA(4)), Anchored(LoRA(4)), Anchored(SVDForm(4)))


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
    init: Init,
    structures: Sequence[Structure] = SAMPLES,
    *,
    stats: Mapping[str, Any] | None = None,
    tolerance: float = TOLERANCE,
) -> Figures:
    """An init gives every factor, finite, of its shape, the same for one seed, and keeps L2.

    Args:
        init: the init.
        structures: structures to try; those without its required traits must be refused.
        stats: what ``collect`` would have gathered, for inits that read data.
        tolerance: of L2.

    Returns:
        The worst figure of L2.
    """
    recipes = legal(structures, init=init)
    return worst(_start(recipe, layer, stats, tolerance) for recipe in recipes for layer in LAYERS)


def _start(recipe: Recipe, layer: Layer, stats: Mapping[str, Any] | None, tolerance: float) -> Figures:
    """The laws of an init on one kind of layer."""
    compare = Comparison(f"{recipe.init!r} with {recipe.structure!r} on {layer.name}", tolerance)
    torch.manual_seed(0)
    base, x = layer.make().double().eval(), layer.inputs(3)
    adapters = []
    for model in (copy.deepcopy(base), copy.deepcopy(base)):
        torch.manual_seed(1)
        adapters.append(attach(model, recipe.with_(sites=layer.sites), stats=stats))
    adapter, again = adapters
    for path, factors in adapter.sites.items():
        lead = () if factors.site.stack is None else (factors.site.stack,)
        for name, value in factors.factors().items():
            what, wanted = f"{compare.where}: {path}/{name}", lead + factors.described[name].shape
            assert value.shape == wanted, f"{what} has shape {tuple(value.shape)}, not {wanted}"
            assert value.isfinite().all(), f"{what} is not finite"
            assert value.equal(again[path][name]), f"{what} ignores the seed"
    if "moves_at_start" not in recipe.structure.traits:
        compare("L2 identity", adapter.model(x), base(x))
    return compare.figures


def _two_layers() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 8)).double()


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
    model = _two_layers()
    x, y = torch.randn(32, 12).double(), torch.randn(32, 8).double()
    adapter, losses = attach(model, recipe), []
    groups = adapter.groups(1e-3)
    assert all(group["params"] and group["name"] for group in groups), f"{where}: empty group"
    held = sorted(id(p) for group in groups for p in group["params"])
    assert held == sorted(map(id, adapter.parameters())), f"{where}: its groups do not hold each factor once"
    optimizer = adapter.optimizer(lr=3e-3)
    for _ in range(21):
        loss = (model(x) - y).square().mean()
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0], f"{where}: the loss went from {losses[0]} to {losses[-1]}"
    return losses[-1] / losses[0]


def check_ranks(ranks: Ranks, structures: Sequence[Structure] = SAMPLES, steps: int = 20) -> None:
    """A rank plan is masks that fit the sites, and carrying it out zeroes what they hide.

    Args:
        ranks: the plan.
        structures: structures to try; those without its required traits must be refused.
        steps: how many optimizer steps to ask for.
    """
    for recipe in legal(structures, ranks=ranks):
        sites = attach(_two_layers(), recipe).sites
        dims = {name: f.dims for name, factors in sites.items() for f in factors.described.values() if "rank" in f.dims}
        given = {name: torch.rand(d["rank"]) for name, d in dims.items()}
        for plan in filter(None, (ranks.plan(step, given) for step in range(1, steps + 1))):
            for name, mask in plan.masks.items():
                fits = mask.shape == given[name].shape and set(mask.unique().tolist()) <= {0.0, 1.0}
                assert fits, f"{ranks!r} with {recipe.structure!r}: no mask of {name}'s ranks: {mask}"
            carry_out(sites.values(), plan)
