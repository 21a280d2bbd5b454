"""What there is to know of one of PEFT's methods."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor

from rankwise.host import Site
from rankwise.structures import Structure


@dataclass(frozen=True)
class Method:
    """One of PEFT's methods.

    Attributes:
        structure: ours.
        names: our factors and PEFT's; an embedding's have "embedding_" inside and no ".weight".
        layers: that it takes.
        free: settings of a convolution that do no harm, as the update runs through the base's own.
        build: from PEFT's settings, with "r" and "alpha" as they are at this site, to our structure; the factors are
            changed in place where ours are others. None where :mod:`rankwise.formats.peft.decode` does it.
        settings: the inverse, from our structure to PEFT's settings at a site; the factors are changed back in place.
        patterns: settings that may differ between sites, and where PEFT keeps those of some.
    """

    structure: type[Structure]
    names: Mapping[str, str]
    layers: tuple[str, ...]
    free: tuple[str, ...] = ()
    build: Callable[[Mapping[str, Any], Site, dict[str, Tensor]], Structure] | None = None
    settings: Callable[[Any, Site, dict[str, Tensor]], dict[str, Any]] | None = None
    patterns: Mapping[str, str] = field(default_factory=lambda: {"r": "rank_pattern", "alpha": "alpha_pattern"})
