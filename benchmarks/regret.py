"""What advice costs and brings on real tasks: ``python -m benchmarks.regret FOLDER``, which keeps every run.

Eight development cases, texts and classifications, on the language model of 260,000 parameters that our race uses.
On each, ``rankwise advise`` gets a budget; then, on test data that it has not seen and a new seed, three runs: the
advised one; LoRA at the rate that stage 2 found; and LoRA at that rate trained on all that advice and the advised run
cost. Regret is how much worse the first is than each of the others, as a share of the gain that advice saw.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import re
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.advice import interval
from benchmarks.race_screen import DATA, convert

SIZE = 400  # characters of a piece of text
VALID, TEST, MOST = 200, 200, 1500  # examples to choose on, to judge on, and to train on at most
AGAIN = 10**6  # seeds that no advice has seen

Rows = list[dict[str, str]]


def pieces(*files: Path) -> Rows:
    """Texts cut into pieces."""
    text = "\n".join(file.read_text("utf-8", errors="replace") for file in files)
    return [{"text": text[i : i + SIZE]} for i in range(0, len(text) - SIZE, SIZE)]


def lines(file: Path) -> Iterator[str]:
    """The lines of a file that are not empty."""
    return (line.strip() for line in file.read_text("latin-1").splitlines() if line.strip())


def labelled(file: Path) -> Rows:
    """A label and a text a line."""
    split = (line.split(" ", 1) for line in lines(file))
    return [{"text": text, "label": label.split(":")[0]} for label, text in split]


def subjectivity(folder: Path) -> Rows:
    """Sentences of plots and of reviews."""
    return [{"text": t, "label": name} for name in ("plot", "quote") for t in lines(folder / f"{name}.tok.gt9.5000")]


def cases() -> dict[str, Rows]:
    """The cases by name, their rows in an order drawn once."""
    found = {
        "Shakespeare": pieces(DATA / "text_tinyshakespeare" / "input.txt"),
        "German": pieces(DATA / "text_genesis_en_de" / "german.txt"),
        "speeches": pieces(*sorted((DATA / "text_state_union").glob("*.txt"))),
        "tables to text": [
            {"prompt": f"{told}\n", "completion": text}
            for told, text in (line.split("||") for line in lines(DATA / "nlg_e2e" / "valid.txt"))
        ],
        "code": [
            {"prompt": f"{row['text']}\n", "completion": re.sub(r"\r", "", row["code"])}
            for row in map(json.loads, lines(DATA / "code_mbpp" / "mbpp.jsonl"))
        ],
        "sentiment": labelled(DATA / "cls_sst2" / "stsa.binary.train"),
        "questions": labelled(DATA / "cls_trec" / "train.txt"),
        "subjectivity": subjectivity(DATA / "cls_subjectivity"),
    }
    for name, rows in found.items():
        unique = {" ".join(" ".join(v for k, v in row.items() if k != "label").split()): row for row in rows}
        found[name] = random.Random(0).sample(list(unique.values()), min(len(unique), VALID + TEST + MOST))
    return found


def files(folder: Path, name: str, rows: Rows) -> dict[str, str]:
    """The rows of a case as three files."""
    parts = {"valid": rows[:VALID], "test": rows[VALID : VALID + TEST], "train": rows[VALID + TEST :]}
    found = {}
    for part, own in parts.items():
        file = folder / f"{name.replace(' ', '-')}-{part}.jsonl"
        file.write_text("".join(json.dumps(row) + "\n" for row in own))
        found[part] = str(file)
    return found


def asked(folder: Path, name: str, parts: dict[str, str], draw: int, steps: int, budget: int) -> dict[str, Any]:
    """One case, one draw: the advice, and the three runs."""
    from rankwise.hf.run import Run
    from rankwise.select import Ledger
    from rankwise.select.case import conclude, survey
    from rankwise.select.feasible import Constraints

    given = {"model": str(folder / "model"), "data": parts["train"], "out": "-", "validation": parts["valid"]}
    task = "classification" if name in ("sentiment", "questions", "subjectivity") else "causal-lm"
    run = Run.of(
        {**given, "task": task, "batch": 4, "max_length": 128, "steps": steps, "saves": 1, "seed": 1000 * draw}
    )
    ledger, began = Ledger(folder / "ledger.jsonl"), time.monotonic()
    advice = conclude(survey(run, budget, Constraints()), ledger).advice
    assert advice is not None
    lora = advice.standings[0]

    def loss(arm: Any, lr: float, count: int) -> float:
        judged = replace(run, **arm.what, lr=lr, steps=count, seed=AGAIN + draw, validation=parts["test"])
        entry = ledger.done(judged)
        return min(entry.scores.get("before", {}).get("loss", float("inf")), entry.loss)

    own = loss(advice.arm, advice.lr, max(1, round(steps / advice.arm.cost)))
    tuned = loss(lora.arm, lora.lr, steps)
    everything = loss(lora.arm, lora.lr, steps + round(advice.spent))
    gain = advice.gain
    return {
        "case": name,
        "draw": draw,
        "word": advice.word,
        "arm": advice.arm.name,
        "tried": [s.arm.name for s in advice.standings[1:]],
        "rate": advice.lr,
        "noise": advice.noise,
        "spent": advice.spent / steps,
        "horizon": advice.horizon,
        "gain": gain,
        "tuned": (own - tuned) / gain,
        "equal": (own - everything) / gain,
        "seconds": time.monotonic() - began,
    }


def table(rows: list[dict[str, Any]]) -> str:
    """The manual's table: a line a case, and all."""
    told = ["| case | verdicts | tried | advised against tuned LoRA | against LoRA at equal cost | spent, in runs |"]
    told.append("|---|---|---|---|---|--:|")
    for name in dict.fromkeys(row["case"] for row in rows):
        own = [row for row in rows if row["case"] == name]
        words = ", ".join(f"{row['word']} {row['arm']}" if row["word"] == "USE" else row["word"] for row in own)
        tried = ", ".join(dict.fromkeys(arm for row in own for arm in row["tried"]))
        tuned, equal = (", ".join(f"{row[key]:+.1%}" for row in own) for key in ("tuned", "equal"))
        spent = sum(row["spent"] for row in own) / len(own)
        told.append(f"| {name} | {words} | {tried} | {tuned} | {equal} | {spent:.1f} |")
    tuned, equal = (interval([row[key] for row in rows]) for key in ("tuned", "equal"))
    told.append(f"| all | | | {tuned} | {equal} | {sum(row['spent'] for row in rows) / len(rows):.1f} |")
    return "\n".join(told) + "\n"


def main() -> None:
    """Run what the ledger lacks, and print the table."""
    made = argparse.ArgumentParser(prog="python -m benchmarks.regret", description=(__doc__ or "").split("\n")[0])
    made.add_argument("folder", type=Path, help="for the ledger and the table")
    made.add_argument("--draws", type=int, default=2)
    made.add_argument("--steps", type=int, default=60, help="of the run that advice is for")
    made.add_argument("--budget", type=int, default=40, help="of advice, in such runs")
    made.add_argument("--cases", default="", help="those with this in their name")
    given = made.parse_args()
    torch.set_num_threads(int(os.environ.get("OMP_NUM_THREADS", "1")))
    given.folder.mkdir(parents=True, exist_ok=True)
    if not (given.folder / "model").exists():
        convert(DATA / "weights_aidreams260k", given.folder / "model")
    rows, chosen = [], {name: rows for name, rows in cases().items() if given.cases in name}
    parts = {name: files(given.folder, name, examples) for name, examples in chosen.items()}
    for draw in range(given.draws):
        for name in chosen:
            rows.append(asked(given.folder, name, parts[name], draw, given.steps, given.budget * given.steps))
            print(json.dumps(rows[-1]), file=sys.stderr, flush=True)
            (given.folder / "regret.json").write_text(json.dumps(rows, indent=1))
    (given.folder / "table.md").write_text(table(rows))
    print(table(rows))


if __name__ == "__main__":
    main()
