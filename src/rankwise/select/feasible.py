"""Stage 0 of advice, without training: which methods the constraints allow, and why the others are out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from typing import Any, final

import torch

from rankwise._recipe import Recipe
from rankwise.errors import DataError, DoesNotFit, RankError
from rankwise.formats.peft.layout import METHODS
from rankwise.host import Site
from rankwise.select.devices import in_words
from rankwise.structures import Chain, Structure
from rankwise.structures.structure import Added

__all__ = ["SERVE", "Candidate", "Constraints", "Excluded", "feasible", "served_rank"]

SERVE = {
    "none": "nowhere yet",
    "merge": "in the base's weights",
    "vllm": "by vLLM, which takes plain LoRA up to --max-lora-rank and no tensors trained whole",
    "gguf": "by llama.cpp, which takes plain LoRA with one scale and no tensors trained whole",
    "bank": "with others in one batch, by their two factors",
}


@final
@dataclass(frozen=True)
class Constraints:
    """What the adapter must keep to, whatever its loss.

    Attributes:
        memory: bytes at the peak of a training step; None for what the device has.
        serve: a key of ``SERVE``.
        max_lora_rank: vLLM's limit.
        adapter_bytes: of one adapter's file.
        adapters: how many are served at once; from a bank and by vLLM they lie in memory together.
        serving_memory: bytes for all of them.
    """

    memory: int | None = None
    serve: str = "none"
    max_lora_rank: int = 16
    adapter_bytes: int | None = None
    adapters: int = 1
    serving_memory: int | None = None

    def __post_init__(self) -> None:
        if self.serve not in SERVE:
            raise DataError(f"serve is one of {', '.join(SERVE)}; found {self.serve!r}.")
        if self.adapters < 1 or self.max_lora_rank < 1:
            raise DataError(f"adapters and max_lora_rank are 1 or more; found {self.adapters}, {self.max_lora_rank}.")


@final
@dataclass(frozen=True)
class Candidate:
    """A method at the size that it would have on the model.

    Attributes:
        name: for reports, such as "lora(rank=1)".
        recipe: the recipe.
        bytes: of its file.
        settings: of a run (method, rank, options) that give the recipe.
    """

    name: str
    recipe: Recipe
    bytes: int
    settings: Mapping[str, Any] = field(default_factory=dict)


@final
@dataclass(frozen=True)
class Excluded:
    """A method that is out, with the reason."""

    name: str
    reason: str


@cache
def served_rank(structure: Structure) -> int | None:
    """The rank of the plain LoRA that a structure is exported as, None where there is none.

    Asked of the update itself, on a layer without values.
    """
    if not isinstance(structure, Added | Chain) or type(structure) in _OWN_KIND:
        return None
    with torch.device("meta"):
        kinds = {True: torch.int64, False: torch.float32}
        factors = {k: torch.empty(f.shape, dtype=kinds[f.below > 0]) for k, f in structure.factors(_LAYER).items()}
        low = structure.delta(factors).lower()
    return None if low is None else low.left.shape[-1]


_LAYER = Site("layer", "linear", 4096, 4096)
_OWN_KIND = {method.structure for kind, method in METHODS.items() if kind != "LORA"}  # in PEFT's files


def objection(candidate: Candidate, limits: Constraints) -> str | None:
    """Why a candidate is out, None where it may stay; memory in training is asked of the plan."""
    recipe, serve = candidate.recipe, limits.serve
    if serve == "merge" and "not_mergeable" in recipe.structure.traits:
        return "it has no dense form to merge"
    if serve in ("vllm", "gguf", "bank"):
        try:
            rank = served_rank(recipe.structure)
        except RankError as error:
            return str(error)
        if rank is None:
            return f"it is no plain LoRA, and is to be served {SERVE[serve]}"
        if serve != "bank" and recipe.sites.train:
            return f"it trains tensors whole, and is to be served {SERVE[serve]}"
        if serve == "vllm" and rank > limits.max_lora_rank:
            return f"vLLM serves it as a LoRA of rank {rank}, above --max-lora-rank {limits.max_lora_rank}"
    if limits.adapter_bytes is not None and candidate.bytes > limits.adapter_bytes:
        return f"its file takes {in_words(candidate.bytes)}, an adapter may take {in_words(limits.adapter_bytes)}"
    together = limits.adapters * candidate.bytes if serve in ("vllm", "bank") else 0
    if limits.serving_memory is not None and together > limits.serving_memory:
        most = in_words(limits.serving_memory)
        return f"{limits.adapters} adapters take {in_words(together)} together, of {most} for serving"
    return None


def feasible(candidates: Iterable[Candidate], limits: Constraints) -> tuple[dict[str, Candidate], list[Excluded]]:
    """Divide candidates into those that the constraints allow and the others.

    Args:
        candidates: methods at their sizes.
        limits: the constraints.

    Returns:
        Those that may stay by name, and the others with their reasons.
    """
    kept, out = {}, []
    for candidate in candidates:
        reason = objection(candidate, limits)
        if reason is None:
            kept[candidate.name] = candidate
        else:
            out.append(Excluded(candidate.name, reason))
    return kept, out


def largest(sized: Callable[[int], Candidate], rank: int, limits: Constraints) -> tuple[Candidate, int]:
    """LoRA at the highest rank that the constraints allow: the one asked for, or halved until it is.

    Raises:
        DoesNotFit: not even rank 1 is allowed.
    """
    while (reason := objection(candidate := sized(rank), limits)) is not None:
        if rank == 1:
            raise DoesNotFit(f"LoRA of rank 1 should meet the constraints; {reason}. Loosen that constraint.")
        rank //= 2
    return candidate, rank
