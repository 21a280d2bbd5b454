"""A PEFT file as it grows: its tensors, its settings, and what it holds of the model itself."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Mapping
from typing import Any

from torch import Tensor

from rankwise import io
from rankwise.adapter import Placement
from rankwise.attach import Adapter
from rankwise.errors import ConversionError
from rankwise.formats.peft.encode import LOWRANK
from rankwise.host import LAYER, ParameterHost, kind_of
from rankwise.targets import base_modules


class Draft:
    """The file as it grows."""

    def __init__(self, adapter: Adapter) -> None:
        self.adapter = adapter
        self.modules: dict[str, Any] = base_modules(adapter.model)
        self.tensors: dict[str, Tensor] = {}
        self.settings: dict[str, Any] = {}
        self.targets: list[str] = []
        self.parameters: list[str] = []
        self.notes: list[str] = []
        self.errors: dict[str, float] = {}

    def factors(self, p: Placement) -> dict[str, Tensor]:
        return {k: io.whole(v) for k, v in self.adapter[p.site.name].items()}

    def weight(self, p: Placement) -> Tensor:
        path, slot, _ = p.carriers[0]
        kind = kind_of(self.modules[path]) if slot == LAYER else None
        host = kind(self.modules[path]) if kind else ParameterHost(self.modules[path], slot)
        return io.whole(host.weight())

    def add(self, path: str, tensors: Mapping[str, Tensor]) -> None:
        dot = f"{path}." if path else ""
        self.tensors |= {f"base_model.model.{dot}{k}": v for k, v in tensors.items()}

    def spread(self, key: str, values: Mapping[str, float], pattern: str | None = None) -> None:
        """A setting of every site: the commonest value, and patterns for the others."""
        common = Counter(values.values()).most_common(1)[0][0] if values else None
        if common is not None:
            self.settings[key] = common
        odd = {f"^{re.escape(k)}": v for k, v in values.items() if v != common}
        if odd and pattern is None:
            raise ConversionError(f"PEFT has one {key} for all sites; found {dict(values)}.")
        if pattern is not None:
            self.settings[pattern] = odd


def put_tokens(d: Draft, placements: list[Placement], kind: str | None) -> str:
    """Rows of new tokens, beside LoRA or alone; returns the method that they make it.

    Raises:
        ConversionError: beside another method, or on a head that was untied.
    """
    ids = {p.carriers[0][0]: list(p.structure.index) for p in placements}  # type: ignore
    if d.adapter.recipe.sites.tied == "untie":
        raise ConversionError(
            "PEFT's token rows always reach a tied head; these were trained on an untied one. "
            "Merge (rw.merge) and save the model."
        )
    alone = kind is None and len(set(map(tuple, ids.values()))) == 1
    if kind not in (None, LOWRANK) or (kind is None and not alone):
        raise ConversionError(
            f"PEFT trains token rows alone, the same on every embedding, or beside LoRA; found "
            f"them beside {kind}. Merge (rw.merge) and save the model."
        )
    infix = "" if alone else "token_adapter."
    for p in placements:
        d.add(p.carriers[0][0], {f"{infix}trainable_tokens_delta": d.factors(p)["rows"]})
    if alone:
        d.targets += ids
        d.settings["token_indices"] = next(iter(ids.values()))
        return "TRAINABLE_TOKENS"
    d.settings["trainable_token_indices"] = ids
    return LOWRANK


def _stored(d: Draft, path: str) -> dict[str, Tensor]:
    """The base's state of a module, adapters left out."""
    found: dict[str, Tensor] = {}
    for name, module in d.modules.items():
        if name == path or name.startswith(f"{path}."):
            inner = name[len(path) + 1 :]
            dot = f"{inner}." if inner else ""
            tensors = {**module._parameters, **module._buffers}
            kept = {k: v for k, v in tensors.items() if v is not None}
            skip = module._non_persistent_buffers_set
            found |= {f"{dot}{k}": io.whole(v) for k, v in kept.items() if k not in skip}
    return found


def put_whole(d: Draft, placements: list[Placement], kind: str) -> None:
    """Tensors trained whole: biases of adapted layers, else modules_to_save.

    Raises:
        ConversionError: a module that is both adapted and replaced.
    """
    saved: list[str] = []
    for p in sorted(placements, key=lambda p: p.site.name.count(".")):
        path, slot, _ = p.carriers[0]
        value = d.factors(p)["value"]
        if ParameterHost(d.modules[path], slot).transposed:
            value = value.mT
        value = value.reshape(p.site.shape)
        if path in d.targets and slot == "bias" and kind in ("LORA", "ADALORA", "OFT"):
            d.settings["bias"] = "oft_only" if kind == "OFT" else "lora_only"
            d.add(path, {"base_layer.bias": value})
            continue
        around = next((s for s in saved if path == s or path.startswith(f"{s}.")), None)
        if around is None:
            if path == "" or any(t == path or t.startswith(f"{path}.") for t in d.targets):
                raise ConversionError(
                    f"PEFT saves {path or 'the model'} whole or adapts what is in it, not both; "
                    f"found {p.site.name} replaced. Merge (rw.merge) and save the model."
                )
            saved.append(path)
            d.add(path, _stored(d, path))
            around = path
        d.add(path, {slot: value})
    if saved:
        d.settings["modules_to_save"] = saved
