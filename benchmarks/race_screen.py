"""Our own race: ``python -m benchmarks.race_screen FOLDER [--quick]``; every run is kept in FOLDER/ledger.jsonl.

1. Screen: every method on a language model of 260,000 parameters that is kept outside of the repository, on
   Shakespeare: four rates by successive halving, then the best one's two neighbours, three new seeds.
2. Finals: the best six, LoRA (twice) and full fine-tuning on the embedded model, on two domains, three new seeds.

With ``--only`` these methods are screened, beside LoRA (twice) and full, without finals: to share the work between
processes, or for what came later. Each race is written as FOLDER/NAME/race.json and race.png. An interrupted race goes
on where it was. With ``--publish`` nothing is run: the races in FOLDER become docs/race.json, docs/our-race.md and
pictures; rows that only docs/race.json has stay where LoRA has the same losses in both.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import struct
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

DATA = Path(__file__).parents[2] / "shared" / "data"
DOCS = Path(__file__).parents[1] / "docs"
NAMES = ("q_proj", "k_proj", "v_proj", "o_proj"), ("gate_proj", "down_proj", "up_proj")
SPECIALS = ("<unk>", "<s>", "</s>")
# plans whose defaults are for runs of thousands of steps: what counts steps, in tenths of a run
SHORT = {"adalora": ("steps", 10), "delta_lora": ("start", 1), "reflora": ("warmup", 1), "reflora_s": ("warmup", 1)}
SHORT |= dict.fromkeys(("cola_chain", "periodic_lora", "relora"), ("every", 3))
SHORT |= dict.fromkeys(("xgblora", "apollo_mini", "loro", "prilora"), ("every", 1))
NARROW = dict.fromkeys(("apollo", "fira", "flora_opt", "galore"), ("every", 1))  # of rank 128, in a model of width 64


def halves(weight: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of a query or key projection from pairs that lie side by side to pairs that lie half a head apart."""
    return weight.view(heads, -1, 2, weight.shape[1]).transpose(1, 2).reshape(weight.shape)


def tokenizer(file: Path) -> Any:
    """llama2.c's tokenizer, with merges in the order of its scores."""
    from tokenizers import Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    raw, at, pieces = file.read_bytes(), 4, []
    while at < len(raw):
        score, size = struct.unpack_from("<fi", raw, at)
        pieces.append((raw[at + 8 : at + 8 + size].decode("utf-8", "replace").strip("\n"), score))
        at += 8 + size
    told = [*SPECIALS, *(f"<0x{byte:02X}>" for byte in range(256)), *(p.replace(" ", "▁") for p, _ in pieces[259:])]
    known = {piece: i for i, piece in enumerate(told)}
    whole = sorted((-score, i) for i, (_, score) in enumerate(pieces) if i >= 259)
    splits = [(told[i][:k], told[i][k:]) for _, i in whole for k in range(1, len(told[i]))]
    merges = [pair for pair in splits if pair[0] in known and pair[1] in known]
    made = Tokenizer(models.BPE(known, merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True))
    made.normalizer = normalizers.Sequence([normalizers.Prepend("▁"), normalizers.Replace(" ", "▁")])
    parts = [decoders.Replace("▁", " "), decoders.ByteFallback(), decoders.Fuse(), decoders.Strip(" ", 1, 0)]
    made.decoder = decoders.Sequence(parts)
    return PreTrainedTokenizerFast(
        tokenizer_object=made, unk_token="<unk>", bos_token="<s>", eos_token="</s>", pad_token="</s>"
    )


def convert(source: Path, folder: Path) -> Path:
    """Write the model of llama2.c's format as transformers reads it; SOURCE.md beside it says how it lies there."""
    from transformers import LlamaConfig, LlamaForCausalLM

    raw = (source / "aidreams260K.bin").read_bytes()
    dim, inner, layers, heads, groups, vocabulary, length = struct.unpack_from("<7i", raw)
    numbers, at = torch.from_numpy(np.frombuffer(raw, "<f4", offset=28).copy()), 0

    def take(*shape: int) -> torch.Tensor:
        nonlocal at
        at += int(np.prod(shape))
        return numbers[at - int(np.prod(shape)) : at].view(shape)

    state = {"model.embed_tokens.weight": take(vocabulary, dim)}
    stacks = {"input_layernorm": take(layers, dim)}
    stacks |= {f"self_attn.{name}": take(layers, dim, dim) for name in NAMES[0]}
    stacks |= {"post_attention_layernorm": take(layers, dim)}
    stacks |= {f"mlp.{n}": take(layers, *((dim, inner) if n == "down_proj" else (inner, dim))) for n in NAMES[1]}
    for name, stack in stacks.items():
        turned = name.endswith(("q_proj", "k_proj"))
        for i, weight in enumerate(stack):
            state[f"model.layers.{i}.{name}.weight"] = halves(weight, heads) if turned else weight
    state["model.norm.weight"] = take(dim)
    config = LlamaConfig(
        vocab_size=vocabulary,
        hidden_size=dim,
        intermediate_size=inner,
        num_hidden_layers=layers,
        num_attention_heads=heads,
        num_key_value_heads=groups,
        max_position_embeddings=length,
        rms_norm_eps=1e-5,
        tie_word_embeddings=True,
        bos_token_id=1,
        eos_token_id=2,
        pad_token_id=2,
    )
    model = LlamaForCausalLM(config)
    missing, extra = model.load_state_dict(state, strict=False)
    assert set(missing) <= {"lm_head.weight"} and not extra, (missing, extra)
    model.save_pretrained(folder)
    tokenizer(source / "tok512.bin").save_pretrained(folder)
    return folder


def texts(folder: Path) -> dict[str, dict[str, str]]:
    """Domains as files, in pieces of 400 characters: "train", "valid" to choose rates on, "test", and "own" English."""
    from rankwise import embedded

    sources = {
        "shakespeare": DATA / "text_tinyshakespeare" / "input.txt",
        "german": DATA / "text_genesis_en_de" / "german.txt",
    }
    own = folder / "own.jsonl"
    english = (embedded.path() / "english_test.txt").read_text("utf-8")
    own.write_text("".join(json.dumps({"text": english[i : i + 400]}) + "\n" for i in range(0, 12000, 400)))
    found = {}
    for name, file in sources.items():
        text = file.read_text("utf-8", errors="replace")[: 400 * 460]
        pieces = [text[i : i + 400] for i in range(0, len(text), 400)]
        parts = {"train": pieces[:400], "valid": pieces[400:430], "test": pieces[430:]}
        for part, chosen in parts.items():
            lines = "".join(json.dumps({"text": piece}) + "\n" for piece in chosen)
            (folder / f"{name}-{part}.jsonl").write_text(lines)
        found[name] = {part: str(folder / f"{name}-{part}.jsonl") for part in parts} | {"own": str(own)}
    return found


def main(folder: Path, steps: tuple[int, int], finalists: int, only: list[str] | None, domains: list[str]) -> None:
    """Screen, then finals; each race is written when it is done."""
    from rankwise.hf.run import Run
    from rankwise.methods import catalogue
    from rankwise.select import Ledger, Race, Tuning, race
    from rankwise.select.race import AGAIN, REFERENCE

    began = time.monotonic()
    folder.mkdir(parents=True, exist_ok=True)
    small, files, ledger = (
        convert(DATA / "weights_aidreams260k", folder / "model"),
        texts(folder),
        Ledger(folder / "ledger.jsonl"),
    )

    def say(text: str) -> None:
        print(f"{time.monotonic() - began:6.0f} s  {text}", file=sys.stderr, flush=True)

    def run(
        name: str, model: str, domain: str, methods: list[str], seeds: int, count: int, centre: float, **settings: Any
    ) -> Race:
        part = files[domain]
        common: dict[str, Any] = {
            "batch": 4,
            "max_length": 128,
            "saves": 1,
            "validation": part["valid"],
            "steps": count,
        }
        one = Run.of({"model": model, "data": part["train"], "out": "-", **common, **settings})
        how: dict[str, Any] = {"seeds": seeds, "tuning": Tuning(centre=centre), "test": part["test"]}
        made = race(one, methods, ledger, match="params", say=say, **how)
        target = folder / name
        target.mkdir(exist_ok=True)
        (target / "race.json").write_text(json.dumps({**made.to_dict(), "seconds": time.monotonic() - began}, indent=1))
        made.draw(target / "race.png")
        for row in made.rows:
            say(f"{name}  {row.method:16} {row.run.lr:8.2g}  {row.verdict or row.word}")
        return made

    tenth = steps[0] // 10
    said = {name: f"({key}={count * tenth})" for name, (key, count) in SHORT.items()}
    said |= {name: f"({key}={count * tenth}, rank=16)" for name, (key, count) in NARROW.items()}
    said["vblora"] = "(length=4)"  # divides the widths, 64 and 172
    said["nola"] = "(bases=64)"  # of its 1,024 a step draws all anew, in two seconds here
    wanted = catalogue() if only is None else only
    methods = [name + said.get(name, "") for name in wanted if name != REFERENCE]
    screened = run("screen", str(small), "shakespeare", methods, 3, steps[0], 4.0)
    if only is not None:
        return
    best = [row.method for row in screened.rows if row.method in methods and row.verdict][:finalists]
    say(f"finals: {', '.join(best)}, {REFERENCE}, {AGAIN}, full")
    for domain in domains:
        run(domain, "embedded", domain, best, 3, steps[1], 1.0, base_text=files[domain]["own"])


FINALS = {"shakespeare": "Finals on Shakespeare", "german": "Finals on German"}
TITLES = {"screen": "Screen", **FINALS}
LINE = "| {method} | {lr:.2g}{edge} | {parameters:,} | {loss:.4f} | {share} | {word} |"
COLUMNS = "| method | rate | parameters | loss | better by | verdict |\n|---|--:|--:|--:|---|---|\n"


def published(file: Path) -> dict[str, Any]:
    """A race as the manual keeps it: without the places of files."""
    told = json.loads(file.read_text())
    for row in told["rows"]:
        run = row.pop("run")
        row |= {"lr": run["lr"], "rank": run["rank"], "options": run["options"]}
    return told


def joined(kept: dict[str, Any], made: dict[str, Any]) -> dict[str, Any]:
    """A race with the rows that only an earlier one has, judged anew, where LoRA and full came out the same in both."""
    from rankwise.select.race import AGAIN, REFERENCE, judged

    new, old = ({row["method"]: row for row in told["rows"]} for told in (made, kept))
    both = ((new[name]["losses"], old[name]["losses"]) for name in (REFERENCE, AGAIN, "full"))
    if not all(np.allclose(*losses, rtol=1e-6) for losses in both):  # another processor rounds otherwise
        return made
    rows = old | new
    losses = {name: [math.inf if x is None else x for x in row["losses"]] for name, row in rows.items()}
    verdicts = judged(losses, made["gain"], made["margin"])
    for name, row in rows.items():
        if name in verdicts:
            row |= {"verdict": asdict(verdicts[name]), "word": verdicts[name].word}
    return {**made, "rows": sorted(rows.values(), key=lambda row: math.inf if row["loss"] is None else row["loss"])}


def publish(folder: Path) -> None:
    """The races of a folder as the manual's page."""
    from rankwise.hf.plots import differences

    pages, kept = [], json.loads((DOCS / "race.json").read_text())
    kept = {**kept.pop("finals"), "screen": kept}
    for name, title in TITLES.items():
        file = folder / name / "race.json"
        told = kept[name] = joined(kept[name], published(file)) if file.exists() else kept[name]
        lines, bars = [], []
        for row in told["rows"]:
            spread = ""
            if v := row["verdict"]:
                spread = f"{v['difference']:+.1%} [{v['low']:+.1%}, {v['high']:+.1%}]"
                bars.append((row["method"], v["difference"], v["low"], v["high"], v["word"]))
            loss = math.inf if row["loss"] is None else row["loss"]
            lines.append(LINE.format(**{**row, "loss": loss, "edge": "*" * row["edge"], "share": spread}))
        picture = DOCS / "img" / f"race-{name}.png"
        differences(bars, told["margin"], picture, f"{len(told['seeds'])} seeds, tuned LoRA = 0")
        facts = f"Base {told['base']:.4f}; full fine-tuning gains {told['gain']:.4f} nats; {len(told['seeds'])} seeds."
        shown = f"![Differences to tuned LoRA with intervals](img/{picture.name})"
        pages.append(f"## {title}\n\n{facts}\n\n{COLUMNS}" + "\n".join(lines) + f"\n\n{shown}\n")
    head = (DOCS / "our-race.md").read_text().split("## ")[0]
    (DOCS / "our-race.md").write_text(head + "\n".join(pages))
    told = {**kept.pop("screen"), "finals": kept}
    (DOCS / "race.json").write_text(json.dumps(told, indent=1) + "\n")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="python -m benchmarks.race_screen", description="Our own race.")
    parser.add_argument("folder", type=Path, help="for the ledger, the tables and the pictures")
    parser.add_argument(
        "--steps", type=int, nargs=2, default=(200, 120), help="of the screen's and of the finals' runs"
    )
    parser.add_argument("--finalists", type=int, default=6)
    parser.add_argument("--publish", action="store_true", help="write the manual's page from the races in FOLDER")
    parser.add_argument("--only", nargs="+", help="screen these methods, without finals")
    parser.add_argument("--domains", nargs="+", choices=FINALS, default=[*FINALS], help="of the finals")
    options = parser.parse_args()
    if options.publish:
        publish(options.folder)
        sys.exit()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "2")))
    main(options.folder, tuple(options.steps), options.finalists, options.only, options.domains)
