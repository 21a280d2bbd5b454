"""Layers that read one tensor (q, k, v; gate, up) run as one node: x is saved once, its gradient is made in one place.

The first of them to be called computes the outputs of all and keeps the others' until they are called with the same
tensor; each still runs its own ``forward``, so hooks see what they always saw. Which layers these are is read off
their names once, at attach: a run that is resumed must group as the first one did.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, final

import torch
from torch import Tensor, nn

from rankwise.activity import Choice, Routing
from rankwise.adapter import Placement, blocks, stacked
from rankwise.host import LAYER, LayerHost, kind_of
from rankwise.ops.fused import Part
from rankwise.ops.fused import run as fused

NAMES = (
    ("q_proj", "k_proj", "v_proj"), ("query", "key", "value"), ("q_lin", "k_lin", "v_lin"), ("q", "k", "v"),
    ("gate_proj", "up_proj"), ("w1", "w3"), ("wi_0", "wi_1"), ("q_a_proj", "kv_a_proj_with_mqa"),
)  # fmt: skip
CROSS = ("cross", "encdec", "encoder_attn")  # attention whose queries read another tensor than its keys


@final
class Siblings:
    """The adapted layers of one module that read the same tensor.

    Args:
        members: the layers, in the order of their names.
    """

    def __init__(self, members: tuple[nn.Module, ...]) -> None:
        self.members = members
        self._forget()

    def _forget(self) -> None:
        self._ready: dict[nn.Module, tuple[LayerHost, Tensor]] = {}
        self._x: Tensor | None = None
        self._then: tuple[Choice, int] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.members = state["members"]
        self._forget()

    def output(self, module: nn.Module, choice: Choice, x: Tensor) -> Tensor | None:
        """A member's output at x, None where it has to run alone."""
        if not torch.is_grad_enabled():
            return None
        now = (choice, 0 if torch.compiler.is_compiling() else x._version)
        if module not in self._ready or self._x is not x or self._then != now:
            self._forget()
            self._run(module, choice, x)
            self._then = now
        found = self._ready.pop(module, None)
        if not self._ready:
            self._x = None
        return None if found is None else found[0].finish(x, found[1])

    def _run(self, module: nn.Module, choice: Choice, x: Tensor) -> None:
        """Run the members that can go together with ``module``, if it can itself."""
        seen = x
        if isinstance(choice, Routing):
            holder: Any = module._modules["adapters"]
            levels = blocks(holder, choice.rows, LAYER) if x.dim() == 3 else []
            if not levels or len(choice.rows) != len(x):
                return
            seen = x.reshape(len(levels), -1, x.shape[-1])
        own = _part(module, choice, seen)
        if own is None:
            return
        found = {module: own}
        for member in self.members:
            if member is not module:
                other = _part(member, choice, seen)
                if other is not None and other[0].dropout == own[0].dropout:
                    found[member] = other
        if len(found) > 1:
            outs = fused(seen, [part for _, part in found.values()], own[0].dropout)
            if seen is not x:
                outs = tuple(y.reshape(*x.shape[:-1], y.shape[-1]) for y in outs)
            self._ready = {m: (host, y) for (m, (host, _)), y in zip(found.items(), outs, strict=True)}
            self._x = x


def _part(module: Any, choice: Choice, x: Tensor) -> tuple[LayerHost, Part] | None:
    """A layer under one adapter (or one a block of rows) and its part of a node; None where it must run alone."""
    if "_old_forward" in module.__dict__ or "grafted_transposed" in module.__dict__:
        return None
    holder, kind = module._modules["adapters"], kind_of(module)
    routed = isinstance(choice, Routing)
    levels = blocks(holder, choice.rows, LAYER) if isinstance(choice, Routing) else holder.active(choice, LAYER)
    if kind is None or len(levels) != (len(x) if routed else 1):
        return None
    host = kind(module, levels[0].p)
    factors = stacked(levels) if routed else levels[0].factors()
    correction = levels[0].structure.correction(factors, host)
    part = None if correction is None else host.part(correction, x)
    return None if part is None else (host, part)


def introduce(modules: Mapping[str, nn.Module], placements: Iterable[Placement]) -> None:
    """Tell the adapted layers of the placements which of them read one tensor."""
    paths = (path for p in placements for path, slot, _ in p.carriers if slot == LAYER)
    for path in {path.rpartition(".")[0]: None for path in paths}:
        if any(word in path.lower() for word in CROSS):
            continue
        for names in NAMES:
            children: list[Any] = [modules[path]._modules.get(name) for name in names]
            members = tuple(c for c in children if c is not None and "adapters" in c._modules)
            together = Siblings(members) if len(members) > 1 else None
            for member in members:
                member._modules["adapters"].siblings = together
