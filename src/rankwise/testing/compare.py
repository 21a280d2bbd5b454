"""How the laws compare: relative to the largest value, with factors drawn so far that it shows."""

import copy
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from rankwise.attachment import Adapter
from rankwise.host import host_of
from rankwise.io import carried

TOLERANCE = 1e-9
EFFECT = 0.01  # a law that is tested on a change too small to see tests nothing
Figures = dict[str, float]


@dataclass(frozen=True)
class Comparison:
    """Compares at one place, and keeps the worst figure of each law.

    Attributes:
        where: the place, for errors.
        tolerance: of every comparison, in units of the largest wanted value.
        figures: the worst figure of each law so far.
    """

    where: str
    tolerance: float = TOLERANCE
    figures: Figures = field(default_factory=dict)

    def __call__(self, law: str, got: Tensor, want: Tensor, at: str = "") -> None:
        """Raise unless the two agree."""
        what, shapes = f"{law}: {self.where}{at}", (tuple(got.shape), tuple(want.shape))
        assert shapes[0] == shapes[1], f"{what} has shape {shapes[0]}, wanted {shapes[1]}"
        if not want.numel():  # of a rank of 0
            return
        figure = float((got - want).detach().abs().max() / want.detach().abs().max().clamp_min(1e-30))
        assert figure <= self.tolerance, f"{what} differs by {figure:.2g} of its largest value"
        key = law.split()[0]
        self.figures[key] = max(self.figures.get(key, 0.0), figure)


def worst(many: Iterable[Mapping[str, float]]) -> Figures:
    """The largest figure of each law; the smallest effect."""
    found: Figures = {}
    for figures in many:
        for law, figure in figures.items():
            found[law] = (min if law == "effect" else max)(found.get(law, figure), figure)
    return found


@torch.no_grad()
def randomise(adapter: Adapter, outputs: Callable[[], Tensor], generator_seed: int = 0, least: float = EFFECT) -> float:
    """Draw every factor at random around its start, so far that the outputs move; whole numbers stay.

    Args:
        adapter: the adapter, at its start.
        outputs: runs the adapted model.
        generator_seed: of the draw.
        least: how far the outputs move at least, as a share of their norm.

    Returns:
        The effect, as a share of the outputs' norm.
    """
    generator = torch.Generator().manual_seed(generator_seed)
    starts = [(p, p.clone()) for p in adapter.parameters(trainable=False) if p.is_floating_point()]
    moves = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p, _ in starts]
    before, effect = outputs(), 0.0
    for size in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0):
        for (p, start), move in zip(starts, moves, strict=True):
            p.copy_(start + size * move.to(p))
        effect = float((outputs() - before).norm() / before.norm())
        if effect >= least:
            return effect
    raise AssertionError(f"{adapter.recipe.structure!r}: random factors move the outputs by {effect:.2g} only")


def truth(base: nn.Module, adapter: Adapter) -> nn.Module:
    """A copy of the base whose weights are ``structure.weight(f, W)``: what L1 compares with."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for placement in adapter.placements:
            module, slot, _ = carried(model, placement)[0]
            host = host_of(module, slot)
            host.write(placement.structure.weight(adapter[placement.site.name], host.weight()))
    return model
