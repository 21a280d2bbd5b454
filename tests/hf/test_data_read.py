"""Files to rows: formats, folders, schemas, and errors that name the place."""

import json
from typing import Any

import numpy as np
import pytest
from chat_templates import make_tokenizer

from rankwise.errors import DataError
from rankwise.hf import data
from rankwise.hf.data import check_model, read, split
from rankwise.hf.data.examples import IGNORE

TEXTS = [{"text": "Hello there"}, {"text": "Paris, the\ncapital"}]


def load(*args: Any, **options: Any) -> Any:
    return data.load(*args, **options)


@pytest.fixture
def lines(tmp_path):
    def write(*rows, name="data.jsonl"):
        path = tmp_path / name
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def refused(call, *words):
    with pytest.raises(DataError) as caught:
        call()
    message = str(caught.value)
    assert all(str(word) in message for word in words), message
    assert ";" in message and ":" in message and "\n" not in message  # convention; found: remedy


# -- formats --------------------------------------------------------------------------------------


def test_jsonl_with_blank_lines_and_a_byte_order_mark(tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'\xef\xbb\xbf{"text": "Hello"}\n\n{"text": "there\xe2\x80\xa8you"}\r\n')
    table = read(path)
    assert [row.fields["text"] for row in table.rows] == ["Hello", "there\u2028you"]
    assert [row.where for row in table.rows] == ["a.jsonl, line 1", "a.jsonl, line 3"]


def test_csv_with_quotes_and_long_fields(tmp_path):
    path, long = tmp_path / "a.csv", "x" * 200_000
    path.write_text(f'text,id\n"Paris, the\ncapital",1\n\n{long},2\n')
    table = read(path)
    assert [row.fields["text"] for row in table.rows] == ["Paris, the\ncapital", long]
    assert [row.where for row in table.rows] == ["a.csv, line 3", "a.csv, line 5"]


def test_parquet_and_its_nones(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    talk = [{"role": "user", "content": "Hi"}, {"role": "assistant", "thinking": "So."}]
    pq.write_table(pa.Table.from_pylist([{"messages": talk}] * 2), tmp_path / "a.parquet")
    table = read(tmp_path / "a.parquet")
    assert table.schema == "messages" and table.rows[1].where == "a.parquet, row 2"
    assert table.rows[0].fields["messages"][0]["content"] == "Hi"


def test_a_text_file_is_one_document(tmp_path):
    (tmp_path / "a.txt").write_text("One.\n\nTwo.\n")
    assert [row.fields for row in read(tmp_path / "a.txt").rows] == [{"text": "One.\n\nTwo.\n"}]


def test_a_folder(tmp_path):
    (tmp_path / "pkg").mkdir()
    (tmp_path / ".git").mkdir()
    (tmp_path / "pkg" / "a.txt").write_text("One\n")
    (tmp_path / "b.txt").write_text("Two\n")
    (tmp_path / ".git" / "c.txt").write_text("Three\n")
    (tmp_path / "notes.md").write_text("Notes\n")
    table = read(tmp_path)
    assert [row.where for row in table.rows] == ["b.txt", "pkg/a.txt"]
    assert table.skipped == ("notes.md",)
    refused(lambda: read(tmp_path / "notes.md"), ".jsonl, .csv", "notes.md", "rename")


# -- schemas --------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("row", "schema"),
    [
        ({"text": "a", "id": 7}, "text"),
        ({"text": "a", "label": 1}, "label"),
        ({"prompt": "a", "completion": "b"}, "completion"),
        ({"messages": [{"role": "user", "content": "a"}], "prompt": "a"}, "messages"),
        ({"prompt": "a", "chosen": "b", "rejected": "c"}, "preference"),
    ],
)
def test_the_columns_tell_the_schema(row, schema, lines):
    assert read(lines(row)).schema == schema


def test_pairs_of_answers_are_for_preference_trainers(lines):
    path = lines({"prompt": "a", "chosen": "b", "rejected": "c", "score": 1})
    assert read(path).dataset().to_list() == [{"chosen": "b", "prompt": "a", "rejected": "c"}]
    refused(lambda: load(path, make_tokenizer()), "data.jsonl", "read(path).dataset()")


def test_ambiguous_columns_are_chosen_by_schema(lines):
    row = {"messages": [{"role": "user", "content": "a"}], "text": "a"}
    refused(lambda: read(lines(row)), "messages and text", "schema=")
    assert read(lines(row), schema="text").schema == "text"
    refused(lambda: read(lines(row), schema="label"), "is not label", "line 1")
    refused(lambda: read(lines(row), schema="chat"), "is not chat", "messages (messages)")


def test_unusable_columns(lines):
    refused(lambda: read(lines({"instruction": "a", "output": "b"})), "instruction + output", "line 1")


def test_mixed_schemas(lines, tmp_path):
    path = lines({"text": "a"}, {"prompt": "a", "completion": "b"})
    refused(lambda: read(path), "line 1 is 'text'", "line 2 is 'completion'")
    refused(lambda: read(lines({"text": "a"}, {"text": "a", "label": 1})), "line 2 is 'label'")
    (tmp_path / "other.txt").write_text("Notes")
    path.write_text('{"prompt": "a", "completion": "b"}')
    refused(lambda: read(tmp_path), "data.jsonl, line 1", "other.txt", "schema=")


@pytest.mark.parametrize(
    ("row", "word"),
    [
        ({"text": None}, "None"),
        ({"text": ["a"]}, "'text' is text"),
        ({"text": " \n"}, "empty"),
        ({"prompt": "a", "completion": ""}, "'completion'"),
        ({"prompt": "a", "completion": 3}, "3"),
        ({"messages": "Hello"}, "a list of messages"),
        ({"messages": []}, "empty"),
        ({"messages": [{"from": "human", "value": "a"}]}, "'role' and 'content'"),
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "equal to the rejected"),
    ],
)
def test_rows_that_hold_nothing_to_learn(row, word, lines):
    refused(lambda: read(lines(row)), "data.jsonl, line 1", word)


# -- broken files ---------------------------------------------------------------------------------


def test_missing_empty_and_unknown_files(tmp_path):
    refused(lambda: read(tmp_path / "none.jsonl"), "none.jsonl", "nothing", "check the path")
    refused(lambda: read(tmp_path), "nothing")
    for name in ("a.jsonl", "a.csv", "a.txt"):
        (tmp_path / name).write_text("\n" if name == "a.txt" else "")
        refused(lambda name=name: read(tmp_path / name), name, "empty")
    (tmp_path / "a.csv").write_text("text,label\n")
    refused(lambda: read(tmp_path / "a.csv"), "empty")
    (tmp_path / "a.xlsx").write_text("a")
    refused(lambda: read(tmp_path / "a.xlsx"), "a.xlsx", ".parquet", ".txt")


@pytest.mark.parametrize("line", [b'{"text": "a"', b"text", b'["text"]', b'{"text": "\xff\xfe"}', b"3"])
def test_a_broken_line_of_jsonl(line, tmp_path):
    path = tmp_path / "a.jsonl"
    path.write_bytes(b'{"text": "a"}\n' + line + b'\n{"text": "b"}\n')
    refused(lambda: read(path), "a.jsonl breaks at or after line 2")


@pytest.mark.parametrize("line", ["a,b,c", "a", '"a"b,c', '"a,b'])
def test_a_broken_line_of_csv(line, tmp_path):
    path = tmp_path / "a.csv"
    path.write_text(f"text,label\nx,y\n{line}\n")
    refused(lambda: read(path), "a.csv breaks at or after line 2")


def test_broken_text_and_parquet(tmp_path):
    (tmp_path / "a.txt").write_bytes(b"caf\xe9")
    refused(lambda: read(tmp_path / "a.txt"), "a.txt", "UTF-8", "position 3")
    (tmp_path / "a.csv").write_bytes(b"text,label\ncaf\xe9,b\n")
    refused(lambda: read(tmp_path / "a.csv"), "a.csv", "UTF-8")
    (tmp_path / "a.parquet").write_bytes(b"PAR1 and no more")
    refused(lambda: read(tmp_path / "a.parquet"), "a.parquet breaks")


# -- labels ---------------------------------------------------------------------------------------


def labelled(*labels):
    return [{"text": f"text {i}", "label": label} for i, label in enumerate(labels)]


def test_labels_are_numbered_by_the_training_data(lines):
    tokenizer = make_tokenizer()
    train = load(lines(*labelled("no", "yes", "no")), tokenizer)
    assert train.label_names == ("no", "yes") and [e["labels"] for e in train] == [0, 1, 0]
    path = lines(*labelled("yes", "maybe", "yes", "never"), name="val.jsonl")
    names = train.label_names
    refused(
        lambda: load(path, tokenizer, label_names=names),
        *("'maybe' (val.jsonl, line 2)", "'never' (val.jsonl, line 4)", "'no', 'yes'"),
    )
    other = lines(*labelled("yes"), name="val.jsonl")
    assert load(other, tokenizer, label_names=names)[0]["labels"] == 1


@pytest.mark.parametrize(("one", "other"), [(1, "1"), (True, 1), ("a", 0)])
def test_labels_of_mixed_types(one, other, lines):
    tokenizer, path = make_tokenizer(), lines(*labelled(one, other))
    names = type(one).__name__, type(other).__name__
    refused(lambda: load(path, tokenizer), *names, "line 1", "line 2", "one type")
    path = lines(*labelled(other))  # the type differs between the files
    refused(lambda: load(path, tokenizer, label_names=(one,)), repr(one), f"{other!r} (", "line 1")


@pytest.mark.parametrize("label", [None, float("nan"), "", "NaN", 0.5, ["a"]])
def test_missing_and_unusable_labels(label, lines):
    path = lines(*labelled("a", label))
    refused(lambda: load(path, make_tokenizer()), "data.jsonl, line 2", repr(label))


def test_whole_floats_are_integers(lines):
    assert load(lines(*labelled(1.0, 0)), make_tokenizer()).label_names == (0, 1)


def test_a_cut_text_keeps_the_closing_token(lines):
    from tokenizers import processors

    tokenizer = make_tokenizer()
    ends = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    both = processors.TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    tokenizer.backend_tokenizer.post_processor = both
    examples = load(lines({"text": "Hello " * 9, "label": 1}), tokenizer, max_length=5)
    ids = examples[0]["input_ids"]
    assert len(ids) == 5 and ids[0] == tokenizer.bos_token_id and ids[-1] == tokenizer.eos_token_id
    assert examples.items[0].cut == "truncate"


# -- long rows ------------------------------------------------------------------------------------


def test_long_texts_are_split_without_loss(lines):
    tokenizer = make_tokenizer()
    text = " ".join(f"number {i}" for i in range(60))
    examples = load(lines({"text": text}), tokenizer, max_length=32)
    assert all(len(e) <= 32 and e.cut == "split" for e in examples.items)
    joined = np.concatenate([e.input_ids for e in examples.items]).tolist()
    assert tokenizer.decode(joined) == f"<s>{text}</s>"
    assert {e.tokens for e in examples.items} == {len(joined)}


@pytest.mark.parametrize("limit", [2, 3, 4, 9, 16])
@pytest.mark.parametrize(("prompt", "answer"), [(40, 2), (40, 40), (2, 40), (9, 9)])
@pytest.mark.parametrize("how", ["truncate", "split"])
def test_long_completions_keep_something_to_learn(limit, prompt, answer, how, lines):
    tokenizer = make_tokenizer()
    row = {"prompt": "?" * prompt, "completion": "!" * answer}
    examples = load(lines(row), tokenizer, max_length=limit, on_long=how)
    assert all(0 < len(e) <= limit and e.learned > 0 for e in examples.items)
    if how == "truncate":
        (item,) = examples.items
        assert item.input_ids[0] == tokenizer.bos_token_id
        text = tokenizer.decode(item.input_ids.tolist()).replace("</s>", "")
        if limit > 3:
            assert "?!" in text  # the answer follows the end of its prompt
        kept = text[3:].replace("?", "")
        assert tokenizer.decode(item.labels[item.labels != IGNORE].tolist()).startswith(kept[:1])


def test_long_rows_can_be_refused(lines):
    path = lines({"text": "Hi"}, {"text": "Hello " * 50})
    call = lambda: load(path, make_tokenizer(), max_length=16, on_long="raise")  # noqa: E731
    refused(call, "data.jsonl, line 2", "16", "max_length")
    refused(lambda: load(path, make_tokenizer(), max_length=1), "1")
    refused(lambda: load(path, make_tokenizer(), on_long="cut"), "'cut'")


# -- splits ---------------------------------------------------------------------------------------


def test_equal_rows_and_the_pieces_of_one_row_stay_together(lines):
    rows = [{"text": f"row {i // 2} " + "a b " * 20} for i in range(40)]
    examples = load(lines(*rows), make_tokenizer(), max_length=32)
    train, validation = split(examples, 0.25)
    assert len(train) + len(validation) == len(examples)
    sides = [{e.row.text() for e in part.items} for part in (train, validation)]
    assert len(sides[1]) == 5 and not sides[0] & sides[1]
    assert [e.row.where for e in split(examples, 0.25)[1].items] == [e.row.where for e in validation.items]
    assert len(examples[:3]) == 3 and examples[:3].schema == "text"
    refused(lambda: split(examples, 1.5), "1.5 of 20")
    refused(lambda: split(examples[:1]), "0.1 of 1")


# -- the model ------------------------------------------------------------------------------------


def make_model(rows, context=64):
    from transformers import LlamaConfig, LlamaForCausalLM

    size: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    heads: dict[str, Any] = {"num_attention_heads": 2, "max_position_embeddings": context}
    return LlamaForCausalLM(LlamaConfig(vocab_size=rows, **size, **heads))


def test_the_model_knows_every_token(lines):
    tokenizer = make_tokenizer()
    known = len(tokenizer)
    examples = load(lines(*TEXTS), tokenizer)
    for rows in (known, known + 24):  # rows to spare are usual
        check_model(tokenizer, make_model(rows), examples)
        check_model(tokenizer, make_model(rows))
    small = make_model(known - 9)
    refused(lambda: check_model(tokenizer, small), known, known - 9, "resize_token_embeddings")
    refused(lambda: check_model(tokenizer, small, examples), known, known - 9)


def test_a_model_of_hashed_characters_has_no_rows_to_count(lines):
    from transformers import CanineConfig, CanineForSequenceClassification

    size: dict[str, Any] = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1}
    model = CanineForSequenceClassification(CanineConfig(num_attention_heads=2, max_position_embeddings=64, **size))
    tokenizer = make_tokenizer()
    check_model(tokenizer, model, load(lines(*TEXTS), tokenizer))


def test_a_token_beyond_the_model_is_refused_where_it_is_used(lines):
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer))
    tokenizer.add_tokens(["<image>"], special_tokens=True)
    check_model(tokenizer, model, load(lines(*TEXTS), tokenizer))
    refused(lambda: check_model(tokenizer, model), len(tokenizer))
    used = load(lines(TEXTS[0], {"text": "Look: <image>"}), tokenizer)
    refused(lambda: check_model(tokenizer, model, used), "data.jsonl, line 2", len(tokenizer) - 1)
    tokenizer.pad_token = "<image>"
    used = load(lines(*TEXTS), tokenizer)
    refused(lambda: check_model(tokenizer, model, used), "padding token")


def test_the_model_has_room_for_every_example(lines):
    tokenizer = make_tokenizer()
    model = make_model(len(tokenizer), context=16)
    examples = load(lines({"text": "Hi"}, {"text": "Hello " * 50}), tokenizer, max_length=32)
    refused(lambda: check_model(tokenizer, model, examples), "16", "line 2", "32", "max_length=")
