"""Layers that read one tensor (q, k, v; gate, up) run as one node: x is saved once, its gradient is made in one place.

A layer without such siblings is a family of one. The first member to be called computes the outputs of all and keeps
the others' until they are called with the same tensor; each still runs its own ``forward``, so hooks see what they
always saw. Which layers these are is read off their names once, at attach: a run that is resumed must group as the
first one did.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from typing import Any, NamedTuple, final

import torch
from torch import Tensor, nn

from rankwise.activity import Choice, Routing
from rankwise.adapter import Dropout, Placement, Registry, blocks, stacked
from rankwise.host import LAYER, Conv1DHost, LayerHost, LinearHost, kind_of
from rankwise.ops.form import about
from rankwise.ops.fused import Bundle, Part
from rankwise.ops.operator import leaves
from rankwise.structures.structure import SAMPLED

NAMES = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"),
    ("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"), ("q_a_proj", "kv_a_proj_with_mqa"),
)  # fmt: skip
LINEAR = (LinearHost, Conv1DHost)
CROSS = ("cross", "encdec", "encoder_attn")  # attention whose queries read another tensor than its keys


class _Plan(NamedTuple):
    """What the members run as one node, or one of them alone, and what has to be as it was for that to hold."""

    then: tuple[Any, ...]
    same: list[tuple[dict[str, Any], str, Any]]  # a mapping, a name in it, and the object that was there
    hosts: dict[nn.Module, LayerHost]
    run: Callable[[Tensor], tuple[Tensor, ...]]

    def holds(self, now: tuple[Any, ...]) -> bool:
        return self.then == now and all(mapping[name] is there for mapping, name, there in self.same)


@final
class Siblings:
    """The adapted layers of one module that read the same tensor, or one layer alone.

    Args:
        members: the layers, in the order of their names.
    """

    def __init__(self, members: tuple[nn.Module, ...]) -> None:
        self.__setstate__({"members": members})

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.members: tuple[nn.Module, ...] = state["members"]
        self._plan: _Plan | None = None
        self._tried: tuple[Any, ...] = ()  # when it was tried who can be a part,
        self._able: tuple[nn.Module, ...] = ()  # who could,
        self._lone: dict[nn.Module, _Plan | None] = {}  # and how each runs where nobody could
        self._ready: dict[nn.Module, tuple[LayerHost, Tensor]] = {}
        self._x: Tensor | None = None
        self._then: tuple[Any, ...] = ()
        self._apart: dict[nn.Module, Siblings] = {}  # each alone, once they were seen to read different tensors,
        self._owed = False  # and whether the call in which they were will run again

    def output(self, module: Any, choice: Choice, x: Tensor) -> Tensor | None:
        """A member's output at x, None where it cannot run as a node."""
        if not torch.is_grad_enabled():
            return None
        traced = torch.compiler.is_compiling()
        task = -1 if traced else torch._C._current_graph_task_id()  # of the backward in which a checkpoint runs again
        if self._apart and (task == -1 or not self._owed):
            return self._apart[module].output(module, choice, x)
        now = (choice, 0 if traced else x._version, task)
        if module in self._ready and self._x is not x and not traced and task in (-1, self._then[-1]):
            self._part_ways(task == self._then[-1])
            return self._apart[module].output(module, choice, x)
        if module not in self._ready or self._x is not x or self._then != now:
            self._run(module, choice, x, traced)
            self._then = now
        found = self._ready.pop(module, None)
        if not self._ready:
            self._x = None
        return None if found is None else found[0].finish(x, found[1])

    def _part_ways(self, ran: bool) -> None:
        """A member reads another tensor after all, and others' outputs are made for nothing: each alone from now.

        Where they ran together before in this call, a checkpoint of it runs again as it ran, and comes here once more.
        """
        self._ready, self._x = {}, None
        hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)  # pyright: ignore[reportAttributeAccessIssue]
        self._owed = ran and hooks is not None and not self._apart
        self._apart = self._apart or {member: Siblings((member,)) for member in self.members}

    def _run(self, module: Any, choice: Choice, x: Tensor, traced: bool) -> None:
        """Run the members, if ``module`` can be among them."""
        self._ready, seen = {}, x
        registry = module._modules["adapters"].registry
        if isinstance(choice, Routing):
            levels = blocks(module._modules["adapters"], choice.rows, LAYER) if x.dim() == 3 else []
            if not levels or len(choice.rows) != len(x):
                return
            seen = x.reshape(len(levels), -1, x.shape[-1])
        device = x.device.type
        cast = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else None
        inside = torch._C._are_functorch_transforms_active()
        now = (choice, registry.generation, x.dtype, x.device, module.training, cast, inside)
        if traced:
            plan = self._make(now, self.members, choice, seen)
        elif (plan := self._plan) is None or not plan.holds(now):
            plan = self._found(module, choice, now, seen)
        if plan is None or module not in plan.hosts:
            return
        outs = [y if seen is x else y.reshape(*x.shape[:-1], y.shape[-1]) for y in plan.run(seen)]
        self._ready = {m: (host, y) for (m, host), y in zip(plan.hosts.items(), outs, strict=True)}
        self._x = x

    def _found(self, module: Any, choice: Choice, now: tuple[Any, ...], x: Tensor) -> _Plan | None:
        """What to run now. A checkpoint that runs again tries nothing again, so what is tried must not be recorded."""
        size = x.dim(), about(x.numel() // max(x.shape[-1], 1))  # what a form is chosen by
        if self._tried != (now, size):
            with _unseen():
                self._able = tuple(_parts(self.members, choice, x, drawn=False))
            self._tried, self._lone = (now, size), {}
        if self._able:
            plan = self._make(now, self._able, choice, x)
            self._plan = plan if plan is not None and plan.same else None  # else of tensors computed for this call
            return plan
        if module not in self._lone or (plan := self._lone[module]) is not None and not plan.holds(now):
            with _unseen():
                self._lone[module] = _by_itself(module, choice, now, x)
        return self._lone[module]

    def _make(self, now: tuple[Any, ...], members: Iterable[nn.Module], choice: Choice, x: Tensor) -> _Plan | None:
        found, same = _parts(members, choice, x), []
        if not found:
            return None
        hosts = {member: host for member, (host, _) in found.items()}
        parts = [part for _, part in found.values()]
        tensors = [t for part in parts for t in (part.weight, part.left, part.right, part.magnitude)]
        still = all(isinstance(t, nn.Parameter) for t in tensors if isinstance(t, Tensor))
        if still and not isinstance(choice, Routing):  # a view's data may be replaced meanwhile
            same = [row for member in found for row in _where(member, choice)]
        return _Plan(now, same, hosts, Bundle.of(parts, next(iter(hosts.values())).dropout))


def _where(module: Any, choice: tuple[str, ...]) -> list[tuple[dict[str, Any], str, Any]]:
    (level,) = module._modules["adapters"].active(choice, LAYER)
    tables = [(module._parameters, ["weight"]), (level._parameters, list(level._parameters))]
    tables += [(level.pool._parameters, [*level.keys.values()])] if level.keys else []
    found = [(table, name, table[name]) for table, names in tables for name in names]
    return [*found, *((level.__dict__, name, getattr(level, name)) for name in ("training", "dropout", "structure"))]


def _by_itself(module: Any, choice: Choice, now: tuple[Any, ...], x: Tensor) -> _Plan | None:
    """How a layer runs that is no part of a node, where its update is made of parameters alone."""
    if "_old_forward" in module.__dict__ or "grafted_transposed" in module.__dict__ or isinstance(choice, Routing):
        return None
    levels, kind = module._modules["adapters"].active(choice, LAYER), kind_of(module)
    if kind is None or len(levels) != 1 or (levels[0].training and levels[0].dropout):
        return None
    f, host = levels[0].seen(), kind(module)
    correction = levels[0].structure.correction(f, host) if SAMPLED not in f else None
    if correction is None or correction.magnitude is not None:
        return None
    if not all(isinstance(t, nn.Parameter) for t in leaves(correction.op)):
        return None
    run = host.ready(correction.op, x)
    return _Plan(now, _where(module, choice), {module: host}, lambda x: (run(x),))


def _unseen() -> AbstractContextManager[Any]:
    """What is recorded within is seen by no hooks on saved tensors: a checkpoint counts those that it sees."""
    inside = torch._C._are_functorch_transforms_active()  # which allow no hooks
    return nullcontext() if inside else torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t)


def _parts(
    members: Iterable[nn.Module], choice: Choice, x: Tensor, drawn: bool = True
) -> dict[nn.Module, tuple[LayerHost, Part]]:
    """The members that can be parts of one node, and their parts."""
    found: dict[nn.Module, tuple[LayerHost, Part]] = {}
    for member in members:
        made = _part(member, choice, x, drawn)
        if made is not None and all(made[0].dropout == host.dropout for host, _ in found.values()):
            found[member] = made
    return found


def _part(module: Any, choice: Choice, x: Tensor, drawn: bool) -> tuple[LayerHost, Part] | None:
    """A layer under one adapter (or one a block of rows) and its part of a node; None where it must run alone."""
    if "_old_forward" in module.__dict__ or "grafted_transposed" in module.__dict__:
        return None
    holder, kind = module._modules["adapters"], kind_of(module)
    routed = isinstance(choice, Routing)
    levels = blocks(holder, choice.rows, LAYER) if isinstance(choice, Routing) else holder.active(choice, LAYER)
    if kind is None or len(levels) != (len(x) if routed else 1):
        return None
    host = kind(module, levels[0].p)

    def made(masked: bool) -> Part | None:
        factors = stacked(levels, masked) if routed else levels[0].seen(masked)
        if SAMPLED in factors:  # it draws where it runs, once
            return None
        correction = levels[0].structure.correction(factors, host)
        return None if correction is None else host.part(correction, x)

    part = made(masked=False)  # no mask is drawn for nothing: a run again in backward would draw another number
    if drawn and part is not None and any(isinstance(level.dropout, Dropout) and level.training for level in levels):
        part = made(masked=True)
    return None if part is None else (host, part)


def introduce(modules: Mapping[str, nn.Module], placements: Iterable[Placement], registry: Registry) -> None:
    """Tell the adapted layers of the placements which of them read one tensor, after an adapter came or went."""
    registry.generation += 1
    paths = [path for p in placements for path, slot, _ in p.carriers if slot == LAYER]
    families: list[tuple[Any, ...]] = [(modules[path],) for path in paths]
    for path in {path.rpartition(".")[0]: None for path in paths}:
        if not any(word in path.lower() for word in CROSS):
            families += [tuple(modules[path]._modules.get(name) for name in names) for names in NAMES]
    for family in families:
        members = tuple(m for m in family if m is not None and "adapters" in m._modules and kind_of(m) in LINEAR)
        together = Siblings(members)
        for member in members:
            member._modules["adapters"].siblings = together
