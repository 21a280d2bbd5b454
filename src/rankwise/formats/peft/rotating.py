"""PEFT's rotations, gates, bounded and shared updates: HRA, BOFT, ROAD, PSOFT, IA3, DELORA, MISS, and BD-LoRA.

PEFT's shapes: hra_u (in, r); boft_R (m, k, b, b), boft_s (out, 1); road_theta flat over (group, part, end, pair);
ia3_l (out, 1) or (1, in); miss_block (r, out), (r, shard) or (out/r, r, r); BD-LoRA's A (r, in/k) or B (out, r/k).
A BOFT of several levels is one in PEFT only where its CUDA extension can be built; elsewhere PEFT refuses the file.
"""

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from rankwise.errors import ConversionError
from rankwise.formats.peft.method import Method
from rankwise.host import Site
from rankwise.ops.linalg import skew
from rankwise.structures import BOFT, HRA, IA3, PSOFT, Bat, BlockLoRA, DeLoRA, MiSS, RoAd, Structure
from rankwise.structures.rotations import size_of

Config = Mapping[str, Any]
Values = dict[str, Tensor]


def _refuse(site: Site, what: str) -> ConversionError:
    return ConversionError(f"{what} at {site.name} has no equal. Merge the adapter, and save or use the merged model.")


def _hra(config: Config, site: Site, f: Values) -> Structure:
    f["u"] = f["u"].mT
    if len(f["u"]) % 2:
        raise _refuse(site, f"HRA's rank is even here; PEFT's r={len(f['u'])}")
    return HRA(len(f["u"]))


def _hra_settings(s: HRA, site: Site, f: Values) -> dict[str, Any]:
    f["u"] = f["u"].mT
    return {"r": s.rank}


def _boft(config: Config, site: Site, f: Values) -> Structure:
    size = f["q"].shape[1] // site.cols
    blocks = f["q"].unflatten(1, (-1, size, size))
    row, col = torch.triu_indices(size, size, 1)
    f["q"] = ((blocks - blocks.mT) / 2)[..., row, col]
    f["s"] = f["s"].flatten()
    return BOFT(size, len(blocks), scaled=True)


def _boft_settings(s: BOFT, site: Site, f: Values) -> dict[str, Any]:
    size = size_of(f["q"])
    f["q"] = skew(f["q"], size)
    scale = f.get("s", torch.ones(site.rows, dtype=f["q"].dtype))
    f["s"] = scale.reshape(1, -1) if site.kind == "conv" else scale.unsqueeze(-1)
    return {"boft_block_size": size, "boft_block_num": 0, "boft_n_butterfly_factor": s.levels}


def _road(config: Config, site: Site, f: Values) -> Structure:
    s = RoAd(int(str(config["variant"])[-1]), config["group_size"])  # pyright: ignore[reportArgumentType]
    part, group, end, pair = s.factors(site)["theta"].shape
    f |= {name: value.reshape(group, part, end, pair).transpose(0, 1) for name, value in f.items()}
    return s


def _road_settings(s: RoAd, site: Site, f: Values) -> dict[str, Any]:
    f |= {name: value.transpose(0, 1).flatten() for name, value in f.items()}
    return {"variant": f"road_{s.variant}", "group_size": s.group_at(site)}


def _psoft(config: Config, site: Site, f: Values) -> Structure:
    kept = {"psoft_orth": True, "ab_svd_init": "psoft_init", "psoft_svd": "full"}
    if other := {key: config[key] for key, value in kept.items() if config.get(key, value) != value}:
        raise _refuse(site, f"PSOFT with {other}")
    terms = config["num_cayley_neumann_terms"] if config["use_cayley_neumann"] else None
    if terms is not None and terms < 3 or len(f) == 2:
        raise _refuse(site, "PSOFT with one of its two vectors, or with a series of fewer than 3 terms,")
    return PSOFT(size_of(f["q"]), 4 if terms == 3 else terms, relaxed=len(f) == 3)  # its 3 terms are our 4


def _psoft_settings(s: PSOFT, site: Site, f: Values) -> dict[str, Any]:
    if s.terms == 3:
        raise _refuse(site, "PSOFT's series has 4 terms or more in PEFT; one of 3")
    series = {"use_cayley_neumann": s.terms is not None, "num_cayley_neumann_terms": s.terms or 5}
    return {"r": s.rank, "psoft_alpha": s.rank, "psoft_mag_a": s.relaxed, "psoft_mag_b": s.relaxed, **series}


def _ia3(config: Config, site: Site, f: Values) -> Structure:
    forward, f["l"] = config["feedforward_modules"] or (), f["l"].flatten()
    ends = re.fullmatch(forward, site.name) if isinstance(forward, str) else site.name.endswith(tuple(forward))
    if ends:
        f["l"] = f["l"].repeat_interleave(site.kernel)
    return IA3("in" if ends else "out")


def _ia3_settings(s: IA3, site: Site, f: Values) -> dict[str, Any]:
    if s.side == "in":
        kernel = f["l"].unflatten(0, (-1, site.kernel))
        f["l"] = kernel[:, 0]
        if not torch.equal(kernel, kernel[:, :1].expand_as(kernel)):
            raise _refuse(site, "A scale of its own for every position of a kernel")
    row = s.side == "in" or site.kind == "conv"
    f["l"] = f["l"].reshape(1, -1, *[1] * (len(site.shape) - 2)) if row else f["l"].unsqueeze(-1)
    return {"feedforward_modules": s.side == "in"}


def _delora(config: Config, site: Site, f: Values) -> Structure:
    return DeLoRA(f["a"].shape[0], float(config["delora_lambda"]))


def _miss(config: Config, site: Site, f: Values) -> Structure:
    init, block = config["init_weights"], f.pop("b")
    if init == "bat":
        r = round(block.shape[1] ** 0.5)
        f["d"] = block.unflatten(1, (r, r))
        return Bat(r)
    f["b"] = block.mT
    return MiSS(block.shape[0], block.shape[1] if init == "mini" else None)


def _miss_settings(s: MiSS | Bat, site: Site, f: Values) -> dict[str, Any]:
    if isinstance(s, Bat):
        f["b"] = f.pop("d")
        return {"r": s.rank, "init_weights": "bat"}
    f["b"] = f["b"].mT
    return {"r": s.rank, "init_weights": "mini" if s.shard else True, "mini_r": s.shard or 1}


def block_lora(blocks: int, site: Site, f: Values, alpha: float, rule: str) -> BlockLoRA | None:
    """The BD-LoRA of these factors, None for a plain LoRA."""
    r = f["a"].shape[-2]
    if f["a"].shape[-1] < site.cols:
        return BlockLoRA(r, alpha, blocks, "a", rule)
    return BlockLoRA(r, alpha, blocks, "b", rule) if f["b"].shape[-1] < r else None


_ANY = ("Linear", "Conv1D", "Conv2d", "Conv3d")
METHODS = {
    "HRA": Method(HRA, {"u": "hra_u"}, ("Linear", "Conv2d"), (), _hra, _hra_settings, {}, square=True),
    "BOFT": Method(
        BOFT,
        {"q": "boft_R", "s": "boft_s"},
        ("Linear", "Conv2d"),
        ("dilation",),
        _boft,
        _boft_settings,
        {},
        square=True,
    ),
    "ROAD": Method(
        RoAd, {"theta": "road_theta", "alpha": "road_alpha"}, ("Linear",), (), _road, _road_settings, {}, bias=bool
    ),
    "PSOFT": Method(
        PSOFT,
        {"q": "psoft_R.weight", "left": "psoft_R.vector_b", "right": "psoft_R.vector_a"},
        *(("Linear",), (), _psoft, _psoft_settings, {}),
    ),
    "IA3": Method(IA3, {"l": "ia3_l"}, _ANY, ("dilation",), _ia3, _ia3_settings, {}, bias=lambda s: s.side == "out"),
    "DELORA": Method(
        DeLoRA,
        {"a": "delora_A", "b": "delora_B", "strength": "delora_lambda", "norms": "delora_w_norm"},
        *(("Linear",), (), _delora, lambda s, site, f: {"r": s.rank, "delora_lambda": s.strength}),
        patterns={"r": "rank_pattern", "delora_lambda": "lambda_pattern"},
    ),
    "MISS": Method(MiSS, {"b": "miss_block"}, ("Linear",), (), _miss, _miss_settings, {}, kin=(Bat,)),
}
