"""rankwise: low-rank adaptation of large models, every method a point in a product of axes."""

from rankwise import errors, recipes
from rankwise._recipe import Recipe
from rankwise.attach import (
    Adapter,
    adapters,
    attach,
    disabled,
    load,
    route,
    set_active,
    targets,
)
from rankwise.catalogue import catalogue, recipe
from rankwise.lifecycle import merge, merged
from rankwise.sites import Sites, Target
from rankwise.version import __version__

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
    "load",
    "merge",
    "merged",
    "recipe",
    "recipes",
    "route",
    "set_active",
    "targets",
]
