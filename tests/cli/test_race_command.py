"""rankwise tune and race on a tiny model, and the ledger under them: cached, paired, resumed after a kill."""

import json
import os
import signal
from dataclasses import replace

import pytest
import torch
import yaml

from rankwise.hf import finetune as module
from rankwise.hf.data import Collator
from rankwise.hf.finetune import Listener
from rankwise.hf.run import Run
from rankwise.select import Ledger
from rankwise.select.robustness import measures

pytest.importorskip("optuna")
SHORT = ("--batch", 4, "--max-length", 32, "--rank", 2)


@pytest.fixture
def run(tiny, files) -> Run:
    values = {"rank": 2, "lr": 1e-2, "steps": 4, "batch": 4, "max_length": 32, "saves": 1, "validation": 0.25}
    return Run.of({"model": str(tiny), "data": str(files / "pairs.jsonl"), "out": "-", **values})


@pytest.fixture
def trained(monkeypatch) -> list[Run]:
    """The runs that are made and not taken from a ledger."""
    runs, real = [], module.finetune

    def finetune(run, **options):
        runs.append(run)
        return real(run, **options)

    monkeypatch.setattr(module, "finetune", finetune)
    return runs


def outcome(entry):
    return entry.loss, entry.curve, entry.scores, entry.steps, entry.parameters, entry.bytes


def test_an_entry_says_everything_and_is_not_made_twice(run, trained, tmp_path):
    ledger = Ledger(tmp_path / "l.jsonl")
    entry = ledger.done(run)
    assert ledger.done(replace(run, out="elsewhere")) == entry and len(trained) == 1
    assert ledger.entries() == {entry.key: entry}
    assert entry.code.startswith("rankwise") and set(entry.digests) == {"model", "data"}
    assert (entry.seed, entry.lr, entry.steps) == (0, 0.01, 4) and entry.recipe["name"] == "lora"
    assert [step for step, _ in entry.curve["training"]] == [1, 2, 3, 4]
    assert entry.curve["validation"][-1][0] == 4
    assert entry.seconds > 0 and entry.bytes > 4 * entry.parameters > 0
    assert entry.loss == entry.scores["after"]["loss"] < entry.scores["before"]["loss"]
    assert not list(ledger.path.with_name("l.jsonl.runs").iterdir())
    ledger.done(replace(run, seed=1))
    assert len(trained) == 2


def test_the_base_is_measured_once(run, tmp_path, monkeypatch):
    """Its scores depend on the data that is held back, not on rate or method."""
    from rankwise.hf import finetune as bridge

    seen, real = [], bridge.scored
    monkeypatch.setattr(bridge, "scored", lambda *args: seen.append(1) or real(*args))
    ledger = Ledger(tmp_path / "l.jsonl")
    one = ledger.done(run)
    assert len(seen) == 2  # before and after
    two = ledger.done(replace(run, lr=1e-3, method="dora"))
    assert len(seen) == 3 and two.scores["before"] == one.scores["before"] and two.loss != one.loss
    other = ledger.done(replace(run, seed=1))  # another share is held back
    assert len(seen) == 5 and other.scores["before"] != one.scores["before"]
    fresh = Ledger(tmp_path / "fresh.jsonl").done(replace(run, lr=1e-3, method="dora"))
    assert outcome(fresh) == outcome(two)


def test_a_run_that_fails_is_an_entry_too(run, trained, tmp_path):
    ledger = Ledger(tmp_path / "l.jsonl")
    entry = ledger.done(replace(run, lr=1e30))
    assert entry.error and "nan" in entry.error and entry.loss == float("inf")
    assert ledger.done(replace(run, lr=1e30)) == entry and len(trained) == 1


class Killer(Listener):
    """Kills its process at the beginning of a step."""

    def on_step_begin(self, args, state, control, **kwargs):
        if state.global_step == 5:
            os.kill(os.getpid(), signal.SIGKILL)


def test_a_killed_run_goes_on_and_ends_as_if_nothing_had_been(run, trained, tmp_path):
    run = replace(run, steps=8, saves=4)  # checkpoints at 2, 4, 6, 8
    ledger = Ledger(tmp_path / "killed.jsonl")
    child = os.fork()
    if child == 0:
        ledger.done(run, listener=Killer())
        os._exit(1)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    assert ledger.entries() == {}
    seen = []

    class Steps(Listener):
        def on_step_begin(self, args, state, control, **kwargs):
            seen.append(state.global_step)

    resumed, whole = ledger.done(run, listener=Steps()), Ledger(tmp_path / "whole.jsonl").done(run)
    assert seen == [4, 5, 6, 7] and resumed.resumed and not whole.resumed
    assert outcome(resumed) == outcome(whole) and resumed.key == whole.key


def test_one_seed_is_one_order_of_the_data_for_every_method(run, monkeypatch, tmp_path):
    batches, real = [], Collator.__call__

    def collate(self, features):
        made = real(self, features)
        batches[-1].append(made["input_ids"].tolist())
        return made

    monkeypatch.setattr(Collator, "__call__", collate)

    def order(**changes):
        batches.append([])
        loss = Ledger(tmp_path / "l.jsonl").done(replace(run, **changes)).loss
        return batches[-1], loss

    lora, loss = order(seed=5)
    for changes in ({"method": "dora"}, {"method": "pissa"}, {"method": "full", "rank": None}, {"init_seed": 3}):
        found, other = order(seed=5, **changes)
        assert found == lora and other != loss, changes
    assert order(seed=6)[0] != lora


def test_measures_of_the_trained_adapter(run, files, tmp_path):
    pytest.importorskip("bitsandbytes")
    run = replace(run, base_text=str(files / "own.txt"), steps=12, lr=3e-2)
    wanted = measures(str(files / "own.txt"), merged=True)
    entry = Ledger(tmp_path / "l.jsonl").done(run, wanted)
    forgot = entry.scores["own_after"]["loss"] - entry.scores["own_before"]["loss"]
    (shift,) = [value for name, value in entry.measures.items() if name.startswith("shift")]
    assert shift == pytest.approx(forgot, abs=1e-5) and abs(forgot) > 1e-3  # the same file, by two ways
    assert 0 < abs(entry.measures["merge4"]) < 0.5


def test_tune_writes_the_run_that_finetune_takes(rankwise, tiny, files, trained, tmp_path):
    command = ("tune", tiny, files / "pairs.jsonl", *SHORT, "--steps", 8, "--rates", 3, "--brackets", 2, "--span", 100)
    done = rankwise(*command, "--write", "best.yaml", "--json")
    assert done.code == 0, done.err
    found = done.json
    assert len(found["trials"]) == len(trained) == 2 * (3 + 2 + 1) + 2
    last = [trial for trial in found["trials"] if trial["share"] == 1]
    assert found["loss"] == min(trial["loss"] for trial in last)
    run = yaml.safe_load((tmp_path / "best.yaml").read_text())
    assert (run["lr"], run["steps"], run["rank"]) == (found["lr"], 8, 2)
    assert rankwise(*command).code == 0 and len(trained) == 14
    done = rankwise("finetune", "best.yaml", "out=made", "--json")
    assert done.json["after"]["loss"] == pytest.approx(found["loss"])


def test_a_race_from_end_to_end(rankwise, tiny, files, trained, tmp_path):
    rows = (files / "pairs.jsonl").read_text().splitlines()
    (tmp_path / "train.jsonl").write_text("\n".join(rows[:18]))
    (tmp_path / "test.jsonl").write_text("\n".join(rows[18:]))
    command = (
        "race",
        tiny,
        "train.jsonl",
        "--methods",
        "dora",
        *SHORT,
        "--steps",
        12,
        "--seeds",
        2,
        "--rates",
        2,
        "--saves",
        1,
    )
    command += ("--rungs", "0.5", "--test", "test.jsonl", "--noise", 0.3, "--validation", 0.25, "--match", "params")
    done = rankwise(*command, "--dry-run")
    assert done.code == 0 and "lora again" in done.out and not trained, done.err
    done = rankwise(*command, "--json")
    assert done.code == 0, done.err
    assert len(trained) == 4 * (4 + 2 + 2)  # methods x (tuning + finals + finals with noise)
    found = done.json
    assert found == json.loads((tmp_path / "race" / "race.json").read_text())
    by = {row["method"]: row for row in found["rows"]}
    assert set(by) == {"lora", "lora again", "dora", "full"} and by["lora"]["word"] == "reference"
    assert {row["word"] for row in found["rows"]} <= {"reference", "better", "worse", "tie", "unresolved"}
    assert {row["tuning_steps"] for row in found["rows"]} == {4 * 6} and found["seeds"] == [1, 2]
    assert found["gain"] == pytest.approx(found["base"] - by["full"]["loss"])
    share = (by["lora"]["loss"] - by["dora"]["loss"]) / found["gain"]
    assert by["dora"]["verdict"]["difference"] == pytest.approx(share)
    assert all("noise" in row["robust"] for row in found["rows"])
    assert (tmp_path / "race" / "race.png").read_bytes().startswith(b"\x89PNG")
    done = rankwise(*command)
    assert done.code == 0 and len(trained) == 32 and "Holm" in done.out  # all of it from the ledger


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        (("--methods", "dorra"), "Nearest: dora"),
        (("--match", "flops"), "params, seconds, bytes"),
        (("--rungs", "half"), "0.25,0.5,1"),
        (("--rates", "0"), "at least 1"),
        (("--noise", "0.2"), "test file"),
        (("--test", "pairs.jsonl"), "not trained on"),
        (("--rank", "999"), "999"),
    ],
)
def test_bad_input_is_told_in_a_sentence(rankwise, tiny, files, tmp_path, changes, text):
    (tmp_path / "pairs.jsonl").write_text((files / "pairs.jsonl").read_text())
    done = rankwise("race", tiny, "pairs.jsonl", *changes)
    assert done.code == 2 and text in done.err and "Traceback" not in done.err
    assert not (tmp_path / "ledger.jsonl").exists()


def test_full_fine_tuning_trains_every_weight_once(tmp_path):
    """A head that is tied to the embedding stays tied."""
    import transformers

    import rankwise as rw
    from rankwise.hf.method import compose

    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=64, tie_word_embeddings=True, **shape)
    torch.manual_seed(0)
    model, alone = (transformers.LlamaForCausalLM(config) for _ in range(2))
    alone.load_state_dict(model.state_dict())
    adapter = rw.attach(model, compose("full"))
    count = sum(p.numel() for p in alone.parameters())
    assert rw.targets(alone, compose("full")).parameters == count == sum(p.numel() for p in adapter.parameters())
    ids = torch.arange(12).view(2, 6)
    here = torch.optim.SGD(adapter.parameters(), lr=0.5)
    there = torch.optim.SGD(alone.parameters(), lr=0.5)
    for _ in range(3):
        for one, optimizer in ((model, here), (alone, there)):
            optimizer.zero_grad()
            one(input_ids=ids, labels=ids).loss.backward()
            optimizer.step()
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, alone(input_ids=ids).logits)
    adapter.save(tmp_path)
    again = transformers.LlamaForCausalLM(config)
    again.load_state_dict({name: value for name, value in model.state_dict().items() if "adapters" not in name})
    rw.load(again, tmp_path)
    with torch.no_grad():
        assert torch.equal(again(input_ids=ids).logits, model(input_ids=ids).logits)
    rw.merge(model)
    assert model.lm_head.weight is model.model.embed_tokens.weight
    with torch.no_grad():
        torch.testing.assert_close(model(input_ids=ids).logits, alone(input_ids=ids).logits)
