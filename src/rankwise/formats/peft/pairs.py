"""Updates that are exactly low rank, and others cut to a rank, as PEFT's LoRA has them."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace

import torch
from torch import Tensor
from torch.nn.functional import pad

from rankwise.structures import LoRA, Magnitude, Rows, Structure
from rankwise.structures.wrappers import under


@dataclass(frozen=True)
class Pair:
    """An update s * b @ a, under a magnitude or not.

    Attributes:
        a: (*experts, rank, in).
        b: (*experts, out, rank).
        scale: s.
        root: whether s is an alpha over the root of the rank.
        magnitude: (out,), or None.
    """

    a: Tensor
    b: Tensor
    scale: float = 1.0
    root: bool = False
    magnitude: Tensor | None = None


def numerator(scale: float, rank: int, root: bool = False) -> float:
    """The alpha of a scale, an integer where it is one but for rounding."""
    alpha = scale * rank ** (0.5 if root else 1)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha


def pair_of(structure: Structure, f: Mapping[str, Tensor], rows: int) -> Pair | None:
    """The structure on a weight of so many rows as one pair, where it is one."""
    if isinstance(structure, LoRA):
        return Pair(f["a"], f["b"], structure.scale, structure.scale_rule == "alpha/sqrt(r)")
    if isinstance(structure, Magnitude):
        inner = pair_of(structure.inner, f, rows)
        return inner and replace(inner, magnitude=f["magnitude"])
    if isinstance(structure, Rows):
        parts = [(pair_of(structure.inner, under(name, f), rows), a, b) for name, a, b in structure.parts]
        pairs = [(p, a, b) for p, a, b in parts if p is not None and p.magnitude is None]
        if len(pairs) < len(parts):
            return None
        padded = [pad(p.b * p.scale, (0, 0, a, rows - b)) for p, a, b in pairs]
        return Pair(torch.cat([p.a for p, _, _ in pairs], -2), torch.cat(padded, -1))
    op = structure.delta(f) if "lowrank" in structure.traits else None
    low = None if op is None else op.lower()
    return None if low is None else Pair(low.right, low.left)


def cut(structure: Structure, f: Mapping[str, Tensor], w: Tensor, rank: int) -> tuple[Pair, float]:
    """Any structure on a dense weight as a pair of this rank at most, and its relative error."""
    w = w.detach().double()
    delta = structure.weight({k: v.double() for k, v in f.items()}, w) - w
    u, s, vh = torch.linalg.svd(delta, full_matrices=False)
    b, a = (u * s.unsqueeze(-2))[..., :rank], vh[..., :rank, :]
    error = (b @ a - delta).norm() / delta.norm().clamp_min(1e-30)
    return Pair(a.float(), b.float()), error.item()
