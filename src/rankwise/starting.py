"""Where the factors of a site start: the init's values inside, a structure's own around them."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from rankwise._recipe import Recipe
from rankwise.adapter import Placement
from rankwise.host import Site
from rankwise.ops.linalg import widened
from rankwise.structures import Structure


def start(
    recipe: Recipe, placement: Placement, host: Any, stats: Mapping[str, Any] | None, begun: dict[Any, Tensor]
) -> dict[str, Tensor]:
    """Starting values at one site, in the dtype and on the device where they will live.

    ``begun`` holds the shared values of the sites before it, and is added to. They are returned as they are, for a
    structure to count something over all its sites; the pool takes a copy when all sites have begun.
    """
    site, here = placement.site, None if stats is None else stats.get(placement.site.name)
    dtype, device = torch.promote_types(host.dtype, torch.float32), host.parameter().device

    def leaf(structure: Structure, site: Site, weight: Callable[[], Tensor]) -> Mapping[str, Tensor]:
        if site.stack is None:
            found = recipe.init(site, structure, weight, here)
        else:
            each = [recipe.init(site, structure, lambda e=e: weight()[e], here) for e in range(site.stack)]
            found = {name: torch.stack([f[name] for f in each]) for name in each[0]}
        found = {k: v.to(device=device, dtype=dtype if v.is_floating_point() else v.dtype) for k, v in found.items()}
        labels = {name: factor.shared for name, factor in structure.factors(site).items() if factor.shared is not None}
        return found | {k: begun.setdefault((k, at, found[k].shape), found[k]) for k, at in labels.items()}

    def weight() -> Tensor:
        w = host.weight().detach()
        return widened(w)

    with torch.no_grad():
        found, still = placement.structure.start(site, weight, leaf), {id(v) for v in begun.values()}
        # copied, since statistics of one input serve several sites
        return {k: v if id(v) in still else v.contiguous().clone() for k, v in found.items()}
