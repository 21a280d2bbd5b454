"""PEFT's methods of augmented rank: GraLoRA and GLoRA.

PEFT's grid holds A (k, in/k, r) and B (k, r, out/k); its column is (out, 1), its number (1,).
"""

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rankwise.errors import ConversionError
from rankwise.formats.peft.method import Method
from rankwise.host import Site
from rankwise.structures import GLoRA, GraLoRA, Structure

_GRID = {"a": "gralora_A", "b": "gralora_B"}
_GRID |= {"whole_a": "gralora_A_general.weight", "whole_b": "gralora_B_general.weight"}
_PARTS = {
    "gate_a": "A.Xu",
    "gate_b": "A.Xd",
    "gate_x": "A.X",
    "update_a": "B.Xu",
    "update_b": "B.Xd",
    "update_x": "B.X",
}
_PARTS |= {f"nothing_{part}": f"{part}.zeros" for part in "ABCDE"}  # buffers of parts that are not there


def _gralora(config: Mapping[str, Any], site: Site, f: dict[str, Tensor]) -> Structure:
    r, h = config["r"], config["hybrid_r"]
    f["a"], f["b"] = f["a"].unflatten(1, (-1, r)).mT, f["b"].unflatten(1, (r, -1)).mT
    return GraLoRA(r, config["alpha"] * r / (r + h), blocks=config["gralora_k"], hybrid=h)


def _of_gralora(structure: GraLoRA, site: Site, f: dict[str, Tensor]) -> dict[str, Any]:
    f["a"], f["b"], both = f["a"].mT, f["b"].mT, structure.rank + structure.hybrid
    settings = {"r": structure.rank, "gralora_k": structure.blocks, "hybrid_r": structure.hybrid}
    return {**settings, "alpha": structure.scale * both}


def _glora(config: Mapping[str, Any], site: Site, f: dict[str, Tensor]) -> Structure:
    for name in [name for name in f if name.startswith("nothing_")]:
        del f[name]
    f |= {name: value.reshape(-1, 1) for name, value in f.items() if name.endswith("_x")}
    return GLoRA(config["r"], config["config_A_B"], config["config_A_B"])


def _of_glora(structure: GLoRA, site: Site, f: dict[str, Tensor]) -> dict[str, Any]:
    if structure.gate != structure.update:
        raise ConversionError(
            f"PEFT's A and B are of one kind; found {structure!r} at {site.name}. Merge the adapter (rw.merge) and "
            f"save the model."
        )
    f |= {name: value.flatten() for name, value in f.items() if structure.gate == "constant"}
    return {"r": structure.rank, "config_A_B": structure.gate, "config_C": "none", "config_D_E": "none"}


METHODS = {
    "GRALORA": Method(GraLoRA, _GRID, ("Linear", "Conv1D"), build=_gralora, settings=_of_gralora),
    "GLORA": Method(
        GLoRA, {ours: f"glora_{name}" for ours, name in _PARTS.items()}, ("Linear",), build=_glora, settings=_of_glora
    ),
}
