"""Layers as structures see them: one host a layer kind, written once for all methods."""

from torch import nn

from rankwise.host.conv import ConvHost
from rankwise.host.embedding import EmbeddingHost
from rankwise.host.linear import Conv1DHost, LinearHost
from rankwise.host.parameter import ParameterHost, TransposedHost
from rankwise.host.site import Adapted, Host, LayerHost, Site

KINDS: tuple[type[LayerHost], ...] = (LinearHost, Conv1DHost, ConvHost, EmbeddingHost)


def kind_of(module: nn.Module) -> type[LayerHost] | None:
    """The host that carries this module, or None where only bare parameters can be adapted."""
    return next((kind for kind in KINDS if kind.claims(module)), None)


__all__ = [
    "KINDS",
    "Adapted",
    "Conv1DHost",
    "ConvHost",
    "EmbeddingHost",
    "Host",
    "LayerHost",
    "LinearHost",
    "ParameterHost",
    "Site",
    "TransposedHost",
    "kind_of",
]
