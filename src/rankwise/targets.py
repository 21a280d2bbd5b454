"""From patterns to placements: which weights of a model a recipe adapts, and with what."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any, final

from torch import nn

from rankwise.adapter import Adapters, Placement
from rankwise.errors import IncompatibleAxes, RankwiseError, TargetError, TiedWeights, WeightFormatError
from rankwise.host import LAYER, ParameterHost, Site, kind_of
from rankwise.sites import Sites, Target
from rankwise.structures import Replace, Rows, Stack, Structure, TokenRows

HEADS = {"lm_head", "score", "classifier", "embed_out", "qa_outputs", "head", "classification_head"}
_ATTENTION = re.compile(r"attn|attention|^(q|k|v|o|qkv|query|key|value|out)_?(proj|lin)?$|^c_attn$")
_MLP = re.compile(r"mlp|ffn|feed_forward|experts|^(gate|up|down|gate_up)_proj$|^(fc|w|linear)\d$")
_OTHER_MLP = {"intermediate", "output"}  # BERT, ViT: blocks without an mlp of that name
_MHA = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@final
@dataclass(frozen=True)
class Candidate:
    """A weight that could carry an adapter.

    Attributes:
        site: its facts.
        path: path of the module that carries it.
        slot: "layer", or the parameter's name.
        aliases: names a pattern may hit.
        classes: names of the classes of its module.
        roles: role words that include it.
        problem: why it cannot carry one after all, raised where it is chosen.
    """

    site: Site
    path: str
    slot: str
    aliases: tuple[str, ...]
    classes: tuple[str, ...]
    roles: tuple[str, ...]
    problem: RankwiseError | None = None

    def hit(self, target: Target) -> bool:
        """Whether the pattern means it."""
        return any(target.accepts(name, self.classes, self.roles) for name in self.aliases)


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the base model by path, without what a graft added."""
    found: dict[str, nn.Module] = {}
    added: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, Adapters):
            added |= {id(m) for m in module.modules()}
        if id(module) not in added:
            found[path] = module
    return found


def output_head(model: nn.Module) -> Any:
    """The module that the model itself calls its output embeddings."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        return getter() if callable(getter) else None
    except (AttributeError, NotImplementedError):
        return None


def _role(path: str) -> str:
    parts = path.split(".")
    if any(_ATTENTION.search(p) for p in parts):
        return "attention"
    if any(_MLP.search(p) for p in parts) or _OTHER_MLP & set(parts):
        return "mlp"
    return "other"


def candidates(model: nn.Module) -> list[Candidate]:
    """Every weight of the model that could carry an adapter, in the model's order."""
    modules = base_modules(model)
    head = output_head(model)
    found: list[Candidate] = []

    def add(
        name: str,
        path: str,
        slot: str,
        site: Site,
        *,
        linear: bool,
        also: str = "",
        problem: RankwiseError | None = None,
    ) -> None:
        owner = modules[path]
        numbers = [int(p) for p in name.split(".") if p.isdigit()]
        is_head = owner is head or path.rsplit(".", 1)[-1] in HEADS
        role = "head" if is_head else "embedding" if site.kind == "embedding" else _role(name)
        site = replace(site, layer=numbers[0] if numbers else None, role=role)
        roles = [role] + (["all-linear"] if linear and not is_head else [])
        classes = tuple(c.__name__ for c in type(modules[also or path]).__mro__)
        aliases = (name, also) if also else (name,)
        found.append(Candidate(site, path, slot, aliases, classes, tuple(roles), problem))

    inside_mha: set[str] = set()
    for path, module in modules.items():
        if path in inside_mha:
            continue
        dot = f"{path}." if path else ""
        if isinstance(module, nn.MultiheadAttention):
            inside_mha.add(f"{dot}out_proj")
            for slot in _MHA:
                if module._parameters.get(slot) is not None:
                    site = ParameterHost(module, slot).site(f"{dot}{slot}")
                    add(f"{dot}{slot}", path, slot, site, linear=True, also=path)
            site = ParameterHost(module.out_proj, "weight").site(f"{dot}out_proj")
            add(f"{dot}out_proj", f"{dot}out_proj", "weight", site, linear=True, also=path)
            continue
        kind = kind_of(module)
        if kind is not None:
            problem = None
            try:
                site = kind(module).site(path)
            except (WeightFormatError, TargetError) as error:
                site, problem = Site(path, kind.kind, 0, 0), error
            add(path, path, LAYER, site, linear=site.kind == "linear", problem=problem)
            continue
        for slot, parameter in module._parameters.items():
            if parameter is not None and parameter.dim() in (2, 3):
                site = ParameterHost(module, slot).site(f"{dot}{slot}")
                # a stack of one is no expert but a token or a table of positions (ViT)
                experts = parameter.dim() == 3 and parameter.shape[0] > 1
                add(f"{dot}{slot}", path, slot, site, linear=experts)
    layers = max((c.site.layer for c in found if c.site.layer is not None), default=-1) + 1
    return [replace(c, site=replace(c.site, layers=layers)) for c in found]


# -- matching ---------------------------------------------------------------------------------


def _nearest(target: Target, names: Sequence[str]) -> str:
    ends = sorted({n.rsplit(".", 1)[-1] for n in names})
    last = target.pattern.rsplit(".", 1)[-1]
    close = difflib.get_close_matches(last, ends, n=3, cutoff=0.5)
    return f"Nearest names: {', '.join(close)}." if close else f"Names here: {', '.join(ends[:12])}."


def _must_match(target: Target, hits: Sequence[object], found: Sequence[Candidate], what: str) -> None:
    if hits or target.optional:
        return
    kinds = sorted({f"{c.classes[0]} ({c.site.kind})" for c in found})
    raise TargetError(
        f"Every pattern of {what} must match something (or be Target(..., optional=True)); "
        f'"{target}" matches nothing. {_nearest(target, [n for c in found for n in c.aliases])} '
        f"Adaptable here: {', '.join(kinds) or 'nothing'}. See rw.targets(model)."
    )


def _selected(sites: Sites, found: list[Candidate]) -> list[Candidate]:
    hits = {t: [c for c in found if c.hit(t)] for t in (*sites.targets, *sites.exclude)}
    for t in sites.targets:
        _must_match(t, hits[t], found, "targets")
    for t in sites.exclude:
        _must_match(t, hits[t], found, "exclude")
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
    """Row ranges of named parts: q, k, v of a fused qkv (grouped-query sizes from the config)."""
    config = getattr(model, "config", None)
    heads: int = getattr(config, "num_attention_heads", None) or 0
    kv: int = getattr(config, "num_key_value_heads", None) or heads
    width: int = getattr(config, "head_dim", None) or 0
    if heads and not width:
        width = getattr(config, "hidden_size", 0) // heads
    sizes: dict[str, int]
    named = [p for p in parts if isinstance(p, str)]
    if set(named) <= {"gate", "up"}:
        sizes = {"gate": site.rows // 2, "up": site.rows // 2}
    elif set(named) <= {"q", "k", "v"}:
        third = site.rows // 3
        sizes = {"q": third, "k": third, "v": third}
        if heads and width and (heads + 2 * kv) * width == site.rows:
            sizes = {"q": heads * width, "k": kv * width, "v": kv * width}
    else:
        raise TargetError(
            f'Parts are named "q", "k", "v" or "gate", "up", or given as (name, first row, last '
            f"row + 1); found {list(parts)} for {site.name}."
        )
    if sum(sizes.values()) != site.rows:
        raise TargetError(f"The {site.rows} rows of {site.name} do not split into {list(sizes)}; give row ranges.")
    spans, start = {}, 0
    for name, size in sizes.items():
        spans[name] = (name, start, start + size)
        start += size
    return tuple(spans[p] if isinstance(p, str) else tuple(p) for p in parts)


# -- placements -------------------------------------------------------------------------------


def _shared(model: nn.Module) -> dict[int, list[tuple[str, str]]]:
    """id(parameter) -> every (module path, parameter name) that holds it."""
    holders: dict[int, list[tuple[str, str]]] = {}
    for path, module in base_modules(model).items():
        for name, parameter in module._parameters.items():
            if parameter is not None:
                holders.setdefault(id(parameter), []).append((path, name))
    return holders


def _carriers(
    model: nn.Module, c: Candidate, sites: Sites, found: list[Candidate]
) -> tuple[tuple[str, str, bool], ...]:
    modules = base_modules(model)
    name = "weight" if c.slot == LAYER else c.slot
    parameter = modules[c.path]._parameters[name]
    holders = _shared(model)[id(parameter)]
    by_path = {(o.path, o.slot): o for o in found}
    carriers = [(c.path, c.slot, False)]
    for path, other_name in holders:
        other = by_path.get((path, LAYER if other_name == "weight" else other_name))
        if path == c.path or other is None:
            continue
        if other.site.kind == c.site.kind:
            carriers.append((path, other.slot, False))
        elif sites.tied == "refuse":
            raise TiedWeights(
                f"{c.path} and {path} share one weight, so an adapter on one is a choice about "
                f'both. Say Sites(tied="tie") for one shared adapter, used transposed by the '
                f'head, or Sites(tied="untie") to give the head a copy of its own; or leave '
                f"both out of the targets."
            )
        elif sites.tied == "tie":
            carriers.append((path, other.slot, True))
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
    modules = base_modules(model)
    for target in sites.train:
        hits = 0
        for path, module in modules.items():
            classes = [k.__name__ for k in type(module).__mro__]
            dot = f"{path}." if path else ""
            own = path != "" and target.accepts(path, classes, ())
            for name, parameter in module._parameters.items():
                full = f"{dot}{name}"
                if parameter is None or not (own or _within(target, full, modules) or target.accepts(full, (), ())):
                    continue
                if not parameter.is_floating_point():
                    raise TargetError(
                        f"Only floating-point tensors can be trained whole; {full} is stored as "
                        f"{parameter.dtype}. Leave the module unquantised, or adapt it instead."
                    )
                hits += 1
                site = ParameterHost(module, name).site(full)
                yield target, Placement(site, Replace(), ((path, name, False),))
        if not hits and not target.optional:
            names = [n for n in modules if n]
            raise TargetError(
                f"Every pattern of train must match a module or parameter (or be Target(..., "
                f'optional=True)); "{target}" matches nothing. {_nearest(target, names)}'
            )


def _within(target: Target, full: str, modules: Mapping[str, nn.Module]) -> bool:
    """Whether some module around the parameter is the one meant."""
    parts = full.split(".")
    paths = (".".join(parts[:i]) for i in range(1, len(parts)))
    return any(target.accepts(p, [k.__name__ for k in type(modules[p]).__mro__], ()) for p in paths if p in modules)


def resolve(model: nn.Module, structure: Structure, sites: Sites) -> tuple[Placement, ...]:
    """The placements of a recipe on a model; nothing is changed.

    Raises:
        TargetError: a pattern that matches nothing, or a weight that cannot carry an adapter.
        TiedWeights: a target shares its weight with the output head and no choice was made.
        RankError: a rank that does not fit a layer.
    """
    found = candidates(model)
    chosen = _selected(sites, found) if sites.targets else []
    for pattern in (*(o.target for o in sites.overrides), *(t for t, _ in sites.parts)):
        _must_match(pattern, [c for c in chosen if c.hit(pattern)], chosen, "overrides and parts")
    extra: dict[str, TokenRows] = {}
    for target, ids in sites.tokens:
        hits = [c for c in found if c.site.kind == "embedding" and c.hit(target)]
        _must_match(target, hits, found, "tokens")
        for c in hits:
            extra[c.site.name] = TokenRows(tuple(ids))
            chosen = chosen if c in chosen else [*chosen, c]
    for c in chosen:
        if c.problem is not None:
            raise c.problem
    adapted = {c.site.name for c in _selected(sites, found)} if sites.targets else set()

    placements: dict[tuple[tuple[str, str, bool], ...], Placement] = {}
    seen: set[tuple[str, str]] = set()
    for c in sorted(chosen, key=lambda c: c.site.kind != "embedding"):
        if (c.path, c.slot) in seen:
            continue
        carriers = _carriers(model, c, sites, found)
        seen |= {(path, slot) for path, slot, _ in carriers}
        here: Structure | None = None
        if c.site.name in adapted:
            here = _structure_at(model, c, structure, sites)
        if c.site.name in extra:
            here = Stack(here, extra[c.site.name]) if here else extra[c.site.name]
        assert here is not None
        here.factors(c.site)  # a rank or a token id that does not fit raises now
        placements[carriers] = Placement(c.site, here, carriers)
    order = {c.site.name: i for i, c in enumerate(found)}
    result = sorted(placements.values(), key=lambda p: order[p.site.name])
    taken = {path for p in result for path, slot, _ in p.carriers if slot == LAYER}
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
        total = f"{_sites(self.sites)}, {self.parameters:,} trainable parameters"
        return "\n".join([*lines, total])


def _sites(count: int) -> str:
    return f"{count} site" if count == 1 else f"{count} sites"


def trainable_count(placement: Placement) -> int:
    """Trainable parameters of one placement."""
    total = 0
    for factor in placement.structure.factors(placement.site).values():
        size = placement.site.stack or 1
        for n in factor.shape:
            size *= n
        total += size * factor.trainable
    return total


def report(model: nn.Module, structure: Structure, sites: Sites) -> TargetReport:
    """The dry run of a recipe on a model; raises as ``attach`` would."""
    placements = resolve(model, structure, sites)
    by_name = {c.site.name: c for c in candidates(model)}
    counted = {p.site.name: trainable_count(p) for p in placements}
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
