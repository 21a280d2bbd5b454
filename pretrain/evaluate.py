"""Measure bits per byte on the held-out text, next to those of ``xz`` primed with the same text.

Usage: ``python pretrain/evaluate.py --corpus OUT [--model MODEL] [--write]``. ``OUT`` is what
``corpus.py`` wrote, ``MODEL`` a model folder (default: the shipped one). ``--write`` stores the
figures as ``bits.json`` in that folder. The figure of ``xz`` is what a test text adds to the size
of the compressed training text: 8 (size(train + test) - size(train)) / bytes(test).
"""

import argparse
import json
import math
import os
import subprocess
from pathlib import Path

import torch
from corpus import SEPARATOR
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaForCausalLM, PreTrainedTokenizerFast

XZ = ("xz", "--stdout", "--threads=1", "--lzma2=preset=9e,dict=64MiB")
SHIPPED = Path(__file__).parents[1] / "src" / "rankwise" / "embedded" / "model"


def xz_size(data: bytes) -> int:
    """Return the number of bytes that ``xz`` needs for some data."""
    return len(subprocess.run(XZ, input=data, capture_output=True, check=True).stdout)


@torch.no_grad()
def document_bits(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, text: str, rows: int = 8) -> float:
    """Score a document.

    A window sees at least half the context before the tokens that it predicts, and every token is
    predicted once.

    Args:
        model: Language model.
        tokenizer: Its tokenizer.
        text: The document.
        rows: Windows in a batch.

    Returns:
        The bits that the model needs for the document and its end.
    """
    context = model.config.max_position_embeddings
    ids = torch.tensor([*tokenizer(text, verbose=False).input_ids, tokenizer.eos_token_id])
    size = len(ids) - 1
    spans = [(0, 0, min(context, size))]
    while spans[-1][2] < size:
        seen = spans[-1][2]
        end = min(seen + context // 2, size)
        spans.append((end - context, seen, end))
    total, first = 0.0, spans[0]
    groups = [[first]] + [spans[i : i + rows] for i in range(1, len(spans), rows)]
    for group in groups:
        inputs = torch.stack([ids[start:end] for start, _, end in group])
        logits = model(input_ids=inputs, use_cache=False).logits.float()
        for row, (start, seen, end) in zip(logits, group, strict=True):
            scored = row[seen - start :]
            total += cross_entropy(scored, ids[seen + 1 : end + 1], reduction="sum").item()
    return total / math.log(2)


def measure(model: LlamaForCausalLM, tokenizer: PreTrainedTokenizerFast, corpus: Path) -> dict[str, dict[str, float]]:
    """Score all test text.

    Args:
        model: Language model.
        tokenizer: Its tokenizer.
        corpus: Folder that ``corpus.py`` wrote.

    Returns:
        Bits per byte of the model and of ``xz``, for each source and for all of them.
    """
    train = (corpus / "train.txt").read_bytes()
    base = xz_size(train)
    figures: dict[str, dict[str, float]] = {}
    whole = 0.0
    for path in (*sorted((corpus / "test").glob("*.txt")), corpus / "test.txt"):
        test = path.read_bytes()
        if path.parent == corpus:
            name, bits = "all", whole
        else:
            documents = test.decode("utf-8").split(SEPARATOR)
            name, bits = path.stem, sum(document_bits(model, tokenizer, d) for d in documents)
            whole += bits
        figures[name] = {
            "bytes": len(test),
            "model": round(bits / len(test), 4),
            "xz": round(8 * (xz_size(train + test) - base) / len(test), 4),
        }
        print(name, figures[name], flush=True)
    return figures


def main() -> None:
    """Measure a model folder."""
    parser = argparse.ArgumentParser(description="Measure bits per byte.")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--model", type=Path, default=SHIPPED)
    parser.add_argument("--write", action="store_true", help="store the figures beside the model")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    model = LlamaForCausalLM.from_pretrained(args.model, dtype=torch.float32).eval()
    figures = measure(model, AutoTokenizer.from_pretrained(args.model), args.corpus)
    if args.write:
        fresh = args.model / "bits.json.tmp"
        fresh.write_text(json.dumps({"unit": "bits per byte", "held_out": figures}, indent=2) + "\n")
        os.replace(fresh, args.model / "bits.json")


if __name__ == "__main__":
    main()
