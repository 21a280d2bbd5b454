"""The laws of the other axes: inits, solvers, ranks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import nn

from rankwise._recipe import Recipe
from rankwise.adapter import SiteFactors
from rankwise.attachment import attach
from rankwise.errors import IncompatibleAxes
from rankwise.inits import Init
from rankwise.ranks import Ranks, carry_out
from rankwise.solvers import Solver
from rankwise.structures import Anchored, LoHa, LoKr, LoRA, Magnitude, Structure, SVDForm
from rankwise.testing.compare import TOLERANCE, Figures, compare, note
from rankwise.testing.layers import LAYERS

SAMPLES: tuple[Structure, ...] = (
    LoRA(4),
    SVDForm(4),
    LoKr(4),
    LoHa(4),
    Magnitude(LoRA(4)),
    Anchored(LoRA(4)),
    Anchored(SVDForm(4)),
)


def legal(axis: Init | Solver | Ranks, structures: Sequence[Structure] = SAMPLES) -> list[Structure]:
    """The structures that an axis accepts; all others must be refused at construction."""
    name = "init" if isinstance(axis, Init) else "solver" if isinstance(axis, Solver) else "ranks"
    found: list[Structure] = []
    for structure in structures:
        fits = axis.requires <= structure.traits
        try:
            Recipe(structure).with_(**{name: axis})
        except IncompatibleAxes:
            assert not fits, f"L4 closure: {axis!r} refuses {structure!r}, which has its traits"
        else:
            assert fits, f"L4 closure: {axis!r} accepts {structure!r}, which lacks its traits"
            found.append(structure)
    assert found, f"{axis!r} accepts none of {structures}"
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
    figures: Figures = {}
    for structure in legal(init, structures):
        for layer in LAYERS:
            where = f"{init!r} with {structure!r} on {layer.name}"
            torch.manual_seed(0)
            base, x = layer.make().double().eval(), layer.inputs(3)
            model, again = copy.deepcopy(base), copy.deepcopy(base)
            recipe = Recipe(structure, init, sites=layer.sites)
            torch.manual_seed(1)
            adapter = attach(model, recipe, stats=stats)
            torch.manual_seed(1)
            values = dict(attach(again, recipe, stats=stats).named_parameters())
            for name, value in adapter.named_parameters():
                assert torch.isfinite(value).all(), f"{where}: {name} is not finite"
                assert torch.equal(value, values[name]), f"{where}: {name} ignores the seed"
            for module in adapter.sites.values():
                _check_shapes(where, module)
            if "moves_at_start" not in structure.traits:
                figure = compare("L2 identity", where, model(x), base(x), tolerance)
                note(figures, "L2", figure)
    return figures


def _check_shapes(where: str, module: SiteFactors) -> None:
    lead = () if module.site.stack is None else (module.site.stack,)
    for name, factor in module.described.items():
        found = tuple(module.factors()[name].shape)
        assert found == lead + factor.shape, f"{where}: {name} has shape {found}"


def check_solver(solver: Solver, structures: Sequence[Structure] = SAMPLES) -> Figures:
    """A solver's groups hold each trainable factor once, and its steps lower a loss.

    Args:
        solver: the solver.
        structures: structures to try; those without its required traits must be refused.

    Returns:
        The largest ratio of the loss after 20 steps to the one before.
    """
    figures: Figures = {}
    for structure in legal(solver, structures):
        torch.manual_seed(0)
        where = f"{solver!r} with {structure!r}"
        model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 8)).double()
        x, y = torch.randn(32, 12).double(), torch.randn(32, 8).double()
        adapter = attach(model, Recipe(structure, solver=solver))
        held = [id(p) for group in adapter.groups(1e-3) for p in group["params"]]
        assert sorted(held) == sorted(map(id, adapter.parameters())), (
            f"{where}: its groups do not hold each trainable factor once"
        )
        assert all(g["params"] and g["name"] for g in adapter.groups(1e-3)), f"{where}: empty group"
        optimizer, losses = adapter.optimizer(lr=3e-3), []
        for _ in range(21):
            loss = (model(x) - y).square().mean()
            losses.append(float(loss.detach()))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[-1] < losses[0], f"{where}: the loss went from {losses[0]} to {losses[-1]}"
        note(figures, "loss", losses[-1] / losses[0])
    return figures


def check_ranks(ranks: Ranks, structures: Sequence[Structure] = SAMPLES, steps: int = 20) -> None:
    """A rank plan is masks that fit the sites, and carrying it out zeroes what they hide.

    Args:
        ranks: the plan.
        structures: structures to try; those without its required traits must be refused.
        steps: how many optimizer steps to ask for.
    """
    for structure in legal(ranks, structures):
        model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 8)).double()
        adapter = attach(model, Recipe(structure, ranks=ranks))
        sizes = {
            name: next((f.dims["rank"] for f in m.described.values() if "rank" in f.dims), None)
            for name, m in adapter.sites.items()
        }
        given = {name: torch.rand(size) for name, size in sizes.items() if size is not None}
        for step in range(1, steps + 1):
            plan = ranks.plan(step, given)
            if plan is None:
                continue
            for name, mask in plan.masks.items():
                assert tuple(mask.shape) == (sizes[name],), (
                    f"{ranks!r} with {structure!r}: the mask of {name} has shape {mask.shape}"
                )
                assert set(mask.unique().tolist()) <= {0.0, 1.0}, f"{ranks!r}: no mask at {name}"
            carry_out(adapter.sites.values(), plan)
