"""How the laws compare: relative to the largest value, with factors drawn so far that it shows."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping

import torch
from torch import Tensor, nn

from rankwise.attachment import Adapter
from rankwise.host import host_of
from rankwise.io import carried
from rankwise.ops import LinearOperator

TOLERANCE = 1e-9
EFFECT = 0.01  # a law that is tested on a change too small to see tests nothing
Figures = dict[str, float]


def compare(law: str, where: str, got: Tensor, want: Tensor, tolerance: float) -> float:
    """The largest difference relative to the largest wanted value."""
    assert got.shape == want.shape, f"{law}: {where} has shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    scale = float(want.detach().abs().max().clamp_min(1e-30))
    figure = float((got - want).detach().abs().max()) / scale
    assert figure <= tolerance, f"{law}: {where} differs by {figure:.2g} of its largest value (tolerance {tolerance:g})"
    return figure


def note(figures: Figures, law: str, figure: float) -> None:
    """Keep the worst figure of a law."""
    figures[law] = max(figures.get(law, 0.0), figure)


def worst(many: Iterable[Mapping[str, float]]) -> Figures:
    """The largest figure of each law; the smallest effect."""
    found: Figures = {}
    for figures in many:
        for law, figure in figures.items():
            pick = min if law == "effect" else max
            found[law] = pick(found.get(law, figure), figure)
    return found


@torch.no_grad()
def randomise(adapter: Adapter, outputs: Callable[[], Tensor], generator_seed: int = 0) -> float:
    """Draw every factor at random around its start, so far that the outputs move by 1 %.

    Args:
        adapter: the adapter, at its start.
        outputs: runs the adapted model.
        generator_seed: of the draw.

    Returns:
        The effect, as a share of the outputs' norm.
    """
    generator = torch.Generator().manual_seed(generator_seed)
    parameters = list(adapter.parameters(trainable=False))
    starts = [p.clone() for p in parameters]
    moves = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    before, effect = outputs(), 0.0
    for size in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0):
        for p, start, move in zip(parameters, starts, moves, strict=True):
            p.copy_(start + size * move.to(p))
        effect = float((outputs() - before).norm() / before.norm())
        if effect >= EFFECT:
            return effect
    raise AssertionError(
        f"{adapter.recipe.structure!r}: with every factor drawn at random the outputs move by "
        f"{effect:.2g} only; some factor is not used"
    )


def truth(base: nn.Module, adapter: Adapter) -> nn.Module:
    """A copy of the base whose weights are ``structure.weight(f, W)``: what L1 compares with."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for placement in adapter.placements:
            module, slot, _ = carried(model, placement)[0]
            host = host_of(module, slot)
            host.write(placement.structure.weight(adapter[placement.site.name], host.weight()))
    return model


def check_operator(op: LinearOperator, batch: tuple[int, ...] = ()) -> float:
    """The operator's laws: ``mv``, ``dense``, ``T``, ``rows`` and ``lower`` agree.

    Args:
        op: the operator, in float64.
        batch: its batch dims, none or one.

    Returns:
        The worst figure.
    """
    name, (m, n), dense = type(op).__name__, op.shape, op.dense()
    x, z = (torch.randn(*batch, 5, size, dtype=torch.float64) for size in (n, m))
    index = torch.randint(0, m, (*batch, 6))
    rows = torch.take_along_dim(dense, index.unsqueeze(-1), dim=-2)
    pairs = {
        "dense": (dense, dense.expand(*batch, m, n)),
        "mv": (op.mv(x), x @ dense.mT),
        "T": (op.T.dense(), dense.mT),
        "T.mv": (op.T.mv(z), z @ dense),
        "T.T.mv": (op.T.T.mv(x), x @ dense.mT),
        "rows": (op.rows(index), rows),
    }
    pair = op.lower()
    if pair is not None:
        pairs["lower"] = (pair.left @ pair.right, dense)
    return max(compare("operator law", f"{name}.{k}", *v, TOLERANCE) for k, v in pairs.items())
