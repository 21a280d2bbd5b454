"""rankwise finetune, from files to an adapter that evaluates, generates, merges and converts."""

import json

import pytest
import torch
import yaml


@pytest.fixture
def trained(rankwise, tiny, files, tmp_path):
    done = rankwise(
        "finetune", tiny, files / "pairs.jsonl", "--out", "run", "--rank", 4, "--steps", 6,
        "--lr", "2e-2", "--batch", 4,
    )  # fmt: skip
    assert done.code == 0, done.err
    return tmp_path / "run"


def test_a_run_from_end_to_end(rankwise, tiny, files, trained):
    assert {p.name for p in trained.iterdir()} >= {
        "adapter.safetensors", "run.yaml", "metrics.jsonl", "loss.png", "tokenizer.json",
        "checkpoint-6",
    }  # fmt: skip
    assert not [p for p in trained.iterdir() if p.name.startswith(".")]
    assert (trained / "loss.png").read_bytes().startswith(b"\x89PNG")
    run = yaml.safe_load((trained / "run.yaml").read_text())
    assert (run["rank"], run["lr"], run["steps"], run["seed"]) == (4, 0.02, 6, 0)
    lines = [json.loads(line) for line in (trained / "metrics.jsonl").read_text().splitlines()]
    assert sum("loss" in line for line in lines) == 6
    result = lines[-1]["result"]
    assert result["after"]["bits_per_byte"] < result["before"]["bits_per_byte"]

    done = rankwise("evaluate", tiny, files / "pairs.jsonl", "--adapter", trained, "--json")
    assert done.json["adapted"]["loss"] < done.json["base"]["loss"]
    done = rankwise("generate", tiny, "--adapter", trained, "-p", "king", "--max-new-tokens", 3)
    assert done.code == 0 and done.out.startswith("king")
    done = rankwise("inspect", trained, "--json")
    assert done.json["method"] == "lora" and len(done.json["sites"]) == 14
    assert done.json["run"]["data"].endswith("pairs.jsonl")
    done = rankwise("evaluate", trained, files / "pairs.jsonl")
    assert done.code == 2 and f"--adapter {trained}" in done.err

    done = rankwise("merge", tiny, trained, "--out", "merged", "--json")
    assert done.code == 0 and "differ by" in done.json["difference"]
    done = rankwise("evaluate", "merged", files / "pairs.jsonl", "--json")
    assert done.json["base"]["loss"] == pytest.approx(result_loss(rankwise, tiny, files, trained))


def result_loss(rankwise, tiny, files, trained):
    done = rankwise("evaluate", tiny, files / "pairs.jsonl", "--adapter", trained, "--json")
    return done.json["adapted"]["loss"]


def test_convert_there_and_back(rankwise, tiny, trained):
    done = rankwise("convert", trained, "--model", tiny, "--to", "peft", "--out", "there")
    assert done.code == 0 and "exact" in done.out, done.err
    done = rankwise("convert", "there", "--model", tiny, "--from", "peft", "--out", "back")
    assert done.code == 0, done.err
    here, back = (rankwise("inspect", p, "--json").json for p in (trained, "back"))
    assert here["sites"] == back["sites"] and here["parameters"] == back["parameters"]


def test_a_failed_verification_exits_4_and_keeps_nothing(rankwise, tiny, trained, tmp_path, monkeypatch):
    monkeypatch.setattr("rankwise.cli.verify.TOLERANCE", {torch.float32: -1.0})
    done = rankwise("merge", tiny, trained, "--out", "merged")
    assert done.code == 4 and "verification failed" in done.err
    assert not (tmp_path / "merged").exists()


def test_run_yaml_repeats_a_run_bit_for_bit(rankwise, tiny, trained, tmp_path):
    assert rankwise("finetune", trained / "run.yaml", "out=again").code == 0
    again = tmp_path / "again" / "adapter.safetensors"
    assert again.read_bytes() == (trained / "adapter.safetensors").read_bytes()
    done = rankwise("finetune", trained / "run.yaml", "rank=2", "--out", "smaller", "--json")
    assert done.json["parameters"] < 6000
    assert yaml.safe_load((tmp_path / "smaller" / "run.yaml").read_text())["rank"] == 2


def test_resume_ends_where_the_whole_run_ends(rankwise, tiny, trained):
    whole = (trained / "adapter.safetensors").read_bytes()
    (trained / "adapter.safetensors").unlink()
    for file in (trained / "checkpoint-6").iterdir():
        file.unlink()
    (trained / "checkpoint-6").rmdir()
    done = rankwise("finetune", trained / "run.yaml", "--resume")
    assert done.code == 0 and "going on from step 4" in done.err
    assert (trained / "adapter.safetensors").read_bytes() == whole
    done = rankwise("finetune", trained / "run.yaml", "--resume", "rank=2")
    assert done.code == 2 and "rank 4 and now 2" in done.err


def test_classification_keeps_its_labels(rankwise, tiny, files, tmp_path):
    done = rankwise(
        "finetune", tiny, files / "mood.csv", "--task", "classification", "--out", "mood",
        "--structure", "svd", "--init", "principal", "--solver", "lora_plus", "--rank", 2,
        "--epochs", 4, "--lr", "2e-2", "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.json["after"]["accuracy"] >= done.json["before"]["accuracy"]
    assert yaml.safe_load((tmp_path / "mood" / "run.yaml").read_text())["labels"] == ["n", "p"]
    done = rankwise("evaluate", tiny, files / "mood.csv", "--adapter", "mood", "--json")
    assert done.json["adapted"]["accuracy"] > 0.8
    done = rankwise("merge", tiny, "mood", "--out", "merged", "--json")
    assert done.code == 0, done.err


def test_a_quantised_base_and_what_it_lost(rankwise, tiny, files):
    pytest.importorskip("bitsandbytes")
    done = rankwise(
        "finetune", tiny, files / "text.txt", "--out", "q", "--base", "nf4", "-m", "dora",
        "--rank", 2, "--steps", 2, "--base-text", files / "own.txt", "pack=true", "--max-length", 48,
    )  # fmt: skip
    assert done.code == 0, done.err
    assert "the base's own text: bits per byte" in done.out
    done = rankwise("evaluate", tiny, files / "text.txt", "--adapter", "q", "--json")
    assert done.code == 0, done.err  # the run says that the base is nf4


def test_a_dry_run_writes_nothing(rankwise, tiny, files, tmp_path):
    done = rankwise("finetune", tiny, files / "text.txt", "-m", "oft", "--dry-run")
    assert done.code == 0 and "14 sites" in done.out, done.err
    done = rankwise("finetune", tiny, files / "text.txt", "--out", "x", "--dry-run", "--json")
    assert done.json["sites"] == 14
    assert not list(tmp_path.iterdir())
