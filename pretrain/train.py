"""Train the embedded model within a wall-clock budget.

Usage: ``python pretrain/train.py --corpus OUT --run RUN --minutes 80``. ``OUT`` is what
``corpus.py`` wrote. ``RUN`` receives ``model/`` (the latest weights with their tokenizer) and the
state that lets a second call of the same command resume. Learning rates are a function of the time
used, so that training always ends annealed, on a fast machine as on a slow one. Three quarters of
the budget go to windows of half the context, in batches of as many tokens: they are faster.
"""

import argparse
import json
import math
import os
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import torch
from corpus import SEPARATOR
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from torch.nn.functional import cross_entropy
from transformers import AutoTokenizer, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

BOS, EOS, PAD = "<s>", "</s>", "<pad>"  # tokens 0, 1 and 2
WORDS = Regex(r"'(?:s|t|re|ve|m|ll|d)\b| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\n+|\t+| +(?= )|\s")


def train_tokenizer(documents: list[str], size: int, context: int) -> PreTrainedTokenizerFast:
    """Train a byte-level BPE tokenizer that encodes any text and knows runs of white space.

    Args:
        documents: Training texts.
        size: Number of tokens, special tokens included.
        context: Longest input of the model.

    Returns:
        The tokenizer, which puts ``<s>`` before a text.
    """
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Split(WORDS, "isolated"), pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    layout = ["\n" * n for n in (2, 3)] + ["\t" * n for n in (2, 3)] + [" " * n for n in (4, 8, 12)]
    runs = "a".join(run + " " * (run[0] == " ") for run in layout) * 3000
    trainer = trainers.BpeTrainer(
        vocab_size=size,
        special_tokens=[BOS, EOS, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator([*documents, runs], trainer)
    tokenizer.post_processor = processors.TemplateProcessing(
        single=f"{BOS} $A", pair=f"{BOS} $A {BOS} $B", special_tokens=[(BOS, 0)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=BOS,
        eos_token=EOS,
        pad_token=PAD,
        model_max_length=context,
        padding_side="right",
    )


def encode(tokenizer: PreTrainedTokenizerFast, documents: list[str]) -> torch.Tensor:
    """Join documents into one row of token ids, each between ``<s>`` and ``</s>``."""
    rows = tokenizer(documents).input_ids
    return torch.tensor([token for row in rows for token in (*row, tokenizer.eos_token_id)])


def config(tokenizer: PreTrainedTokenizerFast, context: int) -> LlamaConfig:
    """Describe the model: 4.7 million parameters, untied embeddings, grouped-query attention."""
    return LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=256,
        intermediate_size=688,
        num_hidden_layers=5,
        num_attention_heads=8,
        num_key_value_heads=4,
        max_position_embeddings=context,
        initializer_range=0.02,
        tie_word_embeddings=False,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )


def optimizers(model: LlamaForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Make Muon for the matrices of the blocks and AdamW for embeddings, head and norms."""
    blocks = [p for n, p in model.named_parameters() if p.ndim == 2 and ".layers." in n]
    inside = {id(p) for p in blocks}
    rest = [p for p in model.parameters() if id(p) not in inside]
    made = [
        torch.optim.Muon(blocks, lr=lr, weight_decay=0.1, adjust_lr_fn="match_rms_adamw"),
        torch.optim.AdamW(rest, lr=lr, betas=(0.9, 0.98), weight_decay=0.01),
    ]
    for optimizer in made:
        optimizer.param_groups[0]["peak"] = lr
    return made


def batches(ids: torch.Tensor, rows: int, context: int, seed: int) -> Iterator[torch.Tensor]:
    """Yield shuffled windows for ever; every pass starts at another offset."""
    rng = torch.Generator().manual_seed(seed)
    while True:
        offset = int(torch.randint(context, (1,), generator=rng))
        windows = ids[offset:].unfold(0, context + 1, context)
        order = torch.randperm(len(windows), generator=rng)
        for start in range(0, len(order) - rows + 1, rows):
            yield windows[order[start : start + rows]]


def loss_of(model: torch.nn.Module, windows: torch.Tensor, bf16: bool) -> torch.Tensor:
    """Return the mean next-token loss, in nats, of windows of token ids."""
    with torch.autocast("cpu", torch.bfloat16, enabled=bf16):
        logits = model(input_ids=windows[:, :-1], use_cache=False).logits
    return cross_entropy(logits.flatten(0, 1).float(), windows[:, 1:].flatten())


@torch.no_grad()
def validate(model: LlamaForCausalLM, ids: torch.Tensor, context: int, limit: int = 40) -> float:
    """Return the mean loss over evenly spaced windows."""
    windows = ids.unfold(0, context + 1, context)
    windows = windows[:: max(1, len(windows) // limit)]
    return sum(loss_of(model, w[None], False).item() for w in windows) / len(windows)


def save(
    run: Path,
    model: LlamaForCausalLM,
    tokenizer: PreTrainedTokenizerFast,
    made: list[torch.optim.Optimizer],
    state: dict[str, float],
) -> None:
    """Write weights, tokenizer, optimizer state and counters to a folder that replaces the last."""
    fresh, final, old = run / "new", run / "model", run / "old"
    for folder in (fresh, old):
        shutil.rmtree(folder, ignore_errors=True)
    model.save_pretrained(fresh)
    tokenizer.save_pretrained(fresh)
    tensors = {
        f"{i}.{name}.{key}": value.contiguous()
        for i, optimizer in enumerate(made)
        for name, entry in optimizer.state_dict()["state"].items()
        for key, value in entry.items()
    }
    save_file(tensors, fresh / "optimizer.safetensors")
    (fresh / "state.json").write_text(json.dumps(state))
    if final.exists():
        os.replace(final, old)
    os.replace(fresh, final)


def resume(folder: Path, model: LlamaForCausalLM, made: list[torch.optim.Optimizer]) -> dict[str, float]:
    """Load weights and optimizer state from a folder that ``save`` wrote.

    Args:
        folder: Folder to read.
        model: Model to fill.
        made: Optimizers to fill.

    Returns:
        The counters saved with them.
    """
    model.load_state_dict(load_file(folder / "model.safetensors"))
    states: list[dict[int, dict[str, torch.Tensor]]] = [{} for _ in made]
    for name, value in load_file(folder / "optimizer.safetensors").items():
        i, parameter, key = name.split(".")
        states[int(i)].setdefault(int(parameter), {})[key] = value
    for optimizer, entries in zip(made, states, strict=True):
        optimizer.load_state_dict(optimizer.state_dict() | {"state": entries})
    return json.loads((folder / "state.json").read_text())


def main() -> None:
    """Train until the budget is used."""
    parser = argparse.ArgumentParser(description="Train the embedded model.")
    parser.add_argument("--corpus", type=Path, required=True)
    parser.add_argument("--run", type=Path, required=True)
    parser.add_argument("--minutes", type=float, default=80)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rows", type=int, default=8, help="full windows in a batch")
    parser.add_argument("--context", type=int, default=512, help="tokens in a window")
    parser.add_argument("--vocab", type=int, default=2048)
    parser.add_argument("--lr", type=float, default=4e-3)
    parser.add_argument("--save-minutes", type=float, default=5)
    parser.add_argument("--bf16", action="store_true")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    torch.manual_seed(0)
    args.run.mkdir(parents=True, exist_ok=True)

    documents = (args.corpus / "train.txt").read_text("utf-8").split(SEPARATOR)
    final = args.run / "model"
    if final.exists():
        tokenizer = AutoTokenizer.from_pretrained(final)
    else:
        tokenizer = train_tokenizer(documents, args.vocab, args.context)
    ids = encode(tokenizer, documents)
    held_out = (args.corpus / "valid.txt").read_text("utf-8")
    valid_ids = encode(tokenizer, held_out.split(SEPARATOR))
    bits = len(valid_ids) / len(held_out.encode()) / math.log(2)

    model = LlamaForCausalLM(config(tokenizer, args.context))
    made = optimizers(model, args.lr)
    state: dict[str, float] = {"step": 0, "seconds": 0.0, "tokens": 0}
    if final.exists():
        state = resume(final, model, made)
    count = sum(p.numel() for p in model.parameters())
    print(f"{count} parameters, {len(ids)} training tokens, resuming at {state}", flush=True)

    budget, clock, saved, average = args.minutes * 60, time.monotonic(), state["seconds"], None
    short = batches(ids, 2 * args.rows, args.context // 2, seed=int(state["step"]))
    long = batches(ids, args.rows, args.context, seed=int(state["step"]) + 1)
    while (done := state["seconds"] / budget) < 1:
        windows = next(short if done < 0.75 else long)
        for optimizer in made:
            for group in optimizer.param_groups:
                group["lr"] = group["peak"] * min(1, (state["step"] + 1) / 100, (1 - done) / 0.7)
        loss = loss_of(model, windows, args.bf16)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for optimizer in made:
            optimizer.step()
            optimizer.zero_grad()
        now = time.monotonic()
        state["seconds"] += now - clock
        clock = now
        state["step"] += 1
        state["tokens"] += windows[:, 1:].numel()
        average = loss.item() if average is None else 0.95 * average + 0.05 * loss.item()
        if state["step"] % 20 == 0:
            rate = state["tokens"] / state["seconds"]
            line = f"{state['step']:6d} {state['seconds']:7.0f} s {average:.4f} {rate:.0f} tokens/s"
            print(line, flush=True)
        if state["seconds"] - saved > args.save_minutes * 60:
            saved = state["seconds"]
            value = validate(model, valid_ids, args.context)
            print(f"valid {value:.4f} nats/token {value * bits:.4f} bits/byte", flush=True)
            save(args.run, model, tokenizer, made, state)
    value = validate(model, valid_ids, args.context)
    print(f"valid {value:.4f} nats/token {value * bits:.4f} bits/byte, {state}", flush=True)
    save(args.run, model, tokenizer, made, state)


if __name__ == "__main__":
    main()
