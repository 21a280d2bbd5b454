"""Structures whose layers draw on a store that they have in common: pools of ranks, a bank of vectors.

a (rank, in), b (out, rank); m outputs, n inputs, L blocks.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from rankwise.errors import IncompatibleAxes, RankError
from rankwise.host import Site
from rankwise.ops import Dense, Diagonal, LinearOperator, Product
from rankwise.structures.shared import Unscaled, fits
from rankwise.structures.structure import Additive, Begun, Factor, Factors, Start, check_rank


@final
@dataclass(frozen=True)
class RaSA(Unscaled):
    """``W + [B, B_s] diag(e, e_s) [A; A_s]``: each of L layers gives k of r ranks to all (He et al. 2025, 2503.12576).

    The layers are those of one name in their blocks (all ``q_proj``); a layer outside of blocks has its ranks alone.

    Attributes:
        rank: r, of which r - k stay a layer's own.
        alpha: e starts at alpha / (2 (r - k)) for them and at alpha / (2 L k) for the L k common ones.
        given: k.
    """

    rank: int = 16
    alpha: float = 16.0
    given: int = 1

    traits = frozenset({"additive", "two_sided", "random_start", "drops"})

    def factors(self, site: Site) -> dict[str, Factor]:
        r, k = check_rank(self.rank, site, min(site.rows, site.cols)), self.given
        if not 1 <= k < r:
            raise RankError(f"A layer gives 1 to r - 1 of its ranks; found given={k} of rank={r}. Choose another.")
        kept, many, found = r - k, k * max(site.layers, 1), dict[str, Factor]()
        for suffix, size, label in (("", kept, None), ("_s", many, f"{site.kind}s {site.leaf}")):
            found[f"a{suffix}"] = Factor({"rank": size, "in": site.cols}, Start.RANDOM, shared=label)
            found[f"b{suffix}"] = Factor({"out": site.rows, "rank": size}, shared=label)
            found[f"e{suffix}"] = Factor({"rank": size}, self.alpha / (2 * size))
        return found

    def operator(self, f: Factors) -> LinearOperator:
        b, e, a = (torch.cat([f[k], f[f"{k}_s"]], dim) for k, dim in (("b", -1), ("e", -1), ("a", -2)))
        return Product(Dense(b), Product(Diagonal(e), Dense(a)))


@final
@dataclass(frozen=True)
class BSLoRA(Additive):
    """``W + s (B A + B_i A_i + B_g A_g)``: ranks of the layer, of its block and of all (Zhou et al. 2025, ICML).

    Attributes:
        rank: of the layer's own pair; 0 for none.
        intra: rank of what the layers of one block have in common.
        inter: rank of what all layers have in common.
        strength: s.
        widths: the most outputs and the most inputs of any layer, for common pairs of which each layer takes the middle
            ("slice sharing"); None to share among layers of one width alone.
    """

    rank: int = 2
    intra: int = 4
    inter: int = 16
    strength: float = 2.0
    widths: tuple[int, int] | None = None

    traits = frozenset({"additive", "two_sided", "random_start", "drops"})

    @property
    def scale(self) -> float:
        return self.strength

    def factors(self, site: Site) -> dict[str, Factor]:
        kind, found = f"{site.kind}s of", dict[str, Factor]()
        if min(self.rank, self.intra, self.inter) < 0 or not self.rank + self.intra + self.inter:
            raise RankError(f"The three ranks are 0 or more, and one of them is not 0; found {self!r}. Raise one.")
        sides = {"in": site.cols}, {"out": site.rows}
        if self.widths is None:
            common = sides
        else:
            rows, cols = fits(site, self.widths)
            common = {"widest_in": cols}, {"widest_out": rows}
        parts = ((None, "", self.rank, sides), (f"{kind} block {site.layer}", "_i", self.intra, common))
        for label, suffix, rank, (in_, out) in (*parts, (f"{kind} all blocks", "_g", self.inter, common)):
            found[f"a{suffix}"] = Factor({"rank": rank, **in_}, Start.RANDOM, shared=label)
            found[f"b{suffix}"] = Factor({**out, "rank": rank}, shared=label)
        return found

    def operator(self, f: Factors) -> LinearOperator:
        cols, rows = f["a"].shape[-1], f["b"].shape[-2]
        a = torch.cat([_middle(f[k], -1, cols) for k in ("a", "a_i", "a_g")], -2)
        return Product(Dense(torch.cat([_middle(f[k], -2, rows) for k in ("b", "b_i", "b_g")], -1)), Dense(a))


def _middle(x: Tensor, dim: int, size: int) -> Tensor:
    """``size`` entries out of the middle of a dim."""
    return x.narrow(dim, (x.shape[dim] - size) // 2, size)


@final
@dataclass(frozen=True)
class VBLoRA(Unscaled, Begun):
    """``W + B A``, A's rows and B's columns put together from one bank of vectors (Li et al. 2024, arXiv 2405.15179).

    Each piece of ``length`` numbers is the mean of the k vectors whose logits are largest, weighed by their softmax;
    the gradient reaches those k logits and vectors.

    Attributes:
        rank: r.
        vectors: h, how many the bank holds.
        length: of a vector; divides both sides of every layer.
        topk: k.
    """

    rank: int = 4
    vectors: int = 256
    length: int = 256
    topk: int = 2

    traits = frozenset({"additive", "drops", "moves_at_start"})

    def __post_init__(self) -> None:
        if not 1 <= self.topk <= self.vectors:
            raise IncompatibleAxes(
                f"The top k vectors come out of the bank, so k lies between 1 and its size; found topk={self.topk} of "
                f"vectors={self.vectors}. Lower topk, or enlarge the bank."
            )

    def factors(self, site: Site) -> dict[str, Factor]:
        r, (h, b) = check_rank(self.rank, site, min(site.rows, site.cols)), (self.vectors, self.length)
        if b < 1 or site.rows % b or site.cols % b:
            raise IncompatibleAxes(
                f"The vectors of one bank fill rows and columns of every layer, so their length divides its sides; "
                f"found length={b} at {site.name} ({site.rows} x {site.cols}). Take a common divisor of all widths."
            )
        return {
            "bank": Factor({"vector": h, "length": b}, Start.NORMAL, shared="all layers"),
            "logits_a": Factor({"rank": r, "piece": site.cols // b, "vector": h}, Start.NORMAL),
            "logits_b": Factor({"piece": site.rows // b, "rank": r, "vector": h}, Start.NORMAL),
        }

    def begin(self, site: Site, weight: Callable[[], Tensor], drawn: Factors) -> Factors:
        bank = torch.empty_like(drawn["bank"]).uniform_(-0.02, 0.02)
        return {"bank": bank, **{k: drawn[k] / 10 for k in ("logits_a", "logits_b")}}

    def operator(self, f: Factors) -> LinearOperator:
        a, b = (self._pieces(f["bank"], f[k]) for k in ("logits_a", "logits_b"))
        return Product(Dense(b.mT.flatten(-3, -2)), Dense(a.flatten(-2)))

    def _pieces(self, bank: Tensor, logits: Tensor) -> Tensor:
        """The pieces (*batch, one, two, length) of logits (*batch, one, two, h)."""
        best = logits.topk(self.topk, -1)
        index = best.indices.flatten(-3).unsqueeze(-1).expand(*logits.shape[:-3], -1, bank.shape[-1])
        chosen = bank.gather(-2, index).unflatten(-2, best.indices.shape[-3:])
        return (best.values.softmax(-1).unsqueeze(-2) @ chosen).squeeze(-2)
