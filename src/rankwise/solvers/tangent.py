"""Steps along the manifold of matrices of rank r, of which b and a are coordinates.

Shapes: b (S, *, m, r), a (S, *, r, n). A tangent vector at ``b @ a`` is a pair of directions (h_b, h_a), meaning
``h_b @ a + b @ h_a``; with any X (r, r) the pair (h_b - b X, h_a + X a) is the same one.
"""

from dataclasses import dataclass, replace
from typing import NamedTuple, final

import torch
from torch import Tensor

from rankwise.errors import IncompatibleAxes
from rankwise.solvers.chain import Chained, Decay, Step, Transform, declare
from rankwise.solvers.gauge import inverse, moments, powers


def sylvester(left: Tensor, right: Tensor, given: Tensor) -> Tensor:
    """X of ``left X + X right = given``, left and right (S, *, r, r) positive semidefinite and one of them definite."""
    (x, u), (y, v) = (torch.linalg.eigh(t.double()) for t in (left, right))
    inner = u.mT @ given.double() @ v / (x.unsqueeze(-1) + y.unsqueeze(-2))
    return (u @ inner @ v.mT).to(given.dtype)


@final
@dataclass(frozen=True)
class Project(Transform):
    """The directions of the tangent vector that is nearest to the full gradient.

    ``h_a = (b^T b)^-1 g_a / s^2 + X a`` and ``h_b = (I - P_b) g_b (a a^T)^-1 / s^2 - b X``, P_b projecting on b.

    Attributes:
        closest: X for which they are also nearest to the factors' own gradients; X = 0 otherwise.
        damping: added to the Gram matrices.
    """

    closest: bool = True
    damping: float = 1e-8

    def start(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def __call__(self, step: Step) -> None:
        b, a, g_b, g_a = step.values["b"], step.values["a"], step.update["b"], step.update["a"]
        rows, cols, both = b.mT @ b, a @ a.mT, b.mT @ g_b  # the last is g_a a^T as well
        left, right = (inverse(gram, self.damping) for gram in (rows, cols))
        left, both = left / step.scale**2, both @ right
        h_a, inner = left @ g_a, left @ both
        if self.closest:
            x = sylvester(rows, cols, -left @ (b.mT @ g_b))
            h_a, inner = h_a + x @ a, inner + x
        step.update = {"a": h_a, "b": g_b @ (right / step.scale**2) - b @ inner}


@final
@dataclass(frozen=True)
class LoRAPro(Chained):
    """Directions that add up to the projection of the full gradient (Wang et al. 2024, arXiv 2407.18242).

    Attributes:
        x: "sylvester", the paper's choice among equals, close to the factors' gradients; or "zero".
        damping: added to the Gram matrices; the paper's code has 1e-8.
        betas: as in AdamW, of the directions; None for the plain form, gradient descent.
        eps: as in AdamW.
        weight_decay: as in AdamW.
    """

    x: str = "sylvester"
    damping: float = 1e-8
    betas: tuple[float, float] | None = (0.9, 0.999)
    eps: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.x not in ("sylvester", "zero"):
            raise IncompatibleAxes(f'LoRAPro(x=) is "sylvester" or "zero"; found {self.x!r}.')
        declare(self, gauge_invariant=self.x == "zero" and self.betas is None and not self.damping)

    def chain(self) -> tuple[Transform, ...]:
        return Project(self.x == "sylvester", self.damping), *moments(self.betas, self.eps), Decay(self.weight_decay)


# -- the manifold -------------------------------------------------------------------------------


class Split(NamedTuple):
    """``extra = base @ part + rest`` with rest orthogonal to base, and their orthonormal bases [U, Q].

    base = U root and rest = Q rest_root (both (S, *, m, r)); back and rest_back are the pseudo-inverses of the roots.
    """

    base: Tensor
    rest: Tensor
    part: Tensor
    root: Tensor
    back: Tensor
    rest_root: Tensor
    rest_back: Tensor

    def columns(self, z: Tensor) -> Tensor:
        """``[U, Q] @ z`` for z (S, *, 2r, k)."""
        upper, lower = z.chunk(2, dim=-2)
        return self.base @ (self.back @ upper).to(self.base) + self.rest @ (self.rest_back @ lower).to(self.base)


def split(base: Tensor, roots: list[Tensor], extra: Tensor) -> Split:
    """Split ``extra`` by its part in the columns of ``base``, whose Gram matrix has these square and inverse roots."""
    root, back = roots
    part = back @ back @ (base.mT @ extra).double()
    rest = extra - base @ part.to(base)
    return Split(base, rest, part, root, back, *powers(rest.mT @ rest, 0.5, -0.5))


def block(rows: list[list[Tensor]]) -> Tensor:
    """A matrix of blocks."""
    return torch.cat([torch.cat(row, dim=-1) for row in rows], dim=-2)


def cores(left: Split, right: Split) -> tuple[Tensor, Tensor]:
    """The point ``b @ a`` and the tangent vector (S, *, 2r, 2r) in the bases of ``b`` and ``a^T``."""
    none = torch.zeros_like(left.root)
    inner = left.root @ (left.part + right.part.mT) @ right.root
    tangent = block([[inner, left.root @ right.rest_root], [left.rest_root @ right.root, none]])
    return block([[left.root @ right.root, none], [none, none]]), tangent


def leading(core: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The leading half of the singular triplets: x (2r, r), s (1, r), y (2r, r)."""
    r = core.shape[-1] // 2
    x, s, y = torch.linalg.svd(core)
    return x[..., :r], s[..., None, :r], y.mT[..., :r]


def retract(b: Tensor, a: Tensor, h_b: Tensor, h_a: Tensor) -> tuple[Tensor, Tensor]:
    """Balanced factors of the truncated SVD, of rank r, of ``b a + h_b a + b h_a``, without forming it (m, n).

    Args:
        b: (S, *, m, r).
        a: (S, *, r, n).
        h_b: direction of b.
        h_a: direction of a.

    Returns:
        The new b and a.
    """
    left = split(b, powers(b.mT @ b, 0.5, -0.5), h_b)
    right = split(a.mT, powers(a @ a.mT, 0.5, -0.5), h_a.mT)
    point, tangent = cores(left, right)
    x, s, y = leading(point + tangent)
    moved = nonzero(s)
    return torch.where(moved, left.columns(x * s.sqrt()), b), torch.where(moved, right.columns(y * s.sqrt()).mT, a)


def nonzero(s: Tensor) -> Tensor:
    """Where a product of leading singular values s (S, *, 1, r) is not zero: (S, *, 1, 1).

    A zero product has no factors to be read off: at b = 0 and a rate of 0 they stay what they are.
    """
    return s[..., :1] > 0


@final
@dataclass(frozen=True)
class Ride(Transform):
    """A step along the manifold: project the gradient, add momentum, make it orthogonal, retract, carry the momentum.

    Attributes:
        momentum: decay of the momentum, a tangent vector that is projected on each new tangent space.
        orthogonal: set the step's singular values to 1, as Muon does, and project it again.
        weight_decay: of ``b @ a``, per step, times the learning rate.
    """

    momentum: float = 0.9
    orthogonal: bool = True
    weight_decay: float = 0.0

    def start(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"mean.{role}": torch.zeros_like(v) for role, v in values.items()}

    def __call__(self, step: Step) -> None:
        b, a, new = step.values["b"], step.values["a"], (1 - self.momentum) / step.scale.double() ** 2
        rows, cols = (powers(gram, 0.5, -0.5) for gram in (b.mT @ b, a @ a.mT))
        h_b = step.update["b"] @ (new * (cols[1] @ cols[1])).to(b) + self.momentum * step.state["mean.b"]
        h_a = (new * (rows[1] @ rows[1])).to(a) @ step.update["a"] + self.momentum * step.state["mean.a"]
        left, right = split(b, rows, h_b), split(a.mT, cols, h_a.mT)
        left = left._replace(part=torch.zeros_like(left.part))  # the overlap of the two projections, counted once
        point, tangent = cores(left, right)
        move = tangent
        if self.orthogonal:
            (back,) = powers(tangent.mT @ tangent, -0.5, dtype=b.dtype)
            move, r = tangent @ back / step.scale, b.shape[-1]
            move[..., r:, r:] = 0
        x, s, y = leading((1 - step.lr * self.weight_decay) * point - step.lr * move)
        over = torch.where(s > s[..., :1] * torch.finfo(b.dtype).eps, s, torch.inf).rsqrt()
        # the part of the mean along the new b is left out by the next step
        mean = {"b": left.columns(tangent @ y * over), "a": right.columns(tangent.mT @ x * over).mT}
        after = {"b": left.columns(x * s.sqrt()), "a": right.columns(y * s.sqrt()).mT}
        moved = nonzero(s)
        for role, (old, carried) in {"b": (b, h_b), "a": (a, h_a)}.items():
            step.state[f"mean.{role}"] = torch.where(moved, mean[role], carried)
            step.values[role] = torch.where(moved, after[role], old)
        step.update = {}


@final
@dataclass(frozen=True)
class Riemannion(Chained):
    """Muon on the manifold of matrices of rank r (RiemannLoRA; Bogachev et al. 2025, arXiv 2507.12142).

    A step moves W by a matrix of spectral norm ``lr``, before it is retracted.

    Attributes:
        momentum: decay of the momentum.
        orthogonal: set the singular values of the step to 1; without, it is Riemannian gradient descent.
        weight_decay: of ``b @ a``, per step, times the learning rate.
    """

    momentum: float = 0.9
    orthogonal: bool = True
    weight_decay: float = 0.0

    traits = frozenset({"gauge_invariant"})

    def chain(self) -> tuple[Transform, ...]:
        return (Ride(self.momentum, self.orthogonal, self.weight_decay),)


@final
@dataclass(frozen=True)
class Lazily(Transform):
    """Steps on the factors, and every so often one along the manifold, after which Adam's moments start anew.

    Attributes:
        every: steps from one along the manifold to the next.
        lazy: what a step on a factor is multiplied with; None for r over the factor's longer side.
        betas: of Adam's quotient, which stands for the gradients in both kinds of step; None for the gradients.
        eps: as in Adam.
        damping: added to the Gram matrices.
    """

    every: int = 500
    lazy: float | None = None
    betas: tuple[float, float] | None = (0.9, 0.999)
    eps: float = 1e-6
    damping: float = 1e-8

    def start(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {k: v for link in moments(self.betas, self.eps) for k, v in link.start(values).items()}

    def __call__(self, step: Step) -> None:
        for link in moments(self.betas, self.eps):
            fresh = replace(step, count=(step.count - 1) % self.every + 1)
            link(fresh)
            step.update = fresh.update
        now = step.count % self.every == 0
        exact = replace(step, values=dict(step.values), update=dict(step.update))
        for role, g in step.update.items():
            share = step.values["a"].shape[-2] / max(g.shape[-2:]) if self.lazy is None else self.lazy
            step.update[role] = g * share * ~now
        if now.any():
            Project(False, self.damping)(exact)
            h_b, h_a = (-step.lr * exact.update[role] for role in "ba")
            moved = dict(zip("ba", retract(step.values["b"], step.values["a"], h_b, h_a), strict=True))
            step.values = {role: torch.where(now, moved[role], v) for role, v in step.values.items()}
            step.state = {name: torch.where(now, 0, v) for name, v in step.state.items()}


@final
@dataclass(frozen=True)
class LORO(Chained):
    """Riemannian steps now and then, cheap ones on the factors between them (LORO; Mo, Huang, Pan 2025, ICLR).

    Every K-th step takes ``b a`` to the truncated SVD of ``b a - lr T``, T the projection of the full gradient on the
    tangent space, known from the factors' gradients alone; no m x n matrix is formed.

    Attributes:
        every: K; 1 for Riemannian steps alone.
        lazy: what the steps between are multiplied with; None for r over the factor's longer side.
        betas: of Adam, whose quotient stands for the gradient in both kinds of step, as in the authors' code; None for
            the gradient itself.
        eps: as in AdamW.
        damping: added to the Gram matrices.
        weight_decay: as in AdamW, of the factors.
    """

    every: int = 500
    lazy: float | None = None
    betas: tuple[float, float] | None = (0.9, 0.999)
    eps: float = 1e-6
    damping: float = 1e-8
    weight_decay: float = 0.0

    def __post_init__(self) -> None:
        if self.every < 1:
            raise IncompatibleAxes(f"A step along the manifold is taken every 1 step or more; found {self.every}.")
        plain = self.every == 1 and self.betas is None and not self.damping
        declare(self, gauge_invariant=plain)

    def chain(self) -> tuple[Transform, ...]:
        return Lazily(self.every, self.lazy, self.betas, self.eps, self.damping), Decay(self.weight_decay)
