"""From an adapter to a PEFT folder."""

import json
import math
import re
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import torch
from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad

from rankwise import io
from rankwise.adapter import Dropout, Placement
from rankwise.attachment import Adapter
from rankwise.candidates import base_modules
from rankwise.errors import ConversionError
from rankwise.formats.peft.config import CONFIG, DROPOUTS, VERSION
from rankwise.formats.peft.layout import METHODS, Place, check, made_anew, method_of, places, theirs
from rankwise.formats.peft.threefactor import SHARED
from rankwise.formats.report import ExportReport
from rankwise.host import LAYER, host_of, kind_of
from rankwise.structures import OFT, Added, Chain, LoRA, LoRAFA, Magnitude, Replace, Rows, Stack, Structure, TokenRows
from rankwise.structures.convolutions import CrossGroup, PatchOFT
from rankwise.structures.structure import check_rank
from rankwise.structures.wrappers import under

WEIGHTS = "adapter_model.safetensors"
# PEFT takes targets of these names for the parts of experts that a model stacks as gate_up_proj, and drops the layers
_PARTS = re.compile(r".*\.(gate|gate_proj|up_proj|down_proj|w1|w2|w3)")


def _refuse(p: Placement, why: str) -> ConversionError:
    return ConversionError(
        f"PEFT cannot hold {p.structure!r} on {p.site.name}: {why}. Merge the adapter (rw.merge) and save the model."
    )


class _Draft:
    """The file as it grows: its method, tensors and settings, and what it cannot say."""

    def __init__(self, adapter: Adapter, rank: int | None, placements: list[Placement]) -> None:
        self.adapter, self.rank, self.error = adapter, rank, 0.0
        self.modules: dict[str, Any] = base_modules(adapter.model)
        self.kind = method_of(self.modules, placements) if placements else None
        stacks = self.kind == "LORA" and any("gate_up_proj" in m._parameters for m in self.modules.values())
        parameters = {
            f"{path}.{'weight' if slot == LAYER else slot}".removeprefix(".")
            for path, slot, _ in [p.carriers[0] for p in placements]
            if kind_of(self.modules[path]) is None or (stacks and _PARTS.fullmatch(path))
        }
        self.places = {p.candidate.site.name: p for p in places(adapter.model, parameters)}
        self.tensors: dict[str, Tensor] = {}
        self.settings: dict[str, Any] = {}
        self.targets: list[str] = []
        self.scales: dict[str, float] = {}  # of a LoRA by target
        self.notes: list[str] = []

    def factors(self, p: Placement) -> dict[str, Tensor]:
        return {k: io.whole(self.adapter[p.site.name][k]) for k in p.structure.factors(p.site)}

    def host(self, p: Placement) -> Any:
        path, slot, _ = p.carriers[0]
        return host_of(self.modules[path], slot)

    def add(self, path: str, tensors: Mapping[str, Tensor]) -> None:
        self.tensors |= {f"base_model.model.{path}.{k}": v.contiguous().clone() for k, v in tensors.items()}

    def put(self, p: Placement, factors: Mapping[str, Tensor]) -> Place:
        """The factors of a site, by PEFT's names and in its layout."""
        kind, place, module = self.kind or "", self.places.get(p.site.name), self.modules[p.carriers[0][0]]
        if place is None or not place.path or (len(p.carriers) > 1 and kind != "LORA"):
            raise _refuse(p, "it has no place for them")
        check(kind, p.site, module, p.structure)
        if p.site.kind == "parameter" and kind_of(module) and place.path == place.candidate.path:
            self.notes.append(f"{p.site.name}: where the model reads this weight itself, PEFT's adapter does not act")
        self.add(place.path, theirs(kind, place, module, factors))
        self.targets.append(place.key)
        return place

    def share(self, p: Placement, factors: Mapping[str, Tensor]) -> None:
        """Factors that all layers have in common."""
        for name, value in factors.items():
            held = self.tensors.setdefault(f"base_model.{METHODS[self.kind or ''].common[name]}", value.contiguous())
            if not torch.equal(held, value):
                why = f"it has one {name} for all layers, and here layers of unlike shapes have their own"
                raise _refuse(p, f"{why} (VeRA takes widths=(most outputs, most inputs) for that)")

    def spread(self, key: str, values: Mapping[str, Any], patterns: str | None = None) -> None:
        """A setting of every site: the commonest value, and patterns for the others."""
        common = Counter(values.values()).most_common(1)[0][0]
        plain = patterns in ("block_size_pattern", "n_frequency_pattern")  # PEFT finds them behind a dot, or as is
        odd = {k if plain else f"^{re.escape(k)}": v for k, v in values.items() if v != common}
        if odd and patterns is None:
            raise ConversionError(f"PEFT has one {key} for all sites; found {values}. Make them one, or merge.")
        self.settings |= {key: common} if patterns is None else {key: common, patterns: odd}


# -- LoRA -----------------------------------------------------------------------------------------


def _numerator(scale: float, rank: int, root: bool = False) -> float:
    """The alpha of a scale, an integer where it is one but for rounding."""
    alpha = scale * rank ** (0.5 if root else 1)
    return round(alpha) if math.isclose(alpha, round(alpha), rel_tol=1e-9) else alpha


Pair: TypeAlias = tuple[LoRA | LoRAFA | CrossGroup, dict[str, Tensor]]


def _unit(a: Tensor, b: Tensor) -> tuple[LoRA, dict[str, Tensor]]:
    return LoRA(a.shape[-2], None), {"a": a, "b": b}


def _exactly(structure: Structure, f: dict[str, Tensor], rows: int) -> Pair | None:
    """A LoRA of this map and its factors, a DoRA's magnitude among them, where there is one; rows of the weight."""
    if isinstance(structure, LoRA | LoRAFA | CrossGroup):
        return structure, f
    if isinstance(structure, Magnitude):
        found = _exactly(structure.inner, f, rows)
        return found and (found[0], found[1] | {"magnitude": f["magnitude"]})
    if isinstance(structure, Rows):
        each = [(_exactly(structure.inner, under(name, f), rows), a, rows - b) for name, a, b in structure.parts]
        parts = [(*low, above, below) for low, above, below in each if low and "magnitude" not in low[1]]
        if len(parts) < len(each):
            return None
        b = torch.cat([pad(f["b"] * s.scale, (0, 0, above, below)) for s, f, above, below in parts], -1)
        return _unit(torch.cat([f["a"] for _, f, _, _ in parts], -2), b)
    op = structure.delta(f) if isinstance(structure, Added | Chain) else None
    low = op and op.lower()
    return low and _unit(low.right, low.left)


def _nearest(d: _Draft, p: Placement, structure: Structure, f: dict[str, Tensor]) -> Pair:
    """The LoRA of the draft's rank that is nearest to an update; how far it is goes into the draft."""
    w = d.host(p).weight().detach().float().cpu()
    u, s, vt = torch.linalg.svd((structure.weight(f, w) - w).double(), full_matrices=False)
    rank = check_rank(d.rank or 1, p.site, s.shape[-1])
    lost = float((s[..., rank:].square().sum() / s.square().sum().clamp_min(1e-300)).sqrt())
    d.error = max(d.error, lost)
    d.notes.append(f"{p.site.name}: the nearest LoRA of rank {rank}, {lost:.2%} of the update is lost")
    root = s[..., :rank].sqrt()
    return _unit((root.unsqueeze(-1) * vt[..., :rank, :]).float(), (u[..., :rank] * root.unsqueeze(-2)).float())


def _pair(d: _Draft, p: Placement) -> Pair:
    f, structure, path = d.factors(p), p.structure, p.carriers[0][0]
    if isinstance(structure, Stack) and isinstance(structure.first, Replace):
        d.add(path, {"base_layer.weight": d.host(p).tensor(f["first_value"])})
        structure, f = structure.second, under("second", f)
    found = _exactly(structure, f, p.site.rows)
    if found is None and d.rank is None:
        raise _refuse(p, "it has no such method, or not for every layer; rank=R writes the nearest LoRA of that rank")
    found = found or _nearest(d, p, structure, f)
    if "magnitude" in found[1]:
        bare = p.site.kind == "parameter" or d.places[p.site.name].key not in d.modules
        if bare or len(p.carriers) > 1 or p.site.groups > 1:
            raise _refuse(p, "its DoRA takes no bare parameters, no tied heads and no groups")
        if getattr(d.modules[path], "padding_idx", None) is not None:
            d.notes.append(f"{p.site.name}: PEFT moves the padding row, which here stays the base's")
    elif p.site.groups > 1 and isinstance(found[0], LoRA | LoRAFA):  # as factors that could cross the groups and do not
        s, g, a = found[0], p.site.groups, found[1]["a"]
        return CrossGroup(s.rank * g, None), {"a": torch.block_diag(*[a] * g), "b": found[1]["b"] * s.scale}
    return found


def _lora(d: _Draft, placements: list[Placement]) -> None:
    pairs = {p: _pair(d, p) for p in placements}
    root = all(s.scale_rule == "alpha/sqrt(r)" for s, _ in pairs.values())
    dora = any("magnitude" in f for _, f in pairs.values())
    said: dict[str, tuple[int, float]] = {}
    for p, (s, f) in pairs.items():
        if dora and "magnitude" not in f:
            raise _refuse(p, "its DoRA is of all sites or of none")
        key, size = d.put(p, f).key, (s.rank, _numerator(s.scale, s.rank, root))
        d.scales[key] = s.scale
        if said.setdefault(key, size) != size:
            raise _refuse(p, "both projections of an attention have one rank and one alpha")
        for head, _, transposed in p.carriers[1:]:
            if not transposed:
                raise _refuse(p, "it ties only an embedding and the head")
            d.settings["ensure_weight_tying"] = True
            d.add(head, {"lora_A.weight": f["b"].mT, "lora_B.weight": f["a"].mT})
            said[head] = size
    d.spread("r", {key: r for key, (r, _) in said.items()}, "rank_pattern")
    d.spread("lora_alpha", {key: alpha for key, (_, alpha) in said.items()}, "alpha_pattern")
    d.settings |= {"use_dora": dora, "use_rslora": root}


# -- the other methods ----------------------------------------------------------------------------


def _adalora(d: _Draft, placements: list[Placement]) -> None:
    structures: dict[Placement, Any] = {p: p.structure for p in placements}
    rank = max(s.rank for s in structures.values())
    d.settings |= {"init_r": rank, "target_r": rank, "lora_alpha": rank, "total_step": 1}
    unit = rank / (rank + 1e-5)  # PEFT's scale under these settings
    for p, s in structures.items():
        f, more = d.factors(p), rank - s.rank
        e = pad(f["e"] * (s.scale / unit), (0, more))
        d.put(p, {"a": pad(f["a"], (0, 0, 0, more)), "b": pad(f["b"], (0, more)), "e": e})


def _products(d: _Draft, placements: list[Placement]) -> None:
    at: dict[str, Any] = {}
    ranks: dict[str, int] = {}
    for p in placements:
        f = d.factors(p)
        key = d.put(p, f).key
        at[key] = p.structure  # a LoKr without rank: one so large that PEFT keeps both factors whole
        ranks[key] = at[key].rank or max(*f["c"].shape, *f["d"].shape)
    d.spread("r", ranks, "rank_pattern")
    if d.kind != "HIRA":
        d.spread("alpha", {k: _numerator(s.scale, ranks[k]) for k, s in at.items()}, "alpha_pattern")
    if d.kind == "LOKR":
        d.spread("decompose_factor", {k: s.factor for k, s in at.items()})
        d.spread("decompose_both", {k: s.decompose_both for k, s in at.items()})


def _oft(d: _Draft, placements: list[Placement]) -> None:
    at: dict[str, tuple[int, int | None]] = {}  # block size and terms
    for p in placements:
        assert isinstance(p.structure, OFT | PatchOFT)
        q, n = d.factors(p)["q"], p.structure.terms
        if isinstance(p.structure, OFT) and p.site.kernel * p.site.groups > 1:
            raise _refuse(p, "it rotates overlapping patches of all channels and adds them up, which is PatchOFT")
        if n == 3:
            raise _refuse(p, "its OFT has 4 terms or more")
        at[d.put(p, {"q": q if n is None else -q}).key] = p.site.cols * p.site.groups // len(q), n
    d.spread("oft_block_size", {k: block for k, (block, _) in at.items()})
    d.spread("num_cayley_neumann_terms", {k: n or 5 for k, (_, n) in at.items()})
    d.spread("use_cayley_neumann", {k: n is not None for k, (_, n) in at.items()})
    d.settings["r"] = 0


def _tinylora(d: _Draft, placements: list[Placement]) -> None:
    """The vectors, which hold the scale, are counted in the model's order."""
    order, sizes = [*d.modules], {}
    for i, p in enumerate(sorted(placements, key=lambda p: order.index(p.carriers[0][0]))):
        s: Any = p.structure
        f = d.factors(p)
        d.tensors[f"{SHARED}.tinylora_v.{i}"] = f.pop("v") * s.scale
        sizes[d.put(p, f).key] = s.rank, s.size
    d.spread("r", {key: r for key, (r, _) in sizes.items()})
    d.spread("u", {key: u for key, (_, u) in sizes.items()})


def _plain(d: _Draft, placements: list[Placement]) -> None:
    """A method whose table entry says all."""
    said: dict[str, dict[str, Any]] = {}
    method = METHODS[d.kind or ""]
    most = max(p.site.rows for p in placements), max(p.site.cols for p in placements)
    for p in placements:
        f = d.factors(p)
        found = method.settings(p.structure, p.site, f) if method.settings else {}
        common = {k: f.pop(k) for k in method.common}
        d.share(p, method.sized(common, *most) if method.sized else common)
        if rest := f.keys() - method.names.keys():
            anew = made_anew(p.structure, p.site, d.modules[p.carriers[0][0]])
            if odd := [k for k in rest if not torch.allclose(f.pop(k), anew[k].cpu(), rtol=1e-4, atol=1e-6)]:
                raise _refuse(p, f"it makes {odd} anew from this model's weight, which gives others")
        said[d.put(p, f).key] = found
    for name in {name: None for found in said.values() for name in found}:
        values = {key: found[name] for key, found in said.items()}
        if name == "feedforward_modules":
            d.settings[name] = [key for key, forward in values.items() if forward]
        else:
            d.spread(name, values, method.patterns.get(name))


_WRITERS = {
    **{"LORA": _lora, "ADALORA": _adalora, "OFT": _oft, "TINYLORA": _tinylora},
    **dict.fromkeys(("LOHA", "LOKR", "HIRA"), _products),
}


# -- the model's own tensors --------------------------------------------------------------------


def _tokens(d: _Draft, placements: list[Placement]) -> None:
    """Rows of new tokens, beside LoRA or alone, which is a method of its own."""
    ids = {p.carriers[0][0]: p.structure.index for p in placements if isinstance(p.structure, TokenRows)}
    if d.adapter.recipe.sites.tied == "untie":
        raise _refuse(placements[0], "its token rows always reach a tied head, and these were trained on an untied one")
    alone = d.kind is None and len(set(ids.values())) == 1
    if d.kind != "LORA" and not alone:
        raise _refuse(placements[0], f"token rows stand alone, the same everywhere, or beside LoRA, not {d.kind}")
    for p in placements:
        infix = "" if alone else "token_adapter."
        d.add(p.carriers[0][0], {f"{infix}trainable_tokens_delta": d.factors(p)["rows"]})
    if alone:
        d.targets += ids
        d.kind, d.settings["token_indices"] = "TRAINABLE_TOKENS", next(iter(ids.values()))
    else:
        d.settings["trainable_token_indices"] = ids


def _lora_bias(d: _Draft, p: Placement, path: str, value: Tensor) -> None:
    """A bias that the layer itself has not: PEFT's has the LoRA's scale, and all layers have one."""
    fits = all("bias" in getattr(d.modules.get(t), "_parameters", ()) for t in d.targets)
    if not d.scales.get(path) or d.settings["use_dora"] or not fits:
        raise _refuse(p, "a bias of its own goes with plain LoRA there, and on linear layers and convolutions only")
    d.settings["lora_bias"] = True
    d.add(path, {"lora_B.bias": value / d.scales[path]})
    for key, b in [(k, v) for k, v in d.tensors.items() if k.endswith(".lora_B.weight")]:
        d.tensors.setdefault(key.replace(".lora_B.weight", ".lora_B.bias"), torch.zeros(len(b), dtype=b.dtype))


def _whole(d: _Draft, placements: list[Placement]) -> None:
    """Tensors trained whole: biases of adapted layers, else modules_to_save."""
    saved: list[str] = []
    for p in sorted(placements, key=lambda p: p.site.name.count(".")):
        path, slot, _ = p.carriers[0]
        value = d.host(p).tensor(d.factors(p)["value"])
        if slot == "bias" and d.modules[path]._parameters[slot] is None:
            _lora_bias(d, p, path, value)
            continue
        if slot == "bias" and path in d.targets and d.kind in ("LORA", "ADALORA", "OFT"):
            d.settings["bias"] = "oft_only" if d.kind == "OFT" else "lora_only"
            d.add(path, {"base_layer.bias": value})
            continue
        if not any(f"{path}.".startswith(f"{s}.") for s in saved):
            if path == "" or any(f"{t}.".startswith(f"{path}.") for t in d.targets):
                raise _refuse(p, "it saves a module whole or adapts what is in it, not both")
            saved.append(path)
            held = d.modules[path].state_dict().items()  # PEFT saves all of the module
            d.add(path, {k: io.whole(v) for k, v in held if "adapters" not in k.split(".")})
        d.add(path, {slot: value})
    d.settings |= {"modules_to_save": saved} if saved else {}


# -- the files ----------------------------------------------------------------------------------


def write(adapter: Adapter, path: str | Path, rank: int | None = None) -> ExportReport:
    """Write ``adapter_config.json`` and ``adapter_model.safetensors`` for PEFT 0.21.2.

    A PiSSA is written as plain LoRA of twice the rank, so that nothing is recomputed on load. Settings that are not
    written have PEFT's defaults.

    Args:
        adapter: the adapter, on its model.
        path: folder to write into.
        rank: of the nearest LoRA, for updates that PEFT has no method for; None refuses them.

    Returns:
        What was written, and what the format cannot say.

    Raises:
        ConversionError: a structure or a site that PEFT cannot hold.
        SaveError: the disk is full or not writable.
    """
    placements = io.served(adapter.placements)
    whole = [p for p in placements if isinstance(p.structure, Replace)]
    tokens = [p for p in placements if isinstance(p.structure, TokenRows)]
    rest = [p for p in placements if p not in whole and p not in tokens]
    d, folder = _Draft(adapter, rank, rest), Path(path)
    with torch.no_grad():
        if d.kind:
            _WRITERS.get(d.kind, _plain)(d, rest)
        if tokens:
            _tokens(d, tokens)
        d.kind = d.kind or "LORA"
        _whole(d, whole)
    text = json.dumps(_config(d), indent=2, sort_keys=True)
    io.atomically(folder / WEIGHTS, lambda file: save_file(d.tensors, file, {"format": "pt"}))
    io.atomically(folder / CONFIG, lambda file: file.write_text(text, encoding="utf-8"))
    return ExportReport(folder, d.kind, len(adapter), tuple(d.notes), d.error)


def _config(d: _Draft) -> dict[str, Any]:
    cls = getattr(d.adapter.model, "grafted_base", type(d.adapter.model))
    mapping: dict[str, Any] = {"auto_mapping": {"base_model_class": cls.__name__, "parent_library": cls.__module__}}
    if cls.__name__.endswith(("ForCausalLM", "LMHeadModel")):
        mapping = {"task_type": "CAUSAL_LM"}
    parameters = [t for t in d.targets if t not in d.modules]
    targets: Any = sorted(set(d.targets) - set(parameters))
    clash = any(name.endswith(f".{t}") for t in targets for name in d.modules.keys() - set(targets))
    d.settings |= {"fan_in_fan_out": True} if any(type(d.modules[t]).__name__ == "Conv1D" for t in targets) else {}
    p = d.adapter.recipe.dropout
    key = DROPOUTS.get(d.kind or "")
    if key and not parameters and not isinstance(p, Dropout):
        d.settings[key] = p
    elif p:
        d.notes.append(f"dropout={p} of training, which PEFT has not for these sites")
    if clash and d.kind != "TRAINABLE_TOKENS":  # PEFT takes the ends of names
        targets = "|".join(re.escape(t) for t in targets)
    d.settings |= {"target_parameters": parameters} if parameters else {}
    name = getattr(d.adapter.model, "name_or_path", None) or None
    own = {"peft_type": d.kind, "target_modules": targets, "base_model_name_or_path": name, "inference_mode": True}
    return {**d.settings, **mapping, **own, "peft_version": VERSION}
