"""What is in the data, and what the validation data repeats."""

import io
import json

import pytest
from chat_templates import LLAMA, QWEN3, make_tokenizer
from rich.console import Console

from rankwise.hf.data import load, render, report

WORDS = [f"word{i}" for i in range(14)]
STORY = " ".join(WORDS * 3)


@pytest.fixture
def file(tmp_path):
    def write(name, *rows):
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    return write


def printed(found, **options):
    page = io.StringIO()
    render(found, Console(file=page, width=200, **options))
    return page.getvalue()


def test_counts_and_lengths(file):
    tokenizer = make_tokenizer()
    rows = [{"prompt": "?" * n, "completion": "!"} for n in range(1, 101)]
    examples = load(file("a.jsonl", *rows), tokenizer, max_length=64)
    found = report(examples, tokenizer, first=2)
    assert found["schema"] == "completion" and found["rows"] == found["examples"] == 100
    assert found["lengths"] == {"p50": 54, "p90": 94, "p99": 103, "max": 103}
    # <s>, the question marks, "!" and </s>
    assert found["truncated"] == 39 and found["truncated_share"] == 0.39
    assert found["tokens"] == sum(min(n + 3, 64) for n in range(1, 101))
    assert found["learned"] == sum(item.learned for item in examples.items)
    assert found["split"] == found["unrolled"] == found["repeated"] == 0
    assert found["samples"] == [[("<s>?", False), ("!</s>", True)], [("<s>??", False), ("!</s>", True)]]
    json.dumps(found)


def test_split_unrolled_and_repeated_rows(file):
    tokenizer = make_tokenizer(QWEN3)
    rows = [{"text": "a " * 50}, {"text": "a"}, {"text": " a\n"}]
    found = report(load(file("a.jsonl", *rows), tokenizer, max_length=32), tokenizer)
    assert (found["rows"], found["split"], found["unrolled"], found["repeated"]) == (3, 1, 0, 1)
    talk = [{"role": r, "content": "Hi"} for r in ("user", "assistant") * 2]
    found = report(load(file("a.jsonl", {"messages": talk}), tokenizer), tokenizer)
    assert (found["rows"], found["examples"], found["unrolled"]) == (1, 2, 1)


def test_classes(file):
    rows = [{"text": "a", "label": n % 3 > 0} for n in range(9)]
    tokenizer = make_tokenizer()
    found = report(load(file("a.jsonl", *rows), tokenizer), tokenizer)
    assert found["classes"] == {"False": 3, "True": 6} and found["learned"] == 9
    assert found["samples"][0] == [("<s>a", False), (" -> False", True)]


def test_duplicates_between_training_and_validation(file):
    tokenizer = make_tokenizer()
    train = load(file("train.jsonl", *({"text": t} for t in ("one", STORY, "two", STORY))), tokenizer)
    texts = [STORY.replace(" ", "\n  "), f"{STORY} now", "three"]
    validation = load(file("val.jsonl", *({"text": t} for t in texts)), tokenizer)
    found = report(train, tokenizer, validation)
    assert found["exact_duplicates"] == [("val.jsonl, line 1", "train.jsonl, line 2")]


def test_a_shared_system_prompt_is_no_duplicate(file):
    tokenizer = make_tokenizer(LLAMA)

    def talk(question, answer):
        turns = {"system": STORY, "user": question, "assistant": answer}
        return {"messages": [{"role": r, "content": c} for r, c in turns.items()]}

    train = load(file("train.jsonl", talk("Why?", "So."), talk("Who?", "I.")), tokenizer)
    validation = load(file("val.jsonl", talk("When?", "Now."), talk("Who?", "I.")), tokenizer)
    found = report(train, tokenizer, validation)
    assert found["exact_duplicates"] == [("val.jsonl, line 2", "train.jsonl, line 2")]


def test_the_page_marks_what_is_learned(file):
    tokenizer = make_tokenizer()
    row = {"prompt": "Is [bold]this[/bold] it?", "completion": " Yes, it is."}
    examples = load(file("a.jsonl", row, row), tokenizer)
    found = report(examples, tokenizer, examples)
    plain = printed(found)
    assert "<s>Is [bold]this[/bold] it?« Yes, it is.</s>»" in plain
    assert "rows" in plain and "truncated share" not in plain and "exact duplicates" in plain
    coloured = printed(found, force_terminal=True, color_system="standard")
    assert "\x1b[32m Yes, it is.</s>" in coloured and "«" not in coloured
