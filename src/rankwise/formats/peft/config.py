"""``adapter_config.json``: which keys there are, what they default to, and which ones we honour."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from rankwise.errors import ConversionError, FileFormatError

VERSION = "0.21.2"
CONFIG = "adapter_config.json"


def _keys(off: str = "", /, **others: Any) -> dict[str, Any]:
    """Keys that are null by default, and the others with theirs."""
    return {**dict.fromkeys(off.split()), **others}


_COMMON = _keys(
    "auto_mapping base_model_name_or_path peft_type revision task_type target_modules",
    inference_mode=True,
    peft_version=VERSION,
)
_TARGETS = _COMMON | _keys("exclude_modules layers_pattern layers_to_transform modules_to_save")
_LORA = _TARGETS | _keys(
    "alora_invocation_tokens arrow_config corda_config eva_config kasa_config layer_replication "
    "lora_ga_config megatron_config monteclora_config target_parameters trainable_token_indices "
    "use_bdlora velora_config",
    **{"r": 8, "lora_alpha": 8, "lora_dropout": 0.0, "rank_pattern": {}, "alpha_pattern": {}},
    **{"bias": "none", "ensure_weight_tying": False, "fan_in_fan_out": False},
    **{"init_lora_weights": True, "loftq_config": {}, "lora_bias": False, "use_dora": False},
    **{"megatron_core": "megatron.core", "qalora_group_size": 16, "use_qalora": False},
    use_rslora=False,
)
_LYCORIS = _TARGETS | _keys(
    **{"r": 8, "alpha": 8, "rank_pattern": {}, "alpha_pattern": {}, "init_weights": True},
    **{"module_dropout": 0.0, "rank_dropout": 0.0, "use_effective_conv2d": False},
)
DEFAULTS: dict[str, dict[str, Any]] = {
    "LORA": _LORA,
    "ADALORA": _LORA
    | _keys(
        "rank_pattern total_step",
        **{"beta1": 0.85, "beta2": 0.85, "deltaT": 1, "init_r": 12, "target_r": 8},
        **{"orth_reg_weight": 0.5, "tfinal": 0, "tinit": 0},
    ),
    "LOHA": _LYCORIS,
    "LOKR": _LYCORIS | _keys(decompose_both=False, decompose_factor=-1, rank_dropout_scale=False),
    "HIRA": _TARGETS
    | _keys(**{"r": 8, "rank_pattern": {}, "hira_dropout": 0.0}, **{"fan_in_fan_out": False, "init_weights": True}),
    "OFT": _TARGETS
    | _keys(
        **{"r": 0, "oft_block_size": 32, "bias": "none", "block_share": False, "coft": False},
        **{"eps": 6e-05, "fan_in_fan_out": False, "init_weights": True, "module_dropout": 0.0},
        **{"num_cayley_neumann_terms": 5, "use_cayley_neumann": True},
    ),
    "TRAINABLE_TOKENS": _COMMON | _keys(init_weights=True, token_indices=[]),
}

# key -> why another value than the default cannot be kept
_LOST = {
    "alora_invocation_tokens": "aLoRA acts on the tokens after its invocation only",
    "arrow_config": "Arrow routes every token between several adapters",
    "coft": "the constraint acts at every step of training",
    "kasa_config": "KaSA has a diagonal of its own and truncates the base's SVD",
    "layer_replication": "the model would get new layers; replicate them in the base first",
    "megatron_config": "the layers are Megatron's; gather them into a plain model first",
    "monteclora_config": "MonteCLoRA samples its factors",
    "use_bdlora": "the factors are block-diagonal, in a layout for tensor parallelism",
    "use_qalora": "the input is pooled over quantisation groups",
    "velora_config": "VeLoRA changes the backward pass",
}
_PLAIN_INITS = {"true", "false", "none", "gaussian", "orthogonal", "eva", "mica", "lycoris"}


def read_config(folder: Path, left: list[str]) -> dict[str, Any]:
    """The settings, every key of the method present; what has no bearing is told in ``left``.

    Raises:
        FileFormatError: no such file, or not JSON.
        ConversionError: a method or a setting whose meaning would be lost.
    """
    file = folder / CONFIG
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
        kind = found["peft_type"]
    except FileNotFoundError as error:
        raise FileFormatError(f"A PEFT folder holds {CONFIG}; {folder} has none.") from error
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(f"{file} is not a PEFT configuration ({error!r}).") from error
    if kind not in DEFAULTS:
        raise ConversionError(
            f'PEFT methods that can be read are {sorted(DEFAULTS)}; found peft_type="{kind}". '
            f"Merge it in PEFT (model.merge_and_unload()) and use the merged model, or convert it "
            f"there to LoRA (peft.convert_to_lora)."
        )
    defaults = DEFAULTS[kind]
    for key, value in found.items():
        if key in _LOST and value != defaults[key] and value not in (None, False):
            raise ConversionError(
                f'The PEFT setting "{key}" cannot be kept ({_LOST[key]}); found {value!r}. Merge '
                f"the adapter in PEFT and use the merged model."
            )
        if key not in defaults and key != "runtime_config":
            if value not in (None, False, 0, "", "none", [], {}):
                raise ConversionError(
                    f'The PEFT setting "{key}" is newer than PEFT {VERSION} or another tool\'s; '
                    f"found {value!r}, whose meaning would be lost. If it only concerns training, "
                    f"remove it from {CONFIG}."
                )
            left.append(f'the unknown setting "{key}", which is off')
    init = str(found.get("init_lora_weights", found.get("init_weights", True))).lower()
    _check_init(init)
    if init == "mica":
        left.append('init_lora_weights="mica": lora_B is not frozen if you go on training')
    for key in ("module_dropout", "rank_dropout"):
        if found.get(key):
            left.append(f"{key}={found[key]}, which acts in PEFT's training only")
    return {**defaults, **found, "init": init}


def _check_init(init: str) -> None:
    if init in _PLAIN_INITS or init in ("pissa", "olora"):
        return
    raise ConversionError(
        f'init_lora_weights="{init}" starts from a base that was edited with random numbers or '
        f"data, and the file does not hold the edit. Save it from PEFT as plain LoRA, "
        f"model.save_pretrained(out, path_initial_model_for_weight_conversion=INITIAL_ADAPTER), "
        f"or load it on the edited base itself, with init_lora_weights set to true in {CONFIG}."
    )


def pattern(patterns: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches the end of the module's name."""
    for key, value in (patterns or {}).items():
        if re.match(rf"(.*\.)?({key})$", name):
            return value
    return otherwise


def _ends(names: Iterable[str], name: str) -> bool:
    return any(name == n or name.endswith(f".{n}") for n in names)


def targeted(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT would adapt the module of this name: it drops the tensors of others."""
    excluded, wanted = config.get("exclude_modules"), config["target_modules"]
    if excluded and (re.fullmatch(excluded, name) if isinstance(excluded, str) else _ends(excluded, name)):
        return False
    if any(re.match(rf"(^|.*\.){m}($|\..*)", name) for m in config.get("modules_to_save") or ()):
        return False
    if wanted is None or wanted == "all-linear":
        return not config.get("target_parameters")
    if isinstance(wanted, str):
        return re.fullmatch(wanted, name) is not None
    if name in wanted or not _ends(wanted, name):
        return name in wanted
    layers = config.get("layers_to_transform")
    if layers is None or layers == []:
        return True
    at = config.get("layers_pattern") or []
    where = [rf"(?:^|.*?\.){p}\.(\d+)\." for p in ([at] if isinstance(at, str) else at)]
    where = where or [r".*?\.[^.]*\.(\d+)\."]
    index = next((int(m[1]) for w in where if (m := re.match(w, name))), None)
    return index in ([layers] if isinstance(layers, int) else layers)
