"""Our factors of one site as the tensors of a PEFT method."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from rankwise.errors import ConversionError
from rankwise.formats.peft.decode import check_conv, is_out_proj
from rankwise.host import Site
from rankwise.ops.linalg import truncated_svd
from rankwise.structures import OFT, Anchored, HiRA, LoHa, LoKr, LoRA, Magnitude, Rows, Structure, SVDForm
from rankwise.structures.wrappers import under

LOWRANK = "LORA"


@dataclass(frozen=True)
class Pair:
    """An update s * b @ a, exactly low rank, under a magnitude or not.

    Attributes:
        a: (*experts, rank, in).
        b: (*experts, out, rank).
        scale: s.
        magnitude: (out,), or None.
    """

    a: Tensor
    b: Tensor
    scale: float
    magnitude: Tensor | None = None

    @property
    def rank(self) -> int:
        """The rank."""
        return self.a.shape[-2]

    def padded(self, rank: int) -> Pair:
        """The same update with zero rows and columns up to a rank."""
        more = rank - self.rank
        a = nn.functional.pad(self.a, (0, 0, 0, more))
        return Pair(a, nn.functional.pad(self.b, (0, more)), self.scale, self.magnitude)


def pair_of(structure: Structure, f: Mapping[str, Tensor], site: Site) -> Pair | None:
    """The structure as one low-rank pair, where it is one."""
    if isinstance(structure, LoRA):
        return Pair(f["a"], f["b"], structure.scale)
    if isinstance(structure, SVDForm):
        return Pair(f["e"].unsqueeze(-1) * f["a"], f["b"], structure.scale)
    if isinstance(structure, Anchored):
        now = pair_of(structure.inner, f, site)
        then = pair_of(structure.inner, under("anchor", f), site)
        if now is None or then is None:
            return None
        a, b = torch.cat([now.a, then.a], -2), torch.cat([now.b, -then.b], -1)
        return Pair(a, b, now.scale)
    if isinstance(structure, Magnitude):
        inner = pair_of(structure.inner, f, site)
        whole = inner is not None and inner.magnitude is None
        return Pair(inner.a, inner.b, inner.scale, f["magnitude"]) if whole and inner else None
    if isinstance(structure, Rows):
        parts = []
        for part, first, last in structure.parts:
            p = pair_of(structure.inner, under(part, f), site)
            if p is None or p.magnitude is not None:
                return None
            span = (0, 0, first, site.rows - last)
            parts.append(Pair(p.a, nn.functional.pad(p.b * p.scale, span), 1.0))
        return Pair(torch.cat([p.a for p in parts], -2), torch.cat([p.b for p in parts], -1), 1.0)
    return None


def cut(structure: Structure, f: Mapping[str, Tensor], w: Tensor, rank: int) -> tuple[Pair, float]:
    """Any structure with a dense weight as a pair of this rank at most, and its relative error."""
    w = w.detach().double()
    delta = structure.weight({k: v.detach().double() for k, v in f.items()}, w) - w
    most = min(rank, *delta.shape[-2:])
    stack = delta if delta.dim() == 3 else delta.unsqueeze(0)
    found = [truncated_svd(d, most) for d in stack]
    b = torch.stack([u * s.sqrt() for u, s, _ in found])
    a = torch.stack([(v * s.sqrt()).mT for _, s, v in found])
    if delta.dim() == 2:
        a, b = a[0], b[0]
    error = ((b @ a - delta).norm() / delta.norm().clamp_min(1e-30)).item()
    return Pair(a.float(), b.float(), 1.0), error


def method(structure: Structure) -> str | None:
    """PEFT's method for a structure of its own; None where it has none."""
    kinds = {SVDForm: "ADALORA", LoHa: "LOHA", LoKr: "LOKR", HiRA: "HIRA", OFT: "OFT"}
    return kinds.get(type(structure))


def encode_pair(pair: Pair, site: Site, module: Any) -> dict[str, Tensor]:
    """LoRA's tensors; the scale is left to the settings."""
    a, b = pair.a, pair.b
    if is_out_proj(site):
        b = b / 2  # PEFT adds this one twice
    if site.kind == "embedding":
        found = {"lora_embedding_A": _without_padding(a, module), "lora_embedding_B": b}
    else:
        if site.stack:
            a, b = a.flatten(0, 1), b.permute(1, 2, 0).flatten(1)  # expert index fastest
        if site.kind == "conv":
            check_conv(module, "LoRA", shares_weight=False)
            a, b = _kernels(a, b, module)
        found = {"lora_A.weight": a, "lora_B.weight": b}
    if pair.magnitude is not None:
        m = pair.magnitude
        ones = (1,) * len(module.kernel_size) if site.kind == "conv" else ()
        found["lora_magnitude_vector"] = m.reshape(1, -1, *ones) if ones else m
    return found


def _without_padding(a: Tensor, module: Any) -> Tensor:
    """Columns of the vocabulary, the padding token's zero: our padding row never moves."""
    if module.padding_idx is not None:
        a = a.clone()
        a[:, module.padding_idx] = 0
    return a


def _kernels(a: Tensor, b: Tensor, module: Any) -> tuple[Tensor, Tensor]:
    size = module.kernel_size
    return a.reshape(a.shape[0], -1, *size), b.reshape(*b.shape, *(1,) * len(size))


def refuse(site: Site, structure: Structure, why: str) -> ConversionError:
    """The error for a site that PEFT cannot hold."""
    return ConversionError(
        f"PEFT cannot hold {structure!r} on {site.name} ({site.kind}): {why}. Pass rank= to write "
        f"a plain LoRA cut to that rank, its error stated, or rw.merge and save the model."
    )


def encode(structure: Structure, f: Mapping[str, Tensor], site: Site, module: Any) -> dict[str, Tensor]:
    """The tensors of a method that is not low rank, for ``method(structure)``.

    Raises:
        ConversionError: PEFT's method does not take this kind of layer.
    """
    name = method(structure)
    plain = site.kind == "linear" and isinstance(module, nn.Linear)
    size: tuple[int, ...] = getattr(module, "kernel_size", ())
    if name != "HIRA" and not plain and site.kind != "conv":
        raise refuse(site, structure, f"its {name} has no such layer")
    if site.kind == "conv":
        check_conv(module, str(name), shares_weight=name != "OFT")
        if len(size) > 2 if name != "HIRA" else module.groups != 1:
            raise refuse(site, structure, f"its {name} has no such convolution")
    if isinstance(structure, LoHa):
        names = {"b1": "hada_w1_a", "a1": "hada_w1_b", "b2": "hada_w2_a", "a2": "hada_w2_b"}
        return {names[k]: v for k, v in f.items()}
    if isinstance(structure, LoKr):
        names = {"c": "w1", "c_b": "w1_a", "c_a": "w1_b", "d": "w2", "d_b": "w2_a", "d_a": "w2_b"}
        found = {f"lokr_{names[k]}": v for k, v in f.items()}
        if site.kind == "conv" and "d" in f:
            found["lokr_w2"] = f["d"].reshape(f["d"].shape[0], -1, *size)
        return found
    if isinstance(structure, HiRA):
        a, b = f["a"], f["b"]
        if site.kind == "embedding":
            a = _without_padding(a, module)
            return {"hira_embedding_A": a, "hira_embedding_B": b}
        if site.kind == "parameter":
            raise refuse(site, structure, "its HIRA has no bare parameters")
        a, b = _kernels(a, b, module) if site.kind == "conv" else (a, b)
        return {"hira_A": a, "hira_B": b}
    assert isinstance(structure, OFT)
    if site.kernel > 1:
        raise refuse(site, structure, "its OFT is another map for kernels larger than 1x1")
    return {"oft_R.weight": f["q"] if structure.terms is None else -f["q"]}
