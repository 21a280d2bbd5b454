"""Methods by name: our recipes and those of installed plug-ins."""

import difflib
import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from rankwise import recipes
from rankwise._recipe import Recipe
from rankwise.errors import IncompatibleAxes, UnknownName
from rankwise.registry import plugins


@dataclass(frozen=True)
class Entry:
    """One method of the catalogue.

    Attributes:
        name: for ``rw.recipe``.
        summary: the first line of its documentation.
        paper: authors, year, arXiv; empty for compositions that no paper names.
        recipe: the recipe at its defaults.
        options: its own arguments and their defaults.
        doc: its manual page.
    """

    name: str
    summary: str
    paper: str
    recipe: Recipe
    options: dict[str, Any]
    doc: str


def _makers() -> dict[str, Callable[..., Recipe]]:
    own = {name: getattr(recipes, name) for name in recipes.__all__}
    return {**own, **plugins("recipes")}


def _options(make: Callable[..., Recipe]) -> dict[str, Any]:
    """A method's own arguments and their defaults; what has none are the ``**axes``."""
    own = inspect.signature(make).parameters.values()
    return {p.name: p.default for p in own if p.default is not p.empty}


def recipe(name: str, **options: Any) -> Recipe:
    """A method by name, plug-ins included.

    Args:
        name: as in ``rw.catalogue()``.
        **options: the method's own arguments, and any axis of :class:`rankwise.Recipe`.

    Returns:
        The recipe.

    Raises:
        UnknownName: no method of that name.
        IncompatibleAxes: an option that the method does not take, or axes that clash.

    Examples:
        >>> recipe("dora", rank=8).name
        'dora'
    """
    makers = _makers()
    if name not in makers:
        close = difflib.get_close_matches(name, makers, n=3)
        hint = f"Nearest: {', '.join(close)}." if close else f"There are: {', '.join(sorted(makers))}."
        raise UnknownName(f'No method is called "{name}". {hint}')
    try:
        return makers[name](**options)
    except TypeError as error:
        axes = [f for f in Recipe.__dataclass_fields__ if f != "structure"]
        raise IncompatibleAxes(
            f'The method "{name}" takes {", ".join(_options(makers[name]))} and the axes {", ".join(axes)}; {error}.'
        ) from error


def catalogue() -> dict[str, Entry]:
    """Every method by name."""
    found = {}
    for name, make in sorted(_makers().items()):
        doc = inspect.getdoc(make) or ""
        made = make()
        found[name] = Entry(name, doc.split("\n")[0], made.paper, made, _options(make), doc)
    return found
