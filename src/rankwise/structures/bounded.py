"""Updates of bounded size, of shared shards and of blocks. b (out, r), a (r, in), d a shard that is used many times."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, final

import torch
from torch import Tensor
from torch.linalg import vector_norm

from rankwise.errors import IncompatibleAxes, RankError
from rankwise.host import Correction, Host, Site
from rankwise.ops import BlockDiagonal, Dense, Fold, LinearOperator, Product
from rankwise.structures.lowrank import scale_of
from rankwise.structures.structure import (
    Added,
    Additive,
    Begun,
    Factor,
    Factors,
    Leaf,
    Start,
    check_rank,
    sizes,
    sizes_of,
)

SHORTEST = 1e-4  # below it the length of a vector counts as this much, so that a zero one has a direction


def check_divides(what: str, parts: int, site: Site, *sizes: int) -> int:
    """Return ``parts`` if it is a whole number of 1 or more that divides every size.

    Raises:
        RankError: it does not.
    """
    check_rank(parts, site, max(sizes))
    if any(size % parts for size in sizes):
        raise RankError(
            f"{what} divides {' and '.join(map(str, sizes))} at {site.name} ({site.rows} x {site.cols}); "
            f"found {parts}. Choose a divisor, or override it there with Sites(overrides)."
        )
    return parts


@final
@dataclass(frozen=True)
class DeLoRA(Additive, Begun):
    """``W + l/r B diag(1 / (|b_i| |a_i|)) A diag(|w_j|)``, w_j the columns of W (Bini et al. 2025, arXiv 2503.18225).

    Each component has the norm l/r but for the |w_j|, whatever its factors: l alone says how far W moves.

    Attributes:
        rank: r.
        strength: l at the start; it is trained.
        from_zero: start with B = 0, from where the first step is a large one; else at random, for an Anchored around.
    """

    rank: int = 8
    strength: float = 15.0
    from_zero: bool = True

    traits = frozenset({"additive", "two_sided", "random_start", "drops"})

    def __post_init__(self) -> None:
        if not self.from_zero:
            object.__setattr__(self, "traits", self.traits | {"moves_at_start"})

    @property
    def scale(self) -> float:
        return 1 / self.rank

    def factors(self, site: Site) -> dict[str, Factor]:
        r = check_rank(self.rank, site, min(site.rows, site.cols))
        return {
            "a": Factor({"rank": r, "in": site.cols}, Start.RANDOM),
            "b": Factor({"out": site.rows, "rank": r}, Start.ZEROS if self.from_zero else Start.RANDOM),
            "strength": Factor({"one": 1}, float(self.strength)),
            "norms": Factor({"in": site.cols}, trainable=False),
        }

    def begin(self, site: Site, weight: Callable[[], Tensor], drawn: Factors) -> Factors:
        return {"norms": vector_norm(weight(), dim=-2)}

    def operator(self, f: Factors) -> LinearOperator:
        a, b = f["a"], f["b"]
        lengths = vector_norm(a, dim=-1).clamp_min(SHORTEST) * vector_norm(b, dim=-2).clamp_min(SHORTEST)
        b = b * (f["strength"] / lengths).unsqueeze(-2)
        return Product(Dense(b), Dense(a * f["norms"].unsqueeze(-2)))


@final
@dataclass(frozen=True)
class MiSS(Added, Leaf):
    """``W + B [I I ... I]``: the inputs are summed r apart (Kang and Yin 2024, arXiv 2409.15371).

    Attributes:
        rank: r, of the shard B (out, r) that every r columns of W share; the last columns take what is left of it.
        shard: rows of B that are trained, and repeated to fill ``out``; None for all ("mini" in PEFT).
    """

    rank: int = 64
    shard: int | None = None

    traits = frozenset({"additive", "drops"})

    def factors(self, site: Site) -> dict[str, Factor]:
        r = check_rank(self.rank, site, site.cols)
        if self.shard is None:
            return {"b": Factor({"out": site.rows, "rank": r}), **sizes(site)}
        check_divides("The shard of a MiSS", self.shard, site, site.rows)
        return {"b": Factor({"shard": self.shard, "rank": r}), **sizes(site)}

    def delta(self, f: Factors) -> LinearOperator:
        b, (rows, cols) = f["b"], sizes_of(f)
        whole = b if self.shard is None else torch.cat([b] * (rows // self.shard), dim=-2)
        return Product(Dense(whole), Fold(cols, b.shape[-1], b[..., 0, 0]))


@final
@dataclass(frozen=True)
class Bat(Leaf):
    """``W_ij + W_ij D_i + D_i`` on r x r blocks of W, i counting along ``out`` (Kang 2024, arXiv 2409.15371).

    The update depends on W: it is formed, (out, in), in each forward and backward.

    Attributes:
        rank: r, which divides both sides of W.
    """

    rank: int = 64

    traits = frozenset({"drops"})

    def factors(self, site: Site) -> dict[str, Factor]:
        r = check_divides("The block of a Bat", self.rank, site, site.rows, site.cols)
        return {"d": Factor({"block": site.rows // r, "row": r, "column": r})}

    def _update(self, f: Factors, w: Tensor) -> Tensor:
        d = f["d"]  # (*batch, blocks, r, r)
        parts = w.to(torch.promote_types(w.dtype, d.dtype)).unflatten(-2, (-1, self.rank)).flatten(-2)
        changed = parts.unflatten(-1, (-1, self.rank)) @ d  # (*batch, blocks of rows, r times blocks of columns, r)
        beside = changed.unflatten(-2, (self.rank, -1)) + d.unsqueeze(-2)
        return beside.flatten(-2).flatten(-3, -2)

    def apply(self, f: Factors, x: Tensor, host: Host) -> Tensor:
        return host.plus(Correction(Dense(self._update(f, host.weight()))), x)

    def weight(self, f: Factors, w: Tensor) -> Tensor:
        return w + self._update(f, w)


@final
@dataclass(frozen=True)
class BlockLoRA(Additive):
    """``W + s B A`` with one of the factors block-diagonal (Wang et al. 2025, arXiv 2510.23346).

    Sharded over k devices the factors need no exchange: a device holds a block of the one and its rows or columns of
    the other.

    Attributes:
        rank: r, a multiple of the blocks.
        alpha: numerator of the scale; None for a scale of 1.
        blocks: k, which divides the block-diagonal factor's outer size.
        side: "a" where W is sharded by rows of its input, "b" by its outputs.
        scale_rule: as in LoRA.
    """

    rank: int = 16
    alpha: float | None = 16.0
    blocks: int = 2
    side: Literal["a", "b"] = "b"
    scale_rule: str = "alpha/r"

    traits = frozenset({"additive", "two_sided", "random_start", "drops"})

    def __post_init__(self) -> None:
        if self.side not in ("a", "b") or self.scale_rule not in ("alpha/r", "alpha/sqrt(r)"):
            raise IncompatibleAxes(
                f'The block-diagonal factor is "a" or "b", the scale rule "alpha/r" or "alpha/sqrt(r)"; found '
                f'"{self.side}" and "{self.scale_rule}".'
            )

    @property
    def scale(self) -> float:
        return scale_of(self.rank, self.alpha, self.scale_rule)

    def factors(self, site: Site) -> dict[str, Factor]:
        r = check_rank(self.rank, site, min(site.rows, site.cols))
        k = check_divides("The number of blocks", self.blocks, site, r, site.cols if self.side == "a" else site.rows)
        a = {"rank": r, "in": site.cols // k} if self.side == "a" else {"rank": r, "in": site.cols}
        b = {"out": site.rows, "rank": r} if self.side == "a" else {"out": site.rows, "share": r // k}
        return {"a": Factor(a, Start.RANDOM), "b": Factor(b)}

    def operator(self, f: Factors) -> LinearOperator:
        a, b = (
            BlockDiagonal(f[name].unflatten(-2, (self.blocks, -1))) if name == self.side else Dense(f[name])
            for name in "ab"
        )
        return Product(b, a)
