"""A method from what is typed: a name, or a value for each axis."""

from __future__ import annotations

import difflib
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

from rankwise._recipe import Recipe
from rankwise.catalogue import catalogue, recipe
from rankwise.errors import IncompatibleAxes, UnknownName
from rankwise.registry import choices
from rankwise.sites import Sites
from rankwise.structures import Anchored, Replace, Rows, Stack, Structure, TokenRows

_AXES = {"structure": "structures", "init": "inits", "solver": "solvers", "ranks": "ranks"}
_PARTIAL = (Replace, Rows, Stack, TokenRows)  # what sites put together, not a method's structure


def compose(
    method: str | None = None,
    axes: Mapping[str, str | None] | None = None,
    *,
    rank: int | None = None,
    options: Mapping[str, Any] | None = None,
    targets: Sequence[str] = (),
    base: str | None = None,
) -> Recipe:
    """Build a recipe from names.

    An axis takes the name of a class ("principal", "svd", "magnitude(svd)", "package:Class") or of
    a method whose value it shares ("pissa", "lora_plus"). A start that must be subtracted anchors
    the structure. The learning rate is that of the nearest method of the catalogue.

    Args:
        method: a name of the catalogue; "lora" where only axes are given.
        axes: structure, init, solver, ranks by name; None for the method's own.
        rank: of the structure.
        options: further arguments of the method or structure.
        targets: patterns, see :class:`rankwise.Target`; by default every linear layer.
        base: format of the frozen weights.

    Returns:
        The recipe.

    Raises:
        UnknownName: a name that nothing answers to.
        IncompatibleAxes: options or axes that do not fit together.
    """
    given = {axis: name for axis, name in (axes or {}).items() if name}
    own = dict(options or {})
    common: dict[str, Any] = {k: own.pop(k) for k in ("dropout", "lr") if k in own}
    if targets:
        common["sites"] = Sites(tuple(targets))
    if base is not None:
        common["base"] = base
    if rank is not None:
        own["rank"] = rank
    made: dict[str, Any] = {}
    if "structure" in given:
        made["structure"] = _value("structure", given["structure"], own)
        own = {}
    for axis in ("init", "solver", "ranks"):
        if axis in given:
            made[axis] = _value(axis, given[axis], {})
    if not made:
        return recipe(method or "lora", **own, **common)
    start = recipe(method or "lora", **own)
    init = made.get("init", start.init)
    traits = made.get("structure", start.structure).traits
    if "structure" in made and "init" not in made and not init.requires <= traits:
        made["init"] = Recipe.__dataclass_fields__["init"].default
    if "anchored" in made.get("init", init).requires - traits:
        made["structure"] = Anchored(made.get("structure", start.structure))
    built = Recipe(**{"structure": start.structure, "init": start.init, "solver": start.solver,
                      "ranks": start.ranks, "penalties": start.penalties, **made})  # fmt: skip
    nearest = max(catalogue().values(), key=lambda e: (_shared(e.recipe, built), -e.recipe.lr))
    name = " x ".join(filter(None, [method, *given.values()]))
    return replace(built, **{"lr": nearest.recipe.lr, "name": name, **common})


def _shared(one: Recipe, other: Recipe) -> int:
    same = [type(getattr(one, axis)) is type(getattr(other, axis)) for axis in _AXES]
    return 2 * sum(same) + (_kinds(one.structure) == _kinds(other.structure))


def _kinds(structure: Any) -> list[type]:
    inner = getattr(structure, "inner", None)
    return [type(structure), *(_kinds(inner) if inner is not None else [])]


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")


def _value(axis: str, text: str, options: Mapping[str, Any]) -> Any:
    """An axis value by name: a class, a wrapper around one, or the value of a method."""
    outer, bracket, rest = text.partition("(")
    there: dict[str, Any] = {_plain(tag): cls for tag, cls in choices(_AXES[axis]).items()}
    if axis == "structure":
        there = {t: c for t, c in there.items() if issubclass(c, Structure) and c not in _PARTIAL}
    methods = catalogue()
    wanted = _plain(outer)
    cls = there.get(wanted)
    if cls is None and outer in methods and not bracket:
        takes = methods[outer].options
        mine = {k: v for k, v in options.items() if k in takes}
        if unknown := sorted(set(options) - set(mine)):
            raise IncompatibleAxes(f"{outer} takes {', '.join(takes)}; found {', '.join(unknown)}.")
        return getattr(recipe(outer, **mine), axis)
    if cls is None and len(begin := [c for t, c in there.items() if t.startswith(wanted)]) == 1:
        cls = begin[0]
    if cls is None:
        known = sorted({*(c.__name__.lower() for c in there.values()), *methods})
        close = difflib.get_close_matches(wanted, known, n=3)
        hint = f"Nearest: {', '.join(close)}." if close else f"There are: {', '.join(known)}."
        raise UnknownName(f'No {axis} is called "{outer}". {hint}')
    names = {f.name for f in fields(cls)}
    if "inner" in names:
        return cls(inner=_value(axis, rest.removesuffix(")") or "lora", options))
    if unknown := sorted(set(options) - names):
        raise IncompatibleAxes(
            f"{cls.__name__} takes {', '.join(sorted(names)) or 'no options'}; found {', '.join(unknown)}."
        )
    given = dict(options)
    if "alpha" in names and given.get("rank") and "alpha" not in given:
        given["alpha"] = float(given["rank"])  # scale 1, so that the rate does not depend on the rank
    return cls(**given)
