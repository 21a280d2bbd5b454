"""Frozen weights of any storage format, one file each."""

from collections.abc import Iterable

from torch import nn

from rankwise.errors import WeightFormatError
from rankwise.weights.bitsandbytes import FourBitWeight, Int8Weight
from rankwise.weights.dense import DenseWeight, computes
from rankwise.weights.weight import Weight

FORMATS: tuple[type[Weight], ...] = (FourBitWeight, Int8Weight, DenseWeight)


def format_of(module: nn.Module, name: str = "weight") -> type[Weight] | None:
    """The format in which a parameter is stored, None where it is none of ours."""
    return next((format_ for format_ in FORMATS if format_.claims(module, name)), None)


def weight_of(module: nn.Module, name: str = "weight") -> Weight:
    """A parameter of a module, in whatever format it is stored.

    Raises:
        WeightFormatError: the format is none of those that can be read and trained through.
    """
    weight = module._parameters.get(name)
    if type(weight) is nn.Parameter and computes(weight):  # asked at every forward: the common case at once
        return DenseWeight(module, name)
    if (found := format_of(module, name)) is not None:
        return found(module, name)
    raise WeightFormatError(
        f"A weight is floating point of 16 bits or more, bitsandbytes 4-bit or bitsandbytes int8; found "
        f"{type(module).__name__} with {f'no {name}' if weight is None else weight.dtype}. Load the base in one of "
        f"these formats, or exclude the module from the targets."
    )


def prepare(modules: Iterable[nn.Module]) -> None:
    """Make a base safe to train on, adapted or not: gradients pass through every layer."""
    for module in modules:
        if (found := format_of(module)) is not None:
            found(module).prepare()


__all__ = ["FORMATS", "DenseWeight", "FourBitWeight", "Int8Weight", "Weight", "format_of", "prepare", "weight_of"]
