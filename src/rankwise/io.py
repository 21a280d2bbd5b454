"""Adapter files: one safetensors file, whole or absent, with everything that loading needs.

``DIR/adapter.safetensors`` holds the factors (``site/factor``), shared ones once. Its header holds
the recipe, the placements, the library's version and a fingerprint of the base. Nothing is pickled,
nothing is recomputed on load.
"""

import hashlib
import json
import os
import tempfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rankwise._recipe import Recipe
from rankwise.adapter import Placement
from rankwise.errors import BaseMismatch, FileFormatError, RankwiseError, SaveError
from rankwise.host import LAYER, Site, host_of, kind_of
from rankwise.registry import check_fields, decode, encode, known_classes
from rankwise.structures import Replace, Structure, TokenRows

FILE = "adapter.safetensors"
FORMAT = "1"
MOST = 2**31  # no side of a weight is longer; keeps a hostile header from costing hours


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


def replaced(structure: Structure) -> frozenset[int] | None:
    """The vocabulary rows that the structure replaces; None where it replaces the whole tensor."""
    if isinstance(structure, Replace):
        return None
    if isinstance(structure, TokenRows):
        return frozenset(structure.index)
    inner = [v for v in vars(structure).values() if isinstance(v, Structure)]
    each = [replaced(s) for s in inner]
    return None if None in each else frozenset(i for rows in each if rows for i in rows)


def fingerprint(model: nn.Module, placements: Iterable[Placement]) -> dict[str, Any]:
    """Which base this is: for each site its shape, storage format, and a digest of some values.

    Values that the adapter brings itself (a head trained whole, new tokens' rows) do not count: a
    fresh base has other ones there. The digest is empty where none are left.
    """
    modules = dict(model.named_modules())
    found: dict[str, Any] = {}
    for placement in placements:
        path, slot, _ = placement.carriers[0]
        raw = host_of(modules[path], slot).parameter()
        data = raw.full_tensor() if hasattr(raw, "full_tensor") else raw  # type: ignore[operator]
        flat = data.detach().reshape(-1)
        step, rows = max(1, flat.numel() // 64), replaced(placement.structure)
        places = range(0, flat.numel(), step)[:64]
        if rows:
            width = flat.numel() // placement.site.shape[0]
            places = [i for i in places if i // width not in rows]
        index = torch.tensor([] if rows is None else list(places), device=flat.device).long()
        sample = flat[index].cpu().contiguous().view(torch.uint8).numpy().tobytes()
        found[placement.site.name] = [
            list(placement.site.shape),
            str(raw.dtype).removeprefix("torch."),
            hashlib.sha256(sample).hexdigest()[:16] if sample else "",
        ]
    return found


def check_base(model: nn.Module, placements: Iterable[Placement], base: Mapping[str, Any], any_base: bool) -> None:
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
        if not any_base and here[1] == dtype and digest and here[2] != digest:
            raise BaseMismatch(
                f"The adapter was trained on a base of the same shape but other weights (first difference at {name}). "
                f"Load it on the model that it was made for, or pass any_base=True if another base is meant."
            )


# -- writing ----------------------------------------------------------------------------------


def whole(tensor: Tensor) -> Tensor:
    """The full tensor on the CPU; gathers a sharded one (call it on every rank)."""
    full = getattr(tensor, "full_tensor", None)
    return (full() if full is not None else tensor).detach().cpu().contiguous()


def atomically(path: Path, write: Callable[[Path], object]) -> None:
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
    except BaseException as error:
        if temporary is not None:
            temporary.unlink(missing_ok=True)
        if not isinstance(error, OSError | SafetensorError):
            raise
        raise SaveError(
            f"A file is written whole or not at all; writing {path} failed ({error}). Nothing was "
            f"changed there: free some space or choose another folder, and save again."
        ) from error


def _save(tensors: dict[str, Tensor], path: Path, header: dict[str, str]) -> None:
    """Write a safetensors file whose bytes depend on nothing but its contents."""
    save_file(tensors, path, header)
    with path.open("r+b") as file:  # safetensors 0.8 writes the metadata in a random order
        size = int.from_bytes(file.read(8), "little")
        names = json.loads(file.read(size))
        names["__metadata__"] = dict(sorted(names["__metadata__"].items()))
        text = json.dumps(names, ensure_ascii=False, separators=(",", ":")).encode()
        assert len(text) <= size
        file.seek(8)
        file.write(text.ljust(size))


def encode_placements(placements: Iterable[Placement]) -> list[Any]:
    """Placements as JSON."""
    return [
        [{k: getattr(p.site, k) for k in Site.__dataclass_fields__}, encode(p.structure), p.carriers]
        for p in placements
    ]


def write(path: str | Path, adapter: Any, version: str) -> Path:
    """Write ``path/adapter.safetensors``; under FSDP every rank calls it and rank 0 writes.

    Raises:
        SaveError: the disk is full or not writable.
    """
    file = Path(path) / FILE
    tensors = {name: whole(parameter) for name, parameter in adapter.named_parameters()}
    header = {
        "format": "rankwise",
        "rankwise_format": FORMAT,
        "version": version,
        "recipe": json.dumps(encode(adapter.recipe)),
        "placements": json.dumps(encode_placements(adapter.placements)),
        "base": json.dumps(fingerprint(adapter.model, adapter.placements)),
    }
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_rank() == 0:
        atomically(file, lambda temporary: _save(tensors, temporary, header))
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
                    f"{header.get('rankwise_format', 'nothing')}. It was written by another tool or a newer version."
                )
            # cloned: BLAS rounds differently at an unaligned address, where the file has them
            flat = {name: archive.get_tensor(name).clone() for name in archive.keys()}  # noqa: SIM118
        recipe, placed, base = (_json(header[k]) for k in ("recipe", "placements", "base"))
        version = header["version"]
    except (SafetensorError, OSError, KeyError, RecursionError, json.JSONDecodeError) as error:
        raise FileFormatError(f"{file} is truncated or damaged ({error}).") from error
    classes = known_classes(known)
    try:
        made = decode(recipe, classes)
        if not isinstance(made, Recipe):
            raise FileFormatError(f"A header says a Recipe; {file} says a {type(made).__name__}.")
        placements = tuple(_placement(a, b, c, classes) for a, b, c in placed)
        tensors = _checked(file, placements, flat)
        if set(base) != set(tensors) or any(len(facts) != 3 for facts in base.values()):
            raise FileFormatError(f"The fingerprint in {file} does not name the adapted sites.")
    except FileFormatError:
        raise
    # whatever a damaged or hostile header leads to: unknown fields, clashing axes, other types
    except (RankwiseError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise FileFormatError(f"The recipe or the sites in {file} do not fit ({error}).") from error
    return Saved(made, placements, tensors, base, version)


def _json(text: str) -> Any:
    def refuse(name: str) -> None:
        raise json.JSONDecodeError(f"{name} is no number", text, 0)

    return json.loads(text, parse_constant=refuse)


def _placement(facts: Any, structure: Any, carriers: Any, classes: Mapping[str, type]) -> Placement:
    """One placement from its JSON."""
    site = Site(**{**facts, "shape": tuple(facts["shape"])})
    check_fields(Site, vars(site))
    sides = (site.rows, site.cols, site.kernel, site.stack or 1, *site.shape)
    made = decode(structure, classes)
    if not isinstance(made, Structure) or ".." in site.name or not carriers:
        raise FileFormatError(f"A site has a name, a structure and a carrier; found {facts}.")
    if not all(isinstance(n, int) and 0 <= n <= MOST for n in sides):
        raise FileFormatError(f"The sides of a weight lie between 0 and {MOST}; found {sides}.")
    return Placement(site, made, tuple((str(p), str(s), bool(t)) for p, s, t in carriers))


def _checked(file: Path, placements: Iterable[Placement], flat: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors by site and factor, every one declared and every declared one there."""
    found: dict[str, dict[str, Tensor]] = {}
    for placement in placements:
        site = placement.site
        if site.name in found:
            raise FileFormatError(f"{file} names the site {site.name} twice.")
        values = found.setdefault(site.name, {})
        for name, factor in placement.structure.factors(site).items():
            key = f"{site.name}/{name}"
            shape = (*((site.stack,) if site.stack else ()), *factor.shape)
            if key not in flat:
                raise FileFormatError(f"{file} declares the tensor {key} but does not hold it.")
            tensor = flat.pop(key)
            if tuple(tensor.shape) != shape:
                raise FileFormatError(
                    f"The recipe of {file} asks for {key} of shape {shape}; the file holds {tuple(tensor.shape)}."
                )
            if not tensor.is_floating_point() or not torch.isfinite(tensor).all():
                raise FileFormatError(f"{key} in {file} holds NaN, infinity or integers.")
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
        if module is None or name not in module._parameters or (slot == LAYER and kind_of(module) is None):
            raise BaseMismatch(
                f"The adapter sits on {path or 'the model itself'} ({name}), which this model does "
                f"not have. Load it on the model that it was made for."
            )
        found.append((module, slot, transposed))
    module, slot, _ = found[0]
    site = host_of(module, slot).site("")
    want = placement.site
    if any(getattr(site, k) != getattr(want, k) for k in ("kind", "rows", "cols", "stack", "groups")):
        raise BaseMismatch(
            f"The adapter was made for {want.name}, {want.kind} of {want.rows} x {want.cols}; "
            f"this model's is {site.kind} of {site.rows} x {site.cols}. Load it on the model that "
            f"it was made for (for new tokens, resize the embedding first)."
        )
    return found
