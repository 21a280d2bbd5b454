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
        settings: the inverse, from our structure to PEFT's settings at a site; the factors are changed in place. Those
            that it leaves and that have no name are made anew by PEFT, as the structure's start is.
        patterns: what PEFT calls a setting's values by name of the layer, for settings that have such.
        kin: further structures of ours that it holds.
        square: kernels have one size.
        bias: whether PEFT's of a structure acts on the layer's bias too, which ours never does.
        common: factors that all layers share, and PEFT's names of them at the model's level.
        sized: those factors, cut or padded to the size that PEFT gives them for the most outputs and inputs of a layer.
        gather: from all tensors of a file, the factors in common that it does not hold as such.
    """

    structure: type[Structure]
    names: Mapping[str, str]
    layers: tuple[str, ...]
    free: tuple[str, ...] = ()
    build: Callable[[Mapping[str, Any], Site, dict[str, Tensor]], Structure] | None = None
    settings: Callable[[Any, Site, dict[str, Tensor]], dict[str, Any]] | None = None
    patterns: Mapping[str, str] = field(default_factory=lambda: {"r": "rank_pattern", "alpha": "alpha_pattern"})
    kin: tuple[type[Structure], ...] = ()
    square: bool = False
    bias: Callable[[Any], bool] | None = None
    common: Mapping[str, str] = field(default_factory=dict)
    gather: Callable[[Mapping[str, Tensor]], dict[str, Tensor]] | None = None
    sized: Callable[[dict[str, Tensor], int, int], dict[str, Tensor]] | None = None
