"""From a name or folder to a model and its tokenizer, with one clear error where that fails."""

import re
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_OFFLINE
from transformers import AutoConfig, AutoTokenizer, BitsAndBytesConfig

from rankwise import embedded
from rankwise.candidates import HEADS
from rankwise.errors import MissingDependency, ModelFileError
from rankwise.formats.peft.config import CONFIG
from rankwise.io import FILE

EMBEDDED = "embedded"  # the name of the small model that the package ships


def locate(model: str | Path) -> str:
    """What ``from_pretrained`` takes for "embedded", a folder, or a hub id ("org/name").

    Raises:
        ModelFileError: there is no such folder, or an adapter is in it.
    """
    if str(model) == EMBEDDED:
        return str(embedded.path())
    on_hub = re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(model)) and not HF_HUB_OFFLINE
    if not on_hub and not Path(model).exists():
        raise ModelFileError(f'A model is a folder of save_pretrained, or "{EMBEDDED}"; there is nothing at {model}.')
    folder = Path(model)
    if not (folder / "config.json").exists() and any((folder / name).exists() for name in (FILE, CONFIG)):
        raise ModelFileError(
            f"A model is a folder of save_pretrained; {model} is an adapter. Give the model that it was trained on, "
            f"and the adapter beside it (to evaluate or generate: --adapter {model})."
        )
    return str(model)


def tokenizer_of(model: str | Path) -> Any:
    """The tokenizer in a model's folder; raises ModelFileError where there is none."""
    return _loaded(AutoTokenizer, model)


def pad_id(tokenizer: Any) -> int:
    """What short rows are filled up with; a mask hides it, so any token will do."""
    return next(i for i in (tokenizer.pad_token_id, tokenizer.eos_token_id, 0) if i is not None)


def config_of(model: str | Path) -> Any:
    """The config of a model; raises ModelFileError where it cannot be read."""
    return _loaded(AutoConfig, model)


def load_model(kind: Any, model: str | Path, *, base: str | None = None, dtype: str = "auto", **options: Any) -> Any:
    """Load a model for evaluation or training, on the accelerator if there is one.

    Args:
        kind: AutoModelForCausalLM and the like.
        model: see :func:`locate`.
        base: "nf4", "int8" or None: the format to quantise the weights to.
        dtype: a torch dtype's name, "stored" for that of the file, or "auto": bfloat16 on a GPU,
            float32 on a CPU.
        **options: for ``from_pretrained``.

    Returns:
        The model, in evaluation mode.

    Raises:
        ModelFileError: it is missing or broken.
        MissingDependency: bitsandbytes is needed and not installed.
    """
    cuda = torch.cuda.is_available()
    native = "bfloat16" if cuda else "float32"
    if base is not None:
        options["quantization_config"] = _quantised(base, native)
        options["device_map"] = {"": 0 if cuda else "cpu"}
    loaded = _loaded(kind, model, dtype={"auto": native, "stored": "auto"}.get(dtype, dtype), **options)
    return (loaded.cuda() if cuda and base is None else loaded).eval()


def _loaded(kind: Any, model: str | Path, **options: Any) -> Any:
    """Load something of transformers, never with code from the model's folder."""
    path = locate(model)
    try:
        return kind.from_pretrained(path, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if "memory" in str(error):
            raise
        reason = str(error).strip().split("\n")[0].rstrip(".:")
        remedy = " Such code is never run; load the model in Python and use rw.attach." * ("custom code" in reason)
        raise ModelFileError(f"{model} does not load as {kind.__name__}: {reason}.{remedy}") from error


def _quantised(base: str, compute: str) -> Any:
    if base not in ("nf4", "int8"):
        raise ModelFileError(f'base is "nf4", "int8" or not given; found "{base}".')
    if find_spec("bitsandbytes") is None:
        raise MissingDependency(f"A base in {base} needs bitsandbytes: pip install 'rankwise[quant]'.")
    nf4 = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True, "bnb_4bit_compute_dtype": compute}
    return BitsAndBytesConfig(
        load_in_4bit=base == "nf4", load_in_8bit=base == "int8", llm_int8_skip_modules=sorted(HEADS), **nf4
    )
