"""Cross-entropy over a vocabulary without ever holding all logits.

The output head runs on a few tokens at a time, as the module that it is: whatever is grafted on it, in whatever
format its weight is. Each chunk's gradients are taken at once, by autograd itself, and its graph is freed; backward
only scales what was summed. So there is one rule for every method, and no formula to keep in step with it.

Shapes: hidden (*batch, in), labels (*batch), logits of a chunk (tokens, vocabulary).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.activity import Routing
from rankwise.errors import AttachError, TrainingError
from rankwise.graft import Grafted
from rankwise.ops.linalg import widened

CHUNK_BYTES = 64 * 2**20  # of float32 logits; a step holds about four times as much


class _Known(torch.autograd.Function):
    """A number whose gradients are known already: apply(number, count, *inputs, *gradients), count of each."""

    @staticmethod
    def forward(ctx: Any, number: Tensor, count: int, *tensors: Tensor) -> Tensor:
        ctx.save_for_backward(*tensors[count:])
        return number.clone()

    @staticmethod
    def backward(ctx: Any, *gs: Tensor) -> tuple[Tensor | None, ...]:
        if torch.is_grad_enabled():
            raise TrainingError(
                "The gradients of this loss are computed with its value, so they have none of their own; found "
                "create_graph=True. Take F.cross_entropy(head(hidden), labels) instead."
            )
        gradients = ctx.saved_tensors
        return None, None, *(v * gs[0].to(v.device) for v in gradients), *(None for _ in gradients)


def _leaves(node: Any, seen: set[Any]) -> Iterator[Tensor]:
    """The leaves of a graph; under FSDP these are not what ``parameters()`` names."""
    if node is None or node in seen:
        return
    seen.add(node)
    if node.name() == "torch::autograd::AccumulateGrad":
        yield node.variable
    for parent, _ in node.next_functions:
        yield from _leaves(parent, seen)


def sharded_alone(head: nn.Module) -> bool:
    """Whether a module is an FSDP2 unit of its own, whose weights are gathered at each call."""
    return any(base.__name__ == "FSDPModule" for base in type(head).__mro__)


def linear_cross_entropy(
    head: nn.Module,
    hidden: Tensor,
    labels: Tensor,
    *,
    softcap: float | None = None,
    scale: float = 1.0,
    transform: Callable[[Tensor], Tensor] | None = None,
    label_smoothing: float = 0.0,
    ignore_index: int = -100,
    num_items: int | float | Tensor | None = None,
    shift: bool = False,
    chunk: int | None = None,
) -> Tensor:
    """Cross-entropy of ``head(hidden)`` in chunks of tokens; the logits are never held whole.

    The head's gradients are those of the module as it is, adapters included. Values and gradients equal those of
    ``F.cross_entropy(head(hidden).float(), labels)`` to rounding. Tokens without a label are left out before the
    product. Gradients are computed with the value, so there is no second derivative.

    Args:
        head: from hidden states to logits; adapted or not, quantised or not, tied or not.
        hidden: (*batch, in).
        labels: (*batch) of class numbers.
        softcap: bounds the logits, after the scale: ``softcap * tanh(logits / softcap)``.
        scale: of the logits.
        transform: any other function of a chunk's logits, token by token, in place of scale and softcap.
        label_smoothing: the share of each label that is spread over the vocabulary.
        ignore_index: the label of tokens that do not count.
        num_items: what the sum is divided by; None for the number of labels (the mean), 1 for the sum.
        shift: labels are those of the tokens themselves, so that each position is compared with the next label.
        chunk: tokens at once (columns of the batch where rows are routed to adapters); None for as many as fit
            ``losses.CHUNK_BYTES``.

    Returns:
        The loss, a number in float32 (float64 for float64 logits).

    Raises:
        ValueError: labels that do not fit the hidden states.
        AttachError: the head is an FSDP unit of its own.
        TrainingError: in backward, where a second derivative is asked for.

    Examples:
        >>> import torch, rankwise as rw
        >>> head, hidden = torch.nn.Linear(4, 100), torch.ones(2, 3, 4, requires_grad=True)
        >>> loss = rw.linear_cross_entropy(head, hidden, torch.tensor([[1, 2, -100], [3, -100, -100]]))
        >>> loss.backward()
        >>> hidden.grad.shape
        torch.Size([2, 3, 4])
    """
    if hidden.shape[:-1] != labels.shape or not labels.numel():
        raise ValueError(
            f"Each hidden state has a label, and there is one at least; found hidden states {tuple(hidden.shape)} and "
            f"labels {tuple(labels.shape)}. Pass (*batch, in) and (*batch)."
        )
    if sharded_alone(head):
        raise AttachError(
            "The head runs once a chunk, inside the model's forward; found one that is an FSDP unit of its own and "
            "would be gathered each time. Leave it to its parent's fully_shard and call this in the model's forward."
        )
    if shift:
        labels = nn.functional.pad(labels, (0, 1), value=ignore_index)[..., 1:]
    holders = [module.adapters for module in head.modules() if isinstance(module, Grafted)]
    choices = [holder.choice() for holder in holders]
    flat, targets = hidden.detach().flatten(0, -2), labels.flatten().to(hidden.device)
    kept = targets != ignore_index
    rows = 1
    if any(isinstance(choice, Routing) for choice in choices):  # an adapter a row: chunks keep the rows
        rows = len(hidden)
        order = torch.arange(len(targets), device=flat.device).view(rows, -1)
    else:  # without any label one token stays, for gradients that are zero rather than missing
        if type(kept).__name__ == "FakeTensor":  # of a plan: labels without values, so all may count
            order = torch.arange(len(targets), device=flat.device)
        else:
            order = kept.nonzero().squeeze(-1) if kept.any() else kept.new_zeros(1, dtype=torch.long)
    follows = torch.is_grad_enabled() and hidden.requires_grad
    into_hidden, into = torch.zeros_like(flat) if follows else None, dict[Tensor, Tensor]()
    total: Any = 0.0
    at, size = 0, chunk or 1  # the first chunk is one token and tells the size of the vocabulary
    while at < order.shape[-1]:
        part = order[..., at : at + size]
        x = flat[part].requires_grad_(follows)
        # a chunk's graph ends with it: neither checkpointing nor offloading around it may take its tensors
        with torch.autograd.graph.saved_tensors_hooks(lambda t: t, lambda t: t):
            y = head(x).flatten(0, -2)
            y = y if transform is None else transform(y)
            y = widened(y)
            y = y if scale == 1.0 else y * scale
            y = y if softcap is None else softcap * torch.tanh(y / softcap)
            target = targets[part].flatten().to(y.device)
            loss = nn.functional.cross_entropy(
                y, target, ignore_index=ignore_index, reduction="sum", label_smoothing=label_smoothing
            )
            at, size = at + size, chunk or max(1, CHUNK_BYTES // (4 * y.shape[-1] * rows))
            del y
            leaves = list(_leaves(loss.grad_fn, set()))
            with torch.autocast(x.device.type, enabled=False):
                gradients = torch.autograd.grad(loss, leaves) if leaves else ()
        for leaf, gradient in zip(leaves, gradients, strict=True):
            if leaf is x and into_hidden is not None:
                into_hidden[part] = gradient
                continue
            if leaf not in into:  # bfloat16 would lose what many chunks add
                into[leaf] = torch.zeros_like(leaf, dtype=torch.promote_types(leaf.dtype, torch.float32))
            into[leaf] += gradient
        total = loss.detach() + total
    if into_hidden is not None:
        into = {hidden: into_hidden.view_as(hidden), **into}
    if into:
        total = _Known.apply(total, len(into), *into, *into.values())
        for holder, choice in zip(holders, choices, strict=True):  # the chunks' own graphs are gone
            holder.note(choice, total)
    items = kept.sum() if num_items is None else torch.as_tensor(num_items)
    return total / items.to(total.device)
