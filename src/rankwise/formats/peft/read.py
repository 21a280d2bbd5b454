"""From a PEFT folder to an adapter on the plain model."""

from __future__ import annotations

import pickle
import re
import sys
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import Tensor, nn

from rankwise._recipe import Recipe
from rankwise.adapter import Placement
from rankwise.attach import Adapter, check_name, install
from rankwise.errors import BaseMismatch, ConversionError, FileFormatError
from rankwise.formats.peft.config import read_config, targeted
from rankwise.formats.peft.decode import Found, decode
from rankwise.host import LAYER, ParameterHost
from rankwise.model_state import check_model, freeze_base, untie
from rankwise.inits import Gaussian, Kaiming, Principal
from rankwise.sites import Override, Sites, Target
from rankwise.structures import LoRA, Replace, Stack, Structure, TokenRows
from rankwise.targets import Candidate, base_modules, candidates, output_head

WEIGHTS = ("adapter_model.safetensors", "adapter_model.bin")
_FACTOR = re.compile(
    r"(?:(?P<path>.*)\.)?(?P<leaf>lora_[AB]\.(?:weight|bias)|lora_embedding_[AB]"
    r"|lora_magnitude_vector(?:\.weight)?|lora_[ABE]|hada_(?:w[12]_[ab]|t[12])"
    r"|lokr_(?:w[12](?:_[ab])?|t2)|hira_(?:embedding_)?[AB]|oft_R\.weight"
    r"|(?:token_adapter\.)?trainable_tokens_delta)$"
)
_FOREIGN = re.compile(r"(^|\.)(lora|hada|lokr|hira|oft)_\w+")
_AROUND = re.compile(r"^(lora|hada|lokr|hira|oft)_|^token_adapter\.|\.weight$")


def _tensors(folder: Path) -> dict[str, Tensor]:
    file = next((folder / name for name in WEIGHTS if (folder / name).is_file()), None)
    if file is None:
        raise FileFormatError(f"A PEFT adapter holds one of {WEIGHTS}; {folder} has neither.")
    try:
        if file.suffix == ".safetensors":
            flat = load_file(file)
        else:
            flat = torch.load(file, map_location="cpu", weights_only=True)
    except (SafetensorError, pickle.UnpicklingError, OSError, RuntimeError, EOFError) as error:
        raise FileFormatError(
            f"{file} is damaged, or a pickle with more than tensors in it, which is never run "
            f"({error}). Save it again with safetensors."
        ) from error
    bad = [k for k, v in flat.items() if not isinstance(v, Tensor) or not torch.isfinite(v).all()]
    if bad:
        raise FileFormatError(f"{file} holds NaN, infinite values or other objects: {bad[:4]}.")
    return {k.removeprefix("base_model.model."): v for k, v in flat.items()}


@dataclass
class _Plan:
    """What will be put where, and what is told about the rest."""

    model: nn.Module
    config: dict[str, Any]
    left: list[str]
    found: dict[str, Candidate] = field(default_factory=dict)
    modules: dict[str, Any] = field(default_factory=dict)
    placed: dict[str, tuple[Placement, dict[str, Tensor]]] = field(default_factory=dict)
    tied: str = "refuse"

    def __post_init__(self) -> None:
        self.found = {c.site.name: c for c in candidates(self.model)}
        self.modules = base_modules(self.model)

    def put(self, placement: Placement, values: dict[str, Tensor]) -> None:
        self.placed[placement.site.name] = (placement, values)

    def replace(self, path: str, name: str, value: Tensor) -> None:
        """Train a parameter whole."""
        full = f"{path}.{name}" if path else name
        host = ParameterHost(self.modules[path], name)
        site = host.site(full)
        value = value.mT if host.transposed else value
        matrix = value.reshape(site.rows, site.cols) if value.dim() == 2 else value
        self.put(Placement(site, Replace(), ((path, name, False),)), {"value": matrix})


def _grouped(flat: Mapping[str, Tensor]) -> tuple[dict[str, dict[str, Tensor]], dict[str, Tensor]]:
    """Factors by the path in the file, and the tensors of the model itself."""
    factors: dict[str, dict[str, Tensor]] = {}
    whole: dict[str, Tensor] = {}
    for key, tensor in flat.items():
        match = _FACTOR.match(key)
        if match:
            leaf = "bias" if match["leaf"].endswith(".bias") else _AROUND.sub("", match["leaf"])
            factors.setdefault(match["path"] or "", {})[leaf] = tensor
        elif foreign := _FOREIGN.search(key):
            raise ConversionError(
                f'The tensor "{key}" belongs to a variant whose meaning would be lost '
                f"({foreign[0].strip('.')}). Merge the adapter in PEFT and use the merged model."
            )
        else:
            whole[key] = tensor
    return factors, whole


def _plain(path: str) -> str:
    """A path without PEFT's wrappers."""
    return ".".join(p for p in path.split(".") if p not in ("base_layer", "token_adapter"))


def _locate(plan: _Plan, path: str) -> tuple[Candidate, str] | None:
    """The weight that a path in the file means and the name that patterns match; None: dropped."""
    name = _plain(path)
    module = plan.modules.get(name)
    if module is None:
        raise BaseMismatch(
            f'The adapter sits on "{name}", which this model does not have. Load it on the model '
            f"that it was made for (the same class and release of its library)."
        )
    dot = f"{name}." if name else ""
    wanted = plan.config.get("target_parameters") or ()
    mine = [n for n in module._parameters if any(f"{dot}{n}" == w or f"{dot}{n}".endswith(f".{w}") for w in wanted)]
    if mine:  # wrappers nest in the order of registration, the first innermost
        depth = len(path.split(".")) - len(name.split("."))
        slot = mine[len(mine) - 1 - depth]
        here = name if isinstance(module, nn.Linear) else f"{dot}{slot}"
        if here not in plan.found:
            raise ConversionError(f"No adapter can sit on the parameter {dot}{slot}.")
        return plan.found[here], f"{dot}{slot}"
    key = name
    if isinstance(module, nn.MultiheadAttention):
        name = f"{dot}in_proj_weight"
    owner = plan.modules.get(name.rpartition(".")[0])
    if isinstance(owner, nn.MultiheadAttention) and name.endswith(".out_proj"):
        key = name.rpartition(".")[0]
    head = plan.config.get("ensure_weight_tying") and module is output_head(plan.model)
    if not head and not targeted(plan.config, key):
        plan.left.append(f'tensors of "{key}", outside of the target modules: PEFT drops them too')
        return None
    if name not in plan.found:
        raise ConversionError(f"No adapter can sit on {name} ({type(module).__name__}).")
    return plan.found[name], key


def _place_factors(plan: _Plan, factors: Mapping[str, dict[str, Tensor]]) -> None:
    for path, tensors in factors.items():
        if "trainable_tokens_delta" in tensors:
            _place_tokens(plan, _plain(path), tensors["trainable_tokens_delta"].float())
            continue
        located = _locate(plan, path)
        if located is None:
            continue
        c, key = located
        if all(t.numel() == 0 for t in tensors.values()):
            plan.left.append(f'"{key}", whose rank is 0')
            continue
        module = plan.modules[c.path]
        structure, values = decode(Found(c.site, module, key, tensors, plan.config))
        plan.put(Placement(c.site, structure, ((c.path, c.slot, False),)), values)
        if "bias" in tensors:
            _fold_bias(plan, c, structure, tensors["bias"])
        pad = getattr(module, "padding_idx", None)
        if pad is not None and ("magnitude" in values or values["a"][..., pad].any()):
            plan.left.append(f"the update of {key}'s padding row {pad}, which stays the base's")


def _fold_bias(plan: _Plan, c: Candidate, structure: Structure, bias: Tensor) -> None:
    """S times the bias of lora_B is a new bias of the layer, where it has one."""
    own = plan.modules[c.path]._parameters.get("bias")
    if own is None or c.slot != LAYER or not hasattr(structure, "scale"):
        raise ConversionError(
            f"lora_bias adds a bias to the update, which can be kept only as the layer's own: "
            f"{c.site.name} has none. Merge the adapter in PEFT, or drop lora_B.bias."
        )
    start = own.detach().float().cpu()
    scale: float = structure.scale  # type: ignore[attr-defined]
    plan.replace(c.path, "bias", start + scale * bias.float())


def _place_tokens(plan: _Plan, path: str, rows: Tensor) -> None:
    config, model = plan.config, plan.model
    ids = config.get("token_indices") or config.get("trainable_token_indices") or ()
    if isinstance(ids, Mapping):
        ids = next((v for k, v in ids.items() if path == k or path.endswith(f".{k}")), ())
    c, head = plan.found.get(path), _tied_head(plan)
    if path == head:
        return  # the embedding's rows once more
    if c is None or c.site.kind != "embedding":
        raise ConversionError(f"Token rows can be kept on an embedding only; found {path}.")
    if len(ids) != len(rows):
        raise FileFormatError(f"The settings train {len(ids)} tokens of {path}; the file has {len(rows)} rows.")
    order = sorted(range(len(ids)), key=lambda i: ids[i])
    structure = TokenRows(tuple(ids))
    structure.factors(c.site)  # ids beyond the vocabulary raise now
    carriers = [(c.path, c.slot, False)]
    if head is not None and plan.modules[path] is model.get_input_embeddings():  # type: ignore
        plan.tied = "tie"
        carriers.append((head, LAYER, True))
    pad = plan.modules[path].padding_idx
    if pad in ids:
        plan.left.append(f"the new row of {path}'s padding token {pad}, which stays the base's")
    plan.put(Placement(c.site, structure, tuple(carriers)), {"rows": rows[order].contiguous()})


def _tied_head(plan: _Plan) -> str | None:
    """The path of an output head that shares the input embedding's weight."""
    head = output_head(plan.model)
    get = getattr(plan.model, "get_input_embeddings", None)
    embedding = get() if callable(get) else None
    if head is None or getattr(embedding, "weight", None) is not head.weight:
        return None
    return next(path for path, module in plan.modules.items() if module is head)


def _place_whole(plan: _Plan, whole: Mapping[str, Tensor]) -> None:
    """Parameters of the model itself: modules_to_save, biases, embeddings that PEFT adds."""
    saved = plan.config.get("modules_to_save") or ()
    here = [m for m in saved if any(re.search(rf"(^|\.){m}$", p) for p in plan.modules)]
    for entry in set(saved) - set(here):
        plan.left.append(f'"{entry}" of modules_to_save, which this model does not have')
    for key, value in whole.items():
        full = _plain(key)
        path, _, name = full.rpartition(".")
        meant = any(re.search(rf"(^|\.){m}(\.|$)", full) for m in saved)
        module = plan.modules.get(path)
        own = None if module is None else module._parameters.get(name)
        if own is None and module is not None and name in module._buffers:
            if torch.equal(module._buffers[name].cpu(), value):
                continue
            raise ConversionError(
                f"{full} is a buffer, which an adapter cannot hold, and differs from this model's. "
                f"Copy it into the model before loading."
            )
        if own is None and meant:
            plan.left.append(f'the tensor "{full}", which this model does not have')
            continue
        if own is None or own.shape != value.shape:
            raise BaseMismatch(
                f"The file holds {full} of shape {tuple(value.shape)}; this model has "
                f"{None if own is None else tuple(own.shape)}. Load it on the model that it was "
                f"made for (for new tokens: model.resize_token_embeddings first)."
            )
        if not meant and torch.equal(own.detach().cpu().to(value.dtype), value):
            plan.left.append(f'"{full}", which equals the base\'s')
        elif path in plan.placed and name == "weight":
            below, values = plan.placed[path]
            matrix = value.float() if isinstance(module, nn.Linear) else value.float().mT
            stack = Placement(below.site, Stack(Replace(), below.structure), below.carriers)
            both = {f"second_{k}": v for k, v in values.items()}
            plan.put(stack, {"first_value": matrix.contiguous(), **both})
        elif full in plan.placed:  # a bias that lora_B's was folded into
            placement, values = plan.placed[full]
            values["value"] += value.float() - own.detach().float().cpu()
        else:
            plan.replace(path, name, value.to(torch.promote_types(value.dtype, torch.float32)))


def _settle_ties(plan: _Plan) -> None:
    """One adapter on both ends of a tied weight, or an untied head."""
    head = _tied_head(plan)
    if head is None or plan.tied == "tie":
        return
    path = next(p for p, m in plan.modules.items() if m is plan.model.get_input_embeddings())  # type: ignore
    if not {head, path, f"{head}.weight", f"{path}.weight"} & set(plan.placed):
        return
    one, two = plan.placed.get(path), plan.placed.get(head)
    ensured = plan.config.get("ensure_weight_tying")
    if ensured and one and two and isinstance(one[0].structure, LoRA):
        a, b, same = one[1]["a"], one[1]["b"], one[0].structure == two[0].structure
        if same and torch.equal(two[1]["b"], a.mT) and torch.equal(two[1]["a"], b.mT):
            carriers = (*one[0].carriers, (head, LAYER, True))
            plan.put(Placement(one[0].site, one[0].structure, carriers), one[1])
            del plan.placed[head]
            plan.tied = "tie"
            return
    saved = plan.placed.get(f"{path}.weight")
    if ensured and saved and f"{head}.weight" not in plan.placed:
        plan.replace(head, "weight", saved[1]["value"].clone())
    plan.tied = "untie"
    plan.left.append(f"the tie between {path} and {head}: the adapter treats them apart")


def _recipe(plan: _Plan, placements: Sequence[Placement]) -> Recipe:
    """The point of the method space that gives these placements."""
    glob = lambda name: Target(name, "glob")  # noqa: E731
    whole = [p for p in placements if isinstance(p.structure, Replace)]
    tokens = [p for p in placements if isinstance(p.structure, TokenRows)]
    rest = [p for p in placements if p not in whole and p not in tokens]
    counted = Counter(p.structure for p in rest)
    main = max(counted, key=lambda s: counted[s]) if counted else LoRA()
    kind = plan.config["peft_type"]
    init: Any = Principal() if "anchored" in main.traits else Kaiming()
    dropout = float(plan.config.get("lora_dropout") or plan.config.get("hira_dropout") or 0.0)
    if dropout and "drops" not in main.traits:
        plan.left.append(f"dropout={dropout}: this method has no input to drop from")
        dropout = 0.0
    return Recipe(
        main,
        init=Gaussian(0.02) if kind == "ADALORA" else init,
        sites=Sites(
            targets=tuple(glob(p.site.name) for p in rest),
            overrides=tuple(Override(glob(p.site.name), p.structure) for p in rest if p.structure != main),
            train=tuple(glob(p.site.name) for p in whole),
            tokens=tuple((glob(p.site.name), p.structure.index) for p in tokens),  # type: ignore
            tied=plan.tied,  # type: ignore[arg-type]
        ),
        dropout=dropout,
        name=f"peft:{kind.lower()}",
    )


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
    left: list[str] = []
    folder = Path(path)
    plan = _Plan(model, read_config(folder, left), left)
    factors, whole = _grouped(_tensors(folder))
    _place_factors(plan, factors)
    _place_whole(plan, whole)
    _settle_ties(plan)
    if not plan.placed:
        raise FileFormatError(f"{folder} holds nothing that PEFT would put on this model: {left}.")
    placements = [p for p, _ in plan.placed.values()]
    recipe = _recipe(plan, placements)
    values = []
    for placement, tensors in plan.placed.values():
        owner, slot, _ = placement.carriers[0]
        raw = plan.modules[owner]._parameters["weight" if slot == LAYER else slot]
        values.append({k: v.to(raw.device) for k, v in tensors.items()})
    if plan.tied == "untie":
        untie(model)
    if trainable:
        freeze_base(model)
    adapter = install(model, name, recipe, placements, values, trainable)
    state = "trainable" if trainable else "frozen (trainable=True to go on training)"
    print(f"loaded {adapter!r} from PEFT, {state}", file=sys.stderr)
    for note in left:
        print(f"  left aside: {note}", file=sys.stderr)
    return adapter
