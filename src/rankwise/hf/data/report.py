"""What is in the data, as plain values and as a page for a terminal."""

from collections import Counter, defaultdict
from hashlib import blake2b
from itertools import pairwise
from typing import Any

import numpy as np

from rankwise.errors import MissingDependency
from rankwise.hf.data.examples import IGNORE, Example, Examples

_WORDS = 5  # a shingle is so many consecutive words
_SKETCH = 64  # of each row the smallest shingle hashes are kept: an unbiased sample for Jaccard
_COMMON = 1000  # a shingle of more training rows than this is boilerplate and finds no candidates
_ALIKE = 0.8  # two rows are near duplicates from this Jaccard similarity on


def report(examples: Examples, tokenizer: Any, validation: Examples | None = None, *, first: int = 3) -> dict[str, Any]:
    """Describe the training data, and what of it the validation data repeats.

    Args:
        examples: What `load` returned.
        tokenizer: To read the samples back.
        validation: If given, its rows are looked up among the training rows.
        first: How many examples to show.

    Returns:
        Plain values, ready for JSON: schema; rows that gave examples; examples; tokens of these;
        learned, the tokens that carry loss; lengths, percentiles of a row's tokens before any cut;
        truncated, rows that lost tokens; truncated_share, of all rows; split, rows cut into several
        examples; unrolled, dialogues in several examples as their template rewrites earlier turns;
        repeated, rows that equal an earlier one; classes, rows of each; skipped files;
        exact_duplicates and near_duplicates, (validation row, training row); samples, runs of
        (text, learned).
    """
    items = examples.items
    heads = [item for item in items if item.part == 0]
    aside = [item for item in validation.items if item.part == 0] if validation else []
    cut = Counter(kind for _, kind in {(item.row.where, item.cut) for item in items})
    marks = np.percentile([item.tokens for item in heads], (50, 90, 99, 100), method="higher")
    classes = [examples.label_names[e.labels] for e in heads if isinstance(e.labels, int)]
    exact, near = _duplicates(heads, aside)
    return {
        "schema": examples.schema,
        "rows": len(heads),
        "examples": len(items),
        "tokens": sum(len(item) for item in items),
        "learned": sum(item.learned for item in items),
        "lengths": dict(zip(("p50", "p90", "p99", "max"), marks.tolist(), strict=True)),
        "truncated": cut["truncate"],
        "truncated_share": cut["truncate"] / len(heads),
        "split": cut["split"],
        "unrolled": len({e.row.where for e in items if e.part and e.cut != "split"}),
        "repeated": len(heads) - len({item.row.text() for item in heads}),
        "classes": dict(Counter(map(str, classes))),
        "skipped": list(examples.skipped),
        "exact_duplicates": exact,
        "near_duplicates": near,
        "samples": [_runs(item, examples, tokenizer) for item in items[:first]],
    }


def render(report: dict[str, Any], console: Any = None) -> None:
    """Print a report; learned tokens are green, and stand in «» where there is no colour.

    Args:
        report: What `report` returned.
        console: A `rich.console.Console`; by default a new one on stdout.
    """
    try:
        from rich.console import Console
        from rich.text import Text
    except ImportError as error:
        raise MissingDependency("reports need rich: pip install 'rankwise[cli]'") from error
    console = console or Console()
    for runs in report["samples"]:
        line = Text()
        for text, learned in runs:
            short = text if len(text) <= 600 else f"{text[:300]} [...] {text[-300:]}"
            marked = f"«{short}»" if learned and not console.color_system else short
            line.append(marked, "green" if learned else "dim")
        console.print(line, end="\n\n")
    for name, value in report.items():
        if name != "samples" and value:
            if isinstance(value, dict):
                value = ", ".join(f"{key} {number}" for key, number in value.items())
            elif isinstance(value, list):
                value = f"{len(value)}, such as {value[0]}"
            elif isinstance(value, float):
                value = f"{value:.1%}"
            console.print(Text(f"{name.replace('_', ' '):18} {value}"))


def _runs(example: Example, examples: Examples, tokenizer: Any) -> list[tuple[str, bool]]:
    """Return the example's text in runs of learned and unlearned tokens."""
    ids, labels = example.input_ids.tolist(), example.labels
    if isinstance(labels, int):
        return [(tokenizer.decode(ids), False), (f" -> {examples.label_names[labels]}", True)]
    learned = labels != IGNORE
    edges = [0, *(np.flatnonzero(np.diff(learned)) + 1).tolist(), len(ids)]
    return [(tokenizer.decode(ids[a:b]), bool(learned[a])) for a, b in pairwise(edges)]


def _sketch(text: str) -> frozenset[int]:
    words = text.lower().split()
    shingles = {" ".join(words[i : i + _WORDS]) for i in range(max(1, len(words) - _WORDS + 1))}
    hashes = (blake2b(s.encode(), digest_size=8).digest() for s in shingles)
    return frozenset(sorted(int.from_bytes(h) for h in hashes)[:_SKETCH])


def _duplicates(train: list[Example], validation: list[Example]) -> list[list[tuple[str, str]]]:
    same = {item.row.text(): item.row.where for item in reversed(train)}  # the first one stays
    sketches = [_sketch(item.row.text()) for item in train] if validation else []
    holders: defaultdict[int, list[int]] = defaultdict(list)
    for i, sketch in enumerate(sketches):
        for shingle in sketch:
            holders[shingle].append(i)
    exact, near = [], []
    for item in validation:
        text = item.row.text()
        if text in same:
            exact.append((item.row.where, same[text]))
            continue
        sketch = _sketch(text)
        lists = (holders.get(shingle, ()) for shingle in sketch)
        shared = Counter(i for rows in lists if len(rows) <= _COMMON for i in rows)
        for i, number in shared.most_common(1):
            if number >= _ALIKE * min(_SKETCH, len(sketch | sketches[i])):
                near.append((item.row.where, train[i].row.where))
    return [exact, near]
