"""Frozen weights of any storage format, one file each."""

from collections.abc import Iterable

from torch import nn

from rankwise.errors import WeightFormatError
from rankwise.weights.bitsandbytes import FourBitWeight, Int8Weight
from rankwise.weights.dense import DenseWeight
from rankwise.weights.weight import Weight

FORMATS: tuple[type[Weight], ...] = (FourBitWeight, Int8Weight, DenseWeight)


def weight_of(module: nn.Module, name: str = "weight") -> Weight:
    """A parameter of a module, in whatever format it is stored.

    Raises:
        WeightFormatError: the format is none of those that can be read and trained through.
    """
    weight = module._parameters.get(name)
    if type(weight) is nn.Parameter and weight.is_floating_point():  # asked at every forward: the common case at once
        return DenseWeight(module, name)
    for format_ in FORMATS:
        if format_.claims(module, name):
            return format_(module, name)
    raise WeightFormatError(
        f"A weight is floating point, bitsandbytes 4-bit or bitsandbytes int8; found {type(module).__name__} with "
        f"{f'no {name}' if weight is None else weight.dtype}. Load the base in one of these formats, or exclude the "
        f"module from the targets."
    )


def prepare(modules: Iterable[nn.Module]) -> None:
    """Make a base safe to train on, adapted or not: gradients pass through every layer."""
    for module in modules:
        for format_ in FORMATS:
            if format_.claims(module, "weight"):
                format_(module).prepare()


__all__ = ["FORMATS", "DenseWeight", "FourBitWeight", "Int8Weight", "Weight", "prepare", "weight_of"]
