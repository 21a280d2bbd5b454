"""More rank than the parameters of a low-rank pair would buy: products, sharing, elementwise functions, gates."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import final

import torch
from torch import Tensor

from rankwise.errors import IncompatibleAxes, RankError
from rankwise.host import Correction, Host, Site
from rankwise.ops import BlockDiagonal, Dense, Fold, Hadamard, LinearOperator, Product, Scaled, Sine, Sum
from rankwise.ops.linalg import truncated_svd
from rankwise.structures.lowrank import Ranked
from rankwise.structures.structure import Additive, Begun, Factor, Factors, Leaf, Start, check_rank, sizes, sizes_of
from rankwise.structures.wrappers import keep, under


@final
@dataclass(frozen=True)
class ABBA(Ranked, Additive, Begun):
    """``W + s (B1 A1) * (B2 A2)`` elementwise, exactly of rank r^2 (Singhal et al. 2025, arXiv 2505.14238).

    B1 A1 starts as the best rank-r approximation of W, and B2 at zero. It is applied by the Khatri-Rao products of the
    factors, never as a matrix.

    Attributes:
        rank: r of both products.
        alpha: numerator of the scale, what the paper calls alpha^2; None for a scale of 1.
        scale_rule: "alpha/r", the paper's rank-stable 1/sqrt(r1 r2), or "alpha/sqrt(r)".
        iterations: power iterations of the randomised SVD of W; None for the exact one.
    """

    iterations: int | None = None

    traits = Ranked.traits - {"lowrank"}

    def factors(self, site: Site) -> dict[str, Factor]:
        r = check_rank(self.rank, site, min(site.rows, site.cols))
        out, in_ = {"out": site.rows, "rank": r}, {"rank": r, "in": site.cols}
        return {"a1": Factor(in_), "b1": Factor(out), "a2": Factor(in_, Start.RANDOM), "b2": Factor(out)}

    def begin(self, site: Site, weight: Callable[[], Tensor], drawn: Factors) -> Factors:
        w = weight()
        each = [truncated_svd(m, self.rank, iterations=self.iterations) for m in w.reshape(-1, *w.shape[-2:])]
        lead = w.shape[:-2]
        b = torch.stack([u * s.sqrt() for u, s, _ in each]).reshape(*lead, -1, self.rank)
        a = torch.stack([(v * s.sqrt()).mT for _, s, v in each]).reshape(*lead, self.rank, -1)
        return {"a1": a, "b1": b}

    def operator(self, f: Factors) -> LinearOperator:
        first, second = (Product(Dense(f[f"b{i}"]), Dense(f[f"a{i}"])) for i in (1, 2))
        pair = Hadamard(first, second).lower()
        assert pair is not None
        return Product(Dense(pair.left), Dense(pair.right))


@final
@dataclass(frozen=True)
class SineLoRA(Ranked, Additive):
    """``W + s/sqrt(in) sin(w B A)`` elementwise, of any rank (Ji et al. 2024, arXiv 2403.19243).

    The matrix itself is formed, in forward and again in backward; it is not kept.

    Attributes:
        rank: r of the product inside.
        alpha: numerator of the scale s; None for a scale of 1.
        scale_rule: "alpha/r" or "alpha/sqrt(r)".
        frequency: w.
    """

    frequency: float = 200.0

    traits = Ranked.traits - {"lowrank"}

    def factors(self, site: Site) -> dict[str, Factor]:
        r = check_rank(self.rank, site, min(site.rows, site.cols))
        return {"a": Factor({"rank": r, "in": site.cols}, Start.RANDOM), "b": Factor({"out": site.rows, "rank": r})}

    def operator(self, f: Factors) -> LinearOperator:
        wave = Sine(Product(Dense(self.frequency * f["b"]), Dense(f["a"])))
        return Scaled(wave, f["a"].shape[-1] ** -0.5)


@final
@dataclass(frozen=True)
class PRoLoRA(Ranked, Additive, Begun):
    """``W + s B A``, most ranks of which repeat one chunk, rotated along the rank (Wang et al. 2024, arXiv 2402.16902).

    ``A = [A_own; A_0, roll(A_0, t), ..., roll(A_0, (k-1) t)]`` with t = max((r - u) // k, 1), and B likewise over rows.

    Attributes:
        rank: r, in all.
        alpha: numerator of the scale s; None for a scale of 1.
        scale_rule: "alpha/r" or "alpha/sqrt(r)".
        unshared: u, ranks with parameters of their own everywhere.
        shares_out: k of B, chunks of rows that share; divides the rows.
        shares_in: k of A, chunks of columns that share; divides the columns.
    """

    unshared: int = 1
    shares_out: int = 2
    shares_in: int = 2

    traits = Ranked.traits - {"lowrank"}

    def factors(self, site: Site) -> dict[str, Factor]:
        r, u = check_rank(self.rank, site, min(site.rows, site.cols)), self.unshared
        k, n = self.shares_out, self.shares_in
        if not 0 <= u < r or min(k, n) < 1 or site.rows % k or site.cols % n:
            raise RankError(
                f"Fewer ranks are unshared than there are, and the chunks that share divide the layer; found rank={r}, "
                f"unshared={u}, shares_out={k}, shares_in={n} at {site.name} ({site.rows} x {site.cols}). Change them, "
                f"or take another structure there."
            )
        a, b = {"rank": r - u, "in": site.cols // n}, {"out": site.rows // k, "rank": r - u}
        found = {"a": Factor(a, Start.RANDOM), "b": Factor(b)}
        own = {"rank": u, "in": site.cols}, {"out": site.rows, "rank": u}
        return found | {"own_a": Factor(own[0], Start.RANDOM), "own_b": Factor(own[1])} if u else found

    def begin(self, site: Site, weight: Callable[[], Tensor], drawn: Factors) -> Factors:
        return {"a": drawn["a"] / self.shares_in**0.5}  # as large as a draw for all of the columns

    def operator(self, f: Factors) -> LinearOperator:
        a, b = [_repeated(f["a"], self.shares_in, -2)], [_repeated(f["b"], self.shares_out, -1)]
        if self.unshared:
            a, b = [f["own_a"], *a], [f["own_b"], *b]
        return Product(Dense(torch.cat(b, -1)), Dense(torch.cat(a, -2)))


def _repeated(chunk: Tensor, times: int, rank: int) -> Tensor:
    """Copies of a chunk beside each other, each rotated further along its dim ``rank``."""
    step = max(chunk.shape[rank] // times, 1)
    return torch.cat([chunk.roll(i * step, rank) for i in range(times)], -3 - rank)


@final
@dataclass(frozen=True)
class MoRA(Additive):
    """``W + D M C``: one square matrix M between fixed maps (Jiang et al. 2024, arXiv 2405.12130).

    C reads x in blocks of M's side h, the last filled up with the first entries of x; D repeats and cuts to the rows.
    "sharing" (type 1 of the paper's code) adds the blocks up: of rank h exactly. "rope" (type 6) turns block j by the
    rotary embedding of position j and gives each of them to M, the results beside each other: of any rank.

    Attributes:
        rank: r of the LoRA with as many parameters: h = floor(sqrt((out + in) r) + 1/2), made even for "rope".
        kind: "rope" (for small r) or "sharing" (for large r).
    """

    rank: int = 8
    kind: str = "rope"

    traits = frozenset({"additive", "drops"})

    def __post_init__(self) -> None:
        if self.kind not in ("rope", "sharing"):
            raise IncompatibleAxes(f'MoRA is of the kind "rope" or "sharing"; found "{self.kind}".')

    @property
    def scale(self) -> float:
        return 1.0

    def factors(self, site: Site) -> dict[str, Factor]:
        rank = check_rank(self.rank, site, min(site.rows, site.cols))
        side = int(((site.rows + site.cols) * rank) ** 0.5 + 0.5)
        side -= side % 2 if self.kind == "rope" else 0
        if side > min(site.rows, site.cols):
            raise RankError(
                f"M is no larger than the smaller side of the layer, {min(site.rows, site.cols)} at {site.name}; found "
                f"a side of {side} for rank={rank}. Choose a smaller rank, or LoRA there."
            )
        return {"m": Factor({"row": side, "column": side}), **sizes(site)}

    def operator(self, f: Factors) -> LinearOperator:
        m, (rows, cols) = f["m"], sizes_of(f)
        side, like = m.shape[-1], m[..., 0, 0]
        blocks = 1 if self.kind == "sharing" else -(-cols // side)
        square = Dense(m) if self.kind == "sharing" else BlockDiagonal(_turned(m, blocks))
        read, write = (Fold(size, blocks * side, like, wraps) for size, wraps in ((cols, True), (rows, False)))
        return Product(Product(write.T, square), read)


def _turned(m: Tensor, blocks: int) -> Tensor:
    """``M R_j`` for the rotary embeddings of the first positions: (*batch, h, h) to (*batch, blocks, h, h)."""
    half = m.shape[-1] // 2
    position, pair = (torch.arange(n, dtype=m.dtype, device=m.device) for n in (blocks, half))
    angle = (position[:, None] * 10000.0 ** (-pair / half)).unsqueeze(-2)
    one, two = m.unsqueeze(-3).split(half, -1)
    return torch.cat([one * angle.cos() + two * angle.sin(), two * angle.cos() - one * angle.sin()], -1)


@final
@dataclass(frozen=True)
class GLoRA(Leaf):
    """``W + W * A + B`` elementwise, each of A and B a product of rank r, a column, a number or nothing.

    Chavan et al. 2023, arXiv 2306.07967. Where A is none the update is low rank; otherwise the matrix is formed.

    Attributes:
        rank: r of "lora".
        gate: A: "lora", "vector" (one number a row), "constant" or "none".
        update: B, of the same kinds.
    """

    rank: int = 8
    gate: str = "lora"
    update: str = "lora"

    def __post_init__(self) -> None:
        kinds, known = {self.gate, self.update}, {"lora", "vector", "constant", "none"}
        if not kinds <= known or kinds == {"none"}:
            raise IncompatibleAxes(
                f'A and B are "lora", "vector", "constant" or "none", not both none; found gate="{self.gate}", '
                f'update="{self.update}".'
            )
        keep(self, traits=frozenset({"drops"} | ({"two_sided", "random_start"} if "lora" in kinds else set())))

    def factors(self, site: Site) -> dict[str, Factor]:
        m, n, found = site.rows, site.cols, dict[str, Factor]()
        for part, kind in (("gate", self.gate), ("update", self.update)):
            if kind == "lora":
                r = check_rank(self.rank, site, min(m, n))
                found[f"{part}_a"] = Factor({"rank": r, "in": n}, Start.RANDOM)
                found[f"{part}_b"] = Factor({"out": m, "rank": r})
            elif kind != "none":
                found[f"{part}_x"] = Factor({"out": m if kind == "vector" else 1, "one": 1})
        return found

    def _change(self, f: Factors, w: Tensor) -> LinearOperator:
        gate, update = (_part(under(part, f), (w.shape[-2], w.shape[-1])) for part in ("gate", "update"))
        terms = [op for op in (gate and Hadamard(Dense(w), gate), update) if op is not None]
        return Sum(*terms) if len(terms) == 2 else terms[0]

    def apply(self, f: Factors, x: Tensor, host: Host) -> Tensor:
        return host.plus(Correction(self._change(f, host.weight())), x)

    def weight(self, f: Factors, w: Tensor) -> Tensor:
        return w + self._change(f, w).dense()


def _part(f: Factors, shape: tuple[int, int]) -> LinearOperator | None:
    """A or B (out, in) of GLoRA, None for nothing."""
    if "x" not in f:
        return Product(Dense(f["b"]), Dense(f["a"])) if f else None
    lead, (m, n) = f["x"].shape[:-2], shape
    return Product(Dense(f["x"].expand(*lead, m, 1)), Dense(f["x"].new_ones(*lead, 1, n)))
