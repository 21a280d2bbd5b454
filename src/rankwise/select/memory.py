"""What a training step allocates and computes, from a step on fake tensors.

The model, the adapter and its solver run as they are, forward, backward and update, on tensors that
have shapes and no values; what they allocate is counted storage by storage. Nothing is written a
second time as a formula, so the count cannot fall behind the implementation. (torch's own
``MemTracker`` counts storages the same way; it is private, tells parameters from the rest by module
only, and does not count the work.)
"""

from __future__ import annotations

import gc
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, final

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from rankwise.attachment import Adapter
from rankwise.hf.deferred import deferred_logits
from rankwise.penalties import backward

_ATEN = torch.ops.aten
KINDS = ("weights", "factors", "optimizer", "gradients", "activations", "temporaries")
_LOOKUPS = {_ATEN.embedding, _ATEN.index, _ATEN.index_select, _ATEN.gather}  # these read what they return, no more
_SAME_WORK = {  # products in place and the CPU's attention are missing from torch 2.13's table
    _ATEN.addmm_: _ATEN.addmm,
    _ATEN._scaled_dot_product_flash_attention_for_cpu: _ATEN._scaled_dot_product_flash_attention,
    _ATEN._scaled_dot_product_flash_attention_for_cpu_backward: _ATEN._scaled_dot_product_flash_attention_backward,
}
_PRODUCTS = {"bitsandbytes.gemm_4bit", "bitsandbytes.int8_linear_matmul", "aten._grouped_mm"}  # missing there too


@final
class Ledger(TorchDispatchMode):
    """Bytes of the living storages, each of the kind that was current when it was made.

    Args:
        full: what a model that asks of its batch hears: whether all of it is tokens, none padding.

    Attributes:
        kind: of the storages that are made from now on.
        live: bytes by kind.
        peak: ``live`` at the moment at which its sum was largest.
        work: (floating-point operations, bytes moved, dtype) of a kernel -> how often it ran.
    """

    def __init__(self, full: bool = False) -> None:
        super().__init__()
        self.full = full
        self.kind = KINDS[0]
        self.live: Counter[str] = Counter()
        self.work: Counter[tuple[int, int, torch.dtype]] = Counter()
        self._held: dict[int, tuple[Any, str, int]] = {}
        self.restart()

    def restart(self) -> None:
        """Forget the peak and the work so far."""
        self.peak, self._most = self.live.copy(), self.live.total()
        self.work.clear()

    def note(self, tensor: Tensor, kind: str | None = None) -> None:
        """Count a tensor's storage, once; a kind given changes that of a storage known already."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self._held:
            held, old, size = self._held[key]
            if kind is not None:
                self.live.update({old: -size, kind: size})
                self._held[key] = held, kind, size
            return
        kind = kind or self.kind
        self._held[key] = weakref.ref(storage, lambda _: self._gone(key)), kind, size
        self.live[kind] += size
        if (total := self.live.total()) > self._most:
            self.peak, self._most = self.live.copy(), total

    def _gone(self, key: int) -> None:
        _, kind, size = self._held.pop(key)
        self.live[kind] -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is torch.ops.prim.device.default:  # half of all calls; a fake knows
            return args[0].fake_device
        if func is _ATEN._local_scalar_dense.default and args[0].dtype == torch.bool:
            return self.full
        out = _run(func, *args, **(kwargs or {}))
        made = [leaf for leaf in tree_leaves(out) if isinstance(leaf, Tensor)]
        made = [t for t in made if getattr(t, "fake_device", t.device).type != "meta"]
        for tensor in made:
            self.note(tensor)
        if made and not func.is_view:
            packet = func.overloadpacket
            count = flop_registry.get(_SAME_WORK.get(packet, packet))
            read = made if packet in _LOOKUPS else [a for a in tree_leaves((args, kwargs)) if isinstance(a, Tensor)]
            moved = sum(t.numel() * t.element_size() for t in (*read, *made))
            flops = count(*args, **(kwargs or {}), out_val=out) if count else 0
            flops += 2 * args[0].numel() * out.shape[-1] if str(packet) in _PRODUCTS else 0
            self.work[flops, moved, made[0].dtype] += 1
        return out


def _run(func: Any, *args: Any, **kwargs: Any) -> Any:
    if func is _ATEN._grouped_mm.default and args[0].dtype != torch.bfloat16:  # torch 2.13's fake one takes no other
        return func(args[0].bfloat16(), args[1].bfloat16(), *args[2:], **kwargs).to(args[0].dtype)
    return func(*args, **kwargs)


@final
@dataclass(frozen=True)
class Footprint:
    """What one training step takes.

    Attributes:
        peak: bytes by kind, where their sum is largest. Activations are what the forward pass made,
            temporaries what the backward pass and the update made.
        held: bytes by kind between two steps.
        gradients: bytes of the factors' gradients.
        saved: bytes that the forward pass leaves for the backward pass.
        logits: bytes of the model's output; none where the loss takes it in chunks.
        file: bytes of the adapter's tensors in its file.
        work: (floating-point operations, bytes moved, dtype) of a kernel -> how often it runs.
    """

    peak: Mapping[str, int]
    held: Mapping[str, int]
    gradients: int
    saved: int
    logits: int
    file: int
    work: Mapping[tuple[int, int, torch.dtype], int]


def update(trained: list[nn.Parameter], optimizer: torch.optim.Optimizer) -> None:
    """The end of a step as transformers' trainer has it."""
    nn.utils.clip_grad_norm_(trained, 1.0)
    optimizer.step()


@contextmanager
def _young() -> Iterator[None]:
    """Within, what is made stays in the youngest generation: its garbage is found without a look at all else."""
    enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if enabled:
            gc.enable()


def footprint(
    build: Callable[[], nn.Module],
    attach: Callable[[nn.Module], Adapter],
    batch: Callable[[], Mapping[str, Any]],
    *,
    accumulate: bool = False,
    full: bool = False,
) -> Footprint:
    """Run a step, not the first one, on fake tensors; nothing is computed or allocated.

    Args:
        build: gives the model, in training mode.
        attach: puts the adapter on it.
        batch: gives the model's arguments.
        accumulate: whether gradients of earlier batches are there already.
        full: whether no row of the batch is padded.

    Returns:
        What the step takes.
    """
    ledger = Ledger(full)
    with _young(), FakeTensorMode(allow_non_fake_inputs=True), ledger:
        model = build()
        ledger.kind = "factors"
        adapter = attach(model)
        ledger.kind = "optimizer"
        solver: Any = adapter.recipe.solver
        if solver.in_backward:  # it looks at its gradients, which have no values here; all at once are the more
            adapter.recipe = adapter.recipe.with_(solver=replace(solver, in_backward=False))
        optimizer, trained = adapter.optimizer(), list(adapter.parameters())
        for parameter in trained:
            parameter.grad = torch.zeros_like(parameter)
            parameter.register_post_accumulate_grad_hook(lambda p: ledger.note(p.grad, "gradients"))
        optimizer.step()
        for parameter in trained:
            if parameter.grad is None:  # a penalty took it away
                parameter.grad = torch.zeros_like(parameter)
            ledger.note(parameter.grad, "gradients")
        if not accumulate:
            optimizer.zero_grad()
        ledger.kind = "activations"
        inputs, found = batch(), {"logits": 0, "saved": 0}
        gc.collect(0)
        ledger.restart()
        held = ledger.live.copy()

        def loss() -> Tensor:
            ledger.kind = "activations"
            with deferred_logits(model):  # as the trainer does
                output = model(**inputs)
            made: Any = output.logits
            if getattr(made, "computed", made) is not None:
                found["logits"] = made.numel() * made.element_size()
            total = output.loss
            del output, made
            found["saved"], ledger.kind = ledger.live["activations"], "temporaries"
            return total

        backward(adapter, loss, 1)
        update(trained, optimizer)
        file, gradients = (sum(p.nbytes for p in adapter.parameters(only)) for only in (False, True))
    return Footprint(dict(ledger.peak), dict(held), gradients, **found, file=file, work=dict(ledger.work))
