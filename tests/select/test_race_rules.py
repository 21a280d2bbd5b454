"""What a race decides, on made-up losses: no model is trained here."""

import json
import math
import random
import re
import warnings
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import pytest

from rankwise.errors import DataError, IncompatibleAxes, RankError, TrainingError, UnknownName
from rankwise.hf.method import compose, spoken, written
from rankwise.hf.run import Run
from rankwise.select import Ledger, Tuning, race, tune
from rankwise.select.ledger import Entry, key_of
from rankwise.select.matching import matched, sizes
from rankwise.select.race import AGAIN, arms, judged
from rankwise.select.robustness import noisy

pytest.importorskip("optuna")
RUN = Run("embedded", "-", "-", steps=100)


class Made:
    """A ledger whose runs are drawn: each method has a level, a best rate, and noise that is shared within a seed."""

    def __init__(self, path, levels, noise=0.05, draw=0):
        self.path, self.levels, self.noise, self.draw, self.runs = path, levels, noise, draw, []

    def done(self, run, measures=None):
        self.runs.append(run)
        shared = random.Random(f"{self.draw} {run.seed}").gauss(0, 1)
        own = random.Random(f"{self.draw} {run.seed} {run.method} {run.init_seed} {run.lr:.3e}").gauss(0, self.noise)
        middle = compose(run.method).lr
        loss = 3.0 + shared + own + self.levels.get(run.method, 0.0) + 0.1 * math.log2(run.lr / middle) ** 2
        scores = {"before": {"loss": 6.0 + shared}, "after": {"loss": loss}}
        return Entry(
            "", {}, "", {"name": run.method}, {}, run.seed, run.lr, steps=run.steps, seconds=1.0, scores=scores
        )


def test_lora_under_another_name_is_not_told_apart(tmp_path):
    """At 95 %, with pairs of normal noise that is large against the margin."""
    words = []
    for draw in range(80):
        found = race(RUN, [], Made(tmp_path / "l", {"full": -0.5}, noise=0.3, draw=draw), seeds=3)
        words += [row.word for row in found.rows if row.method == AGAIN]
    assert len(words) == 80 and sum(word in ("better", "worse") for word in words) <= 6
    assert "unresolved" in words


def test_planted_winners_losers_and_ties_are_found(tmp_path):
    levels = {"full": -0.5, "dora": -0.3, "pissa": 0.3, "rslora": 0.001}
    found = race(RUN, ["dora", "pissa", "rslora"], Made(tmp_path / "l", levels, noise=0.002), seeds=3)
    words = {row.method: row.word for row in found.rows}
    assert words == {
        "full": "better", "dora": "better", "rslora": "tie", "lora": "reference", AGAIN: "tie", "pissa": "worse",
    }  # fmt: skip
    dora = next(row for row in found.rows if row.method == "dora")
    assert dora.verdict.difference == pytest.approx(0.3 / 3.5, rel=0.05)
    assert found.gain == pytest.approx(3.5, abs=0.02)
    assert [sum(row.losses) for row in found.rows] == sorted(sum(row.losses) for row in found.rows)


def test_every_method_is_tuned_with_the_same_steps_and_runs(tmp_path):
    ledger = Made(tmp_path / "l", {"full": -0.5})
    found = race(RUN, ["dora", "oft"], ledger, seeds=2, tuning=Tuning(rates=5, brackets=2, seeds=2))
    assert {row.tuning_steps for row in found.rows} == {2 * 2 * (5 * 25 + 3 * 50 + 2 * 100) + 2 * 2 * 100}
    named = {}
    for run in ledger.runs:
        named.setdefault((run.method, run.init_seed is None), []).append((run.steps, run.seed))
    assert len(named) == 5 and len({tuple(runs) for runs in named.values()}) == 1
    tuned, finals = {0, 1}, {2, 3}
    assert {seed for steps, seed in named["lora", True]} == tuned | finals


def test_halving_keeps_the_better_half_and_starts_on_a_grid(tmp_path):
    found = tune(replace(RUN, lr=1e-3), Made(tmp_path / "l", {}, noise=1e-9), Tuning(rates=4, span=64))
    assert [trial.lr for trial in found.trials[:4]] == pytest.approx([1e-3 / 8, 1e-3 / 2, 2e-3, 8e-3])
    assert [trial.share for trial in found.trials] == [0.25] * 4 + [0.5] * 2 + [1.0] * 3
    losses = {trial.lr: trial.loss for trial in found.trials[:4]}
    assert {trial.lr for trial in found.trials[4:6]} == set(sorted(losses, key=losses.__getitem__)[:2])
    best = found.trials[6].lr  # its neighbours are half a step of the grid away
    assert [trial.lr for trial in found.trials[7:]] == pytest.approx([best / 2, best * 2])
    assert found.run.lr == best == pytest.approx(2e-3)


def test_a_rate_is_looked_for_nearer_each_time(tmp_path):
    """The loss is a parabola in the rate's logarithm around 2.9e-3."""

    class Bowl(Made):
        def done(self, run, measures=None):
            entry = super().done(run)
            return replace(entry, scores={**entry.scores, "after": {"loss": math.log2(run.lr / 2.9e-3) ** 2}})

    for refinements, near in ((0, 2.0), (1, 1.5), (2, 1.2), (3, 1.1)):
        how = Tuning(refinements=refinements)
        found = tune(replace(RUN, lr=1e-3), Bowl(tmp_path / "l", {}), how)
        (best,) = {trial.lr for trial in found.trials if trial.loss == found.loss}
        assert best == found.run.lr and 1 / near < best / 2.9e-3 < near and not found.edge
        assert len(found.trials) == 7 + 2 * refinements and how.cost() == 3 + 2 * refinements


def test_lora_again_chooses_among_rates_between_loras(tmp_path):
    ledger = Made(tmp_path / "l", {"full": -0.5}, noise=1e-9)
    race(RUN, [], ledger, seeds=1)
    mine, again = (
        sorted({run.lr for run in ledger.runs if run.method == "lora" and (run.init_seed is None) == own})
        for own in (True, False)
    )
    assert len(mine) == len(again)
    assert all(b / a == pytest.approx(math.sqrt(2), rel=1e-6) for a, b in zip(mine, again, strict=True))


def test_proposals_repeat_for_a_seed(tmp_path):
    how = Tuning(rates=3, brackets=3)
    first, second = (tune(RUN, Made(tmp_path / "l", {}), how).trials for _ in range(2))
    assert first == second
    other = tune(replace(RUN, seed=1), Made(tmp_path / "l", {}), how).trials
    assert [trial.lr for trial in other] != [trial.lr for trial in first]


def test_a_rate_at_the_end_of_its_range_is_told(tmp_path):
    class Rising(Made):
        def done(self, run, measures=None):
            entry = super().done(run)
            return replace(entry, scores={**entry.scores, "after": {"loss": 1 / run.lr}})

    assert tune(RUN, Rising(tmp_path / "l", {})).edge
    assert not tune(RUN, Made(tmp_path / "l", {}, noise=1e-9)).edge


def test_what_fails_is_said_and_judged(tmp_path):
    class Failing(Made):
        def done(self, run, measures=None):
            entry = super().done(run)
            dead = run.method == self.dead and run.steps == 100 and run.seed > 0
            return replace(entry, scores={}, error="NaN.") if dead else entry

    ledger = Failing(tmp_path / "l", {"full": -0.5})
    ledger.dead = "dora"
    found = race(RUN, ["dora"], ledger)
    assert found.rows[-1].word == "failed" and found.rows[-1].verdict is None
    assert found.to_dict()["rows"][-1]["loss"] is None
    json.dumps(found.to_dict(), allow_nan=False)
    ledger.dead = "full"
    with pytest.raises(TrainingError, match="full failed: NaN"):
        race(RUN, ["dora"], ledger)
    with pytest.raises(DataError, match="gained"):
        race(RUN, [], Made(tmp_path / "l", {"full": 4.0}))


def test_seconds_are_matched_by_steps(tmp_path):
    class Slow(Made):
        def done(self, run, measures=None):
            pace = 0.03 if run.method == "dora" else 0.01
            return replace(super().done(run), seconds=run.steps * pace)

    found = race(RUN, ["dora"], Slow(tmp_path / "l", {"full": -0.5}), match="seconds")
    rows = {row.method: row for row in found.rows}
    assert (rows["lora"].steps, rows["dora"].steps) == (100, 33)
    assert rows["dora"].seconds == pytest.approx(rows["lora"].seconds, rel=0.02)


# -- sizes --------------------------------------------------------------------------------------


@pytest.mark.parametrize("by", ["params", "bytes"])
@pytest.mark.parametrize("method", ["dora", "pissa", "rslora", "svd", "dora_svd", "loha", "hira"])
def test_ranks_are_matched_within_five_percent(method, by):
    size = sizes(replace(RUN, method="lora", rank=16))[by]
    one = matched(replace(RUN, method=method, rank=1), size, by)
    assert sizes(one)[by] == pytest.approx(size, rel=0.05), one.rank
    assert one.rank is not None
    for rank in (one.rank - 1, one.rank + 1):
        if rank:
            assert abs(sizes(replace(one, rank=rank))[by] - size) >= abs(sizes(one)[by] - size)


def test_sizes_are_those_of_an_attached_adapter(tmp_path):
    import rankwise as rw

    model, _ = rw.embedded.load()
    adapter = rw.attach(model, rw.recipe("pissa", rank=3))
    params, stored = sum(p.numel() for p in adapter.parameters()), sum(p.nbytes for _, p in adapter.named_parameters())
    assert sizes(replace(RUN, method="pissa", rank=3)) == {"params": params, "bytes": stored}
    full = sizes(replace(RUN, method="full"))
    assert full["params"] == sum(p.numel() for p in rw.embedded.load()[0].parameters())


def test_a_method_without_a_rank_stays_as_it_is():
    found = arms(replace(RUN, rank=8), ["oft", "dora"], "params")
    assert list(found) == ["lora", "oft", "dora", AGAIN, "full"]
    assert (found["lora"].rank, found["oft"].rank, found["full"].rank) == (8, None, None)
    assert found["dora"].rank in (7, 8)


def test_a_rank_that_changes_no_size_is_left_alone():
    """GaLore trains whole weights; its rank is that of the gradient."""
    size = sizes(replace(RUN, method="lora"))["params"]
    assert matched(replace(RUN, method="galore", rank=8), size, "params").rank == 8


def test_a_rank_that_does_not_fit_is_matched_all_the_same():
    size = sizes(replace(RUN, method="lora", rank=16))["params"]
    one = matched(replace(RUN, method="relora", rank=10**5), size, "params")
    assert one.rank == 16 and sizes(one)["params"] == size
    with pytest.raises(RankError, match="100000"):
        arms(RUN, ["relora(rank=100000)"])


def test_a_range_lies_around_its_centre(tmp_path):
    made = Made(tmp_path / "l", {})
    found = tune(replace(RUN, validation=0.1, lr=1e-3), made, Tuning(rates=3, span=16, centre=4, refinements=0))
    assert sorted({trial.lr for trial in found.trials}) == pytest.approx([1e-3, 4e-3, 1.6e-2])


def test_methods_take_options_by_name():
    found = arms(replace(RUN, rank=8), ["relora(every=40, prune=0.5)", "relora", "lora(rank=2)"])
    assert found["relora(every=40, prune=0.5)"].options == {"every": 40, "prune": 0.5}
    assert found["relora"].options == {} and found["relora"].rank == 8
    assert (found["lora(rank=2)"].rank, found["lora(rank=2)"].options) == (2, {})
    assert spoken(written("svd", {"rank": 4, "whiten": True})) == ("svd", {"rank": 4, "whiten": True})
    assert spoken(" xgblora ") == ("xgblora", {})
    for wrong in ("relora(40)", "relora(every=40", "", "a b", "x(1every=2)"):
        with pytest.raises(UnknownName, match=re.escape(f'found "{wrong}"')):
            spoken(wrong)


def test_bad_input_is_refused_before_anything_runs(tmp_path):
    ledger = Made(tmp_path / "l", {})
    with pytest.raises(UnknownName, match="dora"):
        race(RUN, ["dorra"], ledger)
    for given, text in (
        ({"match": "flops"}, "params, seconds, bytes"),
        ({"seeds": 0}, "at least one seed"),
        ({"test": None, "checks": SimpleNamespace(noise=0.1)}, "test file"),
    ):
        with pytest.raises(DataError, match=text):
            race(RUN, ["dora"], ledger, **given)
    with pytest.raises(DataError, match="validation"):
        tune(replace(RUN, validation=None), ledger)
    for values in ({"rates": 0}, {"span": 1.0}, {"rungs": (1.0, 0.5)}, {"rungs": ()}, {"refinements": -1}):
        with pytest.raises(DataError, match="rungs"):
            Tuning(**values)
    with pytest.raises(IncompatibleAxes, match="full"):
        compose("full", rank=4)
    assert not ledger.runs


def test_held_out_rows_that_are_trained_on_are_refused(tmp_path):
    (tmp_path / "train.jsonl").write_text('{"text": "a b"}\n{"text": "c d"}\n')
    (tmp_path / "test.jsonl").write_text('{"text": "e f"}\n{"text": "c  d"}\n')
    run = replace(RUN, data=str(tmp_path / "train.jsonl"))
    with pytest.raises(DataError, match=r"1 rows .* line 2"):
        race(run, [], Made(tmp_path / "l", {}), test=str(tmp_path / "test.jsonl"))


# -- the ledger ---------------------------------------------------------------------------------


def entry(key, loss=1.0):
    return Entry(key, {}, "code", {"name": "lora"}, {}, 0, 1e-3, scores={"after": {"loss": loss}})


def test_a_torn_line_is_passed_over_and_does_not_spoil_the_next(tmp_path):
    ledger = Ledger(tmp_path / "deep" / "ledger.jsonl")
    assert ledger.entries() == {}
    ledger.append(entry("a"))
    ledger.append(entry("b", 2.0))
    whole = ledger.path.read_bytes()
    ledger.path.write_bytes(whole[:-20])
    with pytest.warns(UserWarning, match="line 2 is not a whole entry"):
        assert list(ledger.entries()) == ["a"]
    ledger.append(entry("c"))
    with pytest.warns(UserWarning, match="line 2"):
        assert list(ledger.entries()) == ["a", "c"]
    assert ledger.path.read_bytes().startswith(whole[:-20])  # nothing is rewritten
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ledger.path.write_bytes(whole)
        assert ledger.entries()["b"] == entry("b", 2.0)


def test_a_key_says_contents_and_settings_not_places(tmp_path):
    for name, text in (("a.txt", "one text"), ("b.txt", "one text"), ("c.txt", "another")):
        (tmp_path / name).write_text(text)
    run = Run("embedded", str(tmp_path / "a.txt"), "out", validation=None)
    same = [replace(run, out="elsewhere"), replace(run, data=str(tmp_path / "b.txt")), replace(run, labels=("x",))]
    others = [
        replace(run, data=str(tmp_path / "c.txt")), replace(run, seed=1), replace(run, init_seed=1),
        replace(run, lr=1e-5), replace(run, method="dora"), replace(run, validation=str(tmp_path / "a.txt")),
    ]  # fmt: skip
    assert {key_of(one) for one in same} == {key_of(run)}
    keys = [key_of(run), key_of(run, ("merge4",)), *(key_of(one) for one in others)]
    assert len(set(keys)) == len(keys)
    (tmp_path / "a.txt").write_text("changed!")
    assert key_of(run) != keys[0]


# -- noise --------------------------------------------------------------------------------------


def lines(file):
    return [json.loads(line) for line in Path(file).read_text().splitlines()]


@pytest.mark.parametrize("kind", ["label", "completion", "messages"])
def test_a_share_of_the_answers_becomes_wrong(tmp_path, kind):
    made = {
        "label": lambda i: {"text": f"t{i}", "label": ("p", "n", "o")[i % 3]},
        "completion": lambda i: {"prompt": f"q{i}", "completion": f"a{i}"},
        "messages": lambda i: {"messages": [{"role": r, "content": f"{r}{i}"} for r in ("user", "assistant")]},
    }  # fmt: skip
    rows = [made[kind](i) for i in range(40)]
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    found = lines(noisy(str(file), 0.25, 0, tmp_path))
    changed = [i for i, (a, b) in enumerate(zip(rows, found, strict=True)) if a != b]
    assert len(changed) == 10
    first = {"label": "text", "completion": "prompt", "messages": "messages"}[kind]
    asked = (lambda row: row[first][0]) if kind == "messages" else lambda row: row[first]
    assert [asked(row) for row in rows] == [asked(row) for row in found]
    again = lines(noisy(str(file), 0.25, 1, tmp_path))
    assert again != found and noisy(str(file), 0.25, 0, tmp_path) == noisy(str(file), 0.25, 0, tmp_path)


def test_words_of_a_text_change_places(tmp_path):
    words = [f"w{i}" for i in range(50)]
    file = tmp_path / "text.txt"
    file.write_text("  ".join(words) + "\n")
    (row,) = lines(noisy(str(file), 0.2, 0, tmp_path))
    found = row["text"].split()
    assert sorted(found) == sorted(words) and sum(a != b for a, b in zip(found, words, strict=True)) == 10
    assert row["text"].count("  ") == 49


def test_the_small_model_of_our_own_race_says_what_its_source_says(tmp_path):
    """The forty tokens and the text that an independent implementation gave, see SOURCE.md beside the weights."""
    import torch
    from benchmarks.race_screen import DATA, convert
    from transformers import AutoModelForCausalLM, AutoTokenizer

    source = DATA / "weights_aidreams260k"
    if not source.exists():
        pytest.skip(f"{source} is not there")
    told = (source / "SOURCE.md").read_text()
    wanted = json.loads(re.findall(r"ids (\[[\d, ]+\])", told)[0])
    folder = convert(source, tmp_path / "model")
    model, tokenizer = (kind.from_pretrained(folder) for kind in (AutoModelForCausalLM, AutoTokenizer))
    found = model.generate(torch.tensor([wanted[:1]]), max_new_tokens=len(wanted) - 1, do_sample=False)[0].tolist()
    assert found == wanted
    text = tokenizer.decode(found, skip_special_tokens=True)
    assert text.strip() in told and tokenizer(text)["input_ids"] == wanted[1:]


# -- what the manual has of our own race ---------------------------------------------------------


def kept(**losses):
    """A race as the manual keeps it, of two seeds."""
    rows = [
        {"method": name, "losses": list(own), "loss": sum(own) / 2, "verdict": None, "word": "-"}
        for name, own in {"lora": (2.0, 2.1), AGAIN: (2.01, 2.1), "full": (1.0, 1.1), **losses}.items()
    ]
    return {"rows": rows, "gain": 1.0, "margin": 0.02}


def test_later_rows_join_a_race_only_where_lora_came_out_the_same():
    from benchmarks.race_screen import joined

    old, new = kept(dora=(2.3, 2.4), pissa=(2.0, 2.0)), kept(pissa=(1.5, 1.6))
    found = {row["method"]: row for row in joined(old, new)["rows"]}
    assert list(found) == ["full", "pissa", "lora", AGAIN, "dora"]
    assert found["pissa"]["losses"] == [1.5, 1.6] and found["pissa"]["word"] == "better"
    assert found["dora"]["word"] == "worse" and found["lora"]["verdict"] is None
    other = kept(pissa=(1.5, 1.6), lora=(2.0, 2.2))
    assert joined(old, other) is other


def test_the_published_verdicts_are_those_of_the_published_losses():
    file = Path(__file__).parents[2] / "docs" / "race.json"
    told = json.loads(file.read_text())
    for part in (told, *told["finals"].values()):
        losses = {row["method"]: [math.inf if x is None else x for x in row["losses"]] for row in part["rows"]}
        words = {name: verdict.word for name, verdict in judged(losses, part["gain"], part["margin"]).items()}
        assert words == {row["method"]: row["word"] for row in part["rows"] if row["verdict"]}
