"""The recipe: one value an axis. What does not fit together is refused when it is constructed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, final

from rankwise.adapter import Dropout
from rankwise.errors import IncompatibleAxes, RankError
from rankwise.inits import Init, Kaiming
from rankwise.penalties import Penalty
from rankwise.ranks import Constant, Ranks
from rankwise.sites import Sites
from rankwise.solvers import AdamW, Solver
from rankwise.structures import Structure

_REMEDY = {
    "anchored": "wrap the structure: Anchored(...), so that the start is subtracted",
    "core": "take Core, the structure with a trained core between fixed sides",
    "frames": "take ThreeFactor(...), whose two sides start orthonormal",
    "input_side": "take InputSide, the structure whose output side is fixed",
    "lowrank": "take a low-rank structure: LoRA or SVDForm (wrappers around them are fine)",
    "random_start": "leave the init at its default: no factor of this structure starts at random",
    "product": "take LoRA (wrappers around it are fine): the solver needs the two factors of a product",
    "pair": "take LoRA (wrappers around it are fine): the solver trains the two factors of a product",
    "chain": "the base may not be written, so a restart puts the pair aside: wrap the structure, Chain(LoRA(...))",
    "open_chain": "the base may not be written, so changes are put aside: wrap the structure, Chain(LoRA(...), None)",
    "delta": "the base may not be written, so its change is kept apart: wrap the structure, Delta(LoRA(...))",
    "gated": "take one whose rank components have trained gates: SVDForm or Gated(...)",
    "hard_concrete": "take the structure whose gates are drawn: HardConcrete(...)",
    "selection": "take the structure whose gates are a softmax: Selection(...)",
    "seen": "take the structure that remembers what its layer reads: Rising(...)",
    "switched": "take one whose rank components have switches: Switched(...)",
    "two_sided": "take a structure with an out-side and an in-side factor: LoRA, SVDForm, LoHa",
    "whole": "take Replace(): the solver compresses the gradient of a weight that is trained whole",
    "drops": "set dropout=0.0: this structure has no low-rank branch to drop from",
}
_AXES = {"structure": Structure, "init": Init, "solver": Solver, "ranks": Ranks, "sites": Sites}
_WRITTEN = {
    "structure": 'Methods by name come from rw.recipe("lora"); structures are rankwise.structures.',
    "init": "They are in rankwise.inits.",
    "solver": "They are in rankwise.solvers.",
    "ranks": "They are in rankwise.ranks.",
    "sites": 'Patterns are given as Sites(targets=["q_proj", "v_proj"]).',
}
BASES = (None, "nf4", "int8")


def inner_rank(structure: Structure) -> int | None:
    """The rank of the innermost structure, None where it has none."""
    inner = getattr(structure, "inner", None)
    return inner_rank(inner) if isinstance(inner, Structure) else getattr(structure, "rank", None)


@final
@dataclass(frozen=True)
class Recipe:
    """A point of the method space.

    Attributes:
        structure: how factors become an update, and how it meets W.
        init: where the factors start.
        solver: in which geometry a step is taken.
        ranks: how rank changes in time.
        sites: where.
        penalties: what else shapes training: values of ``rankwise.penalties``, saved with the recipe, and functions
            ``(adapter, step) -> scalar``, added to the loss and not saved.
        dropout: probability on the adapter's input, while training; or a :class:`rankwise.penalties.Dropout`.
        base: format that the frozen weights should be loaded in: None (as they are), "nf4", "int8".
        lr: learning rate, used where the user gives none.
        name: of the method, for reports.
        paper: authors, year, arXiv.
    """

    structure: Structure
    init: Init = Kaiming()
    solver: Solver = AdamW()
    ranks: Ranks = Constant()
    sites: Sites = Sites()
    penalties: tuple[Penalty | Callable[..., Any], ...] = ()
    dropout: float | Dropout = 0.0
    base: str | None = None
    lr: float = 1e-3
    name: str = "custom"
    paper: str = ""

    def __post_init__(self) -> None:
        for name, kind in _AXES.items():
            if not isinstance(value := getattr(self, name), kind):
                raise IncompatibleAxes(f"{name} is a {kind.__name__}; found {value!r}. {_WRITTEN[name]}")
        object.__setattr__(self, "penalties", tuple(self.penalties))
        if wrong := [p for p in self.penalties if not (isinstance(p, Penalty) or callable(p))]:
            raise IncompatibleAxes(f"A penalty is one of rankwise.penalties or a function; found {wrong[0]!r}.")
        for structure in (self.structure, *(o.structure for o in self.sites.overrides)):
            if structure is not None:
                self._check_traits(structure)
        if not (isinstance(self.dropout, Dropout) or 0 <= self.dropout < 1):
            raise IncompatibleAxes(f"dropout lies in [0, 1); found {self.dropout}.")
        if self.base not in BASES:
            raise IncompatibleAxes(f"base is one of {BASES}; found {self.base!r}.")

    def _check_traits(self, structure: Structure) -> None:
        traits = structure.traits
        for axis in (self.init, self.solver, self.ranks, *(p for p in self.penalties if isinstance(p, Penalty))):
            for trait in sorted(axis.requires - traits):
                raise IncompatibleAxes(
                    f"{type(axis).__name__} needs a structure with the trait '{trait}', which "
                    f"{structure!r} has not; {_REMEDY.get(trait, 'choose another structure')}."
                )
        rank = inner_rank(structure)
        if self.ranks.budget and isinstance(rank, int) and self.ranks.budget > rank:
            raise RankError(
                f"A rank budget is at most the structure's rank; found {self.ranks!r} on {structure!r}. Lower the "
                f"budget, or raise the rank."
            )
        if isinstance(self.dropout, Dropout) and "lowrank" not in traits:
            raise IncompatibleAxes(
                f"{self.dropout} acts on the factors of s * b @ a; {structure!r} has none. Take LoRA."
            )
        if self.dropout and "drops" not in traits:
            raise IncompatibleAxes(
                f"dropout={self.dropout} acts on the input of an update, and {structure!r} "
                f"has none; {_REMEDY['drops']}."
            )

    def with_(self, **changes: Any) -> Recipe:
        """The same recipe with some axes replaced."""
        return replace(self, **changes)
