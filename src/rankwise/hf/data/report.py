"""What is in the data, as plain values and as a page for a terminal."""

from collections import Counter
from itertools import groupby
from typing import Any

import numpy as np

from rankwise.hf.data.examples import IGNORE, Example, Examples


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
        exact_duplicates, (validation row, training row); samples, runs of (text, learned).
    """
    items = examples.items
    rows = {item.row.where: item for item in reversed(items)}
    heads = list(reversed(rows.values()))  # the first example of each row
    texts = {item.row.text(): item.row.where for item in reversed(heads)}  # and the first of equal rows
    cut = Counter(kind for _, kind in {(item.row.where, item.cut) for item in items})
    parts = Counter(item.row.where for item in items if item.cut != "split")
    marks = np.percentile([item.tokens for item in heads], (50, 90, 99, 100), method="higher")
    aside = {item.row.where: item.row.text() for item in validation.items} if validation else {}
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
        "unrolled": sum(number > 1 for number in parts.values()),
        "repeated": len(heads) - len(texts),
        "classes": dict(Counter(str(examples.label_names[e.labels]) for e in heads if isinstance(e.labels, int))),
        "skipped": list(examples.skipped),
        "exact_duplicates": [(where, texts[text]) for where, text in aside.items() if text in texts],
        "samples": [_runs(item, examples, tokenizer) for item in items[:first]],
    }


def render(report: dict[str, Any], console: Any = None) -> None:
    """Print a report; learned tokens are green, and stand in «» where there is no colour.

    Args:
        report: What `report` returned.
        console: A `rich.console.Console`; by default a new one on stdout.
    """
    from rich.console import Console  # which typer, and so transformers, brings
    from rich.text import Text

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
    runs = groupby(zip(ids, (labels != IGNORE).tolist(), strict=True), lambda pair: pair[1])
    return [(tokenizer.decode([i for i, _ in run]), learned) for learned, run in runs]
