"""rankwise: low-rank adaptation of large models, every method a point in a product of axes.

Public names are imported when they are first used, so that ``rankwise --help`` needs no torch.
"""

import importlib
import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

from rankwise.version import __version__

if TYPE_CHECKING:
    from rankwise import errors, recipes
    from rankwise._recipe import Recipe
    from rankwise.attach import Adapter, adapters, attach, disabled, load, route, set_active, targets
    from rankwise.catalogue import catalogue, recipe
    from rankwise.formats import export
    from rankwise.lifecycle import merge, merged
    from rankwise.sites import Sites, Target

__all__ = [
    "Adapter",
    "Recipe",
    "Sites",
    "Target",
    "__version__",
    "adapters",
    "attach",
    "catalogue",
    "disabled",
    "errors",
    "export",
    "load",
    "merge",
    "merged",
    "recipe",
    "recipes",
    "route",
    "set_active",
    "targets",
]

_HOMES = {
    "_recipe": ("Recipe",),
    "attach": ("Adapter", "adapters", "attach", "disabled", "load", "route", "set_active", "targets"),
    "catalogue": ("catalogue", "recipe"),
    "formats": ("export",),
    "lifecycle": ("merge", "merged"),
    "sites": ("Sites", "Target"),
}
_HOME = {name: home for home, names in _HOMES.items() for name in names}
_PACKAGES = ("embedded", "errors", "formats", "hf", "recipes", "testing")


def __getattr__(name: str) -> Any:
    if name in _PACKAGES:
        return importlib.import_module(f"rankwise.{name}")
    if name not in _HOME:
        raise AttributeError(f"module 'rankwise' has no attribute '{name}'")
    value = getattr(importlib.import_module(f"rankwise.{_HOME[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__, *_PACKAGES})


class _Package(ModuleType):
    """Keeps ``rankwise.attach`` the function when the file of that name is imported."""

    def __setattr__(self, name: str, value: Any) -> None:
        if not (name in _HOME and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
