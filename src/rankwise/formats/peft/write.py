"""From an adapter to a PEFT folder."""

from __future__ import annotations

import json
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import nn

from rankwise import io
from rankwise.adapter import Placement
from rankwise.attach import Adapter
from rankwise.errors import ConversionError
from rankwise.formats.peft.config import CONFIG, DEFAULTS
from rankwise.formats.peft.draft import Draft, put_tokens, put_whole
from rankwise.formats.peft.encode import LOWRANK, Pair, cut, encode, encode_pair, method, pair_of, refuse
from rankwise.formats.report import ExportReport
from rankwise.host import ParameterHost
from rankwise.structures import OFT, LoHa, LoKr, Replace, Stack, SVDForm, TokenRows
from rankwise.structures.wrappers import row_norm, under

WEIGHTS = "adapter_model.safetensors"
_CAUSAL = re.compile(r"(ForCausalLM|LMHeadModel)$")


def _tidy(alpha: float) -> float:
    """A numerator of the scale, an integer where it is one but for rounding."""
    near = round(alpha)
    return near if math.isclose(alpha, near, rel_tol=1e-9) else alpha


# -- low rank ---------------------------------------------------------------------------------


def _lora(d: Draft, placements: Iterable[Placement], rank: int | None) -> None:
    pairs: dict[str, Pair] = {}
    at: dict[str, Placement] = {}
    bases: dict[str, Any] = {}
    rules = set()
    for p in placements:
        f, structure, path = d.factors(p), p.structure, p.carriers[0][0]
        pair, base = pair_of(structure, f, p.site), None
        if isinstance(structure, Stack) and isinstance(structure.first, Replace):
            base, structure = f["first_value"], structure.second
            pair = pair_of(structure, under("second", f), p.site)
            stored = isinstance(d.modules[path], nn.Linear)
            if pair is not None:
                d.add(path, {"base_layer.weight": base if stored else base.mT})
        if pair is None:
            if rank is None:
                raise refuse(p.site, p.structure, "it has no such method")
            pair, d.errors[p.site.name] = cut(p.structure, f, d.weight(p), rank)
        pairs[p.site.name], at[p.site.name], bases[p.site.name] = pair, p, base
        rules.add(getattr(_leaf(structure), "scale_rule", "alpha/r"))
    dora = any(pair.magnitude is not None for pair in pairs.values())
    for name, pair in pairs.items() if dora else ():
        p, path = at[name], at[name].carriers[0][0]
        if p.site.kind == "parameter" or len(p.carriers) > 1:
            raise refuse(p.site, p.structure, "its DoRA takes no bare parameters and no tied heads")
        if pair.magnitude is None:  # a magnitude that changes nothing
            w = d.weight(p) if bases[name] is None else bases[name]
            m = row_norm(w + pair.scale * (pair.b @ pair.a))
            pairs[name] = Pair(pair.a, pair.b, pair.scale, m)
        if getattr(d.modules[path], "padding_idx", None) is not None:
            d.notes.append(f"{name}: PEFT moves the padding row, which here stays the base's")
    root = rules == {"alpha/sqrt(r)"}
    ranks: dict[str, float] = {}
    alphas: dict[str, float] = {}

    def note(key: str, pair: Pair) -> None:
        r = pair.rank
        ranks[key], alphas[key] = r, _tidy(pair.scale * (r**0.5 if root else r))

    stacks: dict[str, list[str]] = {}
    for name, pair in pairs.items():
        p = at[name]
        path, slot, _ = p.carriers[0]
        module = d.modules[path]
        owner = path.rpartition(".")[0] if path.endswith("out_proj") else path
        if p.site.kind == "parameter" and isinstance(d.modules.get(owner), nn.MultiheadAttention):
            if owner not in d.targets:
                _attention(d, owner, pairs, at, note)
        elif p.site.kind == "parameter":
            stacks.setdefault(path, []).append(slot)
            note(name, pair)
        else:
            d.targets.append(path)
            d.add(path, encode_pair(pair, p.site, module))
            note(path, pair)
            for head, _, transposed in p.carriers[1:]:
                if not transposed:
                    raise refuse(p.site, p.structure, "it ties only an embedding and the head")
                d.settings["ensure_weight_tying"] = True
                d.add(head, {"lora_A.weight": pair.b.mT, "lora_B.weight": pair.a.mT})
                note(head, pair)
    for path, slots in stacks.items():
        if path == "":
            raise ConversionError("PEFT cannot adapt a parameter of the outermost module.")
        order = [n for n in d.modules[path]._parameters if n in slots]
        for i, slot in enumerate(order):  # nested, the first registered innermost
            name = f"{path}.{slot}"
            inner = path + ".base_layer" * (len(order) - 1 - i)
            d.parameters.append(name)
            d.add(inner, encode_pair(pairs[name], at[name].site, d.modules[path]))
    d.spread("r", ranks, "rank_pattern")
    d.spread("lora_alpha", alphas, "alpha_pattern")
    d.settings |= {"use_dora": dora, "use_rslora": root}
    d.settings["target_parameters"] = d.parameters or None


def _leaf(structure: Any) -> Any:
    while hasattr(structure, "inner"):
        structure = structure.inner
    return structure


def _attention(d: Draft, owner: str, pairs: Mapping[str, Pair], at: Mapping[str, Placement], note: Any) -> None:
    """Both projections of an ``nn.MultiheadAttention``, which PEFT adapts together."""
    names = (f"{owner}.in_proj_weight", f"{owner}.out_proj")
    mine = [n for n in pairs if n.startswith(f"{owner}.")]
    if not set(mine) <= set(names):
        raise refuse(at[mine[0]].site, at[mine[0]].structure, "it adapts packed projections only")
    width = d.modules[owner].embed_dim
    rank = max(pairs[n].rank for n in mine)
    scale = pairs[mine[0]].scale
    dot = {names[0]: "", names[1]: "base_layer.out_proj."}
    for name, rows in zip(names, (3 * width, width), strict=True):
        empty = Pair(torch.zeros(1, width), torch.zeros(rows, 1), scale)
        pair = pairs.get(name, empty).padded(rank)
        module = d.modules[owner]
        site = ParameterHost(module, "in_proj_weight").site(names[0])
        if name == names[1]:
            site = ParameterHost(module.out_proj, "weight").site(name)
        even = Pair(pair.a, pair.b * (pair.scale / scale), scale)
        d.add(owner, {dot[name] + k: v for k, v in encode_pair(even, site, module).items()})
    d.targets.append(owner)
    note(owner, Pair(torch.zeros(rank, width), torch.zeros(width, rank), scale))


def _adalora(d: Draft, placements: list[Placement]) -> None:
    rank = max(p.structure.rank for p in placements)  # type: ignore[attr-defined]
    d.settings |= {"init_r": rank, "target_r": rank, "lora_alpha": rank, "total_step": 1}
    unit = rank / (rank + 1e-5)  # PEFT's scale under these settings
    for p in placements:
        f, structure = d.factors(p), p.structure
        assert isinstance(structure, SVDForm)
        pair = Pair(f["a"], f["b"], 1.0).padded(rank)
        e = nn.functional.pad(f["e"] * (structure.scale / unit), (0, rank - structure.rank))
        path = p.carriers[0][0]
        d.targets.append(path)
        d.add(path, {"lora_A": pair.a, "lora_B": pair.b, "lora_E": e.unsqueeze(-1)})


# -- the others -------------------------------------------------------------------------------


def _other(d: Draft, placements: list[Placement], kind: str) -> None:
    ranks, alphas = {}, {}
    for p in placements:
        path, structure = p.carriers[0][0], p.structure
        if len(p.carriers) > 1:
            raise refuse(p.site, structure, f"its {kind} knows no tied weights")
        f = d.factors(p)
        d.targets.append(path)
        d.add(path, encode(structure, f, p.site, d.modules[path]))
        rank = getattr(structure, "rank", 0)
        if isinstance(structure, LoKr) and rank is None:  # so large that PEFT keeps both whole
            rank = max(*f["c"].shape, *f["d"].shape)
        ranks[path] = rank
        if isinstance(structure, LoHa | LoKr):
            alphas[path] = _tidy(structure.scale * rank)
    if kind == "OFT":
        _blocks(d, placements)
        return
    d.spread("r", ranks, "rank_pattern")
    if alphas:
        d.spread("alpha", alphas, "alpha_pattern")
    if kind == "LOKR":
        kr: Any = {p.carriers[0][0]: p.structure for p in placements}
        d.spread("decompose_factor", {k: s.factor for k, s in kr.items()})
        low = {k: s.decompose_both for k, s in kr.items() if s.rank is not None}
        d.spread("decompose_both", low)


def _adjusted(size: int, cols: int) -> int:
    """The block that PEFT takes where ``size`` is asked for: the nearest divisor."""
    divisors = [b for b in range(1, cols + 1) if cols % b == 0]
    return min(divisors, key=lambda b: (abs(b - size), b))


def _blocks(d: Draft, placements: list[Placement]) -> None:
    terms = set()
    blocks: dict[str, int] = {}
    for p in placements:
        assert isinstance(p.structure, OFT)
        terms.add(p.structure.terms)
        count = d.adapter[p.site.name]["q"].shape[0]
        blocks[p.site.name] = p.site.cols // count
    if len(terms) > 1 or terms == {3}:
        raise ConversionError(
            f"PEFT's OFT has one number of terms for all sites, 4 or more; found {terms}. Use "
            f"terms=None or 5, or pass rank= to write a plain LoRA cut to that rank."
        )
    one = next(iter(terms))
    d.settings["use_cayley_neumann"] = one is not None
    d.settings["num_cayley_neumann_terms"] = one or 5
    size = Counter(blocks.values()).most_common(1)[0][0]
    if all(_adjusted(size, p.site.cols) == blocks[p.site.name] for p in placements):
        d.settings |= {"oft_block_size": size, "r": 0}
        return
    counts = {p.site.cols // blocks[p.site.name] for p in placements}
    if len(counts) > 1:
        raise ConversionError(
            f"PEFT's OFT has one block size, or one number of blocks; found {blocks}. Pass rank= "
            f"to write a plain LoRA cut to that rank, its error stated."
        )
    d.settings |= {"oft_block_size": 0, "r": counts.pop()}


# -- the files --------------------------------------------------------------------------------


def _kind(placements: list[Placement], rank: int | None) -> str | None:
    """The one method of all sites, or LoRA where they have none in common."""
    kinds = {method(p.structure) for p in placements}
    if not placements:
        return None
    only = next(iter(kinds)) if len(kinds) == 1 else None
    if only == "ADALORA":
        convolution = {len(p.site.shape) for p in placements if p.site.kind == "conv"}
        fits = all(p.site.kind in ("linear", "conv") for p in placements)
        return only if fits and convolution <= {4} else LOWRANK
    return LOWRANK if only is None or rank is not None else only


def write(adapter: Adapter, path: str | Path, rank: int | None = None) -> ExportReport:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` for PEFT 0.21.2.

    A PiSSA is written as plain LoRA of twice the rank, so that nothing is recomputed on load.

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
    d = Draft(adapter)
    whole = [p for p in adapter.placements if isinstance(p.structure, Replace)]
    tokens = [p for p in adapter.placements if isinstance(p.structure, TokenRows)]
    rest = [p for p in adapter.placements if p not in whole and p not in tokens]
    kind = _kind(rest, rank)
    with torch.no_grad():
        if kind == LOWRANK:
            _lora(d, rest, rank)
        elif kind == "ADALORA":
            _adalora(d, rest)
        elif kind is not None:
            _other(d, rest, kind)
        if tokens:
            kind = put_tokens(d, tokens, kind)
        kind = kind or LOWRANK
        put_whole(d, whole, kind)
    _dropout(d, kind)
    config = _settings(d, kind)
    folder = Path(path)
    flat = {k: v.contiguous().clone() for k, v in d.tensors.items()}
    io.atomically(folder / WEIGHTS, lambda file: save_file(flat, file, {"format": "pt"}))
    text = json.dumps(config, indent=2, sort_keys=True)

    def settings(file: Path) -> None:
        file.write_text(text, encoding="utf-8")

    io.atomically(folder / CONFIG, settings)
    return ExportReport(folder, kind, len(adapter), d.errors, tuple(d.notes))


def _dropout(d: Draft, kind: str) -> None:
    p = d.adapter.recipe.dropout
    key = {"LORA": "lora_dropout", "ADALORA": "lora_dropout", "HIRA": "hira_dropout"}.get(kind)
    if p and key and not d.parameters:
        d.settings[key] = p
    elif p:
        d.notes.append(f"dropout={p} of training, which PEFT has not for these sites")


def _settings(d: Draft, kind: str) -> dict[str, Any]:
    cls = type(d.adapter.model)
    cls = getattr(cls, "grafted_base", cls)
    causal = _CAUSAL.search(cls.__name__) is not None
    mapping = {"base_model_class": cls.__name__, "parent_library": cls.__module__}
    targets = sorted(set(d.targets))
    others = set(d.modules) - set(targets)
    clash = any(o.endswith(f".{t}") for t in targets for o in others)
    if clash and kind != "TRAINABLE_TOKENS":
        targets: Any = "|".join(re.escape(t) for t in targets)
    transposed = {type(d.modules[t]).__name__ == "Conv1D" for t in set(d.targets)}
    own = {
        "auto_mapping": None if causal else mapping,
        "base_model_name_or_path": getattr(d.adapter.model, "name_or_path", None) or None,
        "peft_type": kind,
        "target_modules": targets,
        "task_type": "CAUSAL_LM" if causal else None,
    }
    if "fan_in_fan_out" in DEFAULTS[kind]:
        own["fan_in_fan_out"] = transposed == {True}
    return {**DEFAULTS[kind], **d.settings, **own}
