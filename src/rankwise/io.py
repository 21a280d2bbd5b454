"""Adapter files: one safetensors file, whole or absent, with everything that loading needs.

``DIR/adapter.safetensors`` holds the factors (``site/factor``), shared ones once. Its header holds
the recipe, the placements, the library's version and a fingerprint of the base. Nothing is pickled,
nothing is recomputed on load.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any
from uuid import uuid4

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rankwise._recipe import Recipe
from rankwise.adapter import Placement, borrowed, owned
from rankwise.errors import BaseMismatch, FileFormatError, RankwiseError, SaveError
from rankwise.host import LAYER, Site, host_of, kind_of
from rankwise.registry import check_fields, decode, encode, known_classes
from rankwise.structures import Replace, Structure, TokenRows
from rankwise.structures.adversary import Adversary

FILE = "adapter.safetensors"
FORMAT = "1"
REMEDY = "Load it on the model that it was made for"
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


def replaced(structure: Structure, rows: int) -> set[int]:
    """Which of the tensor's rows the structure replaces: all, those of new tokens, or none."""
    if isinstance(structure, Replace | TokenRows):
        return set(structure.index if isinstance(structure, TokenRows) else range(rows))
    return {i for part in vars(structure).values() if isinstance(part, Structure) for i in replaced(part, rows)}


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
        flat = gathered(raw).reshape(-1)
        rows, places = next(iter(placement.site.shape), 1), range(0, flat.numel(), max(1, flat.numel() // 64))[:64]
        width, own = max(1, flat.numel() // rows), replaced(placement.structure, rows)
        index = torch.tensor([i for i in places if i // width not in own], device=flat.device, dtype=torch.long)
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
            found = f"has shape {shape}; this model's has {here and here[0]}. {REMEDY}."
            raise BaseMismatch(f"The adapter was trained on a base whose {name} {found}")
        if not any_base and here[1] == dtype and digest and here[2] != digest:
            raise BaseMismatch(
                f"The adapter was trained on a base of the same shape but other weights (first difference at {name}). "
                f"{REMEDY}, or pass any_base=True if another base is meant."
            )


# -- writing ----------------------------------------------------------------------------------


def gathered(tensor: Any) -> Tensor:
    """The full tensor of a sharded one (call it on every rank); any other as it is. Without gradient."""
    return (tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor).detach()


def whole(tensor: Tensor) -> Tensor:
    """The same on the CPU, to be written."""
    return gathered(tensor).cpu().contiguous()


def atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Run ``write`` on a temporary file beside ``path`` and move it there when it is complete.

    Raises:
        SaveError: the disk is full or not writable; nothing half-written is left.
    """
    temporary = path.with_name(f".{path.name}.{uuid4().hex}.tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write(temporary)
        with temporary.open("rb") as file:
            os.fsync(file.fileno())
        os.chmod(temporary, 0o644)  # safetensors 0.8 lets nobody else read what it writes
        temporary.replace(path)
    except (OSError, SafetensorError) as error:
        raise SaveError(
            f"A file is written whole or not at all; writing {path} failed ({error}). Nothing was "
            f"changed there: free some space or choose another folder, and save again."
        ) from error
    finally:
        with suppress(OSError):  # it is gone where it was moved
            temporary.unlink()


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
    return [[vars(p.site), encode(p.structure), p.carriers] for p in placements]


def served(placements: Iterable[Placement]) -> tuple[Placement, ...]:
    """The placements without what only training sees."""
    return tuple(
        replace(p, structure=p.structure.inner) if isinstance(p.structure, Adversary) else p for p in placements
    )


def write(path: str | Path, adapter: Any, version: str, training: bool = False) -> Path:
    """Write ``path/adapter.safetensors``; under FSDP every rank calls it and rank 0 writes.

    Args:
        path: the folder.
        adapter: the adapter.
        version: of the library.
        training: with what only training sees, to resume it.

    Returns:
        The file's path.

    Raises:
        SaveError: the disk is full or not writable.
    """
    file = Path(path) / FILE
    placements = adapter.placements if training else served(adapter.placements)
    named = {f"{p.site.name}/{name}" for p in placements for name in p.structure.factors(p.site)}
    tensors = {name: whole(parameter) for name, parameter in adapter.named_parameters() if name in named}
    header = {
        "format": "rankwise",
        "rankwise_format": FORMAT,
        "version": version,
        "recipe": json.dumps(encode(adapter.recipe)),
        "placements": json.dumps(encode_placements(placements)),
        "base": json.dumps(fingerprint(adapter.model, adapter.placements)),
    }
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    if not distributed or torch.distributed.get_rank() == 0:
        atomically(file, lambda temporary: _save(tensors, temporary, header))
    return file


# -- reading ----------------------------------------------------------------------------------


def contents(file: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    """The header and the tensors of an adapter file, read but not yet understood.

    Raises:
        FileFormatError: a truncated or foreign file.
    """
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
        facts = {k: _json(header[k]) for k in ("recipe", "placements", "base")}
        return {"version": header["version"], **facts}, flat
    except (SafetensorError, OSError, KeyError, RecursionError, json.JSONDecodeError) as error:
        found = f"{file} cannot be read: it is missing, truncated or damaged ({error})"
        raise FileFormatError(f"{found}. Take another copy, or resume from another checkpoint.") from error


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
    header, flat = contents(file)
    classes, base = known_classes(known), header["base"]
    try:
        made = decode(header["recipe"], classes)
        if not isinstance(made, Recipe):
            raise FileFormatError(f"A header says a Recipe; {file} says a {type(made).__name__}.")
        placements = tuple(_placement(a, b, c, classes) for a, b, c in header["placements"])
        tensors = _checked(file, placements, flat)
        if set(base) != set(tensors) or any(len(facts) != 3 for facts in base.values()):
            raise FileFormatError(f"The fingerprint in {file} does not name the adapted sites.")
    except FileFormatError:
        raise
    # whatever a damaged or hostile header leads to: unknown fields, clashing axes, other types
    except (RankwiseError, TypeError, ValueError, KeyError, AttributeError, RecursionError) as error:
        raise FileFormatError(f"The recipe or the sites in {file} do not fit ({error}).") from error
    return Saved(made, placements, tensors, base, header["version"])


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


def _checked(file: Path, placements: Sequence[Placement], flat: dict[str, Tensor]) -> dict[str, dict[str, Tensor]]:
    """The tensors by site and factor, every one declared and every declared one there."""
    described = {f"{p.site.name}/{name}": factor for p, own in owned(placements) for name, factor in own.items()}
    stacks = {p.site.name: () if p.site.stack is None else (p.site.stack,) for p in placements}
    wanted = {key: (*stacks[key.rpartition("/")[0]], *factor.shape) for key, factor in described.items()}
    if wanted.keys() != flat.keys():
        missing, unknown = sorted(wanted.keys() - flat.keys())[:4], sorted(flat.keys() - wanted.keys())[:4]
        raise FileFormatError(f"The recipe of {file} says what it holds; found missing {missing}, unknown {unknown}.")
    found: dict[str, dict[str, Tensor]] = {p.site.name: {} for p in placements}
    if len(found) < len(placements):
        raise FileFormatError(f"{file} names a site twice.")
    for key, shape in wanted.items():
        site, _, name = key.rpartition("/")
        found[site][name] = tensor = flat[key]
        if tuple(tensor.shape) != shape:
            raise FileFormatError(f"In {file} the recipe asks for {key} of shape {shape}; found {tuple(tensor.shape)}.")
        below = described[key].below
        if bool(below) == tensor.is_floating_point() or not torch.isfinite(tensor).all():
            raise FileFormatError(
                f"{key} in {file} should hold {'whole' if below else 'finite'} numbers, and does not."
            )
        if not described[key].inside(tensor):
            raise FileFormatError(
                f"{key} in {file} lies from 0 to {below - 1}; found {tensor.min()} to {tensor.max()}."
            )
    for (site, name), first in borrowed(placements).items():
        found[site][name] = found[first][name]
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
            sits = f"{path or 'the model itself'} ({name})"
            raise BaseMismatch(f"The adapter sits on {sits}, which this model does not have. {REMEDY}.")
        found.append((module, slot, transposed))
    module, slot, _ = found[0]
    site = host_of(module, slot).site("")
    want = placement.site
    if any(getattr(site, k) != getattr(want, k) for k in ("kind", "rows", "cols", "stack", "groups")):
        raise BaseMismatch(
            f"The adapter was made for {want.name}, {want.kind} of {want.rows} x {want.cols}; "
            f"this model's is {site.kind} of {site.rows} x {site.cols}. {REMEDY} (for new tokens, resize the "
            f"embedding first)."
        )
    return found
