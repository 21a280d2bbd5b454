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
from rankwise.adapter import Adapters, Placement
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
        self._ready: dict[nn.Module, Tensor] = {}
        self._made_from: tuple[Any, ...] = ()

    def __getstate__(self) -> dict[str, Any]:
        return {"members": self.members}

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.members = state["members"]
        self._forget()

    def output(self, module: nn.Module, choice: Choice, x: Tensor) -> Tensor | None:
        """A member's output at x without its bias, None where it has to run alone."""
        if torch.compiler.is_compiling() or not torch.is_grad_enabled() or x.is_inference():
            return None
        if module in self._ready:
            tensor, *rest = self._made_from
            if tensor is x and rest == [x._version, choice]:
                y = self._ready.pop(module)
                if not self._ready:
                    self._forget()
                return y
        self._forget()
        parts, dropout = self._parts(module, choice, x)
        if len(parts) < 2:
            return None
        outs = dict(zip(parts, fused(x, list(parts.values()), dropout), strict=True))
        y = outs.pop(module)
        self._ready, self._made_from = outs, (x, x._version, choice)
        return y

    def _parts(self, module: nn.Module, choice: Choice, x: Tensor) -> tuple[dict[nn.Module, Part], float]:
        """What of the members can run together with ``module``, itself included if at all."""
        found: dict[nn.Module, Part] = {}
        own = _part(module, choice, x)
        if own is None:
            return found, 0.0
        for member in self.members:
            made = own if member is module else _part(member, choice, x)
            if made is not None and made[1] == own[1] and made[0].left.dim() == own[0].left.dim():
                found[member] = made[0]
        return found, own[1]


def _part(module: Any, choice: Choice, x: Tensor) -> tuple[Part, float] | None:
    """A layer under one adapter as part of a node, and its dropout; None where it must run alone."""
    if isinstance(choice, Routing) or "_old_forward" in module.__dict__ or "grafted_transposed" in module.__dict__:
        return None
    holder: Adapters = module._modules["adapters"]
    levels = holder.active(choice, LAYER)
    kind = kind_of(module)
    if len(levels) != 1 or kind is None:
        return None
    host: LayerHost = kind(module, levels[0].p)
    correction = levels[0].structure.correction(levels[0].factors(), host)
    part = None if correction is None else host.part(correction, x)
    return None if part is None else (part, host.dropout)


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
