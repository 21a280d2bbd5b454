"""``adapter_config.json``: which settings there are, what they default to, and which cannot be kept."""

import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rankwise.errors import ConversionError, FileFormatError
from rankwise.formats.peft.layout import METHODS

VERSION = "0.21.2"
CONFIG = "adapter_config.json"
MERGE = "Merge the adapter in PEFT (model.merge_and_unload()) and use the merged model."
RESAVE = (
    "Save it from PEFT as plain LoRA: save_pretrained(..., path_initial_model_for_weight_conversion=INITIAL_ADAPTER)."
)

# what an absent setting means, where that is not null
_DEFAULTS = dict(
    r=8, lora_alpha=8, alpha=8, init_r=12, decompose_factor=-1, use_cayley_neumann=True, num_cayley_neumann_terms=5
)
# settings that are kept, or that have no bearing on a trained adapter
_KNOWN = """
    alpha alpha_pattern auto_mapping base_model_name_or_path beta1 beta2 bias block_share corda_config decompose_both
    decompose_factor deltaT ensure_weight_tying eps eva_config exclude_modules fan_in_fan_out hira_dropout
    inference_mode init_lora_weights init_r init_weights layers_pattern layers_to_transform loftq_config lora_alpha
    lora_bias lora_dropout lora_ga_config megatron_core module_dropout modules_to_save num_cayley_neumann_terms
    oft_block_size orth_reg_weight peft_type peft_version qalora_group_size r rank_dropout rank_dropout_scale
    rank_pattern revision runtime_config target_modules target_parameters target_r task_type tfinal tinit
    token_indices total_step trainable_token_indices use_cayley_neumann use_dora use_effective_conv2d use_rslora
    kasa_config init_v_bound projection_seed save_projection tinylora_dropout u weight_tying
"""
# settings of the methods in augmented.py, rotating.py and spectral_domain.py, as above
_KNOWN += """
    config_A_B config_C config_D_E gralora_dropout gralora_k hybrid_r
    ab_svd_init boft_block_num boft_block_size boft_dropout boft_n_butterfly_factor delora_lambda
    feedforward_modules group_size init_ia3_weights lambda_pattern mini_r miss_dropout psoft_alpha psoft_dropout
    psoft_mag_a psoft_mag_b psoft_orth psoft_svd psoft_svd_lowrank_niter random_seed use_bdlora variant
    block_size block_size_pattern mask_type n_frequency n_frequency_pattern proportional_parameters random_loc_seed
    scaling use_idwt wavelet_family
"""
_DEFAULTS |= dict(config_A_B="lora", gralora_k=2, hybrid_r=0)
# settings of the methods in sharing.py, as above
_KNOWN += """
    d_initial generator_seed init_logits_std init_theta_d_bound init_vector_bank_bound num_vectors proj_seed
    projection_prng_key pvera_dropout randlora_alpha randlora_dropout save_indices save_only_topk_weights
    save_projection sparse theta_d_length topk unilora_dropout vblora_dropout vector_length vera_dropout very_sparse
"""
_DEFAULTS |= dict(randlora_alpha=640, topk=2)
# dropout of the layer's input, by method
DROPOUTS = {"LORA": "lora_dropout", "ADALORA": "lora_dropout", "HIRA": "hira_dropout"}
DROPOUTS |= {"GRALORA": "gralora_dropout", "TINYLORA": "tinylora_dropout"}
DROPOUTS |= {"MISS": "miss_dropout", "PSOFT": "psoft_dropout"}
DROPOUTS |= {"VERA": "vera_dropout", "PVERA": "pvera_dropout", "RANDLORA": "randlora_dropout"}
DROPOUTS |= {"VBLORA": "vblora_dropout", "UNILORA": "unilora_dropout"}
# settings that change the map, in ways that no structure here expresses
_LOST = """
    alora_invocation_tokens apply_GS arrow_config coft layer_replication megatron_config monteclora_config
    sample_at_inference use_qalora velora_config
"""
_INITS = {"true", "false", "none", "gaussian", "orthogonal", "eva", "mica", "lycoris", "pissa"}
_INITS |= {"uniform", "bat", "mini", "kaiming_uniform", "xavier_uniform"}


def read_config(folder: Path, left: list[str]) -> dict[str, Any]:
    """The settings; what has no bearing is told in ``left``.

    Raises:
        FileFormatError: no such file, or not JSON.
        ConversionError: a method or a setting whose meaning would be lost.
    """
    try:
        found = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
        kind = found["peft_type"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise FileFormatError(f"A PEFT folder holds a readable {CONFIG}; {folder} does not ({error!r}).") from error
    if kind not in (*METHODS, "TRAINABLE_TOKENS"):
        raise ConversionError(f'Methods of PEFT that are read: {", ".join(METHODS)}; found peft_type="{kind}". {MERGE}')
    for key in sorted(found.keys() - set(_KNOWN.split())):
        if found[key] not in (None, False, 0, "", "none", [], {}):
            raise ConversionError(f'The PEFT setting "{key}" cannot be kept; found {found[key]!r}. {MERGE}')
        if key not in _LOST.split():
            left.append(f'the setting "{key}", which PEFT {VERSION} does not have and is off')
    init = str(found.get("init_lora_weights", found.get("init_weights"))).lower()
    if init not in _INITS:
        raise ConversionError(f'init_lora_weights="{init}" edits the base, and the file lacks the edit. {RESAVE}')
    training = ("module_dropout", "rank_dropout", "boft_dropout", "weight_tying")
    training = [key for key in training if found.get(key)]
    left += [f"{key}={found[key]}, which acts in PEFT's training only" for key in training]
    return {**_DEFAULTS, **found}


def pattern(patterns: Mapping[str, Any] | None, name: str, otherwise: Any) -> Any:
    """The value of the first pattern that matches the end of the module's name."""
    return next((v for k, v in (patterns or {}).items() if re.match(rf"(.*\.)?({k})$", name)), otherwise)


def meant(patterns: str | Sequence[str] | None, name: str) -> bool:
    """Whether a name is meant by a regex, or by the ends of names."""
    if isinstance(patterns, str):
        return re.fullmatch(patterns, name) is not None
    return any(name == p or name.endswith(f".{p}") for p in patterns or ())


def targeted(config: Mapping[str, Any], name: str) -> bool:
    """Whether PEFT would adapt the module of this name: it drops the tensors of others."""
    wanted, layers = config.get("target_modules"), config.get("layers_to_transform")
    if meant(config.get("exclude_modules"), name):
        return False
    if wanted in (None, "all-linear"):
        return not config.get("target_parameters")
    if isinstance(wanted, str) or name in wanted or layers in (None, []):
        return meant(wanted, name)
    at = config.get("layers_pattern") or [r"[^.]*"]
    block = re.match(rf"(?:.*?\.)?(?:{at if isinstance(at, str) else '|'.join(at)})\.(\d+)\.", name)
    chosen = [layers] if isinstance(layers, int) else layers
    return meant(wanted, name) and block is not None and int(block[1]) in chosen
