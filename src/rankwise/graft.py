"""The graft: an adapted module keeps its class's name, its parameters' names and its code.

``attach`` swaps a module's ``__class__`` for a cached subclass of whatever class it had and adds
one child, ``adapters``. A layer's graft replaces ``forward``; a bare parameter's graft is a
property of its name, so that the module's own code reads the adapted tensor. Nothing is wrapped,
hooked or renamed (``torch.nn.utils.parametrize`` would rename the parameter).
"""

import functools
import re
from collections.abc import Callable
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.activity import Routing
from rankwise.adapter import Adapters, SiteFactors, adapted_value, blocks, key_of, normal, stacked
from rankwise.errors import ActivityError
from rankwise.experts import STACKS, is_experts, run_experts
from rankwise.host import LAYER, Adapted, Host, LayerHost, TransposedHost, kind_of

_EXPERT = re.compile(r"\bexperts\.\w*\d+\b")  # a layer that sees the tokens that were sent to one expert


class Grafted:
    """Marks a grafted class; ``grafted_base`` is the class that the module had."""

    grafted_base: type[nn.Module]
    grafted_key: tuple[bool, tuple[str, ...]]
    adapters: Adapters


def run_levels(levels: list[SiteFactors], base: Host, x: Tensor) -> Tensor:
    """Nest the adapters on the layer, first one innermost, and run x through."""
    host = base
    for level in levels:
        host.dropout = level.p
        host = Adapted(level.structure, level.seen(), host)
    return host(x)


def _together(levels: list[SiteFactors], base: Host, x: Tensor) -> Tensor:
    """Adapters of one kind, each on one entry of x."""
    base.dropout = levels[0].p
    return levels[0].structure.apply(stacked(levels), x, base)


def run_routed(holder: Adapters, rows: tuple[str | None, ...], base: Host, x: Tensor) -> Tensor:
    """Each row of the batch through its own adapter; equal structures run as one batch (L3)."""
    flat = x.dim() == (2 if x.is_floating_point() else 1)  # one token a row, or the tokens of all rows in their order
    tokens = 0 if torch.compiler.is_compiling() else holder.registry.activity.tokens_a_row
    names = {level.site.name for row in rows for level in holder.active(normal(row), LAYER)} if flat else ()
    if any(map(_EXPERT.search, names)) or len(x) != len(rows) and not (flat and len(x) == len(rows) * tokens):
        raise ActivityError(
            f"A routing names one adapter a row of the batch; found {len(rows)} names, an input of shape "
            f"{tuple(x.shape)}. Repeat each name for every beam or sequence; leave out layers that see no such rows."
        )
    if flat:
        return run_routed(holder, rows, base, x.unflatten(0, (len(rows), -1))).flatten(0, 1)
    levels = blocks(holder, rows, LAYER) if base.kind == "linear" and x.dim() == 3 else []
    if levels:  # as many tokens of one adapter
        return _together(levels, base, x.reshape(len(levels), -1, x.shape[-1])).reshape(*x.shape[:-1], -1)
    groups: dict[Any, list[int]] = {}
    found = {row: holder.active(normal(row), LAYER) for row in set(rows)}
    for i, row in enumerate(rows):
        groups.setdefault(key_of(found[row][0]) if found[row] else None, []).append(i)
    pieces, order = [], []
    for key, members in groups.items():
        part = x.index_select(0, torch.tensor(members, device=x.device))
        levels = [found[rows[i]][0] for i in members if key]
        pieces.append(_together(levels, base, part) if key else base(part))
        order += members
    return torch.cat(pieces).index_select(0, torch.tensor(order, device=x.device).argsort())


def _layer_forward(base: type[nn.Module]) -> Callable[..., Tensor]:
    def forward(self: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        holder: Adapters = self._modules["adapters"]
        choice = holder.choice()
        routed = isinstance(choice, Routing)
        if routed and x.dim() == 3 and not torch.compiler.is_compiling():
            holder.registry.activity.tokens_a_row = x.shape[1]
        if holder.watches:
            holder.watch(choice, LAYER, x)
        if holder.siblings is not None:
            y = holder.siblings.output(self, choice, x)
            if y is not None:
                holder.note(choice, y)
                return y
        levels = [] if routed else holder.active(choice, LAYER)
        if not levels and not (routed and any(holder.get(r, LAYER) for r in choice.rows if r)):
            y = base.forward(self, x, *args, **kwargs)
            holder.note(choice, y)
            return y
        kind = kind_of(self)
        assert kind is not None
        layer: LayerHost = kind(self, 0.0, *args, **kwargs)
        host: Host = TransposedHost(layer) if "grafted_transposed" in self.__dict__ else layer
        y = layer.finish(x, run_routed(holder, choice.rows, host, x) if routed else run_levels(levels, host, x))
        holder.note(choice, y)
        return y

    return forward


def _read(module: Any, name: str) -> Tensor:
    raw, inside = module._parameters[name], "values" in module._modules["adapters"].__dict__
    # FSDP2 reads its sharded parameters by name before the first forward, and takes what it gets for the base
    return raw if type(raw).__name__ == "DTensor" and not inside else adapted_value(module, name)


def _parameter_forward(base: type[nn.Module], names: tuple[str, ...]) -> Callable[..., Any]:
    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        # one evaluation a forward, however often the module's code reads the tensor
        self.adapters.__dict__["values"] = {n: adapted_value(self, n) for n in names}
        try:
            return base.forward(self, *args, **kwargs)
        finally:
            self.adapters.__dict__.pop("values", None)

    return forward


def _experts_forward(base: type[nn.Module], names: tuple[str, ...]) -> Callable[..., Tensor]:
    whole = _parameter_forward(base, names)

    def forward(self: Any, x: Tensor, index: Tensor, weights: Tensor) -> Tensor:
        if self._is_expert_parallel:  # ids of other processes' experts are among the index
            return whole(self, x, index, weights)
        holder: Adapters = self.adapters
        choice = holder.choice()
        rows = [normal(row) for row in choice.rows] if isinstance(choice, Routing) else [choice]
        choices = [*dict.fromkeys(rows)]
        # the stacks as they are, for the module's own code; a bias may still carry an adapter
        values = {n: self._parameters[n] if n in STACKS else adapted_value(self, n) for n in names}
        holder.__dict__["values"] = values
        try:
            if any(holder.active(c, name) for c in choices for name in STACKS):
                chains = lambda name: [holder.active(c, name) for c in choices]  # noqa: E731
                y = run_experts(self, x, index, weights, chains, [choices.index(row) for row in rows])
            else:
                y = base.forward(self, x, index, weights)
        finally:
            holder.__dict__.pop("values", None)
        holder.note(choice, y)
        return y

    return forward


def _reduce(self: Any, protocol: int) -> tuple[Any, ...]:
    state = self.__dict__.copy()
    return _rebuild, (self.grafted_base, *self.grafted_key), state


def _rebuild(base: type[nn.Module], layer: bool, names: tuple[str, ...]) -> nn.Module:
    cls = graft_class(base, layer, names)
    return cls.__new__(cls)


@functools.cache
def graft_class(base: type[nn.Module], layer: bool, names: tuple[str, ...] = ()) -> type[nn.Module]:
    """The subclass of ``base`` whose layer and/or named bare parameters carry adapters."""
    body: dict[str, Any] = {
        "grafted_base": base,
        "grafted_key": (layer, names),
        "__module__": base.__module__,
        "__qualname__": base.__qualname__,
        "__doc__": base.__doc__,
        "__reduce_ex__": _reduce,
    }
    for name in names:
        body[name] = property(functools.partial(_read, name=name))
    if layer:
        body["forward"] = _layer_forward(base)
    elif base.forward is not nn.Module.forward:
        body["forward"] = (_experts_forward if is_experts(base) else _parameter_forward)(base, names)
    return type(base.__name__, (base, Grafted), body)


def hold(module: nn.Module, registry: Any) -> Adapters:
    """The child of a module that holds what adapters have there."""
    if not isinstance(module._modules.get("adapters"), Adapters):
        module.add_module("adapters", Adapters(registry))
    found: Any = module._modules["adapters"]
    return found


def put(module: nn.Module, adapter: str, slot: str, factors: SiteFactors, registry: Any) -> None:
    """Graft a module (if it is not yet) and hang one adapter's factors on it."""
    if not isinstance(module, Grafted):
        hold(module, registry)
        base, layer, names = type(module), False, ()
    else:
        base, (layer, names) = module.grafted_base, module.grafted_key
    if slot == LAYER:
        layer = True
    else:
        names = tuple(sorted({*names, slot}))
    grafted: Any = module
    _drop_bound_forward(module)
    grafted.__class__ = graft_class(base, layer, names)
    grafted.adapters.put(adapter, slot, factors)
    _reseat(module)


def bound_to_class(module: nn.Module) -> bool:
    """Whether the instance's ``forward`` is only its class's own, bound: it is safe to drop.

    accelerate leaves one behind where it takes its hook off.
    """
    forward = module.__dict__.get("forward")
    return isinstance(forward, MethodType) and forward.__self__ is module and forward.__func__ is type(module).forward


def _drop_bound_forward(module: nn.Module) -> None:
    if bound_to_class(module):
        del module.__dict__["forward"]


def _reseat(module: nn.Module) -> None:
    """Put the grafted forward behind an accelerate hook, which replaced the instance's forward."""
    if "_old_forward" in module.__dict__:
        module.__dict__["_old_forward"] = MethodType(type(module).forward, module)


def remove(module: nn.Module, adapter: str) -> None:
    """Take one adapter off a module; the last one takes the graft with it."""
    holder = module._modules.get("adapters")
    if not isinstance(holder, Adapters):
        return
    holder._modules.pop(adapter, None)
    if holder._modules:
        return
    grafted: Any = module
    grafted._modules.pop("adapters")
    if not isinstance(module, Grafted):
        return
    _drop_bound_forward(module)
    grafted.__dict__.pop("grafted_transposed", None)
    grafted.__class__ = grafted.grafted_base
    _reseat(module)
