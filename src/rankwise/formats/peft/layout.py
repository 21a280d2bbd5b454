"""What PEFT calls our factors, how it stores them and where: one table, read in both directions.

Ours: a (*experts, r, in), b (*experts, out, r), a convolution's kernel folded into in. PEFT's: A (r, in, *kernel),
B (out, r, 1...); experts side by side, A (experts r, in) and B (out, r experts).
"""

from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.adapter import Placement
from rankwise.candidates import Candidate, base_modules, candidates
from rankwise.errors import ConversionError
from rankwise.formats.peft import augmented, rotating, sharing, spectral_domain, threefactor
from rankwise.formats.peft.method import Method
from rankwise.host import LAYER, Site, host_of
from rankwise.inits import Kaiming
from rankwise.structures import OFT, HiRA, LoHa, LoKr, LoRA, Structure, SVDForm
from rankwise.structures.convolutions import PatchOFT

_PAIR = {"a": "lora_A.weight", "b": "lora_B.weight", "magnitude": "lora_magnitude_vector", "e": "lora_diag"}
_HADA = {"b1": "hada_w1_a", "a1": "hada_w1_b", "b2": "hada_w2_a", "a2": "hada_w2_b"}
_KRON = {"c": "lokr_w1", "c_b": "lokr_w1_a", "c_a": "lokr_w1_b"}
_KRON |= {"d": "lokr_w2", "d_b": "lokr_w2_a", "d_a": "lokr_w2_b"}
_SVD = {"a": "lora_A", "b": "lora_B", "e": "lora_E"}
_ALL = ("Linear", "Conv1D", "Conv1d", "Conv2d", "Conv3d", "embedding")
_TUCKER = (("hada_t1", "hada_w1_a", "hada_w1_b"), ("hada_t2", "hada_w2_a", "hada_w2_b"))
_TUCKER += (("lokr_t2", "lokr_w2_a", "lokr_w2_b"),)  # a core (r, r, *kernel), its sides (r, out) and (r, in)
METHODS = {
    "LORA": Method(LoRA, _PAIR, (*_ALL, "parameter"), ("groups",)),
    "ADALORA": Method(SVDForm, _SVD, ("Linear", "Conv1D", "Conv2d"), ("groups", "dilation")),
    "LOHA": Method(LoHa, _HADA, ("Linear", "Conv1d", "Conv2d"), ("groups", "dilation")),
    "LOKR": Method(LoKr, _KRON, ("Linear", "Conv1d", "Conv2d"), ("groups", "dilation")),
    "HIRA": Method(HiRA, {"a": "hira_A", "b": "hira_B"}, _ALL, ("dilation",)),
    "OFT": Method(OFT, {"q": "oft_R.weight"}, ("Linear", "Conv2d"), ("groups",), kin=(PatchOFT,), square=True),
}
_FAMILIES = (augmented, rotating, sharing, spectral_domain, threefactor)
METHODS |= {kind: method for family in _FAMILIES for kind, method in family.METHODS.items()}


def layer_of(site: Site, module: Any) -> str:
    """The layer's name in ``Method.layers``."""
    if site.kind == "conv":
        return f"Conv{len(module.kernel_size)}d"
    return {"linear": "Linear" if isinstance(module, nn.Linear) else "Conv1D"}.get(site.kind, site.kind)


def check(kind: str, site: Site, module: Any, structure: Structure | None = None) -> None:
    """Refuse a layer that PEFT's method does not take, or on which it is another map than ours.

    Raises:
        ConversionError: with what is wrong.
    """
    method, layer = METHODS[kind], layer_of(site, module)
    wrong = [] if layer in method.layers else [layer]
    if site.kind == "conv":
        plain = {"padding_mode": "zeros", "transposed": False, "groups": 1, "dilation": (1,) * len(module.dilation)}
        facts = {k: getattr(module, k) for k, v in plain.items() if k not in method.free and getattr(module, k) != v}
        wrong += [f"{k}={v}" for k, v in facts.items()]
        wrong += ["a kernel that is no square"] if method.square and len({*module.kernel_size}) > 1 else []
    if structure is not None and method.bias and method.bias(structure) and getattr(module, "bias", None) is not None:
        wrong += ["a bias, on which PEFT's acts too"]
    if wrong:
        raise ConversionError(
            f"PEFT's {kind} is ours on {', '.join(method.layers)}, plain ones if convolutions; found {site.name} with "
            f"{', '.join(wrong)}. Leave that layer out of the adapter, or merge the adapter and save the model."
        )


def method_of(modules: Mapping[str, Any], placements: list[Placement]) -> str:
    """PEFT's name of the one method of all sites, or LORA where they have none in common."""
    kinds: dict[type[Structure], str] = {s: kind for kind, m in METHODS.items() for s in (m.structure, *m.kin)}
    kind, *others = {kinds.get(type(p.structure), "LORA") for p in placements}
    fits = not others and {layer_of(p.site, modules[p.carriers[0][0]]) for p in placements} <= {*METHODS[kind].layers}
    return kind if fits else "LORA"


# -- places ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Place:
    """Where PEFT keeps the factors of a weight.

    Attributes:
        path: what stands before the factors' names.
        key: the name that PEFT's targets and patterns match.
        candidate: the weight.
        times: how often PEFT (0.21.2) adds the update: an ``nn.MultiheadAttention``'s out_proj twice.
    """

    path: str
    key: str
    candidate: Candidate
    times: int = 1


def places(model: nn.Module, parameters: Iterable[str]) -> list[Place]:
    """Where PEFT keeps the factors of every weight; ``parameters`` are its target_parameters."""
    modules, wanted = base_modules(model), tuple(f".{w}" for w in parameters)
    found: list[Place] = []
    wrappers: Counter[str] = Counter()  # one a parameter of target_parameters, the first registered innermost
    for c in reversed(candidates(model)):
        owner = c.path.rpartition(".")[0]
        full = f"{c.path}.{'weight' if c.slot == LAYER else c.slot}".removeprefix(".")
        if isinstance(modules[c.path], nn.MultiheadAttention):
            found += [Place(c.path, c.path, c)] if c.slot == "in_proj_weight" else []
        elif c.slot != LAYER and isinstance(modules.get(owner), nn.MultiheadAttention):
            found.append(Place(f"{owner}.base_layer.out_proj", owner, c, times=2))
        elif f".{full}".endswith(wanted):
            found.append(Place(c.path + ".base_layer" * wrappers[c.path], full, c))
            wrappers[c.path] += 1
        elif c.slot == LAYER or c.site.name == c.path:
            found.append(Place(c.path, c.path, c))
    return found


# -- tensors --------------------------------------------------------------------------------------


def ours(kind: str, place: Place, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """PEFT's tensors of a site as our factors; Tucker cores are multiplied out.

    Raises:
        ConversionError: a tensor whose meaning would be lost.
    """
    site = place.candidate.site
    names = {theirs.removesuffix(".weight"): mine for mine, theirs in METHODS[kind].names.items()}
    found = {k.replace("embedding_", "").removesuffix(".weight"): v for k, v in tensors.items()}
    for core, left, right in _TUCKER:
        if {core, left, right} <= found.keys():
            found[left] = found[left].mT
            found[right] = torch.einsum("ijk,jn->ink", found.pop(core).flatten(2), found[right])
    if foreign := found.keys() - names.keys():
        raise ConversionError(
            f"Tensors of {site.name} are of no plain {kind}: {sorted(foreign)}. Merge it in PEFT, use the merged model."
        )
    lines = {k for k, v in found.items() if v.dim() < 2 or k.endswith(("_E", "_vector"))}
    f = {names[k]: v.flatten() if k in lines else v if k == "tinylora_P" else v.flatten(1) for k, v in found.items()}
    if site.stack and {"a", "b"} <= f.keys():
        f["a"] = f["a"].reshape(site.stack, -1, site.cols)
        f["b"] = f["b"].reshape(site.rows, -1, site.stack).permute(2, 0, 1)  # expert index fastest
    if "b" in f:
        f["b"] = f["b"] * place.times
    return f


def theirs(kind: str, place: Place, module: Any, f: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Our factors of a site as PEFT's tensors."""
    site, f = place.candidate.site, dict(f)
    if "b" in f:
        f["b"] = f["b"] / place.times
    if site.kind == "embedding":
        if module.padding_idx is not None:  # our padding row never moves
            f["a"] = f["a"].clone()
            f["a"][:, module.padding_idx] = 0
        names = {k: v.removesuffix(".weight") for k, v in METHODS[kind].names.items()}
        return {names[k].replace("_", "_embedding_") if k in "ab" else names[k]: v for k, v in f.items()}
    if site.stack:
        f["a"], f["b"] = f["a"].flatten(0, 1), f["b"].permute(1, 2, 0).flatten(1)
    if site.kind == "conv":
        size, ones = module.kernel_size, (1,) * len(module.kernel_size)
        shapes = {"a": (-1, *size), "d": (-1, *size), "b": (-1, *ones)} if kind != "ADALORA" else {}
        f = {k: v.reshape(v.shape[0], *shapes[k]) if k in shapes else v for k, v in f.items()}
        f |= {k: v.reshape(1, -1, *ones) for k, v in f.items() if k == "magnitude"}
    return {METHODS[kind].names[k]: v.unsqueeze(-1) if k == "e" else v for k, v in f.items()}


def made_anew(structure: Structure, site: Site, module: Any) -> dict[str, Tensor]:
    """The factors at a structure's start, for those that follow from the weight, or are constant."""

    def leaf(structure: Structure, site: Site, weight: Callable[[], Tensor]) -> Mapping[str, Tensor]:
        return Kaiming()(site, structure, weight, None)

    return structure.start(site, host_of(module, LAYER).weight, leaf)
