"""Adapter files: one safetensors file, whole or absent, with everything that loading needs.

``DIR/adapter.safetensors`` holds the factors (``site/factor``), shared ones once. Its header holds
the recipe, the placements, the library's version and a fingerprint of the base. Nothing is pickled,
nothing is recomputed on load.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rankwise._recipe import Recipe
from rankwise.adapter import LAYER, Placement, SiteFactors
from rankwise.errors import BaseMismatch, FileFormatError, SaveError
from rankwise.host import ParameterHost, Site, kind_of
from rankwise.registry import decode, encode, known_classes

FILE = "adapter.safetensors"
FORMAT = "1"
_NAME = re.compile(r"[A-Za-z0-9_.\-\[\]]+/[A-Za-z0-9_]+")


@dataclass(frozen=True)
class Saved:
    """What a file holds.

    Attributes:
        recipe: the point of the method space.
        placements: where it sits.
        tensors: site name -> factor name -> values.
        base: fingerprint of the base it was trained on.
        version: of the library that wrote it.
    """

    recipe: Recipe
    placements: tuple[Placement, ...]
    tensors: dict[str, dict[str, Tensor]]
    base: dict[str, Any]
    version: str


# -- the base's fingerprint -------------------------------------------------------------------


def fingerprint(model: nn.Module, placements: Iterable[Placement]) -> dict[str, Any]:
    """Which base this is: for each site its shape, storage format, and a digest of some values."""
    modules = dict(model.named_modules())
    found: dict[str, Any] = {}
    for placement in placements:
        path, slot, _ = placement.carriers[0]
        module = modules[path]
        raw = module._parameters["weight" if slot == LAYER else slot]
        assert raw is not None
        data = raw.full_tensor() if hasattr(raw, "full_tensor") else raw  # type: ignore[operator]
        flat = data.detach().reshape(-1)
        step = max(1, flat.numel() // 64)
        sample = flat[::step][:64].cpu().contiguous().view(torch.uint8).numpy().tobytes()
        found[placement.site.name] = [
            list(placement.site.shape),
            str(raw.dtype).removeprefix("torch."),
            hashlib.sha256(sample).hexdigest()[:16],
        ]
    return found


def check_base(
    model: nn.Module, placements: Iterable[Placement], base: Mapping[str, Any], any_base: bool
) -> None:
    """Refuse a base whose values are not those that the adapter was trained on.

    Raises:
        BaseMismatch: another shape, or the same storage format with other values.
    """
    now = fingerprint(model, placements)
    for name, (shape, dtype, digest) in base.items():
        here = now.get(name)
        if here is None or list(here[0]) != list(shape):
            raise BaseMismatch(
                f"The adapter was trained on a base whose {name} has shape {shape}; this model's "
                f"has {here and here[0]}. Load it on the model that it was made for."
            )
        if not any_base and here[1] == dtype and here[2] != digest:
            raise BaseMismatch(
                f"The adapter was trained on a base of the same shape but other weights (first "
                f"difference at {name}). Load it on the model that it was made for, or pass "
                f"any_base=True if another base is meant."
            )


# -- writing ----------------------------------------------------------------------------------


def whole(tensor: Tensor) -> Tensor:
    """The full tensor on the CPU; gathers a sharded one (call it on every rank)."""
    full = getattr(tensor, "full_tensor", None)
    return (full() if full is not None else tensor).detach().cpu().contiguous()


def atomically(path: Path, write: Callable[[Path], None]) -> None:
    """Run ``write`` on a temporary file beside ``path`` and move it there when it is complete.

    Raises:
        SaveError: the disk is full or not writable; nothing half-written is left.
    """
    temporary: Path | None = None
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.", suffix=".tmp")
        os.close(handle)
        temporary = Path(name)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        raise SaveError(
            f"A file is written whole or not at all; writing {path} failed ({error}). Nothing was "
            f"changed there: free some space or choose another folder, and save again."
        ) from error


def encode_placements(placements: Iterable[Placement]) -> list[Any]:
    """Placements as JSON."""
    return [
        [
            {k: getattr(p.site, k) for k in Site.__dataclass_fields__},
            encode(p.structure),
            p.carriers,
        ]
        for p in placements
    ]


def write(
    path: str | Path,
    recipe: Recipe,
    placements: Sequence[Placement],
    modules: Mapping[str, SiteFactors],
    model: nn.Module,
    version: str,
) -> Path:
    """Write ``path/adapter.safetensors``; under FSDP every rank calls it and rank 0 writes.

    Raises:
        SaveError: the disk is full or not writable.
    """
    file = Path(path) / FILE
    tensors = {
        f"{site}/{name}": whole(parameter)
        for site, module in modules.items()
        for name, parameter in module.named_parameters()
    }
    header = {
        "format": "rankwise",
        "rankwise_format": FORMAT,
        "version": version,
        "recipe": json.dumps(encode(recipe)),
        "placements": json.dumps(encode_placements(placements)),
        "base": json.dumps(fingerprint(model, placements)),
    }
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_rank() == 0:
        atomically(file, lambda temporary: save_file(tensors, temporary, header))
    return file


# -- reading ----------------------------------------------------------------------------------


def read(path: str | Path, known: Iterable[type] = ()) -> Saved:
    """Read an adapter file and check it against its own header.

    Raises:
        FileFormatError: a truncated, foreign or hostile file: unknown axes, names that are not
            ``site/factor``, shapes other than those that the recipe asks for, NaN.
    """
    file = Path(path)
    file = file / FILE if file.is_dir() else file
    if not file.is_file():
        raise FileFormatError(
            f"An adapter is a folder with {FILE} in it; found none at {path}. For PEFT's use "
            f"rw.formats.peft, or rankwise convert --from peft."
        )
    try:
        with safe_open(file, framework="pt") as archive:
            header = archive.metadata() or {}
            if header.get("rankwise_format") != FORMAT:
                raise FileFormatError(
                    f"A rankwise adapter says format {FORMAT} in its header; {file} says "
                    f"{header.get('rankwise_format', 'nothing')}. It was written by another tool "
                    f"or a newer version."
                )
            # cloned: BLAS rounds differently at an unaligned address, where the file has them
            flat = {name: archive.get_tensor(name).clone() for name in archive.keys()}  # noqa: SIM118
        recipe_data, placement_data = json.loads(header["recipe"]), json.loads(header["placements"])
        base = json.loads(header["base"])
    except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
        raise FileFormatError(f"{file} is truncated or damaged ({error}).") from error
    classes = known_classes(known)
    recipe = decode(recipe_data, classes)
    try:
        placements = tuple(
            Placement(
                Site(**{**site, "shape": tuple(site["shape"])}),
                decode(structure, classes),
                tuple((str(p), str(s), bool(t)) for p, s, t in carriers),
            )
            for site, structure, carriers in placement_data
        )
    except (TypeError, KeyError, ValueError) as error:
        raise FileFormatError(f"The placements of {file} cannot be read ({error}).") from error
    return Saved(recipe, placements, _checked(file, placements, flat), base, header["version"])


def _checked(
    file: Path, placements: Iterable[Placement], flat: dict[str, Tensor]
) -> dict[str, dict[str, Tensor]]:
    """The tensors by site and factor, every one declared and every declared one there."""
    found: dict[str, dict[str, Tensor]] = {}
    for placement in placements:
        site = placement.site
        values = found.setdefault(site.name, {})
        for name, factor in placement.structure.factors(site).items():
            key = f"{site.name}/{name}"
            shape = (*((site.stack,) if site.stack else ()), *factor.shape)
            if key not in flat or not _NAME.fullmatch(key):
                raise FileFormatError(f"{file} declares the tensor {key} but does not hold it.")
            tensor = flat.pop(key)
            if tuple(tensor.shape) != shape:
                raise FileFormatError(
                    f"The recipe of {file} asks for {key} of shape {shape}; the file holds "
                    f"{tuple(tensor.shape)}."
                )
            if not torch.isfinite(tensor).all():
                raise FileFormatError(f"{key} in {file} holds NaN or infinite values.")
            values[name] = tensor
    if flat:
        raise FileFormatError(f"{file} holds tensors unknown to its recipe: {sorted(flat)[:4]}.")
    return found


def carried(model: nn.Module, placement: Placement) -> list[tuple[nn.Module, str, bool]]:
    """The modules of a placement in this model.

    Raises:
        BaseMismatch: a module or parameter that the model lacks or that has other sizes.
    """
    modules = dict(model.named_modules())
    found = []
    for path, slot, transposed in placement.carriers:
        module = modules.get(path)
        name = "weight" if slot == LAYER else slot
        if module is None or name not in module._parameters:
            raise BaseMismatch(
                f"The adapter sits on {path or 'the model itself'} ({name}), which this model does "
                f"not have. Load it on the model that it was made for."
            )
        found.append((module, slot, transposed))
    module, slot, _ = found[0]
    kind = kind_of(module) if slot == LAYER else None
    site = kind(module).site("") if kind else ParameterHost(module, slot).site("")
    want = placement.site
    if (site.rows, site.cols, site.stack) != (want.rows, want.cols, want.stack):
        raise BaseMismatch(
            f"The adapter was made for {want.name} of {want.rows} x {want.cols}; this model's is "
            f"{site.rows} x {site.cols}. Load it on the model that it was made for (for new "
            f"tokens, resize the embedding first)."
        )
    return found
