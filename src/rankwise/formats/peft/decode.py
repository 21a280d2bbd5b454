"""PEFT's tensors of one site and its settings as our structure and its factors."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import ConversionError, FileFormatError
from rankwise.formats.peft.config import MERGE, RESAVE, pattern
from rankwise.formats.peft.layout import METHODS, Place, check, made_anew, ours
from rankwise.formats.peft.rotating import block_lora
from rankwise.host import LAYER, Site, host_of
from rankwise.inits import Principal
from rankwise.ops.linalg import widened
from rankwise.structures import OFT, Anchored, Gated, HiRA, LoHa, LoKr, LoRA, Magnitude, Structure, SVDForm, Truncated
from rankwise.structures.convolutions import CrossGroup, PatchOFT
from rankwise.structures.wrappers import named


def decode(
    config: Mapping[str, Any], place: Place, module: Any, tensors: Mapping[str, Tensor], common: Mapping[str, Tensor]
) -> tuple[Structure, dict[str, Tensor]]:
    """The structure and factors of one site, those in common with others among them, checked against each other.

    Raises:
        ConversionError: a map that no structure of ours expresses.
        FileFormatError: tensors that do not fit the settings or the layer.
    """
    kind, site = config["peft_type"], place.candidate.site
    check(kind, site, module)
    try:
        f = {**ours(kind, place, tensors), **common}
        structure = _structure(config, place, f)
        if structure.factors(site).keys() - f.keys():
            f |= {k: v for k, v in made_anew(structure, site, module).items() if k not in f}
    except (ArithmeticError, LookupError, RuntimeError, TypeError) as error:
        raise FileFormatError(f"Tensors and settings of {site.name} do not fit each other ({error!r}).") from error
    check(kind, site, module, structure)
    if kind == "LORA" and str(config.get("init_lora_weights")).lower() == "pissa" and site.kind != "embedding":
        if site.kind != "linear":
            raise ConversionError(f"A PiSSA is rebuilt for linear layers; {site.name} is a {site.kind}. {RESAVE}")
        # the start that PEFT has cut out of the base
        f |= named("anchor", Principal()(site, structure, host_of(module, LAYER).weight, None))
        structure = Anchored(structure)
    if config.get("kasa_config"):
        if not isinstance(structure, LoRA) or not isinstance(module, nn.Linear):
            raise ConversionError(f"A KaSA is rebuilt for plain linear layers; {site.name} is none. {MERGE}")
        gated = Gated(structure.rank, structure.alpha, structure.scale_rule)
        structure = Truncated(gated, gated.rank)  # PEFT has cut it out of the base
        f = structure.start(site, host_of(module, LAYER).weight, lambda structure, site, weight, f=f: f)
    if config.get("use_dora") and site.groups > 1:
        raise ConversionError(f"PEFT's LoRA of {site.name} crosses its groups: no weight for a DoRA. {MERGE}")
    if config.get("use_dora"):
        structure = Magnitude(structure)
    lead = () if site.stack is None else (site.stack,)
    described = structure.factors(site)
    want = {name: (*lead, *factor.shape) for name, factor in described.items()}
    have = {name: tuple(value.shape) for name, value in f.items()}
    if want != have:
        raise FileFormatError(f"{site.name} needs factors of the shapes {want}; the file gives {have}.")
    if not all(factor.inside(f[name]) for name, factor in described.items()):
        raise FileFormatError(f"Whole numbers of {site.name} choose entries; the file chooses others than there are.")
    wide = {k: widened(v) for k, v in f.items() if v.is_floating_point()}
    return structure, {k: v.contiguous().clone() for k, v in {**f, **wide}.items()}


def _structure(config: Mapping[str, Any], place: Place, f: dict[str, Tensor]) -> Structure:
    """The structure of the factors f, which are changed in place where ours are others."""
    kind, site, key = config["peft_type"], place.candidate.site, place.key
    r = pattern(config.get("rank_pattern"), key, config["r"])
    alpha = float(pattern(config.get("alpha_pattern"), key, config["lora_alpha" if kind == "LORA" else "alpha"]))
    if build := METHODS[kind].build:
        return build({**config, "r": r, "alpha": alpha}, site, f)
    if kind == "LOKR":
        split = config["decompose_factor"], bool(config.get("decompose_both"))
        # of two whole factors the rank is no size, it may be above all of them
        return LoKr(None, alpha / r, *split) if {"c", "d"} <= f.keys() else LoKr(r, alpha, *split)
    if kind == "OFT":
        terms = config["num_cayley_neumann_terms"] if config["use_cayley_neumann"] else None
        q = f["q"]
        block = round((1 + (1 + 8 * q.shape[-1]) ** 0.5) / 2)
        q = q.expand(site.cols * site.groups // block, -1) if len(q) == 1 else q
        # PEFT rotates x R(q), we W R: the transpose. Its inverse branch is the transpose already.
        f["q"] = q if terms is None else -q
        plain = site.kernel == 1 == site.groups
        return (OFT if plain else PatchOFT)(block, 4 if terms == 3 else terms)  # its 3 terms are our 4
    if kind == "ADALORA":
        first, alpha, r = config["init_r"], config["lora_alpha"], len(f.get("e", ()))
        if r > min(site.rows, site.cols):
            f["b"], f["e"] = f["b"] * f["e"], torch.ones(min(site.rows, site.cols))
        kept = _fit(f, site, r)
        return SVDForm(kept, (alpha if alpha > 0 else first) / (first + 1e-5) * kept)  # whatever the rank is by now
    rule, power = ("alpha/sqrt(r)", 0.5) if config.get("use_rslora") else ("alpha/r", 1)
    if found := config.get("use_bdlora") and block_lora(config["use_bdlora"]["nblocks"], site, f, alpha, rule):
        return found
    across = kind == "LORA" and site.groups > 1
    kept = r if across else _fit(f, site, r)
    if kind == "LORA":
        return (CrossGroup if across else LoRA)(kept, alpha * (kept / r) ** power, rule)
    return HiRA(kept) if kind == "HIRA" else LoHa(kept, alpha / r * kept)


def _fit(f: dict[str, Tensor], site: Site, r: int) -> int:
    """Give products b @ a of rank r no more than the matrix can hold; returns the rank that is left."""
    most = min(site.rows, site.cols)
    for b, a in (("b", "a"), ("b1", "a1"), ("b2", "a2")):
        if {a, b} <= f.keys() and f[a].shape[-2] == f[b].shape[-1] > most:
            product = (f[b].double() @ f[a].double()).to(f[b].dtype)
            eye = torch.eye(most, dtype=product.dtype).expand(*product.shape[:-2], -1, -1)
            f[b], f[a] = (eye, product) if site.rows <= site.cols else (product, eye)
    return min(r, most)
