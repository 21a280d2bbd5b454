"""The protocol between a structure and the layer that it sits on: Site (facts) and Host (acts).

Shapes: every weight is seen as a matrix (out, in), for a convolution (out, in/groups * kernel);
activations are whatever the layer takes, for a linear layer (*batch, tokens, in).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, NamedTuple, final

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rankwise.host.norms import dense_row_norm
from rankwise.ops import Dense, LinearOperator
from rankwise.ops.fused import Part
from rankwise.ops.fused import run as fused
from rankwise.weights import Weight, weight_of

if TYPE_CHECKING:
    from rankwise.structures.structure import Factors, Structure


@dataclass(frozen=True)
class Site:
    """The facts of one adapted weight, all that a structure needs to size its factors.

    Attributes:
        name: path of the module, or of the parameter for a bare one.
        kind: which kind of host carries it ("linear", "conv", "embedding", "parameter" ...).
        rows: out, the rows of the weight seen as a matrix.
        cols: in, its columns; for a convolution in/groups * kernel.
        kernel: how many of the columns belong to one input channel (1 but for convolutions).
        groups: of a convolution, each with rows/groups rows and input channels of its own.
        shape: the parameter's own shape, for structures that replace it whole.
        stack: number of matrices in a stacked parameter (experts), or None for one matrix.
        layer: index of the block, None outside of blocks.
        layers: number of blocks.
        role: "attention", "mlp", "head", "embedding" or "other".
    """

    name: str
    kind: str
    rows: int
    cols: int
    kernel: int = 1
    shape: tuple[int, ...] = ()
    stack: int | None = None
    layer: int | None = None
    layers: int = 0
    role: str = "other"
    groups: int = 1

    @property
    def leaf(self) -> str:
        """What the weight is called within its block: "q_proj"."""
        return self.name.rpartition(".")[2]


def computes_as(module: nn.Module, *kinds: type[nn.Module]) -> bool:
    """Whether a module runs the forward of one of these classes, and none of its own class's."""
    cls = getattr(type(module), "grafted_base", type(module))
    return any(issubclass(cls, kind) and cls.forward is kind.forward for kind in kinds)


def flat_tokens(x: Tensor) -> Tensor:
    """Fold all dims between the first and the last: (B, ..., N) -> (B, T, N); (N,) -> (1, N)."""
    if x.dim() == 1:
        return x.unsqueeze(0)
    return x if x.dim() in (2, 3) else x.flatten(1, -2)


def turn_last(op: LinearOperator, y: Tensor) -> Tensor:
    """Apply ``op`` (*batch, M, M) to the last dim of y (*batch, ..., M)."""
    return op.mv(flat_tokens(y)).reshape(y.shape)


class Correction(NamedTuple):
    """What is put on a weight W: ``m/n * (W + op)``, m/n scaling the rows where there is a magnitude.

    Attributes:
        op: the update (out, in).
        magnitude: m (*batch, out), or None for no scale.
        norm: gives n, the norms of the rows of W + op, constant in backward; infinite where they are zero.
        recompute: for m's gradient make the layer's output again in backward, instead of saving it.
    """

    op: LinearOperator
    magnitude: Tensor | None = None
    norm: Callable[[], Tensor] | None = None
    recompute: bool = False


class Host(ABC):
    """All that a structure may ask of its layer. One final subclass a layer kind.

    Args:
        module: the layer; only read, but for ``write``.
        dropout: probability for ``drop``; 0 outside of training.
    """

    kind: ClassVar[str]

    def __init__(self, module: nn.Module, dropout: float = 0.0) -> None:
        self.module: Any = module
        self.dropout = dropout

    @abstractmethod
    def __call__(self, x: Tensor) -> Tensor:
        """The frozen map, without bias."""

    @abstractmethod
    def mv(self, op: LinearOperator, x: Tensor) -> Tensor:
        """Apply an operator the way this layer applies its weight."""

    @abstractmethod
    def weight(self) -> Tensor:
        """The frozen weight as a matrix (out, in); may dequantise: ask rarely."""

    def part(self, correction: Correction, x: Tensor) -> Part | None:
        """This layer and a low-rank correction as part of a fused node at x, None where there is no such form."""
        return None

    def node(self, op: LinearOperator, x: Tensor) -> Callable[[Tensor], Tensor] | None:
        """The map of ``W + op`` as one autograd node, None where its cheapest form at x has none."""
        return None

    def beside(self, x: Tensor, update: Callable[[], Tensor]) -> Tensor:
        """The frozen map of x, and what an update gives then added to it; a host may add in place."""
        return self(x) + update()

    @abstractmethod
    def row_norm(self, op: LinearOperator) -> Tensor:
        """Euclidean norms of the rows of ``W + op``, at least in float32: (*batch, out)."""

    @final
    def plus(self, correction: Correction, x: Tensor) -> Tensor:
        """The corrected map, with adapter dropout before the correction."""
        part = self.part(correction, x)
        if part is not None:
            return fused(x, [part], self.dropout)[0]
        op, magnitude, norm, _ = correction
        if magnitude is not None and norm is not None:
            return self.scale_rows(magnitude / norm(), lambda x: self.plus(Correction(op), x), x)
        return self.ready(op, x)(x)

    @final
    def ready(self, op: LinearOperator, x: Tensor) -> Callable[[Tensor], Tensor]:
        """The map of ``W + op`` in the form that is cheapest for what is like x."""
        return self.node(op, x) or (lambda x: self.beside(x, lambda: self._dropped(op, x)))

    @final
    def _dropped(self, op: LinearOperator, x: Tensor) -> Tensor:
        """The correction alone. Under dropout it runs again in backward, so that x is kept but no copy of it."""
        p = self.dropout  # as it is now: a host that serves several adapters may have another by then
        if not (p and torch.is_grad_enabled() and x.is_floating_point()):
            return self.mv(op, self.drop(x))
        return checkpoint(lambda x: self.mv(op, nn.functional.dropout(x, p)), x, use_reentrant=False)

    @final
    def drop(self, x: Tensor) -> Tensor:
        """Adapter dropout, while training; indices of an embedding pass, their rows are dropped."""
        return nn.functional.dropout(x, self.dropout) if self.dropout and x.is_floating_point() else x

    @abstractmethod
    def rotate(self, op: LinearOperator, x: Tensor) -> Tensor:
        """The frozen map after ``op`` (in, in) has acted on its input."""

    @abstractmethod
    def turn(self, op: LinearOperator, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``run(x)`` with the matrix behind it multiplied by ``op`` (out, out) from the left."""

    @abstractmethod
    def scale_rows(self, scale: Tensor, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        """``run(x)`` with row i of the matrix behind it scaled by ``scale`` (*batch, out)."""

    @abstractmethod
    def overwrite(self, y: Tensor, x: Tensor, index: tuple[int, ...], rows: Tensor) -> Tensor:
        """The output y of x, with the vocabulary rows ``index`` replaced by ``rows`` (n, width)."""


class Stored(ABC):
    """What can be merged: a weight in its storage, and its layout as a matrix."""

    storage: Weight

    @abstractmethod
    def site(self, name: str) -> Site:
        """The facts of the weight; layer, layers and role are filled in by the caller."""

    @abstractmethod
    def matrix(self, tensor: Tensor) -> Tensor:
        """The stored tensor as a matrix (out, in), or a stack of them (E, out, in)."""

    @abstractmethod
    def tensor(self, w: Tensor) -> Tensor:
        """The inverse of :meth:`matrix`; keeps what never changes, as an embedding's padding row."""

    @final
    def weight(self) -> Tensor:
        """The frozen weight as a matrix (out, in); may dequantise: ask rarely."""
        return self.matrix(self.storage.dense())

    @final
    def stored(self, w: Tensor) -> Tensor:
        """The matrix that would be read back after ``write(w)``."""
        return self.matrix(self.storage.decode(self.storage.encode(self.tensor(w))))

    @final
    def write(self, w: Tensor) -> None:
        """Store the matrix w, rounded or quantised once: merging."""
        self.storage.put(self.storage.encode(self.tensor(w)))

    @final
    def parameter(self) -> Tensor:
        """The parameter itself, to tell shared weights; zeros for a bias that the layer has not."""
        found = self.storage.module._parameters[self.storage.name]
        return self.storage.dense() if found is None else found

    @property
    @final
    def dtype(self) -> torch.dtype:
        """The dtype in which the layer computes."""
        return self.storage.dtype


class LayerHost(Stored, Host):
    """A host that is a layer of the model, not another adapter."""

    def __init__(self, module: nn.Module, dropout: float = 0.0) -> None:
        super().__init__(module, dropout)
        self.storage = weight_of(module)

    @staticmethod
    @abstractmethod
    def claims(module: nn.Module) -> bool:
        """Whether this is the kind of the module."""

    @abstractmethod
    def finish(self, x: Tensor, y: Tensor) -> Tensor:
        """What the layer does after its weight: bias, the padding row."""


class Through(Host):
    """A host on top of another, which acts the same way."""

    def __init__(self, host: Host, dropout: float = 0.0) -> None:
        super().__init__(host.module, dropout)
        self.host = host

    @final
    def row_norm(self, op: LinearOperator) -> Tensor:
        return dense_row_norm(self.weight(), op)

    @final
    def mv(self, op: LinearOperator, x: Tensor) -> Tensor:
        return self.host.mv(op, x)

    @final
    def turn(self, op: LinearOperator, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return self.host.turn(op, run, x)

    @final
    def scale_rows(self, scale: Tensor, run: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        return self.host.scale_rows(scale, run, x)

    @final
    def overwrite(self, y: Tensor, x: Tensor, index: tuple[int, ...], rows: Tensor) -> Tensor:
        return self.host.overwrite(y, x, index, rows)


@final
class Adapted(Through):
    """A host with an adapter on it, so that the next adapter composes with it."""

    kind = "adapted"

    def __init__(self, structure: Structure, factors: Factors, host: Host, dropout: float = 0.0) -> None:
        super().__init__(host, dropout)
        self.structure, self.factors = structure, factors

    def __call__(self, x: Tensor) -> Tensor:
        return self.structure.apply(self.factors, x, self.host)

    def weight(self) -> Tensor:
        return self.structure.weight(self.factors, self.host.weight())

    def rotate(self, op: LinearOperator, x: Tensor) -> Tensor:
        layer = self.host
        while isinstance(layer, Adapted):
            layer = layer.host
        if layer.kind == "linear":
            return self(turn_last(op, x))
        return self.host.mv(Dense(op.T.mv(self.weight())), x)
