"""Tensor formats within one layer: tensor trains of the update or of its two factors, and circuits of gates.

A core G (left, mode, right) of a train is held as a matrix: on the out side (left * mode, right), on the in side
(left, mode * right), so that an init that draws matrices draws trains whose size does not grow with the rank.
"""

from dataclasses import dataclass
from itertools import combinations
from typing import final

from torch import Tensor

from rankwise.errors import RankError
from rankwise.host import Site
from rankwise.ops import Circuit, Dense, LinearOperator, Product
from rankwise.ops.tensors import TensorTrain, checked_modes
from rankwise.structures.lowrank import scale_of
from rankwise.structures.structure import Additive, Factor, Factors, Start, check_rank

Modes = int | tuple[int, ...]


def _cores(site: Site, out: Modes, in_: Modes, rank: int) -> tuple[list[Factor], list[Factor]]:
    """The cores over the modes of out, ending in a bond, and over those of in, beginning with one."""
    check_rank(rank, site, min(site.rows, site.cols))
    rows = checked_modes(out, site.rows, f"the outputs of {site.name}")
    cols = checked_modes(in_, site.cols, f"the inputs of {site.name}")
    left = [Factor({"out": n * (rank if i else 1), "rank": rank}, Start.RANDOM) for i, n in enumerate(rows)]
    last = len(cols) - 1
    right = [Factor({"rank": rank, "in": n * (rank if i < last else 1)}, Start.RANDOM) for i, n in enumerate(cols)]
    return left, right


def _train(f: Factors, rank: int) -> tuple[list[Tensor], list[Tensor]]:
    """The same cores with three dims."""
    names = [[n for n in (f"{side}{i}" for i in range(len(f))) if n in f] for side in ("out", "in")]
    left = [f[n].unflatten(-2, (rank if i else 1, -1)) for i, n in enumerate(names[0])]
    last = len(names[1]) - 1
    return left, [f[n].unflatten(-1, (-1, rank if i < last else 1)) for i, n in enumerate(names[1])]


@final
@dataclass(frozen=True)
class TTLoRA(Additive):
    """``W + alpha reshape(TT(G_1 ... G_D))``, a train over the modes of out, then those of in.

    Source: Anjum et al. 2024, arXiv 2408.01008. The bond between the two sides is the rank of the update.

    Attributes:
        rank: of every bond.
        alpha: the scale.
        out_modes: the modes of out, or how many balanced ones.
        in_modes: the modes of in.
    """

    rank: int = 5
    alpha: float = 1.0
    out_modes: Modes = 3
    in_modes: Modes = 3

    traits = frozenset({"additive", "two_sided", "random_start", "drops"})

    @property
    def scale(self) -> float:
        return self.alpha

    def factors(self, site: Site) -> dict[str, Factor]:
        left, right = _cores(site, self.out_modes, self.in_modes, self.rank)
        left[-1] = Factor(left[-1].dims)  # zeros at the bond to the in side
        return {f"out{i}": c for i, c in enumerate(left)} | {f"in{i}": c for i, c in enumerate(right)}

    def operator(self, f: Factors) -> LinearOperator:
        left, right = _train(f, self.rank)
        pair = TensorTrain([*left, *right]).split(len(left))
        return Product(Dense(pair.left), Dense(pair.right))


@final
@dataclass(frozen=True)
class LoRETTA(Additive):
    """``W + s B A``, B (out, r) and A (r, in) each a train (LoRETTA_rep; Yang et al. 2024, arXiv 2402.11417).

    Attributes:
        rank: r; the update's own rank is the smaller of r and ``bond``.
        bond: rank of every bond of the two trains.
        alpha: numerator of the scale alpha/r; None for a scale of 1.
        out_modes: the modes of out, or how many balanced ones; r is a mode of its own.
        in_modes: the modes of in.
    """

    rank: int = 8
    bond: int = 5
    alpha: float | None = 8.0
    out_modes: Modes = 3
    in_modes: Modes = 3

    traits = TTLoRA.traits

    @property
    def scale(self) -> float:
        return scale_of(self.rank, self.alpha, "alpha/r")

    def factors(self, site: Site) -> dict[str, Factor]:
        check_rank(self.rank, site, min(site.rows, site.cols))
        left, right = _cores(site, self.out_modes, self.in_modes, self.bond)
        b = Factor({"bond": self.bond, "rank": self.rank})
        a = Factor({"rank": self.rank, "bond": self.bond}, Start.RANDOM)
        cores = {f"out{i}": c for i, c in enumerate(left)} | {f"in{i}": c for i, c in enumerate(right)}
        return {**cores, "b": b, "a": a}

    def operator(self, f: Factors) -> LinearOperator:
        left, right = _train(f, self.bond)
        b = TensorTrain([*left, f["b"].unsqueeze(-1)]).split(len(left))
        a = TensorTrain([f["a"].unsqueeze(-3), *right]).split(1)
        if self.bond <= self.rank:
            return Product(Dense(b.left @ (b.right @ a.left)), Dense(a.right))
        return Product(Dense(b.left @ b.right), Dense(a.left @ a.right))


@final
@dataclass(frozen=True)
class QuanTA(Additive):
    """``W + T``, T the product of a gate on every pair of axes of the inputs reshaped (Chen et al. 2024, 2406.00132).

    Moves the weight at the start: ``Anchored(QuanTA())`` is the method. A layer that is not square, or whose sides are
    not the modes' product, is padded with zeros and cut, as in the paper's code: the gates are square.

    Attributes:
        modes: of the larger side, or how many even ones.
    """

    modes: Modes = 4

    traits = frozenset({"additive", "random_start", "drops", "moves_at_start"})

    @property
    def scale(self) -> float:
        return 1.0

    def factors(self, site: Site) -> dict[str, Factor]:
        modes = checked_modes(self.modes, max(site.rows, site.cols), f"the larger side of {site.name}", padded=True)
        if len(modes) < 2:
            raise RankError(
                f"A circuit has gates on pairs of axes; found modes={self.modes!r}, a single axis, at {site.name}. "
                f"Give at least two modes."
            )
        shape = {"out": site.rows, "in": site.cols, "none": 0, **{f"axis{i}": n for i, n in enumerate(modes)}}
        found = {"shape": Factor(shape, trainable=False)}  # without elements: what a forward needs to know
        sizes = [modes[i] * modes[j] for i, j in _pairs(len(modes))]
        return found | {f"gate{i}": Factor({"row": p, "col": p}, Start.RANDOM) for i, p in enumerate(sizes)}

    def operator(self, f: Factors) -> LinearOperator:
        gates = [f[name] for name in (f"gate{i}" for i in range(len(f))) if name in f]
        d = round((1 + (1 + 8 * len(gates)) ** 0.5) / 2)
        rows, cols, _, *modes = f["shape"].shape[-3 - d :]
        return Circuit(gates, _pairs(d), modes, (rows, cols))


def _pairs(d: int) -> list[tuple[int, int]]:
    """The axes of each gate: the last axis with each other one first, as in the paper's code."""
    return [(d - 1 - j, d - 1 - i) for i, j in combinations(range(d), 2)]
