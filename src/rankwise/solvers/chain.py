"""Solvers as chains of small transforms over stacks of factors.

Factors of equal shape are stacked, so a step is a few batched calls and no loop over sites. Shapes: a stack of S sites
holds b (S, *stack, m, r) and a (S, *stack, r, n), or values of any shape under the one role "value"; what is one number
a site (step count, scale) is (S, 1, ...) and broadcasts.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, final

import torch
from torch import Tensor

from rankwise.adapter import SiteFactors
from rankwise.solvers.shards import share, whole
from rankwise.solvers.solver import Solver
from rankwise.structures.structure import trained_pairs
from rankwise.structures.wrappers import keep

PAIR = ("b", "a")
HALF = ("b",)  # of a pair whose a is frozen
ALONE = ("value",)
FRAME = ("frame",)  # of orthonormal columns, or rows


@dataclass
class Step:
    """What a transform sees of one step of a stack.

    Attributes:
        values: role -> factors, as they are before the step; what a retraction puts here are the new ones.
        update: role -> the gradients at first; at the end of the chain ``values - lr * update`` are the new values, or
            the values themselves for a role that is not here.
        state: the transform's own tensors by name, a leading dim S in each; changed in place or replaced.
        count: steps, this one included: (S, 1, ...).
        scale: s of ``s * b @ a``, 1 for other factors: (S, 1, ...).
        lr: the group's learning rate.
    """

    values: dict[str, Tensor]
    update: dict[str, Tensor]
    state: dict[str, Tensor]
    count: Tensor
    scale: Tensor
    lr: float


class Transform(ABC):
    """One link of a chain: a frozen dataclass of its options."""

    @abstractmethod
    def start(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        """State before the first step, for the factors of S sites: name -> (S, ...)."""

    @abstractmethod
    def __call__(self, step: Step) -> None:
        """Turn ``step.update`` into a better one, in place or by putting another in its place."""


class _Unit(NamedTuple):
    """The factors of one pair, or one factor alone, and the pair's scale."""

    params: tuple[Tensor, ...]
    scale: float


@final
class _Stack:
    """Units of equal shapes; their state as views of stacked tensors."""

    def __init__(self, units: Sequence[_Unit], roles: Sequence[str], chain: Sequence[Transform], state: Any) -> None:
        self.units, self.roles, self.chain = units, roles, chain
        self.own = [state[unit.params[0]] for unit in units]
        fresh = [own for own in self.own if not own]
        if fresh:
            values = self._stacked([u for u, own in zip(units, self.own, strict=True) if not own])
            begun = {f"{i}.{k}": v for i, link in enumerate(chain) for k, v in link.start(values).items()}
            for i, own in enumerate(fresh):
                own["step"] = torch.zeros(())
                own.update({k: v[i] for k, v in begun.items()})
        self.state = {name: torch.stack([own[name] for own in self.own]) for name in self.own[0]}
        for name, stack in self.state.items():
            for own, row in zip(self.own, stack.unbind(), strict=True):
                own[name] = row
        self.views = [dict(own) for own in self.own]

    def _stacked(self, units: Sequence[_Unit], grads: bool = False) -> dict[str, Tensor]:
        found = {}
        for i, role in enumerate(self.roles):
            params = [unit.params[i] for unit in units]
            tensors = [p if not grads else torch.zeros_like(p) if p.grad is None else p.grad for p in params]
            found[role] = torch.stack([whole(t.detach()) for t in tensors])
        return found

    def holds(self, units: Sequence[_Unit], state: Any) -> bool:
        """Whether the stack is still of these units, and their state still its views."""
        same = [id(p) for u in units for p in u.params] == [id(p) for u in self.units for p in u.params]
        return same and all(
            all(state[unit.params[0]].get(name) is view for name, view in views.items())
            for unit, views in zip(self.units, self.views, strict=True)
        )

    def step(self, lr: float) -> None:
        given, update = self._stacked(self.units), self._stacked(self.units, grads=True)
        values = dict(given)
        like = values[self.roles[0]]
        ones = [-1] + [1] * (like.dim() - 1)
        self.state["step"] += 1
        count = self.state["step"].to(like).reshape(ones)
        scale = torch.tensor([unit.scale for unit in self.units]).to(like).reshape(ones)
        for i, link in enumerate(self.chain):
            own = {k.removeprefix(f"{i}."): v for k, v in self.state.items() if k.startswith(f"{i}.")}
            step = Step(values, update, own, count, scale, lr)
            link(step)
            values, update = step.values, step.update
            for name, now in step.state.items():
                if now is not self.state[f"{i}.{name}"]:
                    self.state[f"{i}.{name}"].copy_(now)
        for i, role in enumerate(self.roles):
            params = [unit.params[i] for unit in self.units]
            if not params[0].requires_grad:
                continue
            if role in update and values[role] is given[role] and not hasattr(params[0], "full_tensor"):
                torch._foreach_add_(params, update[role].unbind(), alpha=-lr)
            else:
                after = values[role].sub(update[role], alpha=lr) if role in update else values[role]
                _write(params, after.unbind())


def _write(params: Sequence[Tensor], values: Sequence[Tensor]) -> None:
    parts = [share(p, v) for p, v in zip(params, values, strict=True)]
    torch._foreach_copy_([mine for mine, _ in parts], [part for _, part in parts])


@final
class ChainOptimizer(torch.optim.Optimizer):
    """Runs a chain over groups of units; the state of a unit is that of its first parameter.

    Args:
        groups: each with "params" (the units' factors, one unit after the other), "roles" (of a unit's factors),
            "scales" (one a unit) and "lr".
        chain: the transforms for pairs, or for frames.
        alone: the transforms for all other factors.
        frozen: b -> a of the pairs whose a is frozen.
    """

    def __init__(
        self,
        groups: list[dict[str, Any]],
        chain: Sequence[Transform],
        alone: Sequence[Transform],
        frozen: Mapping[Tensor, Tensor] | None = None,
    ) -> None:
        self.chains = {PAIR: tuple(chain), FRAME: tuple(chain), ALONE: tuple(alone)}
        self.frozen = dict(frozen or {})
        self._stacks: dict[int, list[_Stack]] = {}
        super().__init__(groups, {"lr": 0.0})

    def __getstate__(self) -> dict[str, Any]:
        return {**super().__getstate__(), "chains": self.chains, "frozen": self.frozen, "_stacks": {}}

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """One step of every unit that has a gradient; a factor of a pair without one counts as zero."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for i, group in enumerate(self.param_groups):
            for stack in self._current(i, group):
                stack.step(float(group["lr"]))
        return loss

    def _current(self, i: int, group: dict[str, Any]) -> list[_Stack]:
        roles = tuple(group["roles"])
        each, params = len(roles), group["params"]
        units = [_Unit(tuple(params[k : k + each]), group["scales"][k // each]) for k in range(0, len(params), each)]
        if roles == HALF:
            roles, units = PAIR, [_Unit((b, self.frozen[b]), scale) for (b,), scale in units]
        kinds: dict[Any, list[_Unit]] = {}
        for unit in units:
            if any(p.grad is not None for p in unit.params):
                kinds.setdefault(tuple((p.shape, p.dtype, p.device) for p in unit.params), []).append(unit)
        known = self._stacks.get(i, [])
        if len(known) != len(kinds) or not all(
            stack.holds(units, self.state) for stack, units in zip(known, kinds.values(), strict=True)
        ):
            known = [_Stack(units, roles, self.chains[roles], self.state) for units in kinds.values()]
            self._stacks[i] = known
        return known


class Chained(Solver):
    """A solver that is a chain on the pairs ``s * b @ a``; every other factor (a magnitude) takes AdamW's step."""

    requires = frozenset({"pair"})

    @abstractmethod
    def chain(self) -> tuple[Transform, ...]:
        """The transforms, in order."""

    @final
    def groups(self, sites: Iterable[SiteFactors], lr: float) -> list[dict[str, Any]]:
        found: dict[str, tuple[tuple[str, ...], list[torch.nn.Parameter], list[float]]]
        found = {"pairs": (PAIR, [], []), "pairs with a frozen": (HALF, [], []), "others": (ALONE, [], [])}
        for site in sites:
            held = {name: p for name, p in site.own().items() if p.requires_grad}
            for b, a, scale in trained_pairs(site.described):
                if b in held:
                    _, params, scales = found["pairs" if a in held else "pairs with a frozen"]
                    params += [held.pop(name) for name in (b, a) if name in held]
                    scales.append(scale)
            _, params, scales = found["others"]
            params += held.values()
            scales += [1.0] * len(held)
        return [{"name": n, "lr": lr, "params": p, "roles": r, "scales": s} for n, (r, p, s) in found.items() if p]

    @final
    def __call__(self, sites: Iterable[SiteFactors], lr: float) -> torch.optim.Optimizer:
        sites = list(sites)
        named = [(site.factors(), b, a) for site in sites for b, a, _ in trained_pairs(site.described)]
        pairs: list[Any] = [(f[b], f[a]) for f, b, a in named]
        frozen = {b: a for b, a in pairs if b.requires_grad and not a.requires_grad}
        return ChainOptimizer(self.groups(sites, lr), self.chain(), (Adam(),), frozen)


def declare(solver: Solver, **traits: bool) -> None:
    """Give a solver, in its ``__post_init__``, the traits that its options bring."""
    keep(solver, traits=frozenset(name for name, holds in traits.items() if holds))


# -- links that know no pair ------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Adam(Transform):
    """The quotient of Adam's two moments, bias corrected (Kingma and Ba 2014, arXiv 1412.6980).

    Attributes:
        betas: decay of the two moments.
        eps: added to the root of the second moment.
    """

    betas: tuple[float, float] = (0.9, 0.999)
    eps: float = 1e-8

    def start(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {f"{moment}.{role}": torch.zeros_like(v) for role, v in values.items() for moment in ("mean", "square")}

    def __call__(self, step: Step) -> None:
        given = {role: g.contiguous() for role, g in step.update.items()}  # the kernel reads memory as it lies
        found = {role: torch.zeros_like(g) for role, g in given.items()}  # AdamW's step of rate -1 from zero
        moments = ({role: step.state[f"{moment}.{role}"] for role in found} for moment in ("mean", "square"))
        kinds = (found, given, *moments)
        values, grads, means, squares = ([one for v in kind.values() for one in v.unbind()] for kind in kinds)
        torch._fused_adamw_(
            values,
            grads,
            means,
            squares,
            [],
            [*step.count.flatten().float().unbind()] * len(found),
            lr=-1.0,
            beta1=self.betas[0],
            beta2=self.betas[1],
            weight_decay=0.0,
            eps=self.eps,
            amsgrad=False,
            maximize=False,
        )
        step.update = found


@final
@dataclass(frozen=True)
class Decay(Transform):
    """Decoupled weight decay: ``rate`` times the value is added to the update (Loshchilov and Hutter, 1711.05101).

    Attributes:
        rate: per step, times the learning rate.
    """

    rate: float = 0.0

    def start(self, values: dict[str, Tensor]) -> dict[str, Tensor]:
        return {}

    def __call__(self, step: Step) -> None:
        if self.rate:
            step.update = {role: g.add(step.values[role], alpha=self.rate) for role, g in step.update.items()}
