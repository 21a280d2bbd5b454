"""A method from what is typed: a name, or a value for each axis."""

import re
from collections.abc import Mapping, Sequence
from dataclasses import fields, replace
from typing import Any

import yaml

from rankwise._recipe import Recipe
from rankwise.errors import IncompatibleAxes, UnknownName
from rankwise.hf.run import Run
from rankwise.inits import Kaiming
from rankwise.methods import catalogue, recipe
from rankwise.registry import choices
from rankwise.sites import Sites
from rankwise.structures import Anchored, Factor, Replace, Rows, Stack, TokenRows

_AXES = {"structure": "structures", "init": "inits", "solver": "solvers", "ranks": "ranks"}
FULL = "full"
_PARTIAL = (Factor, Replace, Rows, Stack, TokenRows)  # what sites put together, not a method's structure


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

    An axis takes the name of a class ("principal", "svd", "magnitude(svd)", "package:Class") or of a method whose value
    it shares ("pissa", "lora_plus"). A start that must be subtracted anchors the structure. The learning rate is that
    of the nearest method of the catalogue.

    Args:
        method: a name of the catalogue, "lora" where only axes are given; or "full", every parameter of the model (or
            of the targets) trained whole.
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
    given = {axis: text for axis, text in (axes or {}).items() if text}
    if method == FULL:
        if given or rank or options:
            raise IncompatibleAxes(f'"{FULL}" trains the weights themselves and takes no axis, rank or option.')
        sites = Sites((), train=tuple(targets) or "*")
        return Recipe(Replace(), sites=sites, base=base, lr=1e-4, name=FULL)
    own = dict(options or {})
    common: dict[str, Any] = {name: own.pop(name) for name in ("dropout", "lr") if name in own}
    if rank is not None:
        own["rank"] = rank
    if base is not None:
        common["base"] = base
    if targets:
        common["sites"] = Sites(tuple(targets))
    if not given:
        return recipe(method or "lora", **own, **common)
    start = recipe(method or "lora", **({} if "structure" in given else own))
    parts: dict[str, Any] = {axis: getattr(start, axis) for axis in _AXES}
    parts |= {axis: _value(axis, text, own if axis == "structure" else {}) for axis, text in given.items()}
    if "init" not in given and not parts["init"].requires <= parts["structure"].traits:
        parts["init"] = Kaiming()
    if "anchored" in parts["init"].requires - parts["structure"].traits:
        parts["structure"] = Anchored(parts["structure"])

    def likeness(other: Recipe) -> tuple[int, float]:
        return sum(type(getattr(other, axis)) is type(value) for axis, value in parts.items()), -other.lr

    lr = max((entry.recipe for entry in catalogue().values()), key=likeness).lr
    name = " x ".join(filter(None, [method, *given.values()]))
    kept = {"penalties": start.penalties, "dropout": start.dropout}
    return replace(Recipe(**parts, **kept, lr=lr, name=name), **common)


def recipe_of(run: Run) -> Recipe:
    """The recipe that a run asks for; see :func:`compose`."""
    axes = {axis: getattr(run, axis) for axis in _AXES}
    return compose(run.method, axes, rank=run.rank, options=run.options, targets=run.target, base=run.base)


def written(name: str, options: Mapping[str, Any]) -> str:
    """A method and its options in a word: "lora(rank=1)"."""
    return name + (f"({', '.join(f'{k}={v}' for k, v in options.items())})" if options else "")


def spoken(text: str) -> tuple[str, dict[str, Any]]:
    """The inverse of :func:`written`: a method's name and its options.

    Raises:
        UnknownName: the text is not of this form.
    """
    found = re.fullmatch(r"\s*([\w.:]+)\s*(?:\((.*)\))?\s*", text)
    pairs = [pair.partition("=") for pair in ((found and found[2]) or "").split(",") if pair.strip()]
    if found is None or not all(name.strip().isidentifier() and equals for name, equals, _ in pairs):
        raise UnknownName(
            f'A method is written as its name, or with options: relora(every=100, prune=0.9); found "{text}".'
        )
    return found[1], {name.strip(): yaml.safe_load(value) for name, _, value in pairs}


def _value(axis: str, text: str, options: Mapping[str, Any]) -> Any:
    """An axis value by name: a class, a wrapper around one, or the value of a method."""
    outer, _, rest = text.partition("(")
    wanted, methods = _plain(outer), catalogue()
    classes: dict[str, Any] = {_plain(tag): cls for tag, cls in choices(_AXES[axis]).items() if cls not in _PARTIAL}
    if wanted not in classes and outer in methods:
        return getattr(recipe(outer, **options), axis)
    found = [wanted] if wanted in classes else [name for name in classes if name.startswith(wanted)]
    if len(found) != 1:
        raise UnknownName(f'No {axis} is called "{outer}"; there are {", ".join([*classes, *methods])}.')
    cls = classes[found[0]]
    takes = {f.name for f in fields(cls)}
    if "inner" in takes:
        return cls(inner=_value(axis, rest.removesuffix(")") or "lora", options))
    if unknown := sorted(options.keys() - takes):
        raise IncompatibleAxes(f"{cls.__name__} takes {', '.join(takes) or 'no options'}; found {', '.join(unknown)}.")
    if "alpha" in takes and "rank" in options:  # scale 1, so that the rate does not depend on the rank
        options = {"alpha": float(options["rank"]), **options}
    return cls(**options)


def _plain(name: str) -> str:
    return name.lower().replace("_", "").replace("-", "")
