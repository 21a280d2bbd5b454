"""rankwise plan, and the plan that finetune makes before it loads a model."""

from dataclasses import replace

import pytest

from rankwise.select.devices import DEVICES


def test_a_plan_as_json(rankwise, tiny, files):
    done = rankwise("plan", tiny, files / "pairs.jsonl", "-m", "dora", "--rank", 4, "--device", "l4", "--json")
    assert done.code == 0, done.err
    found = done.json
    assert found["fits"] and found["remedies"] == [] and found["device"] == "l4"
    assert sum(found["at_peak"].values()) == found["peak"] < found["memory"]
    assert found["flops"] > 0 < found["bytes_moved"]


def test_a_plan_in_words_exits_3_where_it_does_not_fit(rankwise, tiny):
    done = rankwise("plan", tiny, "batch=4", "--device", "l4", "--device-memory", "1MiB")
    assert done.code == 3
    assert "does not fit" in done.out and "makes it fit: batch=" in done.out


@pytest.mark.parametrize("more", [("mood.csv", "--task", "classification"), ("text.txt", "pack=true")])
def test_the_data_are_read_as_finetune_reads_them(rankwise, tiny, files, more):
    done = rankwise("plan", tiny, files / more[0], *more[1:], "--max-length", 32, "--device", "l4", "--json")
    assert done.code == 0, done.err
    assert done.json["length"] <= 32 and (done.json["logits"] == 2 * 2 * 8) == ("--task" in more)


@pytest.fixture
def poor(monkeypatch):
    """A machine with 64 KiB left."""
    monkeypatch.setattr("rankwise.select.devices._measured", lambda: replace(DEVICES["l4"], memory=2**16))


def test_finetune_stops_before_it_loads_what_does_not_fit(rankwise, tiny, files, tmp_path, poor):
    given = ("finetune", tiny, files / "pairs.jsonl", "--out", "run", "--steps", 1, "--batch", 8)
    done = rankwise(*given)
    assert done.code == 3
    assert "does not fit" in done.err and "loading the model" not in done.err
    assert not (tmp_path / "run" / "adapter.safetensors").exists()
    done = rankwise(*given, "--any-size", "--overwrite")
    assert done.code == 0, done.err
    assert "does not fit" in done.err and (tmp_path / "run" / "adapter.safetensors").exists()


def test_finetune_prints_its_plan(rankwise, tiny, files):
    done = rankwise("finetune", tiny, files / "pairs.jsonl", "--out", "run", "--dry-run")
    assert done.code == 0 and "plan: a batch of 8 x" in done.err
