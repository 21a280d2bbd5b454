"""From an adapter to a PEFT folder."""

from __future__ import annotations

import json
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from rankwise import io
from rankwise.adapter import Placement
from rankwise.attachment import Adapter
from rankwise.candidates import base_modules
from rankwise.errors import ConversionError
from rankwise.formats.peft.config import CONFIG, VERSION
from rankwise.formats.peft.layout import METHODS, Place, check, layer_of, places, theirs
from rankwise.formats.peft.pairs import Pair, cut, numerator, pair_of
from rankwise.formats.report import ExportReport
from rankwise.host import host_of
from rankwise.structures import OFT, Replace, Stack, TokenRows
from rankwise.structures.wrappers import under

WEIGHTS = "adapter_model.safetensors"


def _refuse(p: Placement, why: str) -> ConversionError:
    return ConversionError(
        f"PEFT cannot hold {p.structure!r} on {p.site.name} ({p.site.kind}): {why}. Pass rank= to write a plain LoRA "
        f"cut to that rank, its error stated, or rw.merge and save the model."
    )


class _Draft:
    """The file as it grows: its tensors, its settings, and what it cannot say."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.modules: dict[str, Any] = base_modules(adapter.model)
        parameters = [p.site.name for p in adapter.placements if p.site.kind == "parameter"]
        self.places = {p.candidate.site.name: p for p in places(adapter.model, parameters)}
        self.tensors: dict[str, Tensor] = {}
        self.settings: dict[str, Any] = {}
        self.targets: list[str] = []
        self.notes: list[str] = []
        self.errors: dict[str, float] = {}

    def factors(self, p: Placement) -> dict[str, Tensor]:
        return {k: io.whole(v) for k, v in self.adapter[p.site.name].items()}

    def host(self, p: Placement) -> Any:
        path, slot, _ = p.carriers[0]
        return host_of(self.modules[path], slot)

    def add(self, path: str, tensors: Mapping[str, Tensor]) -> None:
        self.tensors |= {f"base_model.model.{path}.{k}": v.contiguous().clone() for k, v in tensors.items()}

    def put(self, p: Placement, kind: str, factors: Mapping[str, Tensor]) -> Place:
        """The factors of a site, by PEFT's names and in its layout."""
        place, module = self.places.get(p.site.name), self.modules[p.carriers[0][0]]
        if place is None or not place.path or (len(p.carriers) > 1 and kind != "LORA"):
            raise _refuse(p, "it has no place for them")
        check(kind, p.site, module)
        self.add(place.path, theirs(kind, place, module, factors))
        self.targets.append(place.key)
        return place

    def spread(self, key: str, values: Mapping[str, Any], patterns: str | None = None) -> None:
        """A setting of every site: the commonest value, and patterns for the others."""
        common = Counter(values.values()).most_common(1)[0][0]
        odd = {f"^{re.escape(k)}": v for k, v in values.items() if v != common}
        if odd and patterns is None:
            raise ConversionError(f"PEFT has one {key} for all sites; found {values}. Pass rank= for a plain LoRA.")
        self.settings |= {key: common} if patterns is None else {key: common, patterns: odd}


# -- the methods ------------------------------------------------------------------------------


def _pair(d: _Draft, p: Placement, rank: int | None) -> Pair:
    f, structure, path = d.factors(p), p.structure, p.carriers[0][0]
    if isinstance(structure, Stack) and isinstance(structure.first, Replace):
        d.add(path, {"base_layer.weight": d.host(p).tensor(f["first_value"])})
        structure, f = structure.second, under("second", f)
    pair = pair_of(structure, f, p.site.rows)
    if pair is None:
        if rank is None:
            raise _refuse(p, "it has no such method")
        pair, d.errors[p.site.name] = cut(structure, f, io.whole(d.host(p).weight()), rank)
    if pair.magnitude is not None:
        if p.site.kind == "parameter" or len(p.carriers) > 1:
            raise _refuse(p, "its DoRA takes no bare parameters and no tied heads")
        if getattr(d.modules[path], "padding_idx", None) is not None:
            d.notes.append(f"{p.site.name}: PEFT moves the padding row, which here stays the base's")
    return pair


def _lora(d: _Draft, placements: list[Placement], rank: int | None) -> None:
    pairs = {p: _pair(d, p, rank) for p in placements}
    root = all(pair.root for pair in pairs.values())
    dora = any(pair.magnitude is not None for pair in pairs.values())
    ranks: dict[str, int] = {}
    alphas: dict[str, float] = {}
    for p, pair in pairs.items():
        if dora and pair.magnitude is None:
            raise _refuse(p, "its DoRA is of all sites or of none")
        f = {"a": pair.a, "b": pair.b, "magnitude": pair.magnitude}
        place = d.put(p, "LORA", {k: v for k, v in f.items() if v is not None})
        r = pair.a.shape[-2]
        alpha = numerator(pair.scale, r, root)
        if (ranks.setdefault(place.key, r), alphas.setdefault(place.key, alpha)) != (r, alpha):
            raise _refuse(p, "both projections of an attention have one rank and one alpha")
        for head, _, transposed in p.carriers[1:]:
            if not transposed:
                raise _refuse(p, "it ties only an embedding and the head")
            d.settings["ensure_weight_tying"] = True
            d.add(head, {"lora_A.weight": pair.b.mT, "lora_B.weight": pair.a.mT})
            ranks[head], alphas[head] = r, alpha
    d.spread("r", ranks, "rank_pattern")
    d.spread("lora_alpha", alphas, "alpha_pattern")
    d.settings |= {"use_dora": dora, "use_rslora": root}


def _adalora(d: _Draft, placements: list[Placement]) -> None:
    structures: dict[Placement, Any] = {p: p.structure for p in placements}
    rank = max(s.rank for s in structures.values())
    d.settings |= {"init_r": rank, "target_r": rank, "lora_alpha": rank, "total_step": 1}
    unit = rank / (rank + 1e-5)  # PEFT's scale under these settings
    for p, s in structures.items():
        f, more = d.factors(p), rank - s.rank
        f = {"a": pad(f["a"], (0, 0, 0, more)), "b": pad(f["b"], (0, more)), "e": pad(f["e"], (0, more))}
        d.put(p, "ADALORA", f | {"e": f["e"] * (s.scale / unit)})


def _products(d: _Draft, placements: list[Placement], kind: str) -> None:
    at: dict[str, Any] = {}
    ranks: dict[str, int] = {}
    for p in placements:
        f = d.factors(p)
        key = d.put(p, kind, f).key
        at[key] = p.structure  # a LoKr without rank: one so large that PEFT keeps both factors whole
        ranks[key] = at[key].rank or max(*f["c"].shape, *f["d"].shape)
    d.spread("r", ranks, "rank_pattern")
    if kind != "HIRA":
        d.spread("alpha", {k: numerator(s.scale, ranks[k]) for k, s in at.items()}, "alpha_pattern")
    if kind == "LOKR":
        d.spread("decompose_factor", {k: s.factor for k, s in at.items()})
        d.spread("decompose_both", {k: s.decompose_both for k, s in at.items()})


def _oft(d: _Draft, placements: list[Placement]) -> None:
    sizes: dict[str, int] = {}
    terms: dict[str, int | None] = {}
    for p in placements:
        assert isinstance(p.structure, OFT)
        if p.structure.terms == 3:
            raise _refuse(p, "its OFT has 4 terms or more")
        q = d.factors(p)["q"]
        key = d.put(p, "OFT", {"q": q if p.structure.terms is None else -q}).key
        sizes[key], terms[key] = p.site.cols // len(q), p.structure.terms
    d.spread("oft_block_size", sizes)
    d.spread("num_cayley_neumann_terms", {k: t or 5 for k, t in terms.items()})
    d.spread("use_cayley_neumann", {k: t is not None for k, t in terms.items()})
    d.settings["r"] = 0


# -- the model's own tensors --------------------------------------------------------------------


def _tokens(d: _Draft, placements: list[Placement], kind: str | None) -> str:
    """Rows of new tokens, beside LoRA or alone; returns the method that they make it."""
    ids: dict[str, tuple[int, ...]] = {p.carriers[0][0]: p.structure.index for p in placements}  # type: ignore
    if d.adapter.recipe.sites.tied == "untie":
        raise _refuse(placements[0], "its token rows always reach a tied head, and these were trained on an untied one")
    alone = kind is None and len(set(ids.values())) == 1
    if kind != "LORA" and not alone:
        raise _refuse(placements[0], f"token rows stand alone, the same everywhere, or beside LoRA, not {kind}")
    for p in placements:
        infix = "" if alone else "token_adapter."
        d.add(p.carriers[0][0], {f"{infix}trainable_tokens_delta": d.factors(p)["rows"]})
    if not alone:
        d.settings["trainable_token_indices"] = ids
        return "LORA"
    d.targets += ids
    d.settings["token_indices"] = next(iter(ids.values()))
    return "TRAINABLE_TOKENS"


def _whole(d: _Draft, placements: list[Placement], kind: str) -> None:
    """Tensors trained whole: biases of adapted layers, else modules_to_save."""
    saved: list[str] = []
    for p in sorted(placements, key=lambda p: p.site.name.count(".")):
        path, slot, _ = p.carriers[0]
        value = d.host(p).tensor(d.factors(p)["value"])
        if slot == "bias" and path in d.targets and kind in ("LORA", "ADALORA", "OFT"):
            d.settings["bias"] = "oft_only" if kind == "OFT" else "lora_only"
            d.add(path, {"base_layer.bias": value})
            continue
        if not any(f"{path}.".startswith(f"{s}.") for s in saved):
            if path == "" or any(f"{t}.".startswith(f"{path}.") for t in d.targets):
                raise _refuse(p, "it saves a module whole or adapts what is in it, not both")
            saved.append(path)
            state = d.modules[path].state_dict()  # PEFT saves all of the module
            d.add(path, {k: io.whole(v) for k, v in state.items() if "adapters" not in k.split(".")})
        d.add(path, {slot: value})
    if saved:
        d.settings["modules_to_save"] = saved


# -- the files ----------------------------------------------------------------------------------


def _method(d: _Draft, placements: list[Placement], rank: int | None) -> str | None:
    """The one method of all sites, or LoRA where they have none in common."""
    kinds = {m.structure: kind for kind, m in METHODS.items()}
    found = {kinds.get(type(p.structure), "LORA") for p in placements}
    kind = found.pop() if len(found) == 1 else "LORA" if found else None
    layers = {layer_of(p.site, d.modules[p.carriers[0][0]]) for p in placements}
    fits = kind is None or layers <= set(METHODS[kind].layers)
    return kind if fits and (rank is None or kind in (None, "ADALORA")) else "LORA"


def write(adapter: Adapter, path: str | Path, rank: int | None = None) -> ExportReport:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` for PEFT 0.21.2.

    A PiSSA is written as plain LoRA of twice the rank, so that nothing is recomputed on load. Settings that are not
    written have PEFT's defaults.

    Args:
        adapter: the adapter, on its model.
        path: folder to write into.
        rank: of the plain LoRA that stands in for a structure which PEFT does not have.

    Returns:
        What was written and how exact it is.

    Raises:
        ConversionError: a structure or a site that PEFT cannot hold, and no rank was given.
        SaveError: the disk is full or not writable.
    """
    d, folder = _Draft(adapter), Path(path)
    whole = [p for p in adapter.placements if isinstance(p.structure, Replace)]
    tokens = [p for p in adapter.placements if isinstance(p.structure, TokenRows)]
    rest = [p for p in adapter.placements if p not in whole and p not in tokens]
    kind = _method(d, rest, rank)
    with torch.no_grad():
        if kind == "LORA":
            _lora(d, rest, rank)
        elif kind == "ADALORA":
            _adalora(d, rest)
        elif kind == "OFT":
            _oft(d, rest)
        elif kind is not None:
            _products(d, rest, kind)
        kind = _tokens(d, tokens, kind) if tokens else kind or "LORA"
        _whole(d, whole, kind)
    text = json.dumps(_config(d, kind), indent=2, sort_keys=True)

    def save_text(file: Path) -> None:
        file.write_text(text, encoding="utf-8")

    io.atomically(folder / WEIGHTS, lambda file: save_file(d.tensors, file, {"format": "pt"}))
    io.atomically(folder / CONFIG, save_text)
    return ExportReport(folder, kind, len(adapter), d.errors, tuple(d.notes))


def _config(d: _Draft, kind: str) -> dict[str, Any]:
    cls = type(d.adapter.model)
    cls = getattr(cls, "grafted_base", cls)
    mapping: dict[str, Any] = {"auto_mapping": {"base_model_class": cls.__name__, "parent_library": cls.__module__}}
    if cls.__name__.endswith(("ForCausalLM", "LMHeadModel")):
        mapping = {"task_type": "CAUSAL_LM"}
    parameters = [t for t in d.targets if t not in d.modules]
    targets: Any = sorted(set(d.targets) - set(parameters))
    clash = any(name.endswith(f".{t}") for t in targets for name in d.modules.keys() - set(targets))
    if any(type(d.modules[t]).__name__ == "Conv1D" for t in targets):
        d.settings["fan_in_fan_out"] = True
    p = d.adapter.recipe.dropout
    key = {"LORA": "lora_dropout", "ADALORA": "lora_dropout", "HIRA": "hira_dropout"}.get(kind)
    if key and not parameters:
        d.settings[key] = p
    elif p:
        d.notes.append(f"dropout={p} of training, which PEFT has not for these sites")
    if clash and kind != "TRAINABLE_TOKENS":  # PEFT takes the ends of names
        targets = "|".join(re.escape(t) for t in targets)
    if parameters:
        d.settings["target_parameters"] = parameters
    name = getattr(d.adapter.model, "name_or_path", None) or None
    own = {"peft_type": kind, "target_modules": targets, "base_model_name_or_path": name, "inference_mode": True}
    return {**d.settings, **mapping, **own, "peft_version": VERSION}
