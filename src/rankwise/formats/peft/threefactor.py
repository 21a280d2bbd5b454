"""TinyLoRA: PEFT keeps the trained vectors beside the model, one a group of sites, counted in the model's order."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from rankwise.errors import ConversionError
from rankwise.formats.peft.method import Method
from rankwise.host import Site
from rankwise.structures import TinyLoRA

SHARED = "base_model"  # where the vectors are
_NAMES = {"a": "tinylora_A", "b": "tinylora_B", "basis": "tinylora_P", "v": "tinylora_v"}


def _build(config: Mapping[str, Any], site: Site, f: dict[str, Tensor]) -> TinyLoRA:
    if "basis" not in f:
        raise ConversionError(
            f"The random matrices of a TinyLoRA are part of the file; that of {site.name} has none. Save it from PEFT "
            f"with TinyLoraConfig(save_projection=True)."
        )
    return TinyLoRA(f["a"].shape[-2], None, size=f["v"].shape[-1])


def spread(config: Mapping[str, Any], order: Iterable[str], factors: dict[str, dict[str, Tensor]]) -> None:
    """Give every site its vector, a copy where PEFT ties several sites.

    Args:
        config: PEFT's settings.
        order: the paths of the model's modules.
        factors: PEFT's tensors by path, changed in place.
    """
    vectors, sites = factors.pop(SHARED), [path for path in order if path in factors]
    groups = max(1, round(len(sites) * (1 - (config.get("weight_tying") or 0.0))))
    for i, path in enumerate(sites):
        factors[path]["tinylora_v"] = vectors[f"tinylora_v.{min(i // max(1, len(sites) // groups), groups - 1)}"]


METHODS = {"TINYLORA": Method(TinyLoRA, _NAMES, ("Linear", "Conv1D"), build=_build)}
