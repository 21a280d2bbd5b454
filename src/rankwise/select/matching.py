"""Equal sizes for unlike methods: the rank at which one costs what another does, counted by its factors."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import replace
from math import prod

import torch

from rankwise.adapter import owned
from rankwise.errors import IncompatibleAxes, RankError
from rankwise.hf.method import recipe_of
from rankwise.hf.models import config_of
from rankwise.hf.prepare import task_of
from rankwise.hf.run import Run
from rankwise.placement import resolve
from rankwise.select.skeleton import kind_of_model

__all__ = ["matched", "sizes"]

FLOAT = 4  # bytes of a factor's number in the file
_MOST = 2**14  # no layer has a higher rank


def sizes(run: Run) -> dict[str, int]:
    """What a run trains and saves, from the model's config alone: "params", and "bytes" of the adapter's tensors.

    Raises:
        RankwiseError: the method does not go onto the model.
    """
    model = _bare(run.model, run.task)
    recipe = recipe_of(run)
    found = {"params": 0, "bytes": 0}
    for placement, own in owned(resolve(model, recipe.structure, task_of(run).sites(recipe.sites, model))):
        for factor in own.values():
            count = (placement.site.stack or 1) * prod(factor.shape)
            found["params"] += count * factor.trainable
            found["bytes"] += count * FLOAT
    return found


@functools.lru_cache(4)
def _bare(name: str, task: str) -> torch.nn.Module:
    with torch.device("meta"):
        return kind_of_model(Run(name, "-", "-", task=task)).from_config(config_of(name))


def matched(run: Run, size: int, by: str) -> Run:
    """The run at the rank whose size comes nearest to ``size``.

    Args:
        run: the run.
        size: to come near to.
        by: "params" or "bytes", see :func:`sizes`.

    Returns:
        The run with that rank, or as it was where the method has no rank or its size does not depend on it.
    """

    def at(rank: int | None) -> Run:
        return replace(run, rank=rank)

    @functools.cache
    def size_at(rank: int | None) -> float:
        try:
            return sizes(at(rank))[by]
        except RankError:
            return float("inf")

    try:
        size_at(1)
    except IncompatibleAxes:
        return run
    above = _first(lambda rank: size_at(rank) >= size)
    nearest = min({max(1, above - 1), above}, key=lambda rank: (abs(size_at(rank) - size), rank))
    return min((run, at(nearest)), key=lambda one: abs(size_at(one.rank) - size))


def _first(fits: Callable[[int], bool]) -> int:
    """The least number up to ``_MOST`` that fits, all larger ones fitting too."""
    low, high = 1, _MOST
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if fits(middle) else (middle + 1, high)
    return low
