"""Stacks of experts in transformers: products on the factors, never the update of every expert.

A module that leaves its forward to transformers' experts interface (``use_experts_implementation``)
promises all that an implementation of it needs: its signature, the names of its two stacks, how they
lie, its gate. So the graft is one more implementation, with adapters on the two products, and holds
for every family; the eager loops of the families have no such promise.

Shapes: x (tokens, in); S token-expert pairs, sorted into groups, one an expert (and, where rows are
routed, a chain of adapters); a stack is (E, out, in), its factors (E, ...); ends (groups,) says where
each group ends among the S.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import pad

from rankwise.adapter import SiteFactors
from rankwise.errors import ActivityError
from rankwise.host import ParameterHost
from rankwise.structures import Added
from rankwise.structures.adversary import Adversary

STACKS = frozenset({"gate_up_proj", "up_proj", "down_proj"})
INTERFACE = "transformers.integrations.moe"


def is_experts(kind: type[nn.Module]) -> bool:
    """Whether the class's forward is the interface's own dispatcher, which is told by its file."""
    return getattr(kind.forward, "__globals__", {}).get("__name__") == INTERFACE


def _grouped(x: Tensor, stack: Tensor, ends: Tensor) -> Tensor:
    """Every group through its matrix: (S, in) and (E, out, in) -> (S, out)."""
    from transformers.integrations.moe import _grouped_linear

    return _grouped_linear(x, stack, ends)


def _low_rank(y: Tensor, x: Tensor, ends: Tensor, level: SiteFactors) -> Tensor:
    """Add a low-rank update of x to y: two narrow products over all experts at once."""
    structure = level.structure.inner if isinstance(level.structure, Adversary) else level.structure
    assert isinstance(structure, Added)
    pair = structure.delta(level.seen()).lower()
    assert pair is not None
    # on a CPU oneDNN compiles a bfloat16 product anew for every number of tokens: float32 is faster
    dtype = pair.left.dtype if x.device.type == "cpu" else y.dtype
    left, right = pair.left.to(dtype), pair.right.to(dtype)
    if odd := -left.shape[-1] % 8:  # CUDA's grouped product wants rows of whole 16 bytes
        left, right = pad(left, (0, odd)), pad(right, (0, 0, 0, odd))
    x = nn.functional.dropout(x, level.p) if level.p else x
    return y + _grouped(_grouped(x, right, ends), left, ends).to(y.dtype)


def _at_once(chains: Sequence[Sequence[SiteFactors]]) -> bool:
    """Whether all experts can be done at once: no adapter here, or one chain of low-rank updates."""
    one = len(chains) == 1 and all(level.structure.traits >= {"additive", "lowrank"} for level in chains[0])
    return one or not any(chains)


def run_experts(
    module: Any,
    x: Tensor,
    index: Tensor,
    weights: Tensor,
    chains: Callable[[str], Sequence[Sequence[SiteFactors]]],
    rows: Sequence[int] = (0,),
) -> Tensor:
    """The experts' computation with adapters on its products.

    Args:
        module: of a class for which :func:`is_experts` holds.
        x: (tokens, in), the rows of the batch one after another.
        index: (tokens, k), the experts of each token.
        weights: (tokens, k), what each of them counts.
        chains: the adapters on a stack, by its name, for each choice of them.
        rows: which choice each row of the batch made.

    Returns:
        (tokens, in).

    Raises:
        ActivityError: the tokens are not those of so many rows.
    """
    choices, (tokens, k) = max(rows) + 1, index.shape
    if tokens % len(rows):
        raise ActivityError(
            f"A routing names one adapter a row of the batch, and all rows have as many tokens; found {len(rows)} "
            f"names and {tokens} tokens. Repeat each name for every beam or returned sequence."
        )
    key = index
    if choices > 1:
        row = torch.tensor(rows, device=x.device, dtype=index.dtype).repeat_interleave(tokens // len(rows))
        key = index * choices + row.unsqueeze(-1)
    key, order = key.reshape(-1).sort()
    groups = torch.arange(module.num_experts * choices, device=key.device, dtype=key.dtype)
    ends = torch.searchsorted(key, groups, right=True, out_int32=True)
    expert = key // choices
    eager = module.config._experts_implementation in (None, "eager")

    def project(name: str, x: Tensor) -> Tensor:
        stack, here = ParameterHost(module, name).weight(), chains(name)
        if eager or not _at_once(here):
            from rankwise.expert_loop import one_by_one

            y = one_by_one(x, stack, ends, here)
        else:
            y = _grouped(x, stack, ends[choices - 1 :: choices])
            for level in here[0]:
                y = _low_rank(y, x, ends, level)
        return y + getattr(module, f"{name}_bias")[expert] if module.has_bias else y

    h = project("gate_up_proj" if module.has_gate else "up_proj", x[order // k])
    y = project("down_proj", module._apply_gate(h) if module.has_gate else module.act_fn(h))
    y = module.post_expert_norm(y) if module.has_post_expert_norm else y
    y = y * weights.reshape(-1)[order].unsqueeze(-1)
    return y[order.argsort()].view(tokens, k, y.shape[-1]).sum(1).to(x.dtype)
