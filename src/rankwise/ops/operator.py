"""The algebra's protocol: a linear operator is a value over tensors.

Shapes: an operator is (*batch, M, N); activations are (*batch, T, N) rows, so that
``op.mv(x)`` is ``x @ op.dense().mT``. ``batch`` is empty or one stacking dim (adapters, experts).
"""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from typing import NamedTuple, TypeVar

import torch
from torch import Tensor


class LowRank(NamedTuple):
    """The exact factors of ``left @ right``: (*batch, M, r) and (*batch, r, N)."""

    left: Tensor
    right: Tensor


class Cost(NamedTuple):
    """Multiply-adds of an operator.

    Attributes:
        apply: of ``mv``, a token.
        form: of ``dense()``; an entry written without a product counts as one.
    """

    apply: int
    form: int


class LinearOperator(ABC):
    """A linear map (*batch, M, N), held as the small tensors that define it.

    Laws, for every operator: ``mv(x) == x @ dense().mT``, ``rows(i) == dense()[..., i, :]``,
    ``T.dense() == dense().mT``, and ``left @ right == dense()`` where ``lower()`` is not None.
    """

    shape: tuple[int, int]  # (M, N), without the batch

    @abstractmethod
    def mv(self, x: Tensor) -> Tensor:
        """Apply to the rows of x: (*batch, T, N) -> (*batch, T, M), in x's dtype."""

    def mm(self, x: Tensor) -> Tensor:
        """Apply to the columns of x: (*batch, N, T) -> (*batch, M, T), in x's dtype."""
        return self.mv(x.mT).mT

    @abstractmethod
    def dense(self) -> Tensor:
        """The matrix itself, (*batch, M, N), in the factors' dtype."""

    @property
    @abstractmethod
    def T(self) -> LinearOperator:
        """The transpose, (*batch, N, M)."""

    def lower(self) -> LowRank | None:
        """(left, right) with ``left @ right == dense()`` where the operator is exactly low rank, as most are not."""
        return None

    @property
    def rank(self) -> int | None:
        """The inner size of ``lower()``, None where it has none."""
        pair = self.lower()
        return None if pair is None else pair.left.shape[-1]

    @property
    def cost(self) -> Cost:
        """What applying and forming it takes."""
        m, n = self.shape
        return Cost(m * n, m * n)

    def added(self, weight: Tensor, scale: float = 1.0) -> Tensor:
        """``weight + scale * dense()`` (*batch, M, N), in the weight's dtype and in as few passes as it takes."""
        return torch.add(weight, self.dense().to(weight.dtype), alpha=scale)

    def gradients(self, g: Tensor) -> list[Tensor | None]:
        """Of :func:`leaves`, from that of ``dense()`` (*batch, M, N); None where one needs no gradient."""
        tensors = leaves(self)
        with torch.enable_grad():
            dense = self.dense()
        needed = [t for t in tensors if t.requires_grad]
        found = iter(torch.autograd.grad(dense, needed, g, create_graph=torch.is_grad_enabled()))
        return [next(found) if t.requires_grad else None for t in tensors]

    def formed(self) -> LinearOperator:
        """The same operator for one backward, holding what ``added`` and ``gradients`` would each form."""
        return self

    def rows(self, index: Tensor) -> Tensor:
        """Rows of the matrix, the embedding look-up: index (*batch, T) -> (*batch, T, N)."""
        pair = self.lower()
        if pair is None:
            return gather_rows(self.dense(), index)
        return gather_rows(pair.left, index) @ pair.right


Op = TypeVar("Op", bound=LinearOperator)


def leaves(op: LinearOperator) -> list[Tensor]:
    """The tensors that define an operator, in a fixed order; not to be changed."""
    if "_leaves" in vars(op):  # asked many times a step
        return vars(op)["_leaves"]
    found: list[Tensor] = []
    for value in vars(op).values():
        if isinstance(value, Tensor):
            found.append(value)
        elif isinstance(value, LinearOperator):
            found += leaves(value)
    if not torch.compiler.is_compiling():
        vars(op)["_leaves"] = found
    return found


def gradients_of(op: LinearOperator, g: Callable[[], Tensor]) -> list[Tensor | None]:
    """``op.gradients(g())``; g is not even made where nothing needs it."""
    return op.gradients(g()) if trained(op) else [None] * len(leaves(op))


def trained(op: LinearOperator) -> bool:
    """Whether something in it needs a gradient."""
    return any(t.requires_grad for t in leaves(op))


def refilled(op: Op, tensors: Sequence[Tensor]) -> Op:
    """The operator over what a node saved of its :func:`leaves`: itself where they come back as they were."""
    same = all(a is b for a, b in zip(leaves(op), tensors, strict=True))
    return op if same else with_leaves(op, iter(tensors))


def with_leaves(op: Op, tensors: Iterator[Tensor]) -> Op:
    """The operator over other tensors, given in the order of :func:`leaves`."""
    other = copy.copy(op)
    vars(other).pop("_leaves", None)
    for name, value in vars(op).items():
        if isinstance(value, Tensor):
            setattr(other, name, next(tensors))
        elif isinstance(value, LinearOperator):
            setattr(other, name, with_leaves(value, tensors))
    return other


def gather_rows(matrix: Tensor, index: Tensor) -> Tensor:
    """``matrix[..., index, :]``, batched: (*batch, M, N) and (*batch, T) -> (*batch, T, N)."""
    if matrix.dim() == 2:
        return torch.nn.functional.embedding(index, matrix)
    flat = index.reshape(matrix.shape[0], -1, 1).expand(-1, -1, matrix.shape[-1])
    return torch.gather(matrix, 1, flat).reshape(*index.shape, matrix.shape[-1])
