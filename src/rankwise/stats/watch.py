"""Looking on while the model runs: the inputs of the sites, and the gradients of their outputs.

Hooks on the modules, and nothing on parameters: they need no gradient, get no ``.grad``, and may be quantised or
sharded. The hooks are gone when the context is left.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from rankwise.adapter import Placement
from rankwise.errors import StatisticsError
from rankwise.host import LAYER, Conv1DHost, ConvHost, LayerHost, LinearHost, host_of
from rankwise.ops.linalg import widened
from rankwise.stats.collector import Seen


@final
class _Anchored(torch.autograd.Function):
    """x, as an output of a graph whose root is the anchor: so every layer after it has a gradient to look at."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, anchor: Tensor) -> Tensor:
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        return grads[0], None


def layers_of(model: nn.Module, placement: Placement) -> list[LayerHost]:
    """The layers that multiply by a site's weight.

    Raises:
        StatisticsError: the site is no linear layer and no convolution.
    """
    found = []
    for path, slot, transposed in placement.carriers:
        host = host_of(model.get_submodule(path), slot)
        known = isinstance(host, LinearHost | Conv1DHost | ConvHost) and not getattr(host.module, "transposed", False)
        if slot != LAYER or transposed or not known:
            raise StatisticsError(
                f"Statistics are gathered where a layer multiplies its input: linear layers and plain convolutions; "
                f"{placement.site.name} ({placement.site.kind}) is none. Leave it out (Sites(exclude=...)), or take an "
                f"init that reads no data."
            )
        assert isinstance(host, LayerHost)
        found.append(host)
    return found


def inputs(host: LayerHost, x: Tensor) -> Tensor:
    """The rows that the weight multiplies: x (*, in) -> (1, tokens, in); an image -> (groups, places, in/g * k)."""
    m = host.module
    if not isinstance(host, ConvHost):
        return x.reshape(1, -1, x.shape[-1])
    mode = "constant" if m.padding_mode == "zeros" else m.padding_mode
    x = x if x.dim() > len(m.kernel_size) + 1 else x.unsqueeze(0)
    x = nn.functional.pad(x, m._reversed_padding_repeated_twice, mode=mode)
    dims = range(2, x.dim())
    for dim, size, stride, dilation in zip(dims, m.kernel_size, m.stride, m.dilation, strict=True):
        x = x.unfold(dim, (size - 1) * dilation + 1, stride)[..., ::dilation]
    x = x.unflatten(1, (m.groups, -1)).transpose(0, 1)  # (g, batch, in/g, *places, *kernel)
    return x.movedim(2, 2 + len(dims)).flatten(2 + len(dims)).flatten(1, -2)


def outputs(host: LayerHost, dy: Tensor) -> Tensor:
    """The same of the outputs: (1, tokens, out), or (groups, places, out/groups)."""
    if not isinstance(host, ConvHost):
        return dy.reshape(1, -1, dy.shape[-1])
    dy = dy if dy.dim() > len(host.module.kernel_size) + 1 else dy.unsqueeze(0)
    return dy.unflatten(1, (host.module.groups, -1)).transpose(0, 1).movedim(2, -1).flatten(1, -2)


def _again() -> bool:
    """Whether a checkpointed layer runs again, inside of backward: it must do the same, and has been seen."""
    return torch._C._current_graph_task_id() != -1


def fine(x: Tensor) -> Tensor:
    """The tensor at least in float32, without gradient."""
    return widened(x.detach())


@dataclass
class _Last:
    """The input seen last, and which linear layer saw it first. It is held, so that no other takes its address."""

    x: Tensor
    version: int
    owner: str | None
    anchored: Tensor

    def is_again(self, x: Tensor) -> bool:
        here, there = ((t.data_ptr(), t.shape, t.stride()) for t in (x, self.x))
        return here == there and x._version == self.version


@final
class Watch:
    """What the sites of a model see, batch by batch.

    Args:
        model: the model.
        placements: the sites.
        see: called with a site's name and what a batch shows of it.
        inputs_too: whether inputs are asked for apart from gradients.
        gradients: whether gradients are asked for.
        leaders: site -> the site whose input it shares; filled by the first batch.
        share: whether inputs that sites share are shown once, by the site that leads.
    """

    def __init__(
        self,
        model: nn.Module,
        placements: Sequence[Placement],
        see: Callable[[str, Seen], None],
        inputs_too: bool,
        gradients: bool,
        leaders: dict[str, str],
        share: bool,
    ) -> None:
        self.see, self.inputs_too, self.gradients = see, inputs_too, gradients
        self.leaders, self.share = leaders, share
        self.layers = [(p.site.name, host) for p in placements for host in layers_of(model, p)]
        self.batch, self.mask, self.last = 0, None, None
        self.calls: Counter[str] = Counter()
        self.pending: dict[str, list[tuple[LayerHost, Tensor, int, Tensor]]] = defaultdict(list)
        self.anchor = torch.zeros((), requires_grad=True)

    @contextmanager
    def hooked(self) -> Iterator[None]:
        """Look on."""
        with ExitStack() as stack:
            for name, host in self.layers:
                before, after = self._before(name, host), self._after(name, host)
                stack.callback(host.module.register_forward_pre_hook(before, with_kwargs=True).remove)
                if self.gradients:
                    stack.callback(host.module.register_forward_hook(after).remove)
            yield

    def run(self, batch: int, mask: Tensor | None, loss: Callable[[], Any]) -> None:
        """Show one batch.

        Args:
            batch: its index.
            mask: (rows, tokens), which tokens are no padding; None where there are none to tell.
            loss: runs the model, and gives the loss where gradients are asked for.

        Raises:
            StatisticsError: a value that is not finite, or an input that sites share no longer.
        """
        self.batch, self.mask, self.last = batch, mask, None
        self.calls.clear()
        self.pending.clear()
        with torch.set_grad_enabled(self.gradients):
            value = loss()
        if self.gradients:
            self._check(value, "loss")
            torch.autograd.grad(value.sum(), self.anchor, allow_unused=True)
            for name in list(self.pending):  # calls whose output the loss does not depend on
                self._flush(name)
        for name, leader in self.leaders.items():
            if self.calls[name] != self.calls[leader]:
                raise self._unlike(name)
        self.last = None

    def _check(self, x: Tensor, what: str) -> None:
        if not torch.isfinite(x).all():
            raise StatisticsError(
                f"Statistics are sums of finite values; batch {self.batch} gives a {what} that is NaN or infinite. "
                f"Leave the batch out, or look at its labels and the model's precision."
            )

    def _unlike(self, name: str) -> StatisticsError:
        return StatisticsError(
            f"Sites that read one tensor are computed once; {name} and {self.leaders[name]} shared theirs in the first "
            f"batch and do not in batch {self.batch}. Call collect(share=False)."
        )

    def _before(self, name: str, host: LayerHost) -> Callable[..., Any]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            key = None if args else next(iter(kwargs))
            x = args[0] if key is None else kwargs[key]
            last = self.last
            if last is None or not last.is_again(x):
                anchored = _Anchored.apply(x, self.anchor) if self.gradients else x
                owner = None if isinstance(host, ConvHost) else name
                last = self.last = _Last(x, x._version, owner, anchored)
            if not _again():
                self.calls[name] += 1
                if self.inputs_too:
                    self._input(name, host, x, last.owner)
            if key is not None:
                return args, {**kwargs, key: last.anchored}
            return (last.anchored, *args[1:]), kwargs

        return hook

    def _input(self, name: str, host: LayerHost, x: Tensor, owner: str | None) -> None:
        shares = self.share and not isinstance(host, ConvHost)
        leader = self.leaders.setdefault(name, owner if shares and owner else name)
        if leader == name:
            x = x.detach()  # a product with x would be saved for backward, and not when a checkpoint runs again
            self._check(x, f"input of {name}")
            mask = self.mask
            if mask is not None and not isinstance(host, ConvHost) and x.shape[:2] == mask.shape:
                x = x[mask.to(x.device, torch.bool)]
            self.see(name, Seen(fine(inputs(host, x)), None, self.batch))
        elif leader != owner:
            raise self._unlike(name)

    def _after(self, name: str, host: LayerHost) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], y: Tensor) -> None:
            if _again() or not y.requires_grad:
                return
            x = self.last.anchored if self.last is not None else args[0]
            version = x._version

            def keep(dy: Tensor) -> None:
                self.pending[name].append((host, x, version, dy))
                if len(self.pending[name]) == self.calls[name]:
                    self._flush(name)

            y.register_hook(keep)

        return hook

    def _flush(self, name: str) -> None:
        rows = []
        for host, x, version, dy in self.pending.pop(name):
            if x._version != version:
                raise StatisticsError(
                    f"A layer's input must outlive the forward pass; that of {name} is written over in place. Exclude "
                    f"the site, or have the model add out of place."
                )
            rows.append((fine(inputs(host, x)), fine(outputs(host, dy))))
        x, dy = (torch.cat(each, dim=1) for each in zip(*rows, strict=True))
        self._check(x, f"input of {name}")
        self._check(dy, f"gradient at {name}")
        self.see(name, Seen(x, dy, self.batch))
