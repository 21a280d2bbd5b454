"""Write the files that the package ships from a training run.

Usage: ``python pretrain/export.py --corpus OUT --run RUN [--to MODEL]``. Weights become bfloat16,
configuration files lose what depends on the machine, and the held-out public-domain text comes
along. ``MODEL_CARD.md``, ``NOTICE`` and ``bits.json`` in the target are left as they are.
"""

import argparse
import json
import os
from pathlib import Path

import torch
from evaluate import SHIPPED
from safetensors.torch import load_file, save

CONFIGS = ("config.json", "generation_config.json", "tokenizer_config.json")


def files(corpus: Path, run: Path) -> dict[str, bytes]:
    """Make the exported files.

    Args:
        corpus: Folder that ``corpus.py`` wrote.
        run: Folder that ``train.py`` wrote.

    Returns:
        The content of each file by its name.
    """
    model = run / "model"
    weights = load_file(model / "model.safetensors")
    made = {
        "model.safetensors": save(
            {name: value.to(torch.bfloat16) for name, value in weights.items()}, {"format": "pt"}
        ),
        "english_test.txt": (corpus / "english_test.txt").read_bytes(),
        "tokenizer.json": (model / "tokenizer.json").read_bytes(),
    }
    for name in CONFIGS:
        values = json.loads((model / name).read_text())
        values.pop("_name_or_path", None)
        if name == "config.json":
            values["dtype"] = "bfloat16"
        if name == "tokenizer_config.json":
            values["tokenizer_class"] = "PreTrainedTokenizerFast"
        made[name] = (json.dumps(values, indent=2) + "\n").encode()
    return made


def main() -> None:
    """Replace the exported files one by one."""
    parser = argparse.ArgumentParser(description="Write the files that ship.")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--to", type=Path, default=SHIPPED)
    args = parser.parse_args()
    args.to.mkdir(parents=True, exist_ok=True)
    for name, content in files(args.corpus, args.run).items():
        fresh = args.to / f"{name}.tmp"
        fresh.write_bytes(content)
        os.replace(fresh, args.to / name)


if __name__ == "__main__":
    main()
