"""The weights of a model that could carry an adapter, and what patterns may know of each."""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, final

from torch import nn
from torch.nn.utils.parametrize import ParametrizationList

from rankwise.adapter import Adapters
from rankwise.errors import RankwiseError, TargetError, WeightFormatError
from rankwise.host import LAYER, Site, host_of, kind_of
from rankwise.sites import Target

HEADS = {"lm_head", "score", "classifier", "embed_out", "qa_outputs", "head", "classification_head"}
_ATTENTION = re.compile(r"attn|attention|^(q|k|v|o|qkv|query|key|value|out)_?(proj|lin)?$|^c_attn$")
_MLP = re.compile(r"mlp|ffn|feed_forward|experts|^(gate|up|down|gate_up)_proj$|^(fc|w|linear)\d$")
_OTHER_MLP = {"intermediate", "output"}  # BERT, ViT: blocks without an mlp of that name
# by the class around them: layers whose weights that class reads itself, so that their own forward may never run
_READ = {
    re.compile("Mamba|BambaMixer|FalconH1Mixer"): {"dt_proj", "x_proj", "out_proj"},
    re.compile("WavLMAttention"): {"q_proj", "k_proj", "v_proj", "out_proj"},
    re.compile("MHAttentionMap"): {"k_proj"},
    re.compile("LayoutLMv[23]Encoder"): {"rel_pos_bias", "rel_pos_x_bias", "rel_pos_y_bias"},
}
_EXPERTS = re.compile("expert|moe", re.IGNORECASE)
_MHA = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


@final
@dataclass(frozen=True)
class Candidate:
    """A weight that could carry an adapter.

    Attributes:
        site: its facts.
        path: path of the module that carries it.
        slot: "layer", or the parameter's name.
        aliases: names a pattern may hit.
        classes: names of the classes of its module.
        roles: role words that include it.
        problem: why it cannot carry one after all, raised where it is chosen.
    """

    site: Site
    path: str
    slot: str
    aliases: tuple[str, ...]
    classes: tuple[str, ...]
    roles: tuple[str, ...]
    problem: RankwiseError | None = None

    def hit(self, target: Target) -> bool:
        """Whether the pattern means it."""
        return any(target.accepts(name, self.classes, self.roles) for name in self.aliases)


def base_modules(model: nn.Module) -> dict[str, nn.Module]:
    """The modules of the base model by path, without what a graft added."""
    found: dict[str, nn.Module] = {}
    added: set[int] = set()
    for path, module in model.named_modules():
        if isinstance(module, Adapters):
            added |= {id(m) for m in module.modules()}
        if id(module) not in added:
            found[path] = module
    return found


def output_head(model: nn.Module) -> Any:
    """The module that the model itself calls its output embeddings."""
    getter = getattr(model, "get_output_embeddings", None)
    try:
        return getter() if callable(getter) else None
    except (AttributeError, NotImplementedError):  # transformers' answer of a model that has none
        return None


def _role(path: str) -> str:
    parts = path.split(".")
    if any(_ATTENTION.search(p) for p in parts):
        return "attention"
    if any(_MLP.search(p) for p in parts) or _OTHER_MLP & set(parts):
        return "mlp"
    return "other"


def _candidate(
    modules: Mapping[str, nn.Module], head: Any, path: str, slot: str, name: str, also: str = ""
) -> Candidate:
    """One weight, by the module that carries it; ``also`` is a module around it whose name means it too."""
    owner, problem = modules[path], None
    try:
        if slot == LAYER and kind_of(owner) is None:
            raise TargetError(
                f"A convolution is adapted where it computes what torch's does; {name} is a {type(owner).__name__}, "
                f"with a forward of its own. Leave it out of the targets."
            )
        site = host_of(owner, slot).site(name)
    except (WeightFormatError, TargetError) as error:  # raised only if it is chosen
        kind = kind_of(owner)
        site, problem = Site(name, kind.kind if kind else "parameter", 0, 0), error
    is_head = owner is head or path.rsplit(".", 1)[-1] in HEADS
    role = "head" if is_head else "embedding" if site.kind == "embedding" else _role(name)
    stack = site.stack is not None and _EXPERTS.search(type(owner).__name__)  # else a table, a scale of each channel
    linear = site.kind == "linear" or bool(also) or stack
    every = "all-conv" if site.kind == "conv" else "all-linear" if linear and not is_head else None
    roles = (role, every) if every else (role,)
    numbers = [int(p) for p in name.split(".") if p.isdigit()]
    site = replace(site, layer=numbers[0] if numbers else None, role=role)
    classes = tuple(c.__name__ for c in type(modules[also or path]).__mro__)
    return Candidate(site, path, slot, (name, also) if also else (name,), classes, roles, problem)


def _is_read(modules: Mapping[str, nn.Module], path: str) -> bool:
    """Whether a layer's weight is read by code other than that of its kind: its class's own, or that of the owner."""
    if not isinstance(modules[path], nn.Linear | nn.Embedding):
        return False
    owner, _, leaf = path.rpartition(".")
    around = type(modules.get(owner)).__name__
    return kind_of(modules[path]) is None or any(leaf in names and cls.search(around) for cls, names in _READ.items())


def candidates(model: nn.Module) -> list[Candidate]:
    """Every weight of the model that could carry an adapter, in the model's order."""
    modules, head = base_modules(model), output_head(model)
    found: list[Candidate] = []
    inside: set[str] = set()
    for path, module in modules.items():
        dot = f"{path}." if path else ""
        if path in inside or isinstance(module, ParametrizationList):
            continue
        if isinstance(module, nn.MultiheadAttention):  # it reads all its weights itself
            inside.add(f"{dot}out_proj")
            own = [n for n in _MHA if module._parameters.get(n) is not None]
            found += [_candidate(modules, head, path, n, f"{dot}{n}", path) for n in own]
            found.append(_candidate(modules, head, f"{dot}out_proj", "weight", f"{dot}out_proj", path))
        elif _is_read(modules, path):
            also = path if isinstance(module, nn.Linear) else ""
            found.append(_candidate(modules, head, path, "weight", path, also))
        elif kind_of(module) is not None or isinstance(module, nn.modules.conv._ConvNd):
            found.append(_candidate(modules, head, path, LAYER, path))
        else:
            own = [n for n, p in module._parameters.items() if p is not None and p.dim() in (2, 3)]
            found += [_candidate(modules, head, path, n, f"{dot}{n}") for n in own]
    layers = max((c.site.layer for c in found if c.site.layer is not None), default=-1) + 1
    return [replace(c, site=replace(c.site, layers=layers)) for c in found]
