"""From a name or folder to a model and its tokenizer, with one clear error where that fails."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from rankwise import embedded
from rankwise.errors import MissingDependency, ModelFileError
from rankwise.targets import HEADS

EMBEDDED = "embedded"  # the name of the small model that the package ships


def locate(model: str | Path) -> str:
    """The folder of a model; a hub id is passed on.

    Args:
        model: "embedded", a folder, or a hub id ("org/name").

    Returns:
        What ``from_pretrained`` takes.

    Raises:
        ModelFileError: no such folder, no config in it, or one that asks for code of its own.
    """
    if str(model) == EMBEDDED:
        return str(embedded.path())
    path = Path(model)
    if not path.exists():
        parts = str(model).split("/")
        offline = os.environ.get("HF_HUB_OFFLINE", "0") not in ("0", "")
        if len(parts) == 2 and all(p and p[0] not in ".~" for p in parts) and not offline:
            return str(model)
        raise ModelFileError(
            f'A model is a folder that save_pretrained wrote, or "{EMBEDDED}"; there is nothing at {model}.'
        )
    config = path / "config.json"
    if not config.is_file():
        raise ModelFileError(f"A model folder holds config.json; {path} has none.")
    try:
        said = json.loads(config.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ModelFileError(f"{config} is not valid JSON ({error}).") from error
    from transformers import CONFIG_MAPPING

    if said.get("model_type") not in CONFIG_MAPPING:
        own = "asks to run code of its own (auto_map)" if "auto_map" in said else "is unknown"
        raise ModelFileError(
            f"Only architectures of transformers are loaded, never code from a model's folder; "
            f"{path} ({said.get('model_type')}) {own}. Load it in Python and use rw.attach."
        )
    return str(path)


def tokenizer_of(model: str | Path) -> Any:
    """The tokenizer in a model's folder.

    Raises:
        ModelFileError: there is none, or it asks for code of its own.
    """
    from transformers import AutoTokenizer

    path = locate(model)
    try:
        return AutoTokenizer.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelFileError(f"{model} has no tokenizer that loads ({_first(error)}).") from error


def config_of(model: str | Path) -> Any:
    """The config of a model.

    Raises:
        ModelFileError: it cannot be read.
    """
    from transformers import AutoConfig

    path = locate(model)
    try:
        return AutoConfig.from_pretrained(path, trust_remote_code=False)
    except (OSError, ValueError, KeyError) as error:
        raise ModelFileError(f"{model} has no config that loads ({_first(error)}).") from error


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
    path = locate(model)
    cuda = torch.cuda.is_available()
    wanted: Any = {"auto": "bfloat16" if cuda else "float32", "stored": "auto"}.get(dtype, dtype)
    if wanted != "auto":
        wanted = getattr(torch, wanted, None)
        if not isinstance(wanted, torch.dtype):
            raise ModelFileError(f'dtype is "auto", "stored" or one of torch; found "{dtype}".')
    if base is not None:
        options["quantization_config"] = _quantised(base, torch.bfloat16 if cuda else torch.float32)
        options["device_map"] = {"": 0} if cuda else {"": "cpu"}
    try:
        loaded = kind.from_pretrained(path, dtype=wanted, trust_remote_code=False, **options)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        if "memory" in str(error):
            raise
        raise ModelFileError(f"{model} does not load as {kind.__name__}: {_first(error)}") from error
    return (loaded.cuda() if cuda and base is None else loaded).eval()


def _quantised(base: str, compute: torch.dtype) -> Any:
    try:
        import bitsandbytes  # noqa: F401
    except ImportError as error:
        raise MissingDependency(f"A base in {base} needs bitsandbytes: pip install 'rankwise[quant]'.") from error
    from transformers import BitsAndBytesConfig

    if base not in ("nf4", "int8"):
        raise ModelFileError(f'base is "nf4", "int8" or not given; found "{base}".')
    skip = sorted(HEADS)
    if base == "int8":
        return BitsAndBytesConfig(load_in_8bit=True, llm_int8_skip_modules=skip)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type="nf4",
        bnb_4bit_use_double_quant=True,
        bnb_4bit_compute_dtype=compute,
        llm_int8_skip_modules=skip,
    )


def _first(error: Exception) -> str:
    return str(error).strip().split("\n")[0].rstrip(".:")
