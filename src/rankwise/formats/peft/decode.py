"""PEFT's tensors of one site as our structure and its factors.

Theirs: lora_A (r, in, *k), lora_B (out, r, 1...); hada_w*_a (out, r), hada_w*_b (r, in);
lokr_w1 (m1, n1), lokr_w2 (m2, n2, *k); oft_R (blocks, b(b-1)/2). Ours: a (r, in), b (out, r), a
convolution's kernel folded into in.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import ConversionError, FileFormatError
from rankwise.formats.peft.config import pattern
from rankwise.host import Site, kind_of
from rankwise.ops.linalg import truncated_svd
from rankwise.structures import OFT, Anchored, HiRA, LoHa, LoKr, LoRA, Magnitude, Structure, SVDForm

Decoded = tuple[Structure, dict[str, Tensor]]


def is_out_proj(site: Site) -> bool:
    """Whether this is an ``nn.MultiheadAttention``'s out_proj, which is read as a parameter."""
    return site.kind == "parameter" and site.name.endswith("out_proj") and site.stack is None


@dataclass(frozen=True)
class Found:
    """What a file says of one site.

    Attributes:
        site: the facts.
        module: the module that carries it.
        key: the name that patterns of the configuration match.
        tensors: by PEFT's name of the factor.
        config: the settings.
    """

    site: Site
    module: nn.Module
    key: str
    tensors: Mapping[str, Tensor]
    config: Mapping[str, Any]

    def rank(self, found: int) -> int:
        """The rank, as tensors and settings agree.

        Raises:
            FileFormatError: they do not.
        """
        want = pattern(self.config["rank_pattern"], self.key, self.config["r"])
        if want != found:
            raise FileFormatError(f"The settings give {self.key} rank {want}; its tensors have rank {found}.")
        return found

    def get(self, *names: str) -> list[Tensor]:
        """Tensors by name.

        Raises:
            FileFormatError: one is not there.
        """
        missing = [n for n in names if n not in self.tensors]
        if missing:
            raise FileFormatError(f"The file holds no {missing} for {self.site.name}.")
        return [self.tensors[n] for n in names]


def check_conv(module: Any, method: str, shares_weight: bool) -> None:
    """Refuse a convolution on which PEFT's method is another map than ours.

    Raises:
        ConversionError: PEFT builds the update without the base's groups, dilation or padding mode.
    """
    if not isinstance(module, nn.modules.conv._ConvNd):
        return
    wrong = [f"padding_mode={module.padding_mode}"] if module.padding_mode != "zeros" else []
    if not shares_weight:
        wrong += [f"groups={module.groups}"] if module.groups != 1 else []
        wrong += [f"dilation={module.dilation}"] if set(module.dilation) != {1} else []
    wrong += [type(module).__name__] if module.transposed else []
    if wrong:
        raise ConversionError(
            f"PEFT's {method} on a convolution is an update of its weight only without groups, "
            f"dilation or padding modes; found {', '.join(wrong)}. Leave that layer out of the "
            f"adapter (exclude it, or remove its tensors from the file)."
        )


def fit(b: Tensor, a: Tensor) -> tuple[Tensor, Tensor]:
    """The same product b @ a with no more rank than the matrix can hold."""
    rows, cols = b.shape[-2], a.shape[-1]
    if a.shape[-2] <= min(rows, cols):
        return b, a
    product = (b.double() @ a.double()).to(b.dtype)
    eye = torch.eye(min(rows, cols), dtype=b.dtype).expand(*b.shape[:-2], -1, -1).contiguous()
    return (eye, product) if rows <= cols else (product, eye)


def _lora(f: Found) -> Decoded:
    site, config = f.site, f.config
    if site.kind == "embedding" and "embedding_A" in f.tensors:
        a, b = f.get("embedding_A", "embedding_B")
    else:
        a, b = f.get("A", "B")
        check_conv(f.module, "LoRA", shares_weight=False)
    if site.stack:
        a = a.reshape(site.stack, -1, a.shape[-1])
        b = b.reshape(b.shape[0], -1, site.stack).permute(2, 0, 1)  # expert index fastest
    else:
        a, b = a.flatten(1), b.flatten(1)
    r = f.rank(a.shape[-2])
    rule = "alpha/sqrt(r)" if config["use_rslora"] else "alpha/r"
    alpha = float(pattern(config["alpha_pattern"], f.key, config["lora_alpha"]))
    alpha *= 2 if is_out_proj(site) else 1  # PEFT (0.21.2) adds that one two times
    structure: Structure = LoRA(r, alpha, rule)
    values: dict[str, Tensor] = {}
    init = config["init"]
    if init in ("pissa", "olora") and site.kind != "embedding":
        start = _rebuilt(f, init, r, structure.scale)
        values = {"anchor_a": start[1], "anchor_b": start[0]}
        structure = Anchored(structure)
    else:
        b, a = fit(b, a)
        if a.shape[-2] != r:
            structure = LoRA(a.shape[-2], structure.scale * a.shape[-2])
    values |= {"a": a, "b": b}
    if config["use_dora"]:
        values["magnitude"] = f.get("magnitude_vector")[0].flatten()
        structure = Magnitude(structure)
    return structure, values


def _rebuilt(f: Found, init: str, r: int, scale: float) -> tuple[Tensor, Tensor]:
    """The start (b, a) that PEFT cut out of the base, rebuilt without randomness."""
    kind = kind_of(f.module)
    stored_as_is = isinstance(f.module, nn.Linear)
    if kind is None or f.site.kind != "linear" or (init == "olora" and not stored_as_is):
        raise ConversionError(
            f'init_lora_weights="{init}" is rebuilt for linear layers; found {f.site.name} '
            f"({f.site.kind}). Save it from PEFT as plain LoRA (model.save_pretrained(out, "
            f"path_initial_model_for_weight_conversion=INITIAL_ADAPTER))."
        )
    w = kind(f.module).weight().detach().float()
    if init == "olora":
        q, upper = torch.linalg.qr(w)
        return q[:, :r], upper[:r]
    u, s, v = truncated_svd(w, r)
    root = (s / scale).sqrt()
    return u * root, root.unsqueeze(-1) * v.mT


def _adalora(f: Found) -> Decoded:
    a, b, e = f.get("A", "B", "E")
    check_conv(f.module, "AdaLoRA", shares_weight=True)
    given = float(f.config["lora_alpha"])
    init_r, r = f.config["init_r"], a.shape[0]
    scale = (given if given > 0 else float(init_r)) / (init_r + 1e-5)  # by the first rank, always
    b, a, e = b.flatten(1), a.flatten(1), e.flatten()
    if r > min(f.site.rows, f.site.cols):
        b, a = fit(b * e, a)
        r, e = a.shape[-2], torch.ones(a.shape[-2])
    return SVDForm(r, scale * r), {"a": a, "b": b, "e": e}


def _alpha(f: Found) -> float:
    return float(pattern(f.config["alpha_pattern"], f.key, f.config["alpha"]))


def _contracted(core: Tensor, left: Tensor, right: Tensor) -> tuple[Tensor, Tensor]:
    """A Tucker core (r, r, *k) with sides (r, out), (r, in) as flat factors (out, r), (r, in k)."""
    return left.mT, torch.einsum("ijkl,jn->inkl", core, right).flatten(1)


def _loha(f: Found) -> Decoded:
    check_conv(f.module, "LoHa", shares_weight=True)
    values = {}
    rank = f.rank(f.get("w1_b")[0].shape[0])
    for i in "12":
        b, a = f.get(f"w{i}_a", f"w{i}_b")
        if f"t{i}" in f.tensors:
            b, a = _contracted(f.tensors[f"t{i}"], b, a)
        values[f"b{i}"], values[f"a{i}"] = fit(b, a)
    kept = values["a1"].shape[0]
    return LoHa(kept, _alpha(f) / rank * kept), values


def _lokr(f: Found) -> Decoded:
    check_conv(f.module, "LoKr", shares_weight=True)
    t, config = f.tensors, f.config
    rank = pattern(config["rank_pattern"], f.key, config["r"])
    structure = LoKr(rank, _alpha(f), config["decompose_factor"], bool(config["decompose_both"]))
    values: dict[str, Tensor] = {}
    if "w1" in t:
        values["c"] = t["w1"]
    else:
        values["c_b"], values["c_a"] = f.get("w1_a", "w1_b")
    if "w2" in t:
        values["d"] = t["w2"].flatten(1)
    else:
        b, a = f.get("w2_a", "w2_b")
        if "t2" in t:
            b, a = _contracted(t["t2"], b, a)
        values["d_b"], values["d_a"] = b, a
    if "c" in values and "d" in values:  # the rank is then no size, it may be above all of them
        structure = LoKr(None, structure.scale, structure.factor)
    return structure, values


def _hira(f: Found) -> Decoded:
    check_conv(f.module, "HiRA", shares_weight=True)
    names = ("embedding_B", "embedding_A") if f.site.kind == "embedding" else ("B", "A")
    b, a = (t.flatten(1) for t in f.get(*names))
    f.rank(a.shape[0])
    b, a = fit(b, a)
    return HiRA(a.shape[0]), {"a": a, "b": b}


def neumann_terms(config: Mapping[str, Any]) -> int | None:
    """How many terms PEFT sums; None for the inverse. Its 3 terms are our 4.

    Raises:
        ConversionError: fewer than 3.
    """
    if not config["use_cayley_neumann"]:
        return None
    terms = config["num_cayley_neumann_terms"]
    if terms < 3:
        raise ConversionError(
            f"A Neumann series of num_cayley_neumann_terms={terms} is no rotation; 3 or more can "
            f"be kept. Merge the adapter in PEFT."
        )
    return max(terms, 4)


def _oft(f: Found) -> Decoded:
    check_conv(f.module, "OFT", shares_weight=False)
    if f.site.kernel > 1:
        raise ConversionError(
            f"PEFT (0.21.2) rotates overlapping patches of {f.site.name} and adds them up, which "
            f"is another map than the one that it merges, and not the base's at the start. Merge "
            f"it in PEFT if the merged map is meant, or leave out convolutions above 1x1."
        )
    if f.site.kind not in ("linear", "conv"):
        raise ConversionError(
            f"PEFT's OFT on an embedding rotates its outputs, ours its inputs: {f.site.name} "
            f"cannot be kept. Merge the adapter in PEFT."
        )
    q = f.get("R")[0]
    block = round((1 + (1 + 8 * q.shape[-1]) ** 0.5) / 2)
    q = q.expand(f.site.cols // block, -1) if q.shape[0] == 1 else q
    terms = neumann_terms(f.config)
    # PEFT rotates x R(q), we W R: the transpose. Its inverse branch is the transpose already.
    return OFT(block, terms), {"q": q if terms is None else -q}


_DECODERS = {"LORA": _lora, "ADALORA": _adalora, "LOHA": _loha, "LOKR": _lokr, "HIRA": _hira, "OFT": _oft}


def decode(f: Found) -> Decoded:
    """The structure and factors of one site, checked against each other.

    Raises:
        ConversionError: a map that no structure of ours expresses.
        FileFormatError: tensors that do not fit the settings or the layer.
    """
    kind = f.config["peft_type"]
    if kind not in _DECODERS:
        raise FileFormatError(f"A {kind} file holds no factors; found some of {f.site.name}.")
    structure, values = _DECODERS[kind](f)
    lead = () if f.site.stack is None else (f.site.stack,)
    for name, factor in structure.factors(f.site).items():
        if name not in values or tuple(values[name].shape) != (*lead, *factor.shape):
            raise FileFormatError(
                f"{f.site.name} ({f.site.rows} x {f.site.cols}) needs {name} of shape "
                f"{(*lead, *factor.shape)}; the file gives "
                f"{tuple(values[name].shape) if name in values else sorted(values)}."
            )
    return structure, {
        k: v.detach().to(torch.promote_types(v.dtype, torch.float32)).contiguous().clone() for k, v in values.items()
    }
