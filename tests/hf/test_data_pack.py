"""Batches, padded and packed: the loss is that of the documents alone."""

import json
import warnings
from typing import Any

import pytest
import torch
from chat_templates import make_tokenizer

from rankwise.errors import DataError
from rankwise.hf.data import Collator, check_packing, load, pack
from rankwise.hf.data.examples import IGNORE

SIZE: dict[str, Any] = {"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 2, "head_dim": 16}
HEADS: dict[str, Any] = {"num_attention_heads": 2, "num_key_value_heads": 1, "max_position_embeddings": 128}


def make_model(kind="llama", attention="sdpa"):
    from transformers import Gemma3ForCausalLM, Gemma3TextConfig, LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    common = {**SIZE, **HEADS, "vocab_size": 340, "attn_implementation": attention}
    if kind == "llama":
        model = LlamaForCausalLM(LlamaConfig(**common))
    else:
        layers = ["sliding_attention", "full_attention"]
        config = Gemma3TextConfig(sliding_window=8, layer_types=layers, **common)
        model = Gemma3ForCausalLM(config)
    for parameter in model.parameters():  # attention sharp enough for a leak to show
        torch.nn.init.normal_(parameter, std=0.3)
    return model.eval()


@pytest.fixture
def examples(tmp_path):
    rows = [{"prompt": f"Question {i}: " + "why " * i, "completion": "so " * (7 * i % 9 + 1)} for i in range(8)]
    (tmp_path / "a.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return load(tmp_path / "a.jsonl", make_tokenizer())


def summed(model, batch):
    """Sum of the losses over learned tokens, and their number."""
    with torch.no_grad():
        count = int((batch["labels"][:, 1:] != IGNORE).sum())
        return float(model(**batch).loss) * count, count


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_the_packed_loss_is_that_of_the_documents_alone(kind, attention, examples):
    tokenizer, model = make_tokenizer(), make_model(kind, attention)
    alone = [summed(model, Collator(tokenizer)([item])) for item in examples]
    assert sum(n for _, n in alone) == sum(item.learned for item in examples.items)
    expected = sum(loss for loss, _ in alone) / sum(n for _, n in alone)
    rows = pack(examples, 100)
    assert len(rows) < len(examples) and len({len(row["labels"]) for row in rows}) > 1
    batch = Collator(tokenizer, packed=True)(rows)
    loss, count = summed(model, batch)
    assert count == sum(n for _, n in alone)
    assert abs(loss / count - expected) < 1e-5
    padded, count = summed(model, Collator(tokenizer)(list(examples)))
    assert abs(padded / count - expected) < 1e-5
    contaminated, count = summed(model, {k: v for k, v in batch.items() if k != "position_ids"})
    assert abs(contaminated / count - expected) > 1e-3  # the test can fail


def test_packing_keeps_every_document_whole(examples):
    rows = pack(examples, 100)
    documents = []
    for row in rows:
        starts = [i for i, position in enumerate(row["position_ids"]) if position == 0]
        assert all(row["labels"][i] == IGNORE for i in starts)
        for a, b in zip(starts, [*starts[1:], None], strict=True):
            documents.append((row["input_ids"][a:b].tolist(), row["labels"][a:b].tolist()))
    expected = [(item["input_ids"], item["labels"]) for item in examples]
    assert sorted(documents) == sorted(expected)
    assert all(len(row["labels"]) <= 100 for row in rows)


def test_what_cannot_be_packed(examples, tmp_path):
    with pytest.raises(DataError, match=r"is 8 tokens; a.jsonl, line \d has \d+"):
        pack(examples, 8)
    with pytest.raises(DataError, match="position_ids"):
        Collator(make_tokenizer(), packed=True)([examples[0]])
    (tmp_path / "b.jsonl").write_text('{"text": "a", "label": 1}')
    with pytest.raises(DataError, match="one a text"):
        pack(load(tmp_path / "b.jsonl", make_tokenizer()))


def test_padding_is_marked_by_position_not_by_its_id(tmp_path):
    tokenizer = make_tokenizer(pad="</s>")
    assert tokenizer.pad_token_id == tokenizer.eos_token_id
    (tmp_path / "a.jsonl").write_text('{"text": "Hello"}\n{"text": "Hello there, what is it"}')
    examples = load(tmp_path / "a.jsonl", tokenizer)
    batch = Collator(tokenizer)([examples[0], examples[1]])
    short = len(examples[0]["input_ids"])
    assert batch["labels"][0, short - 1] == tokenizer.eos_token_id
    assert batch["labels"][1, -1] == tokenizer.eos_token_id
    assert (batch["labels"][0, short:] == IGNORE).all()
    assert batch["attention_mask"].sum(1).tolist() == [short, len(examples[1]["input_ids"])]


def test_a_tokenizer_without_padding(examples):
    tokenizer = make_tokenizer(pad=None)
    batch = Collator(tokenizer)(list(examples))
    assert batch["input_ids"][batch["attention_mask"] == 0].unique() == tokenizer.eos_token_id


def test_classes_are_one_a_text(tmp_path):
    (tmp_path / "b.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b c", "label": 0}')
    batch = Collator(make_tokenizer())(list(load(tmp_path / "b.jsonl", make_tokenizer())))
    assert batch["labels"].tolist() == [1, 0] and batch["input_ids"].shape[0] == 2


@pytest.mark.parametrize("kind", ["llama", "gemma3"])
def test_check_packing_finds_a_model_that_mixes_documents(kind, monkeypatch):
    model = make_model(kind)
    check_packing(model)
    check_packing(model.train())
    assert model.training
    forward = type(model).forward

    def without_positions(self, *args, position_ids=None, **kwargs):
        return forward(self, *args, **kwargs)

    monkeypatch.setattr(type(model), "forward", without_positions)
    with pytest.raises(DataError, match="leaks"):
        check_packing(model)


@pytest.mark.parametrize("packed", [False, True])
def test_trainer_takes_the_data_sets(packed, examples, tmp_path):
    from transformers import Trainer, TrainingArguments

    arguments = TrainingArguments(
        output_dir=str(tmp_path / "out"),
        max_steps=2,
        per_device_train_batch_size=2,
        report_to=[],
        disable_tqdm=True,
        use_cpu=True,
        save_strategy="no",
    )
    dataset: Any = pack(examples, 100) if packed else examples
    trainer = Trainer(
        model=make_model(),
        args=arguments,
        train_dataset=dataset,
        data_collator=Collator(make_tokenizer(), packed=packed),
    )
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        result = trainer.train()
    assert 0 < result.training_loss < 100
