"""A tiny model in a folder, small data files, and the command line in this process."""

import json
import random
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest
import torch
import transformers
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

WORDS = ["king", "queen", "day", "road", "good", "fine", "bad", "grim", "was", "and", "the", "in"]


def sentence(generator: random.Random, count: int = 12) -> str:
    return " ".join(generator.choice(WORDS) for _ in range(count)) + "."


@pytest.fixture(scope="session")
def tiny(tmp_path_factory) -> Path:
    """A random Llama of width 32 and a byte-level tokenizer, as save_pretrained writes them."""
    folder = tmp_path_factory.mktemp("tiny")
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    specials = ["<s>", "</s>", "<pad>"]
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=specials,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator([" ".join(WORDS)] * 4, trainer)
    names = dict(zip(("bos_token", "eos_token", "pad_token"), specials, strict=True))
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, **names)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = transformers.LlamaConfig(
        vocab_size=len(tokenizer),
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=64,
        bos_token_id=0,
        eos_token_id=1,
        pad_token_id=2,
    )
    transformers.LlamaForCausalLM(config).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def files(tmp_path_factory) -> Path:
    """text.txt, pairs.jsonl, mood.csv and own.txt."""
    folder = tmp_path_factory.mktemp("files")
    g = random.Random(0)
    (folder / "text.txt").write_text(" ".join(sentence(g) for _ in range(40)))
    (folder / "own.txt").write_text(" ".join(sentence(g) for _ in range(10)))
    rows = [{"prompt": f"{sentence(g, 4)} ", "completion": "good king."} for _ in range(24)]
    (folder / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    lines = [f"the {g.choice(WORDS)} was {('bad', 'good')[i % 2]} {i},{'np'[i % 2]}\n"
             for i in range(48)]  # fmt: skip
    (folder / "mood.csv").write_text("text,label\n" + "".join(lines))
    return folder


@dataclass
class Done:
    code: int
    out: str
    err: str

    @property
    def json(self):
        return json.loads(self.out)


@pytest.fixture
def rankwise(monkeypatch, capsys, tmp_path):
    """Run a command as the shell does, in an empty folder."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("warnings.showwarning", None)  # main replaces it

    def run(*arguments) -> Done:
        from rankwise.cli import main

        monkeypatch.setattr(sys, "argv", ["rankwise", *map(str, arguments)])
        capsys.readouterr()
        try:
            main()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else 0
        said = capsys.readouterr()
        return Done(code, said.out, said.err)

    return run
