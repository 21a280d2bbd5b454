"""Wrappers: structures around a structure. Their factors are the inner ones and a few more."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import TypeVar, final

import torch
from torch import Tensor

from rankwise.errors import IncompatibleAxes, TargetError
from rankwise.host import Adapted, Correction, Host, Site, Through, norm_of_rows
from rankwise.ops import LinearOperator, Scaled, Sum
from rankwise.structures.structure import Added, Factor, Factors, LeafStart, Structure

T = TypeVar("T")


def keep(value: object, **derived: object) -> None:
    """Set what a frozen value derives from its fields."""
    for name, item in derived.items():
        object.__setattr__(value, name, item)


def under(prefix: str, f: Factors) -> dict[str, Tensor]:
    """The factors whose names begin with ``prefix_``, without it."""
    return {k.removeprefix(f"{prefix}_"): v for k, v in f.items() if k.startswith(f"{prefix}_")}


def named(prefix: str, values: Mapping[str, T]) -> dict[str, T]:
    """The inverse of :func:`under`: the names with ``prefix_`` before them."""
    return {f"{prefix}_{name}": value for name, value in values.items()}


def check_dense(wrapper: str, inner: Structure) -> None:
    """Refuse a structure inside that has no weight.

    Raises:
        IncompatibleAxes: it has none.
    """
    if "not_mergeable" in inner.traits:
        raise IncompatibleAxes(f"{wrapper} needs the weight inside; {inner!r} has none. Put it on top, by Stack.")


def check_still(wrapper: str, *inner: Structure) -> None:
    """Refuse a structure inside that is a random map while training.

    Raises:
        IncompatibleAxes: it is.
    """
    if any("samples" in structure.traits for structure in inner):
        raise IncompatibleAxes(
            f"{wrapper} holds no map that is drawn while training; found {inner!r}. Take VeRA there, or Gated."
        )


@final
@dataclass(frozen=True)
class Magnitude(Structure):
    """``diag(m / |W'|) W'``, W' from *any* structure (DoRA; Liu et al. 2024, arXiv 2402.09353).

    The norms |W'| of the rows are constants in the backward pass, as in the paper. Where a row of
    W' is zero it stays zero.

    Attributes:
        inner: the structure that gives the direction W'.
        recompute: for m's gradient make the layer's output again in backward, instead of saving it: less memory, one
            more product with W.
    """

    inner: Structure
    recompute: bool = False

    def __post_init__(self) -> None:
        if isinstance(self.inner, Magnitude):
            raise IncompatibleAxes(
                "A magnitude on a magnitude is the same magnitude; found Magnitude(Magnitude(...)). Keep one."
            )
        check_dense("A magnitude", self.inner)
        keep(self, traits=self.inner.traits - {"additive"} | {"identity_to_rounding"})

    def factors(self, site: Site) -> dict[str, Factor]:
        return {**self.inner.factors(site), "magnitude": Factor({"out": site.rows})}

    def start(self, site: Site, weight: Callable[[], Tensor], leaf: LeafStart) -> dict[str, Tensor]:
        f = self.inner.start(site, weight, leaf)
        return {**f, "magnitude": norm_of_rows(self.inner.weight(f, weight()))}

    def correction(self, f: Factors, host: Host) -> Correction | None:
        inner = self.inner.correction(f, host)
        if inner is None:
            return None
        norm = torch.no_grad()(lambda: _or_infinite(host.row_norm(inner.op)))
        return Correction(inner.op, f["magnitude"], norm, self.recompute)

    def apply(self, f: Factors, x: Tensor, host: Host) -> Tensor:
        correction = self.correction(f, host)
        if correction is not None:
            return host.plus(correction, x)
        with torch.no_grad():
            norm = norm_of_rows(self.inner.weight(f, host.weight()))
        scale = f["magnitude"] / _or_infinite(norm)
        return host.scale_rows(scale, lambda x: self.inner.apply(f, x, host), x)

    def weight(self, f: Factors, w: Tensor) -> Tensor:
        direction = self.inner.weight(f, w)
        with torch.no_grad():
            norm = norm_of_rows(direction)
        return (f["magnitude"] / _or_infinite(norm)).unsqueeze(-1) * direction


def _or_infinite(norm: Tensor) -> Tensor:
    """The norms, those of rows of zeros as infinity: such a row stays zero."""
    return norm.masked_fill(norm == 0, torch.inf)


@final
@dataclass(frozen=True)
class Anchored(Added):
    """``W + op(f) - op(f_0)``: a start other than zero that leaves the base as it is.

    Exactly equal to editing the base (PiSSA; Meng et al. 2024, arXiv 2404.02948), with the base
    untouched and the start f_0 stored beside the factors: nothing is recomputed on load.

    Attributes:
        inner: an additive structure.
    """

    inner: Structure

    def __post_init__(self) -> None:
        if not isinstance(self.inner, Added):
            raise IncompatibleAxes(
                f"An anchor subtracts the update's start, so the update must be additive; found Anchored("
                f"{self.inner!r}). Anchor the additive structure inside instead: Magnitude(Anchored(LoRA(...)))."
            )
        check_still("An anchor", self.inner)
        keep(self, traits=self.inner.traits - {"moves_at_start"} | {"anchored", "identity_to_rounding"})

    def factors(self, site: Site) -> dict[str, Factor]:
        inner = self.inner.factors(site)
        return {**inner, **named("anchor", {k: replace(v, trainable=False) for k, v in inner.items()})}

    def start(self, site: Site, weight: Callable[[], Tensor], leaf: LeafStart) -> dict[str, Tensor]:
        f = self.inner.start(site, weight, leaf)
        return {**f, **named("anchor", f)}

    def delta(self, f: Factors) -> LinearOperator:
        assert isinstance(self.inner, Added)
        return Sum(self.inner.delta(f), Scaled(self.inner.delta(under("anchor", f)), -1.0))


@final
@dataclass(frozen=True)
class Rows(Structure):
    """Named row ranges of a fused projection (qkv, gate_up), each with its own factors.

    Attributes:
        inner: the structure on each part.
        parts: (name, first row, last row + 1) of each adapted part.
    """

    inner: Structure
    parts: tuple[tuple[str, int, int], ...]

    def __post_init__(self) -> None:
        check_still("A range of rows", self.inner)
        keep(self, parts=tuple(tuple(p) for p in self.parts), traits=self.inner.traits - {"additive"})
        spans = sorted((a, b) for _, a, b in self.parts)
        overlap = any(one[1] > two[0] for one, two in zip(spans, spans[1:], strict=False))
        if not spans or overlap or any(not 0 <= a < b for a, b in spans):
            raise IncompatibleAxes(
                f"Parts are disjoint, non-empty row ranges (name, first, last + 1); found {self.parts}."
            )

    def _sites(self, site: Site) -> dict[str, Site]:
        if site.kind not in ("linear", "parameter"):
            raise TargetError(f"Parts are rows of a fused linear projection; {site.name} is of kind {site.kind}.")
        last = max(b for _, _, b in self.parts)
        if last > site.rows:
            raise TargetError(f"Parts lie within the {site.rows} rows of {site.name}; found a part up to {last}.")
        return {part: replace(site, name=f"{site.name}[{part}]", rows=b - a) for part, a, b in self.parts}

    def factors(self, site: Site) -> dict[str, Factor]:
        parts = self._sites(site).items()
        return {k: v for part, sub in parts for k, v in named(part, self.inner.factors(sub)).items()}

    def start(self, site: Site, weight: Callable[[], Tensor], leaf: LeafStart) -> dict[str, Tensor]:
        spans = {part: (a, b) for part, a, b in self.parts}
        found: dict[str, Tensor] = {}
        for part, sub in self._sites(site).items():
            a, b = spans[part]
            found |= named(part, self.inner.start(sub, lambda a=a, b=b: weight()[..., a:b, :], leaf))
        return found

    def apply(self, f: Factors, x: Tensor, host: Host) -> Tensor:
        y, cuts, end = host(x), [], 0
        for part, a, b in sorted(self.parts, key=lambda p: p[1]):
            cuts += [y[..., end:a], self.inner.apply(under(part, f), x, RowsHost(host, a, b, x, y))]
            end = b
        return torch.cat([*cuts, y[..., end:]], dim=-1)

    def weight(self, f: Factors, w: Tensor) -> Tensor:
        cuts, end = [], 0
        for part, a, b in sorted(self.parts, key=lambda p: p[1]):
            cuts += [w[..., end:a, :], self.inner.weight(under(part, f), w[..., a:b, :])]
            end = b
        cuts.append(w[..., end:, :])
        lead = max((c.shape[:-2] for c in cuts), key=len)
        return torch.cat([c.expand(*lead, *c.shape[-2:]) for c in cuts], dim=-2)


@final
class RowsHost(Through):
    """Rows a..b of a linear host. The host's output at x is known already, and is reused."""

    kind = "rows"

    def __init__(self, host: Host, a: int, b: int, x: Tensor, y: Tensor) -> None:
        super().__init__(host, host.dropout)
        self.a, self.b, self.x, self.y = a, b, x, y

    def __call__(self, x: Tensor) -> Tensor:
        y = self.y if x is self.x else self.host(x)
        return y[..., self.a : self.b]

    def weight(self) -> Tensor:
        return self.host.weight()[..., self.a : self.b, :]

    def rotate(self, op: LinearOperator, x: Tensor) -> Tensor:
        return self.host.rotate(op, x)[..., self.a : self.b]


@final
@dataclass(frozen=True)
class Stack(Structure):
    """Two structures at one site, the second on top of the first (LoRA and new token rows).

    Attributes:
        first: the structure next to the base.
        second: the structure on the adapted base.
    """

    first: Structure
    second: Structure

    def __post_init__(self) -> None:
        check_dense("A stack on top", self.first)
        check_still("A stack", self.first, self.second)
        common = self.first.traits & self.second.traits
        either = (self.first.traits | self.second.traits) & {"identity_to_rounding", "moves_at_start", "not_mergeable"}
        keep(self, traits=(common | either) - {"additive"})

    def factors(self, site: Site) -> dict[str, Factor]:
        return named("first", self.first.factors(site)) | named("second", self.second.factors(site))

    def start(self, site: Site, weight: Callable[[], Tensor], leaf: LeafStart) -> dict[str, Tensor]:
        first = self.first.start(site, weight, leaf)
        second = self.second.start(site, lambda: self.first.weight(first, weight()), leaf)
        return named("first", first) | named("second", second)

    def apply(self, f: Factors, x: Tensor, host: Host) -> Tensor:
        below = Adapted(self.first, under("first", f), host, host.dropout)
        return self.second.apply(under("second", f), x, below)

    def weight(self, f: Factors, w: Tensor) -> Tensor:
        return self.second.weight(under("second", f), self.first.weight(under("first", f), w))
