"""From patterns to placements: which weights of a model a recipe adapts, and with what."""

import difflib
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from itertools import accumulate
from math import prod
from typing import Any

from torch import nn

from rankwise.adapter import Carriers, Placement, owned
from rankwise.candidates import Candidate, base_modules, candidates
from rankwise.errors import IncompatibleAxes, RankError, TargetError, TiedWeights
from rankwise.host import LAYER, ParameterHost, Site
from rankwise.sites import ROLES, Sites, Target
from rankwise.structures import Replace, Rows, Stack, Structure, TokenRows
from rankwise.weights import DenseWeight, format_of

# -- matching ---------------------------------------------------------------------------------


def _must_match(target: Target, hits: Sequence[object], what: str, among: Mapping[str, str]) -> None:
    """Raise where a pattern matches nothing ``among`` these names (and what each of them is)."""
    if hits or target.optional:
        return
    ends = sorted({name.rsplit(".", 1)[-1] for name in among if name})
    close = difflib.get_close_matches(target.pattern.rsplit(".", 1)[-1], ends, n=3, cutoff=0.5)
    near = f"Nearest names: {', '.join(close)}" if close else f"Names here: {', '.join(ends[:12])}"
    raise TargetError(
        f"Every pattern of {what} must match something (or be Target(..., optional=True)); "
        f'"{target}" matches nothing. {near}. Of these kinds: {", ".join(sorted({*among.values()})) or "none"}. '
        f"Roles: {', '.join(ROLES)}. See rw.targets(model)."
    )


def _named(found: Sequence[Candidate]) -> dict[str, str]:
    return {name: f"{c.classes[0]} ({c.site.kind})" for c in found for name in c.aliases}


def _selected(sites: Sites, found: list[Candidate]) -> list[Candidate]:
    hits = {t: [c for c in found if c.hit(t)] for t in (*sites.targets, *sites.exclude)}
    for what in ("targets", "exclude"):
        for t in getattr(sites, what):
            _must_match(t, hits[t], what, _named(found))
    names = {c.site.name for t in sites.targets for c in hits[t]}
    names -= {c.site.name for t in sites.exclude for c in hits[t]}
    if sites.layers is not None:
        there = {c.site.layer for c in found if c.site.name in names}
        missing = sorted(set(sites.layers) - there)
        if missing:
            raise TargetError(
                f"Every index of layers must be a block with a target; found no block {missing} "
                f"(blocks here: {sorted(i for i in there if i is not None)})."
            )
        names = {c.site.name for c in found if c.site.name in names and c.site.layer in sites.layers}
    return [c for c in found if c.site.name in names]


def changed(structure: Structure, changes: Mapping[str, Any]) -> Structure:
    """The structure with fields of its innermost structure replaced.

    Raises:
        IncompatibleAxes: a field that the innermost structure does not have.
    """
    assert is_dataclass(structure)
    inner = getattr(structure, "inner", None)
    if isinstance(inner, Structure):
        return replace(structure, inner=changed(inner, changes))
    known = {f.name for f in fields(structure)}
    if unknown := set(changes) - known:
        raise IncompatibleAxes(
            f"An override changes fields of {type(structure).__name__}, which are {sorted(known)}; "
            f"found {sorted(unknown)}."
        )
    return replace(structure, **changes)


def _spans(model: nn.Module, site: Site, parts: Sequence[Any]) -> tuple[tuple[str, int, int], ...]:
    """Row ranges of named parts: gate and up, or q, k, v (grouped-query sizes from the config)."""
    named = {p for p in parts if isinstance(p, str)}
    names = next((n for n in (("gate", "up"), ("q", "k", "v")) if named <= set(n)), None)
    if names is None:
        raise TargetError(
            f'Parts are named "q", "k", "v" or "gate", "up", or given as (name, first row, last row + 1); found '
            f"{list(parts)} for {site.name}."
        )
    # gpt-oss interleaves gate and up row by row; GPT-NeoX, BLOOM and Falcon q, k and v head by head
    owner, _, last = site.name.rpartition(".")
    mixed = getattr(model.get_submodule(owner), "is_concatenated", True) is False
    if named and (mixed or last == "query_key_value"):
        raise TargetError(f"The parts of {site.name} are interleaved, not row ranges; adapt the whole of it.")
    sizes = [site.rows // len(names)] * len(names)
    config = getattr(model, "config", None)
    heads = getattr(config, "num_attention_heads", None)
    if len(names) == 3 and heads:
        kv = getattr(config, "num_key_value_heads", None) or heads
        width = getattr(config, "head_dim", None) or getattr(config, "hidden_size", 0) // heads
        grouped = [heads * width, kv * width, kv * width]
        sizes = grouped if sum(grouped) == site.rows else sizes
    if named and sum(sizes) != site.rows:
        raise TargetError(f"The {site.rows} rows of {site.name} do not split into {names}; give row ranges.")
    ends = list(accumulate(sizes))
    spans = {n: (n, end - size, end) for n, size, end in zip(names, sizes, ends, strict=True)}
    return tuple(spans[p] if isinstance(p, str) else tuple(p) for p in parts)


# -- placements -------------------------------------------------------------------------------


def _sharing(model: nn.Module, found: list[Candidate]) -> dict[tuple[str, str], list[Candidate]]:
    """(path, slot) of each candidate -> all candidates that hold the same parameter."""
    modules = base_modules(model)
    holders: dict[int, list[Candidate]] = {}
    for c in found:
        parameter = modules[c.path]._parameters.get("weight" if c.slot == LAYER else c.slot)
        holders.setdefault(id(c if parameter is None else parameter), []).append(c)  # parametrised: computed, not held
    return {(c.path, c.slot): group for group in holders.values() for c in group}


def _carriers(c: Candidate, sites: Sites, sharing: list[Candidate]) -> Carriers:
    """Every module that holds the candidate's weight, itself first."""
    carriers = [(c.path, c.slot, False)]
    for other in sharing:
        if other.path == c.path:
            continue
        transposed = other.site.kind != c.site.kind
        if transposed and sites.tied == "refuse":
            raise TiedWeights(
                f"{c.path} and {other.path} share one weight, so an adapter on one is a choice about both. Say "
                f'Sites(tied="tie") for one shared adapter, used transposed by the head, or Sites(tied="untie") to '
                f"give the head a copy of its own; or leave both out of the targets."
            )
        if not transposed or sites.tied == "tie":
            carriers.append((other.path, other.slot, transposed))
    return tuple(carriers)


def _structure_at(model: nn.Module, c: Candidate, base: Structure, sites: Sites) -> Structure:
    structure = base
    for override in sites.overrides:
        if c.hit(override.target):
            structure = override.structure or changed(base, dict(override.changes))
            break
    for target, parts in sites.parts:
        if c.hit(target):
            return Rows(structure, _spans(model, c.site, parts))
    return structure


def _whole(model: nn.Module, sites: Sites) -> Iterator[tuple[Target, Placement]]:
    """The tensors to train whole: those that a pattern means, or some module around them."""
    modules = base_modules(model)
    classes = {path: [k.__name__ for k in type(module).__mro__] for path, module in modules.items()}
    tensors = [(p, n, t) for p, m in modules.items() for n, t in m._parameters.items()]
    for target in sites.train:
        hits = []
        for path, name, tensor in tensors:
            parts = [*path.split("."), name] if path else [name]
            around = [".".join(parts[:i]) for i in range(1, len(parts) + 1)]
            meant = any(target.accepts(p, classes.get(p, ()), ()) for p in around)
            if meant if tensor is not None else target.pattern == around[-1]:  # no pattern invents a bias
                hits.append((path, name, tensor))
        _must_match(target, hits, "train", {path: kinds[0] for path, kinds in classes.items()})
        for path, name, tensor in hits:
            full = f"{path}.{name}" if path else name
            if tensor is not None and format_of(modules[path], name) is not DenseWeight:
                raise TargetError(
                    f"Only plain floating-point tensors can be trained whole; {full} is stored as {tensor.dtype}. "
                    f"Leave the module unquantised, or adapt it instead."
                )
            holders = [(p, n, False) for p, n, t in hits if (p, n) == (path, name) or (t is tensor and t is not None)]
            if holders[0][:2] == (path, name):  # a tensor that is shared is trained once
                yield target, Placement(ParameterHost(modules[path], name).site(full), Replace(), tuple(holders))


def _narrow(site: Site) -> bool:
    """Whether it is a gate or a score of few numbers, or a depthwise convolution."""
    return min(site.rows, site.cols) < 8 or (site.groups > 1 and site.cols == site.kernel)


def _leave_out(small: Sequence[tuple[Site, RankError]], others: Sequence[Placement]) -> None:
    """Say which narrow layers of a role the structure does not fit; raise where there are no others."""
    site, error = small[0]
    if not others:
        raise error
    names = Counter(f"{site.leaf} ({site.rows} x {site.cols})" for site, _ in small)
    warnings.warn(
        f"{_sites(len(small))} left out, too narrow for the rank: {', '.join(f'{n} {k}' for k, n in names.items())}. "
        f'To adapt them too, give them a rank of their own: Sites(overrides={{"{site.leaf}": {{"rank": '
        f"{min(site.rows, site.cols)}}}}}).",
        stacklevel=2,
    )


def resolve(model: nn.Module, structure: Structure, sites: Sites) -> tuple[Placement, ...]:
    """The placements of a recipe on a model; nothing is changed.

    Raises:
        TargetError: a pattern that matches nothing, or a weight that cannot carry an adapter.
        TiedWeights: a target shares its weight with the output head and no choice was made.
        RankError: a rank that does not fit a layer.
    """
    found = candidates(model)
    adapted = _selected(sites, found) if sites.targets else []
    for pattern in (*(o.target for o in sites.overrides), *(t for t, _ in sites.parts)):
        _must_match(pattern, [c for c in adapted if c.hit(pattern)], "overrides and parts", _named(adapted))
    tokens: dict[str, TokenRows] = {}
    for target, ids in sites.tokens:
        hits = [c for c in found if c.site.kind == "embedding" and c.hit(target)]
        _must_match(target, hits, "tokens", _named(found))
        tokens |= {c.site.name: TokenRows(tuple(ids)) for c in hits}
    names = {c.site.name for c in adapted}
    chosen = [c for c in found if c.site.name in names or c.site.name in tokens]

    sharing = _sharing(model, found)
    result: list[Placement] = []
    seen: set[tuple[str, str]] = set()
    small: list[tuple[Site, RankError]] = []
    for c in sorted(chosen, key=lambda c: c.site.kind != "embedding"):  # a tied weight is the embedding's
        if (c.path, c.slot) in seen:
            continue
        if c.problem is not None:
            raise c.problem
        carriers = _carriers(c, sites, sharing[c.path, c.slot])
        seen |= {(path, slot) for path, slot, _ in carriers}
        rows = tokens.get(c.site.name)
        here = _structure_at(model, c, structure, sites) if c.site.name in names else rows
        here = Stack(here, rows) if rows and here is not rows and here else here
        assert here is not None
        try:
            here.factors(c.site)  # a rank or a token id that does not fit raises now
        except RankError as error:
            named = here is not structure or any(t.match != "role" and c.hit(t) for t in sites.targets)
            if named or not _narrow(c.site):
                raise
            small.append((c.site, error))
            continue
        result.append(Placement(c.site, here, carriers))
    if small:
        _leave_out(small, result)
    order = {c.site.name: i for i, c in enumerate(found)}
    result.sort(key=lambda p: order[p.site.name])
    taken = {path for p in result for path, slot, _ in p.carriers if slot in (LAYER, "weight")}
    for placement in {p.site.name: p for _, p in _whole(model, sites)}.values():
        path, name, _ = placement.carriers[0]
        if path in taken and name == "weight":
            raise TargetError(f"{path} is both a target and trained whole; exclude it from one of the two.")
        result.append(placement)
    if not result:
        raise TargetError("The patterns leave nothing to adapt. See rw.targets(model).")
    return tuple(result)


# -- the dry run ------------------------------------------------------------------------------


@dataclass(frozen=True)
class TargetRow:
    """What one pattern matches.

    Attributes:
        pattern: the pattern.
        count: how many sites.
        examples: up to three of their names.
        parameters: trainable parameters there.
    """

    pattern: str
    count: int
    examples: tuple[str, ...]
    parameters: int


@dataclass(frozen=True)
class TargetReport:
    """The dry run: pattern -> count -> example names -> trainable parameters."""

    rows: tuple[TargetRow, ...]
    sites: int
    parameters: int

    def __str__(self) -> str:
        width = max(len(r.pattern) for r in self.rows)
        lines = [
            f"{r.pattern:<{width}}  {_sites(r.count):>10}  {r.parameters:>13,} parameters  "
            f"{', '.join(r.examples)}{' ...' if r.count > len(r.examples) else ''}".rstrip()
            for r in self.rows
        ]
        return "\n".join([*lines, f"{_sites(self.sites)}, {self.parameters:,} trainable parameters"])


def _sites(count: int) -> str:
    return f"{count} site" if count == 1 else f"{count} sites"


def trained(placements: Sequence[Placement]) -> dict[str, int]:
    """Trained numbers by site, shared ones at the first of theirs."""
    return {
        p.site.name: (p.site.stack or 1) * sum(prod(f.shape) for f in own.values() if f.trainable)
        for p, own in owned(placements)
    }


def report(model: nn.Module, structure: Structure, sites: Sites) -> TargetReport:
    """The dry run of a recipe on a model; raises as ``attach`` would."""
    placements = resolve(model, structure, sites)
    by_name = {c.site.name: c for c in candidates(model)}
    counted = trained(placements)
    whole: dict[str, Target] = {}
    for target, placement in _whole(model, sites):
        whole.setdefault(placement.site.name, target)

    def hits(target: Target) -> list[str]:
        return [n for n in counted if n in by_name and n not in whole and by_name[n].hit(target)]

    patterns = [(str(t), hits(t)) for t in sites.targets]
    patterns += [(f"train {t}", [n for n, by in whole.items() if by == t]) for t in sites.train]
    patterns += [(f"tokens {t}", hits(t)) for t, _ in sites.tokens]
    rows, left = [], set(counted)  # a site counts where it is met first
    for label, found in patterns:
        here = [n for n in found if n in left]
        left -= set(here)
        rows.append(TargetRow(label, len(here), tuple(here[:3]), sum(counted[n] for n in here)))
    return TargetReport(tuple(rows), len(placements), sum(counted.values()))
