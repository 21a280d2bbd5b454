"""From a PEFT folder to an adapter on the plain model."""

import pickle
import re
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rankwise._recipe import Recipe
from rankwise.adapter import Placement
from rankwise.attachment import Adapter, check_name, install
from rankwise.candidates import base_modules, output_head
from rankwise.errors import BaseMismatch, ConversionError, FileFormatError
from rankwise.formats.peft import threefactor
from rankwise.formats.peft.config import DROPOUTS, MERGE, meant, read_config, targeted
from rankwise.formats.peft.decode import decode
from rankwise.formats.peft.layout import METHODS, places
from rankwise.host import LAYER, ParameterHost, host_of
from rankwise.inits import Kaiming, Principal
from rankwise.model_state import check_model, freeze_base, untied
from rankwise.ops.linalg import widened
from rankwise.sites import Override, Sites, Target
from rankwise.structures import CrossGroup, LoRA, Replace, Stack, TokenRows
from rankwise.structures.wrappers import named

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_LEAVES = {name.partition("_")[0] for method in METHODS.values() for name in method.names.values()} | {
    "trainable_tokens"
}
_FACTOR = re.compile(rf"(?:(?P<path>.*?)\.)?(?P<leaf>(?:{'|'.join(sorted(_LEAVES))})_.+)$")


def _read_tensors(folder: Path) -> dict[str, Tensor]:
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise FileFormatError(f"A PEFT adapter holds one of {WEIGHTS}; {folder} has neither.")
    try:
        flat = load_file(file) if file.suffix == ".safetensors" else torch.load(file, "cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, EOFError) as error:
        raise FileFormatError(f"{file} is damaged, or a pickle of more than tensors, never run ({error}).") from error
    if bad := [k for k, v in flat.items() if not isinstance(v, Tensor) or not torch.isfinite(v).all()]:
        raise FileFormatError(f"{file} holds NaN, infinite values or other objects: {bad[:4]}.")
    return {k.removeprefix("base_model.model."): v for k, v in flat.items()}


def _plain(path: str) -> str:
    """A path without PEFT's wrappers."""
    return ".".join(p for p in path.split(".") if p not in ("base_layer", "token_adapter"))


class _Loading:
    """What will be put where, and what is told about the rest."""

    def __init__(self, model: Any, config: dict[str, Any], left: list[str]) -> None:
        self.config, self.left = config, left
        self.modules: dict[str, Any] = base_modules(model)
        self.places = {p.path: p for p in places(model, config.get("target_parameters") or ())}
        self.placed: dict[str, tuple[Placement, dict[str, Tensor]]] = {}
        self.common: dict[str, Tensor] = {}  # factors that all layers share
        self.begun: dict[Any, Tensor] = {}  # those of the sites so far, where they live
        self.tied: Literal["refuse", "tie", "untie"] = "refuse"
        head = output_head(model)
        embedding = None if head is None else model.get_input_embeddings()
        tied = (embedding, head) if getattr(embedding, "weight", self) is getattr(head, "weight", None) else ()
        self.ends = [path for end in tied for path, module in self.modules.items() if module is end]

    def put(self, placement: Placement, values: dict[str, Tensor]) -> None:
        path, slot, _ = placement.carriers[0]
        device = host_of(self.modules[path], slot).parameter().device
        labels = {k: factor.shared for k, factor in placement.structure.factors(placement.site).items()}
        for k, v in values.items():
            key = k, labels[k], v.shape
            held = self.begun.get(key)
            values[k] = v.to(device) if held is None else held
            if labels[k] is not None:
                self.begun[key] = values[k]
        self.placed[placement.site.name] = (placement, values)

    def replace(self, path: str, name: str, value: Tensor) -> None:
        """Train a parameter whole."""
        host = ParameterHost(self.modules[path], name)
        value = host.matrix(widened(value))
        site = host.site(f"{path}.{name}".removeprefix("."))
        self.put(Placement(site, Replace(), ((path, name, False),)), {"value": value})

    # -- tensors of the model itself ---------------------------------------------------------------

    def place_whole(self, full: str, value: Tensor) -> None:
        """A parameter of the model itself: of modules_to_save, a bias, an embedding that PEFT adds."""
        path, _, name = full.rpartition(".")
        saved = any(re.search(rf"(^|\.){m}(\.|$)", full) for m in self.config.get("modules_to_save") or ())
        module = self.modules.get(path, nn.Module())
        own = {**module._parameters, **module._buffers}.get(name)
        if own is None and saved:
            self.left.append(f'"{full}" of modules_to_save, which this model does not have')
        elif own is None or own.shape != value.shape:
            raise BaseMismatch(
                f"The file holds {full} of shape {tuple(value.shape)}; this model has {getattr(own, 'shape', None)}. "
                f"Load it on the model that it was made for (for new tokens: model.resize_token_embeddings first)."
            )
        elif (name in module._buffers or not saved) and torch.equal(own.detach().cpu().to(value.dtype), value):
            self.left.append(f'"{full}", which equals the base\'s')
        elif name in module._buffers:
            raise ConversionError(f"The buffer {full} differs, and no adapter holds one. Set it in the model first.")
        else:
            self.replace(path, name, value)

    # -- factors -----------------------------------------------------------------------------------

    def place_factors(self, path: str, tensors: dict[str, Tensor]) -> None:
        """The factors of one site, on the base or on a weight that the file replaces."""
        if _plain(path) not in self.modules:
            raise BaseMismatch(f'This model has no "{_plain(path)}". Load it on the model that it was made for.')
        if path not in self.places:
            raise ConversionError(f"No adapter can sit on {path}. {MERGE}")
        place, bias = self.places[path], tensors.pop("lora_B.bias", None)
        c, module = place.candidate, self.modules[place.candidate.path]
        tied = self.config.get("ensure_weight_tying") and place.key in self.ends
        dropped = place.key in self.modules and not tied and not targeted(self.config, place.key)
        if dropped or all(t.numel() == 0 for t in tensors.values()):
            why = "outside of the target modules: PEFT drops them too" if dropped else "whose rank is 0"
            self.left.append(f'tensors of "{place.key}", {why}')
            return
        structure, values = decode(self.config, place, module, tensors, self.common)
        pad = getattr(module, "padding_idx", None)
        if pad is not None and ("magnitude" in values or values["a"][:, pad].any()):
            self.left.append(f"the update of {place.key}'s padding row {pad}, which stays the base's")
        if bias is not None:  # times s it is added to the layer's bias
            if c.slot != LAYER or not isinstance(structure, LoRA | CrossGroup):
                raise ConversionError(f"lora_bias is kept as the layer's own bias, and {path} can have none. {MERGE}")
            held = self.placed.get(f"{path}.bias")
            start = held[1]["value"] if held else host_of(module, "bias").weight().detach().float()
            self.replace(path, "bias", start.cpu() + structure.scale * bias.float())
        whole = self.placed.pop(f"{c.path}.weight", None) if c.slot == LAYER else None
        if whole is not None:
            structure, values = Stack(Replace(), structure), named("second", values)
            values["first_value"] = host_of(module, LAYER).matrix(whole[1]["value"]).contiguous()
        self.put(Placement(c.site, structure, ((c.path, c.slot, False),)), values)

    def place_tokens(self, path: str, rows: Tensor) -> None:
        """New rows of an embedding, and of the head that shares its weight."""
        ids = self.config.get("token_indices") or self.config.get("trainable_token_indices") or ()
        if isinstance(ids, Mapping):
            ids = next((v for k, v in ids.items() if meant([k], path)), ())
        if self.ends and path == self.ends[1]:
            return  # the embedding's rows once more
        if path not in self.places or self.places[path].candidate.site.kind != "embedding":
            raise ConversionError(f"Token rows can be kept on an embedding only; found {path}. {MERGE}")
        if len(ids) != len(rows):
            raise FileFormatError(f"The settings train {len(ids)} tokens of {path}; the file has {len(rows)} rows.")
        site, structure = self.places[path].candidate.site, TokenRows(tuple(ids))
        structure.factors(site)  # ids beyond the vocabulary raise now
        carriers = ((path, LAYER, False),)
        if self.ends and path == self.ends[0]:
            self.tied = "tie"
            carriers += ((self.ends[1], LAYER, True),)
        pad = self.modules[path].padding_idx
        if pad in ids:
            self.left.append(f"the new row of {path}'s padding token {pad}, which stays the base's")
        self.put(Placement(site, structure, carriers), {"rows": rows[torch.tensor(ids).argsort()]})

    # -- ties --------------------------------------------------------------------------------------

    def settle_ties(self) -> None:
        """One adapter on both ends of a tied weight, or an untied head."""
        names = {n for end in self.ends for n in (end, f"{end}.weight")}
        if self.tied == "tie" or not names & self.placed.keys():
            return
        (path, head), ensured = self.ends, self.config.get("ensure_weight_tying")
        one, two, whole = (self.placed.get(n) for n in (path, head, f"{path}.weight"))
        if ensured and one and two and isinstance(one[0].structure, LoRA) and one[0].structure == two[0].structure:
            del self.placed[head]  # PEFT holds one pair for both
            self.put(replace(one[0], carriers=(*one[0].carriers, (head, LAYER, True))), one[1])
            self.tied = "tie"
            return
        if ensured and whole and f"{head}.weight" not in self.placed:
            self.replace(head, "weight", whole[1]["value"].clone())
        self.tied = "untie"
        self.left.append(f"the tie between {path} and {head}: the adapter treats them apart")


def _common(config: Mapping[str, Any], tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """The factors that all layers share, taken out of the file's tensors.

    Raises:
        ConversionError: the file lacks them, for PEFT to draw them again.
    """
    method = METHODS.get(config["peft_type"])
    if method is None or not method.common:
        return {}
    try:
        more = method.gather(tensors) if method.gather else {}
        found = {**{k: tensors[f"base_model.{name}"] for k, name in method.common.items()}, **more}
    except LookupError as error:
        raise ConversionError(
            f"Random numbers are kept, not drawn again; the file lacks {error}. Save it from PEFT with "
            f"save_projection=True (Uni-LoRA: save_indices=True) in its settings."
        ) from error
    for key in [k for k in tensors if k.rpartition(".")[2] in method.common.values()]:
        del tensors[key]  # RandLoRA's are there once more at every layer
    return found


def _recipe(load: _Loading) -> Recipe:
    """The point of the method space that gives these placements."""
    at = {Target(name, "glob"): p.structure for name, (p, _) in load.placed.items()}
    rest = {t: s for t, s in at.items() if not isinstance(s, Replace | TokenRows)}
    main = Counter(rest.values()).most_common(1)[0][0] if rest else LoRA()
    dropout = float(load.config.get(DROPOUTS.get(load.config["peft_type"], "")) or 0.0)
    if dropout and "drops" not in main.traits:
        load.left.append(f"dropout={dropout}: this method has no input to drop from")
        dropout = 0.0
    sites = Sites(
        targets=tuple(rest),
        overrides=tuple(Override(t, s) for t, s in rest.items() if s != main),
        train=tuple(t for t, s in at.items() if isinstance(s, Replace)),
        tokens=tuple((t, s.index) for t, s in at.items() if isinstance(s, TokenRows)),
        tied=load.tied,
    )
    init = Principal() if "anchored" in main.traits else Kaiming()
    return Recipe(main, init=init, sites=sites, dropout=dropout, name=f"peft:{load.config['peft_type'].lower()}")


def load(model: nn.Module, path: str | Path, name: str = "default", trainable: bool = False) -> Adapter:
    """Load a PEFT adapter onto the plain base model and activate it.

    The outputs are PEFT's. Says on stderr what it loaded and what it left aside.

    Args:
        model: the base, not a PeftModel.
        path: folder with ``adapter_config.json`` and ``adapter_model.safetensors`` (or ``.bin``).
        name: under which the adapter is known on this model.
        trainable: go on training it.

    Returns:
        The adapter, in every respect one of ours: ``save`` writes our own format.

    Raises:
        ConversionError: a setting or tensor whose meaning would be lost.
        FileFormatError: a truncated, foreign or hostile file.
        BaseMismatch: a module that this model lacks, or of another size.
        ModelTypeError: a PeftModel.
        AttachError: the name is taken.
    """
    check_model(model)
    check_name(model, name)
    folder, left = Path(path), []
    loading = _Loading(model, read_config(folder, left), left)
    factors: dict[str, dict[str, Tensor]] = {}
    found = _read_tensors(folder)
    loading.common = _common(loading.config, found)
    for key, tensor in found.items():
        if match := _FACTOR.match(key):
            factors.setdefault(match["path"] or "", {})[match["leaf"]] = tensor
        else:
            loading.place_whole(_plain(key), tensor)
    if threefactor.SHARED in factors:
        threefactor.spread(loading.config, loading.modules, factors)
    for where, tensors in factors.items():
        if "trainable_tokens_delta" in tensors:
            loading.place_tokens(_plain(where), tensors["trainable_tokens_delta"].float())
        else:
            loading.place_factors(where, tensors)
    loading.settle_ties()
    if not loading.placed:
        raise FileFormatError(f"{folder} holds nothing that PEFT would put on this model: {left}.")
    recipe = _recipe(loading)
    placements, values = zip(*loading.placed.values(), strict=True)
    if trainable:
        freeze_base(model)
    with untied(model, loading.tied == "untie"):
        adapter = install(model, name, recipe, placements, values, trainable)
    state = "trainable" if trainable else "frozen (trainable=True to go on training)"
    print("\n  left aside: ".join([f"loaded {adapter!r} from PEFT, {state}", *left]), file=sys.stderr)
    return adapter
