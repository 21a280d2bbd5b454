"""Tensor formats across layers: one tensor holds the updates of all matrices, and each site reads its slice.

Factors that all sites read are shared by the kind of the layer, so layers of unlike widths share what has one shape. A
row that belongs to a layer is a factor shared within that layer, and likewise for a role ("q_proj").
"""

from abc import abstractmethod
from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from rankwise.errors import IncompatibleAxes
from rankwise.host import Site
from rankwise.ops import BlockDiagonal, Dense, LinearOperator, Product
from rankwise.ops.tensors import CP, Tucker
from rankwise.structures.lowrank import Ranked
from rankwise.structures.structure import Additive, Begun, Factor, Factors, Leaf, Start, check_rank

TRAITS = frozenset({"additive", "two_sided", "random_start", "drops"})


def _layer(site: Site) -> str:
    """The block, by its path: encoder and decoder count their blocks apart."""
    parts = site.name.split(".")
    first = next((i for i, part in enumerate(parts) if part.isdigit()), -1)
    return f"layer {'.'.join(parts[: first + 1])}"


def _role(site: Site) -> str:
    return f"role {site.leaf}"


def _heads(site: Site, heads: int) -> int:
    """The largest divisor of the outputs not above ``heads``.

    Raises:
        IncompatibleAxes: it is below 1.
    """
    if heads < 1:
        raise IncompatibleAxes(f"An output is split into one head or more; found heads={heads}. Give the model's.")
    return max(h for h in range(1, min(heads, site.rows) + 1) if site.rows % h == 0)


@dataclass(frozen=True)
class Across(Leaf):
    """A rank, and a scale that does not depend on it."""

    rank: int = 8
    alpha: float = 1.0

    traits = TRAITS

    @property
    @final
    def scale(self) -> float:
        return self.alpha


@dataclass(frozen=True)
class Tiled(Across, Additive):
    """``W + s V S_ij U`` in each block (i, j), U and V the same in all matrices.

    Attributes:
        rank: r.
        alpha: the scale s.
        width: side of the square blocks; None for the smaller side of the layer where it divides the larger one, and
            else the layer as one block.
    """

    width: int | None = None

    @final
    def factors(self, site: Site) -> dict[str, Factor]:
        m, n = site.rows, site.cols
        small = self.width or min(m, n)
        fits = m % small == n % small == 0
        if self.width is not None and (self.width < 1 or not fits):
            raise IncompatibleAxes(
                f"Matrices are split into square blocks, whose width divides both sides; found width={self.width} for "
                f"the {m} x {n} of {site.name}. Give a common divisor, or None."
            )
        rows, cols = (small, small) if fits else (m, n)
        r = check_rank(self.rank, site, min(rows, cols))
        sides = {
            "u": Factor({"rank": r, "in": cols}, Start.RANDOM, shared=site.kind),
            "v": Factor({"out": rows, "rank": r}, shared=site.kind),
        }
        return sides | self._own(site.kind, m // rows, n // cols)

    @abstractmethod
    def _own(self, shared: str, rows: int, cols: int) -> dict[str, Factor]:
        """What else there is, of so many rows and columns of blocks."""

    @abstractmethod
    def _middle(self, f: Factors) -> Tensor:
        """All S_ij as one matrix, (rows * r, cols * r)."""

    @final
    def operator(self, f: Factors) -> LinearOperator:
        middle = self._middle(f)
        rows, cols = (size // self.rank for size in middle.shape[-2:])
        left, core, right = _repeated(f["v"], rows), Dense(middle), _repeated(f["u"], cols)
        return Product(Product(left, core), right) if rows <= cols else Product(left, Product(core, right))


def _repeated(block: Tensor, times: int) -> LinearOperator:
    """``I (x) block``."""
    if times == 1:
        return Dense(block)
    return BlockDiagonal(block.unsqueeze(-3).expand(*block.shape[:-2], times, *block.shape[-2:]))


@final
@dataclass(frozen=True)
class FacTTT(Tiled):
    """``W + s V S U``, S each matrix's own, U and V all matrices' (FacT-TT; Jie and Deng 2022, arXiv 2212.03145)."""

    def _own(self, shared: str, rows: int, cols: int) -> dict[str, Factor]:
        return {"s": Factor({"row": rows * self.rank, "col": cols * self.rank}, Start.RANDOM)}

    def _middle(self, f: Factors) -> Tensor:
        return f["s"]


@final
@dataclass(frozen=True)
class FacTTK(Tiled):
    """``W + s V (sum_t p_t C_t) U``, p each block's own, C all matrices' (FacT-TK; Jie and Deng 2022, 2212.03145)."""

    def _own(self, shared: str, rows: int, cols: int) -> dict[str, Factor]:
        r = self.rank
        return {
            "c": Factor({"mode": r, "row": r, "col": r}, Start.RANDOM, shared=shared),
            "mix": Factor({"row": rows, "col": cols, "mode": r}, Start.RANDOM),
        }

    def _middle(self, f: Factors) -> Tensor:
        blocks = torch.einsum("...ijt,...tab->...iajb", f["mix"], f["c"])
        return blocks.flatten(-2).flatten(-3, -2)


@final
@dataclass(frozen=True)
class LoTR(Ranked, Additive):
    """``W + s L M R``, M each layer's own, L and R those of all layers of a role (Bershatsky et al. 2024, 2402.01376).

    Attributes:
        rank: r.
        alpha: numerator of the scale; None for a scale of 1.
        scale_rule: as in LoRA.
    """

    traits = TRAITS

    def factors(self, site: Site) -> dict[str, Factor]:
        r, role = check_rank(self.rank, site, min(site.rows, site.cols)), _role(site)
        return {
            "l": Factor({"out": site.rows, "rank": r}, Start.NORMAL, shared=role),
            "m": Factor({"row": r, "col": r}),
            "r": Factor({"rank": r, "in": site.cols}, Start.NORMAL, shared=role),
        }

    def operator(self, f: Factors) -> LinearOperator:
        left, right = Tucker(f["m"], [f["l"], f["r"].mT]).split(1)
        return Product(Dense(left), Dense(right))


@final
@dataclass(frozen=True)
class LoRTA(Across, Additive):
    """``W + s B diag(h * l * q) A`` in each head, a CP tensor of five modes (Hounie et al. 2024, arXiv 2410.04060).

    A is of all matrices and B of all heads; h is a head's, l a layer's, q a role's.

    Attributes:
        rank: r.
        alpha: the scale.
        heads: how many the outputs are split into, the largest divisor not above this.
    """

    heads: int = 8

    def factors(self, site: Site) -> dict[str, Factor]:
        h, r = _heads(site, self.heads), check_rank(self.rank, site, min(site.rows, site.cols))
        return {
            "a": Factor({"rank": r, "in": site.cols}, Start.RANDOM, shared=site.kind),
            "b": Factor({"out": site.rows // h, "rank": r}, shared=site.kind),
            "head": Factor({"head": h, "rank": r}, Start.RANDOM, shared=site.kind),
            "layer": Factor({"layer": 1, "rank": r}, Start.RANDOM, shared=_layer(site)),
            "role": Factor({"role": 1, "rank": r}, Start.RANDOM, shared=_role(site)),
        }

    def operator(self, f: Factors) -> LinearOperator:
        weights = (f["layer"] * f["role"]).squeeze(-2)
        left, right = CP([f["head"], f["b"], f["a"].mT], weights).split(2)
        return Product(Dense(left), Dense(right))


@final
@dataclass(frozen=True)
class CaRA(Across, Additive):
    """``W + s CP``, one CP tensor for the projections in front of attention, one for the rest (Veeramacheneni 2025).

    Attention, h a head: rows ``A4 diag(A3[h] * w * k) A2^T``. The rest, j a block as wide as the smaller side: rows
    ``P2 diag(w * k[j]) P3^T``, or columns where the larger side is the inputs. k is each matrix's own.

    Attributes:
        rank: r.
        alpha: the scale.
        heads: how many the outputs of attention are split into, the largest divisor not above this.
        attention: roles of the projections in front of attention.
    """

    heads: int = 8
    attention: tuple[str, ...] = ("q_proj", "k_proj", "v_proj", "query", "key", "value")

    traits = TRAITS - {"two_sided"}

    def factors(self, site: Site) -> dict[str, Factor]:
        r, (m, n) = check_rank(self.rank, site, min(site.rows, site.cols)), (site.rows, site.cols)
        if site.leaf in self.attention:
            label, h = f"attention of {site.kind}", _heads(site, self.heads)
            sides = {"a2": (n, Start.ZEROS), "a3": (h, Start.RANDOM), "a4": (m // h, Start.RANDOM)}
            own, blocks = "k", 1
        else:
            label, small, large = f"the rest of {site.kind}", min(m, n), max(m, n)
            blocks = 1 if large % small else large // small
            sides = {"p2": (large // blocks, Start.ZEROS), "p3": (small, Start.RANDOM)}
            own = "k_rows" if m >= n else "k_cols"
        found = {k: Factor({"side": size, "rank": r}, start, shared=label) for k, (size, start) in sides.items()}
        weight = Factor({"rank": r}, Start.ONES, shared=label)
        return {**found, own: Factor({"block": blocks, "rank": r}, Start.RANDOM), "weight": weight}

    def operator(self, f: Factors) -> LinearOperator:
        if "k" in f:
            left, right = CP([f["a3"], f["a4"], f["a2"]], f["weight"] * f["k"].squeeze(-2)).split(2)
        elif "k_rows" in f:
            left, right = CP([f["k_rows"], f["p2"], f["p3"]], f["weight"]).split(2)
        else:
            left, right = CP([f["p3"], f["k_cols"], f["p2"]], f["weight"]).split(1)
        return Product(Dense(left), Dense(right))


@final
@dataclass(frozen=True)
class MetaTT(Across, Additive, Begun):
    """``W + s B H_h R_q T_t L_l A``, a train over layers, tasks, roles and heads.

    Source: Lopez-Piqueres et al. 2025, arXiv 2506.09105. B and A are of all matrices, the cores (r, r) between them a
    layer's, a role's, and where asked for a task's and a head's.

    Attributes:
        rank: r of every bond.
        alpha: the scale.
        heads: how many the outputs are split into, the largest divisor not above this; None for no such core.
        tasks: how many; None for no such core. The factor "chosen" weighs their cores, the first alone to begin with.
    """

    heads: int | None = None
    tasks: int | None = None

    def __post_init__(self) -> None:
        if self.tasks is not None and self.tasks < 1:
            raise IncompatibleAxes(f"A core for tasks holds one task or more; found tasks={self.tasks}. Give None.")

    def factors(self, site: Site) -> dict[str, Factor]:
        r, kind = check_rank(self.rank, site, min(site.rows, site.cols)), site.kind
        h, core = 1 if self.heads is None else _heads(site, self.heads), {"row": r, "col": r}
        found = {
            "a": Factor({"rank": r, "in": site.cols}, Start.RANDOM, shared=kind),
            "b": Factor({"out": site.rows // h, "rank": r}, shared=kind),
            "layer": Factor({"layer": 1, **core}, shared=_layer(site)),
            "role": Factor({"role": 1, **core}, shared=_role(site)),
        }
        if self.heads is not None:
            found["head"] = Factor({"head": h, **core}, shared=kind)
        if self.tasks is not None:
            found["task"] = Factor({"task": self.tasks, **core}, shared=kind)
            found["chosen"] = Factor({"task": self.tasks}, trainable=False, shared=kind)
        return found

    def begin(self, site: Site, weight: Callable[[], Tensor], drawn: Factors) -> Factors:
        eye = torch.eye(self.rank, dtype=drawn["a"].dtype, device=drawn["a"].device)
        found = {k: eye.expand_as(v) for k, v in drawn.items() if k in ("layer", "role", "head", "task")}
        if "chosen" in drawn:
            found["chosen"] = torch.cat([torch.ones_like(v := drawn["chosen"])[..., :1], v[..., 1:]], -1)
        return found

    def operator(self, f: Factors) -> LinearOperator:
        left, middle = f["b"], f["layer"].squeeze(-3)
        if "task" in f:
            middle = (f["chosen"].unsqueeze(-1).unsqueeze(-1) * f["task"]).sum(-3) @ middle
        middle = f["role"].squeeze(-3) @ middle
        if "head" in f:
            cores = f["head"]  # in one product of matrices, which rounds alike with and without gradients
            each = (left @ cores.transpose(-3, -2).flatten(-2)).unflatten(-1, (cores.shape[-3], -1))
            left = each.transpose(-3, -2).flatten(-3, -2)
        return Product(Dense(left), Product(Dense(middle), Dense(f["a"])))
