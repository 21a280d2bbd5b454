"""PEFT's tensors of one site and its settings as our structure and its factors."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rankwise.errors import ConversionError, FileFormatError
from rankwise.formats.peft.config import MERGE, RESAVE, pattern
from rankwise.formats.peft.layout import Place, check, ours
from rankwise.host import LAYER, Site, host_of
from rankwise.ops.linalg import truncated_svd
from rankwise.structures import OFT, Anchored, HiRA, LoHa, LoKr, LoRA, Magnitude, Structure, SVDForm


def decode(
    config: Mapping[str, Any], place: Place, module: Any, tensors: Mapping[str, Tensor]
) -> tuple[Structure, dict[str, Tensor]]:
    """The structure and factors of one site, checked against each other.

    Raises:
        ConversionError: a map that no structure of ours expresses.
        FileFormatError: tensors that do not fit the settings or the layer.
    """
    kind, site = config["peft_type"], place.candidate.site
    check(kind, site, module)
    try:
        f = ours(kind, place, tensors)
        r = pattern(config.get("rank_pattern"), place.key, config["r"])
        alpha = pattern(config.get("alpha_pattern"), place.key, config["lora_alpha" if kind == "LORA" else "alpha"])
        structure = _STRUCTURES[kind](config, site, f, r, float(alpha))
    except (ArithmeticError, LookupError, RuntimeError, TypeError) as error:
        raise FileFormatError(f"Tensors and settings of {site.name} do not fit each other ({error!r}).") from error
    pissa = str(config.get("init_lora_weights")).lower() == "pissa" and site.kind != "embedding"
    if pissa and isinstance(structure, LoRA):
        f |= _principal(site, module, structure)
        structure = Anchored(structure)
    if config.get("use_dora"):
        structure = Magnitude(structure)
    lead = () if site.stack is None else (site.stack,)
    want = {name: (*lead, *factor.shape) for name, factor in structure.factors(site).items()}
    have = {name: tuple(value.shape) for name, value in f.items()}
    if want != have:
        raise FileFormatError(f"{site.name} needs factors of the shapes {want}; the file gives {have}.")
    return structure, {k: v.to(torch.promote_types(v.dtype, torch.float32)).contiguous().clone() for k, v in f.items()}


def _fit(f: dict[str, Tensor], site: Site, r: int) -> int:
    """Give products b @ a of rank r no more than the matrix can hold; returns the rank that is left."""
    most = min(site.rows, site.cols)
    for b, a in (("b", "a"), ("b1", "a1"), ("b2", "a2")):
        if {a, b} <= f.keys() and f[a].shape[-2] == f[b].shape[-1] > most:
            product = (f[b].double() @ f[a].double()).to(f[b].dtype)
            eye = torch.eye(most, dtype=product.dtype).expand(*product.shape[:-2], -1, -1)
            f[b], f[a] = (eye, product) if site.rows <= site.cols else (product, eye)
    return min(r, most)


def _lora(config: Mapping[str, Any], site: Site, f: dict[str, Tensor], r: int, alpha: float) -> Structure:
    rule, power = ("alpha/sqrt(r)", 0.5) if config.get("use_rslora") else ("alpha/r", 1)
    kept = _fit(f, site, r)
    return LoRA(kept, alpha * (kept / r) ** power, rule)


def _principal(site: Site, module: Any, structure: LoRA) -> dict[str, Tensor]:
    """The start that PiSSA cut out of the base, by the exact SVD."""
    if site.kind != "linear":
        raise ConversionError(f'init_lora_weights="pissa" is rebuilt for linear layers; found {site.name}. {RESAVE}')
    u, s, v = truncated_svd(host_of(module, LAYER).weight().detach().float(), structure.rank)
    root = (s / structure.scale).sqrt()
    return {"anchor_b": u * root, "anchor_a": root.unsqueeze(-1) * v.mT}


def _adalora(config: Mapping[str, Any], site: Site, f: dict[str, Tensor], r: int, alpha: float) -> Structure:
    first, alpha, r = config["init_r"], config["lora_alpha"], len(f.get("e", ()))
    scale = (alpha if alpha > 0 else first) / (first + 1e-5)  # PEFT's, whatever the rank is by now
    if r > min(site.rows, site.cols):
        f["b"], f["e"] = f["b"] * f["e"], torch.ones(min(site.rows, site.cols))
    kept = _fit(f, site, r)
    return SVDForm(kept, scale * kept)


def _loha(config: Mapping[str, Any], site: Site, f: dict[str, Tensor], r: int, alpha: float) -> Structure:
    kept = _fit(f, site, r)
    return LoHa(kept, alpha / r * kept)


def _lokr(config: Mapping[str, Any], site: Site, f: dict[str, Tensor], r: int, alpha: float) -> Structure:
    factor, both = config["decompose_factor"], bool(config.get("decompose_both"))
    if {"c", "d"} <= f.keys():  # the rank is then no size, it may be above all of them
        return LoKr(None, alpha / r, factor, both)
    return LoKr(r, alpha, factor, both)


def _hira(config: Mapping[str, Any], site: Site, f: dict[str, Tensor], r: int, alpha: float) -> Structure:
    return HiRA(_fit(f, site, r))


def _oft(config: Mapping[str, Any], site: Site, f: dict[str, Tensor], r: int, alpha: float) -> Structure:
    terms = config["num_cayley_neumann_terms"] if config["use_cayley_neumann"] else None
    if terms is not None and terms < 3:
        raise ConversionError(f"A rotation takes num_cayley_neumann_terms=3 or more; found {terms}. {MERGE}")
    q = f["q"]
    block = round((1 + (1 + 8 * q.shape[-1]) ** 0.5) / 2)
    q = q.expand(site.cols // block, -1) if len(q) == 1 else q
    # PEFT rotates x R(q), we W R: the transpose. Its inverse branch is the transpose already.
    f["q"] = q if terms is None else -q
    return OFT(block, None if terms is None else max(terms, 4))  # its 3 terms are our 4


_STRUCTURES = {"LORA": _lora, "ADALORA": _adalora, "LOHA": _loha, "LOKR": _lokr, "HIRA": _hira, "OFT": _oft}
