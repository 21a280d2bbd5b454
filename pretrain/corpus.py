"""Build the text that the embedded model is trained, validated and tested on.

Usage: ``python pretrain/corpus.py --data DATA --out OUT``. ``DATA`` holds one folder per source
(see ``SOURCES``). ``OUT`` receives ``train.txt``, ``valid.txt``, ``test.txt`` and, per source,
``test/<source>.txt``. Documents are separated by a NUL character, which no document contains.
"""

import argparse
import json
import random
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

SEPARATOR = "\0"
_FOLD = str.maketrans({"‘": "'", "’": "'", "“": '"', "”": '"', "–": "-", "—": "--", "…": "...", "\xa0": " ", "\0": ""})


@dataclass
class Split:
    """Documents of one source, or of all of them, in three parts that share no text."""

    train: list[str] = field(default_factory=list)
    valid: list[str] = field(default_factory=list)
    test: list[str] = field(default_factory=list)

    def extend(self, other: "Split") -> None:
        """Append the documents of another split, part by part."""
        self.train += other.train
        self.valid += other.valid
        self.test += other.test


def read(path: Path) -> str:
    """Read a text file as UTF-8, or as Windows-1252 where it is not valid UTF-8."""
    raw = path.read_bytes()
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError:
        return raw.decode("cp1252", errors="replace")


def clean(text: str) -> str:
    """Fold typographic characters to ASCII and drop trailing spaces and long runs of newlines."""
    text = text.translate(_FOLD).replace("\r\n", "\n").replace("\r", "\n")
    text = re.sub(r"[ \t]+\n", "\n", text)
    return re.sub(r"\n{3,}", "\n\n", text).strip() + "\n"


def detokenise(line: str) -> str:
    """Reattach punctuation, clitics and quotation marks in one line of space-separated tokens."""
    line = re.sub(r" (n't|'(?:s|re|ve|ll|d|m)\b)", r"\1", line, flags=re.IGNORECASE)
    line = re.sub(r" ([,.;:?!%)\]}])", r"\1", line)
    line = re.sub(r"([(\[{$]) ", r"\1", line)
    return re.sub(r'" ?([^"]*?) ?"', r'"\1"', line)


def cut(text: str, valid: float, test: float) -> Split:
    """Split one document by position, at line ends: its last part is test text, then valid."""
    marks = [text.rfind("\n", 0, int(len(text) * share)) + 1 for share in (1 - valid - test, 1 - test)]
    return Split([text[: marks[0]]], [text[marks[0] : marks[1]]], [text[marks[1] :]])


def shakespeare(folder: Path) -> Split:
    """Plays; the last tenth (the usual validation part of this corpus) is held out."""
    return cut(clean(read(folder / "input.txt")), 0.02, 0.1)


def genesis(folder: Path) -> Split:
    """The Book of Genesis in the King James version; the last 4 % is test text."""
    return cut(clean(read(folder / "english-kjv.txt")), 0.02, 0.04)


def state_union(folder: Path) -> Split:
    """Addresses by year: to 1998 for training, to 2002 for validation, the later ones for test."""
    split = Split()
    for path in sorted(folder.glob("[0-9]*.txt")):
        year = int(path.name[:4])
        part = split.train if year <= 1998 else split.valid if year <= 2002 else split.test
        part.append(clean(read(path)))
    return split


def masc(folder: Path) -> Split:
    """Five genres without their part-of-speech tags; the last 4 % of each document is test text."""
    split = Split()
    for path in sorted(folder.glob("*/*.txt")):
        lines = (
            " ".join(token.rpartition("_")[0] or token for token in line.split()) for line in read(path).splitlines()
        )
        split.extend(cut(clean("\n".join(detokenise(line) for line in lines)), 0.02, 0.04))
    return split


def gsm8k(folder: Path) -> Split:
    """Word problems of the training file, never the test file; the last 120 are test text."""
    rows = [json.loads(line) for line in read(folder / "train_first3000.jsonl").splitlines()]
    texts = [clean(f"Question: {row['question']}\nAnswer: {re.sub('<<.*?>>', '', row['answer'])}") for row in rows]
    return Split(texts[:-180], texts[-180:-120], texts[-120:])


def subjectivity(folder: Path) -> Split:
    """Film reviews and plots; the last 500 sentences of each are test text, 500 more validation."""
    split = Split()
    for path in sorted(folder.glob("*.tok.gt9.5000")):
        lines = [detokenise(line.strip()) for line in path.read_text("latin-1").splitlines()]
        for part, chosen in (
            (split.train, lines[:-1000]),
            (split.valid, lines[-1000:-500]),
            (split.test, lines[-500:]),
        ):
            part.append(clean("\n".join(chosen)))
    return split


SOURCES: dict[str, Callable[[Path], Split]] = {
    "text_tinyshakespeare": shakespeare,
    "text_genesis_en_de": genesis,
    "text_state_union": state_union,
    "text_masc_dev": masc,
    "math_gsm8k": gsm8k,
    "cls_subjectivity": subjectivity,
}
PUBLIC_DOMAIN = ("text_tinyshakespeare", "text_state_union", "text_genesis_en_de")


def outlines(documents: list[str], seed: int = 0, share: float = 0.04, unit: int = 40) -> list[str]:
    """Lay a share of the text out as nested, indented lines.

    Prose has no runs of spaces or tabs. Without this, the tokens for them would keep their random
    embeddings and every indented text would be out of reach of a frozen model.

    Args:
        documents: Texts to take passages from.
        seed: Seed of the choice of passages and of their indentation.
        share: Share of the passages that is laid out again.
        unit: Lines in a passage.

    Returns:
        One document for each chosen passage.
    """
    rng = random.Random(seed)
    found = []
    for document in documents:
        lines = [line for line in document.splitlines() if line]
        for start in range(0, len(lines), unit):
            if rng.random() >= share:
                continue
            step, depth, rows = rng.choice(("  ", "    ", "    ", "\t")), 0, []
            for line in lines[start : start + unit]:
                rows.append(step * depth + line)
                depth = max(0, min(5, depth + rng.choice((-2, -1, 0, 0, 0, 1, 1))))
                rows += [""] * (rng.random() < 0.1)
            found.append("\n".join(rows) + "\n")
    return found


def build(data: Path) -> tuple[Split, dict[str, list[str]]]:
    """Read every source.

    Args:
        data: Folder with one folder per source.

    Returns:
        All documents, and the test documents of each source.
    """
    whole, tests = Split(), {}
    for name, reader in SOURCES.items():
        split = reader(data / name)
        whole.extend(split)
        tests[name] = split.test
    whole.train += outlines(whole.train)
    return whole, tests


def excerpt(tests: dict[str, list[str]], budget: int = 36_000) -> str:
    """Join held-out public-domain text, at most ``budget`` characters of each source."""
    parts = []
    for name in PUBLIC_DOMAIN:
        taken, size = [], 0
        for line in "\n".join(tests[name]).splitlines(keepends=True):
            size += len(line)
            if size > budget:
                break
            taken.append(line)
        parts.append("".join(taken).strip() + "\n")
    return "\n".join(parts)


def main() -> None:
    """Write the corpus to a folder."""
    parser = argparse.ArgumentParser(description="Build the training text.")
    parser.add_argument("--data", type=Path, required=True)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    whole, tests = build(args.data)
    (args.out / "test").mkdir(parents=True, exist_ok=True)
    for part in ("train", "valid", "test"):
        documents = getattr(whole, part)
        (args.out / f"{part}.txt").write_text(SEPARATOR.join(documents), "utf-8", newline="\n")
        print(f"{part}: {len(documents)} documents, {sum(len(d.encode()) for d in documents)} bytes")
    for name, documents in tests.items():
        (args.out / "test" / f"{name}.txt").write_text(SEPARATOR.join(documents), "utf-8", newline="\n")
    (args.out / "english_test.txt").write_text(excerpt(tests), "utf-8", newline="\n")


if __name__ == "__main__":
    main()
