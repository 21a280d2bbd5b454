"""Layers as structures see them: one host a layer kind, written once for all methods."""

from torch import nn

from rankwise.host.conv import ConvHost
from rankwise.host.embedding import EmbeddingHost
from rankwise.host.linear import Conv1DHost, LinearHost
from rankwise.host.norms import norm_of_rows
from rankwise.host.parameter import ParameterHost, TransposedHost
from rankwise.host.site import Adapted, Correction, Host, LayerHost, Site, Stored, Through

LAYER = "layer"  # the slot of a layer's weight; that of a bare parameter is its name
KINDS: tuple[type[LayerHost], ...] = (LinearHost, Conv1DHost, ConvHost, EmbeddingHost)


def kind_of(module: nn.Module) -> type[LayerHost] | None:
    """The host that carries this module, or None where only bare parameters can be adapted."""
    return next((kind for kind in KINDS if kind.claims(module)), None)


def host_of(module: nn.Module, slot: str) -> LayerHost | ParameterHost:
    """The host of a slot of a module: "layer", or the name of a bare parameter."""
    kind = kind_of(module) if slot == LAYER else None
    return kind(module) if kind else ParameterHost(module, slot)


__all__ = [
    "KINDS", "LAYER", "Adapted", "Conv1DHost", "ConvHost", "Correction", "EmbeddingHost", "Host", "LayerHost",
    "LinearHost", "ParameterHost", "Site", "Stored", "Through", "TransposedHost", "host_of", "kind_of", "norm_of_rows",
]  # fmt: skip
