r"""Tensor formats: tensor train (TT), canonical polyadic (CP) and Tucker, and how a size is split into modes.

Shapes: a tensor (\*batch, n_1, ..., n_d) of modes n_k. A train has cores (\*batch, r_{k-1}, n_k, r_k), with 1 at both
ends; CP has factors (\*batch, n_k, r); Tucker a core (\*batch, r_1, ..., r_d) and factors (\*batch, n_k, r_k).
"""

from abc import ABC, abstractmethod
from collections.abc import Sequence
from math import prod
from typing import final

from torch import Tensor

from rankwise.errors import IncompatibleAxes
from rankwise.ops.operator import LowRank


def balanced_modes(size: int, count: int) -> tuple[int, ...]:
    """``count`` modes whose product is ``size``, as equal as its prime factors allow, in rising order.

    Examples:
        >>> balanced_modes(768, 3), balanced_modes(4096, 4), balanced_modes(14, 3)
        ((8, 8, 12), (8, 8, 8, 8), (1, 2, 7))
    """
    primes: list[int] = []
    divisor = 2
    while size > 1:
        if divisor * divisor > size:
            divisor = size
        while size % divisor == 0:
            primes.append(divisor)
            size //= divisor
        divisor += 1
    modes = [1] * count
    for prime in reversed(primes):  # the largest first, each to the smallest mode
        modes[modes.index(min(modes))] *= prime
    return tuple(sorted(modes))


def even_modes(size: int, count: int) -> tuple[int, ...]:
    """Modes of the least product not below ``size`` in which none is more than twice another.

    Examples:
        >>> even_modes(4096, 4), even_modes(50257, 4), even_modes(9, 3)
        ((8, 8, 8, 8), (11, 13, 16, 22), (2, 2, 3))
    """
    while (modes := balanced_modes(size, count))[-1] > 2 * modes[0]:
        size += 1
    return modes


def checked_modes(modes: int | Sequence[int], size: int, what: str, *, padded: bool = False) -> tuple[int, ...]:
    """The modes of a size: those given, or so many balanced ones.

    Args:
        modes: the modes, or how many.
        size: that they split.
        what: it is the size of, for the error.
        padded: whether their product may exceed the size, the rest being zeros; those that are chosen are then even.

    Returns:
        The modes.

    Raises:
        IncompatibleAxes: their product is another, or they are no whole numbers above zero.
    """
    given = (modes,) if isinstance(modes, int) else tuple(modes)
    if not given or any(isinstance(n, bool) or not isinstance(n, int) or n < 1 for n in given):
        raise IncompatibleAxes(
            f"Tensor modes are whole numbers above zero, or how many of them to choose; found {modes!r} for {what}. "
            f"Give 3, or modes such as {balanced_modes(size, 3)}."
        )
    if isinstance(modes, int):
        return (even_modes if padded else balanced_modes)(size, modes)
    product = prod(given)
    if product != size and not (padded and product > size):
        rule, fit = "at least the size" if padded else "the size", balanced_modes(size, len(given))
        raise IncompatibleAxes(
            f"The product of tensor modes is {rule} that they split; found {given} with the product {product} for the "
            f"{size} of {what}. Give {fit}, or the number {len(given)} to have them chosen."
        )
    return given


class TensorFormat(ABC):
    """A tensor held as small tensors. Law: ``split(k)`` of every cut multiplies to ``dense()`` unfolded there."""

    @property
    @abstractmethod
    def modes(self) -> tuple[int, ...]:
        """n_1, ..., n_d."""

    @abstractmethod
    def split(self, cut: int) -> LowRank:
        """The unfolding (n_1 ... n_cut, n_cut+1 ... n_d) as a product of two matrices; 0 < cut < d."""

    @final
    def dense(self) -> Tensor:
        """The tensor itself, (*batch, n_1, ..., n_d)."""
        left, right = self.split(1)
        return (left @ right).unflatten(-1, self.modes[1:])


@final
class TensorTrain(TensorFormat):
    """``T[i_1 ... i_d] = G_1[i_1] G_2[i_2] ... G_d[i_d]``, a product of matrices (Oseledets 2011)."""

    def __init__(self, cores: Sequence[Tensor]) -> None:
        self.cores = tuple(cores)

    @property
    def modes(self) -> tuple[int, ...]:
        return tuple(core.shape[-2] for core in self.cores)

    def split(self, cut: int) -> LowRank:
        left, right = self.cores[0].flatten(-3, -2), self.cores[-1].flatten(-2)
        for core in self.cores[1:cut]:
            left = (left @ core.flatten(-2)).unflatten(-1, core.shape[-2:]).flatten(-3, -2)
        for core in reversed(self.cores[cut:-1]):
            right = (core.flatten(-3, -2) @ right).unflatten(-2, core.shape[-3:-1]).flatten(-2)
        return LowRank(left, right)


@final
class CP(TensorFormat):
    """``T[i_1 ... i_d] = sum_t w_t A_1[i_1, t] ... A_d[i_d, t]``, weights w (*batch, r)."""

    def __init__(self, factors: Sequence[Tensor], weights: Tensor) -> None:
        self.factors, self.weights = tuple(factors), weights

    @property
    def modes(self) -> tuple[int, ...]:
        return tuple(factor.shape[-2] for factor in self.factors)

    def split(self, cut: int) -> LowRank:
        left, right = _columns(self.factors[:cut]), _columns(self.factors[cut:])
        return LowRank(left, (right * self.weights.unsqueeze(-2)).mT)


def _columns(factors: Sequence[Tensor]) -> Tensor:
    """Their Khatri-Rao product: the Kronecker product of their columns, (*batch, n_1 n_2 ..., r)."""
    found = factors[0]
    for factor in factors[1:]:
        found = (found.unsqueeze(-2) * factor.unsqueeze(-3)).flatten(-3, -2)
    return found


@final
class Tucker(TensorFormat):
    """``T = C x_1 A_1 x_2 A_2 ... x_d A_d``, a core C with a factor along each mode."""

    def __init__(self, core: Tensor, factors: Sequence[Tensor]) -> None:
        self.core, self.factors = core, tuple(factors)

    @property
    def modes(self) -> tuple[int, ...]:
        return tuple(factor.shape[-2] for factor in self.factors)

    def split(self, cut: int) -> LowRank:
        d = len(self.factors)
        ranks = [factor.shape[-1] for factor in self.factors]
        core = self.core.flatten(cut - d).flatten(-1 - cut, -2)  # (*batch, r_1 ... r_cut, the rest)
        left, right = _kronecker(self.factors[:cut]), _kronecker(self.factors[cut:]).mT
        if prod(ranks[:cut]) <= prod(ranks[cut:]):
            return LowRank(left, core @ right)
        return LowRank(left @ core, right)


def _kronecker(factors: Sequence[Tensor]) -> Tensor:
    found = factors[0]
    for factor in factors[1:]:
        both = found[..., :, None, :, None] * factor[..., None, :, None, :]
        found = both.flatten(-2).flatten(-3, -2)
    return found
