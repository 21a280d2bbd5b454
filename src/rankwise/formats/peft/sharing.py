"""PEFT's methods whose layers have tensors in common, which its files keep once, at the model's level.

a (r, in), b (out, r); PEFT's VeRA and RandLoRA have one pair as large as the largest layers, which each layer slices.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import pad

from rankwise.formats.peft.method import Method
from rankwise.host import Site
from rankwise.structures import PVeRA, RandLoRA, UniLoRA, VBLoRA, VeRA

_LAYERS = ("Linear", "Conv1D")


def _vera(config: Mapping[str, Any], site: Site, f: dict[str, Tensor]) -> VeRA | PVeRA:
    f["sizes"], cls = f["a"].new_zeros(site.rows, site.cols, 0), VeRA if config["peft_type"] == "VERA" else PVeRA
    return cls(config["r"], None, widths=(len(f["b"]), f["a"].shape[1]))


def _to_vera(s: VeRA | PVeRA, site: Site, f: dict[str, Tensor]) -> dict[str, Any]:
    f.pop("sizes", None)
    f["v"] = f["v"] * s.scale
    return {"r": s.rank, "d_initial": s.start_u, "save_projection": True}


def _cut(common: dict[str, Tensor], rows: int, cols: int) -> dict[str, Tensor]:
    return {"a": common["a"][:, :cols], "b": common["b"][:rows]}


def _randlora(config: Mapping[str, Any], site: Site, f: dict[str, Tensor]) -> RandLoRA:
    r, (small, large) = config["r"], sorted((site.rows, site.cols))
    n = -(-small // r)
    # PEFT counts the columns of its bases by (basis, rank), and the rows that they meet by (rank, basis)
    f["basis_b"] = f["basis_b"][:large, :n].flatten(1).unflatten(1, (r, n)).mT
    f["basis_a"], f["l"] = f["basis_a"][:, 0, :small], f["l"].mT
    f["g_in" if site.cols <= site.rows else "g_out"] = f.pop("g")
    return RandLoRA(r, float(config["randlora_alpha"]))


def _to_randlora(s: RandLoRA, site: Site, f: dict[str, Tensor]) -> dict[str, Any]:
    f["basis_b"] = f["basis_b"].mT.flatten(1).unflatten(1, (-1, s.rank))
    f["basis_a"], f["l"] = f["basis_a"].unsqueeze(1), f["l"].mT
    f["g"] = f.pop("g_in" if "g_in" in f else "g_out")
    return {"r": s.rank, "randlora_alpha": s.scale * s.rank, "save_projection": True}


def _padded(common: dict[str, Tensor], rows: int, cols: int) -> dict[str, Tensor]:
    a, b, (small, large) = common["basis_a"], common["basis_b"], sorted((rows, cols))
    more = -(-small // b.shape[2]) - b.shape[1]
    return {"basis_a": pad(a, (0, small - a.shape[2])), "basis_b": pad(b, (0, 0, 0, more, 0, large - b.shape[0]))}


def _vblora(config: Mapping[str, Any], site: Site, f: dict[str, Tensor]) -> VBLoRA:
    h, k = f["bank"].shape[0], config["topk"]
    for side in "ab":
        if f"index_{side}" in f:  # the top k alone, and their weights but for the last
            index = f.pop(f"index_{side}").long().unflatten(1, (-1, k))
            share = f.pop(f"weight_{side}").reshape(*index.shape[:-1], k - 1)
            share = torch.cat([share, 1 - share.sum(-1, keepdim=True)], -1).clamp_min(1e-30)
            f[f"logits_{side}"] = torch.full((*index.shape[:-1], h), -1e4).scatter(-1, index, share.log())
        else:
            f[f"logits_{side}"] = f[f"logits_{side}"].unflatten(1, (-1, h))
    return VBLoRA(config["r"], h, f["bank"].shape[1], k)


def _to_vblora(s: VBLoRA, site: Site, f: dict[str, Tensor]) -> dict[str, Any]:
    return {"r": s.rank, "num_vectors": s.vectors, "vector_length": s.length, "topk": s.topk}


def _counts(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """How often the model uses each entry of the vector, by the scales of the numbers that it is used for."""
    count = torch.zeros(len(tensors["base_model.unilora_theta_d"]))
    names = [name for name in tensors if "unilora_indices" in name]
    if not names:
        raise KeyError("unilora_indices")
    for name in names:
        scales = tensors[name.replace("indices", "scales")].float()
        count[tensors[name].flatten().long()] = scales.flatten() ** -2
    return {"count": count}


def _unilora(config: Mapping[str, Any], site: Site, f: dict[str, Tensor]) -> UniLoRA:
    del f["scale_a"], f["scale_b"]
    return UniLoRA(config["r"], len(f["theta"]))


def _to_unilora(s: UniLoRA, site: Site, f: dict[str, Tensor]) -> dict[str, Any]:
    scale = f.pop("count").clamp_min(1).rsqrt()
    f |= {f"scale_{side}": scale[f[f"index_{side}"]] for side in "ab"}
    return {"r": s.rank, "theta_d_length": s.size, "save_indices": True}


_BANK = {f"logits_{side.lower()}": f"vblora_logits_{side}" for side in "AB"}
_BANK |= {f"index_{side.lower()}": f"vblora_logits_{side}_topk_indices" for side in "AB"}
_BANK |= {f"weight_{side.lower()}": f"vblora_logits_{side}_topk_weights" for side in "AB"}
_ONE = {f"index_{side.lower()}": f"unilora_indices_{side}" for side in "AB"}
_ONE |= {f"scale_{side.lower()}": f"unilora_scales_{side}" for side in "AB"}

METHODS: dict[str, Method] = {
    "VERA": Method(
        VeRA,
        {"u": "vera_lambda_d", "v": "vera_lambda_b"},
        _LAYERS,
        build=_vera,
        settings=_to_vera,
        common={"a": "vera_A", "b": "vera_B"},
        sized=_cut,
    ),
    "PVERA": Method(
        PVeRA,
        {"u": "pvera_lambda_d", "v": "pvera_lambda_b"},
        _LAYERS,
        build=_vera,
        settings=_to_vera,
        common={"a": "pvera_A", "b": "pvera_B"},
        sized=_cut,
    ),
    "RANDLORA": Method(
        RandLoRA,
        {"l": "randlora_lambda", "g": "randlora_gamma"},
        _LAYERS,
        build=_randlora,
        settings=_to_randlora,
        common={"basis_a": "randlora_A", "basis_b": "randlora_B"},
        sized=_padded,
    ),
    "VBLORA": Method(VBLoRA, _BANK, _LAYERS, build=_vblora, settings=_to_vblora, common={"bank": "vblora_vector_bank"}),
    "UNILORA": Method(
        UniLoRA,
        _ONE,
        _LAYERS,
        build=_unilora,
        settings=_to_unilora,
        common={"theta": "unilora_theta_d"},
        gather=_counts,
    ),
}
