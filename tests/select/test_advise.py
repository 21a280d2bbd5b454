"""The advisor: verdicts on trials with a known answer, constraints, accounts, and what it refuses."""

import json
import math
import random
from collections import Counter
from pathlib import Path

import pytest
from benchmarks.advice import asked
from benchmarks.planted import RATES, WINNERS, ill_conditioned

import rankwise as rw
from rankwise.errors import DataError, DoesNotFit, RankwiseError
from rankwise.select.advise import DOES_NOT_MATTER, UNRESOLVED, USE, Arm, Outcome, advise, layout
from rankwise.select.feasible import SERVE, Candidate, Constraints, feasible, largest, objection, served_rank
from rankwise.select.rules import RULES, Facts, Probe, nominate, note, records, written
from rankwise.structures import LoRA, Magnitude


class Curve:
    """A trial by formula: a valley around a best rate, what an arm adds to the gain, and noise.

    What a seed does is shared by all arms; ``noise`` is each run's own.
    """

    def __init__(self, effects=None, noise=0.01, draw=0, best=3e-3):
        self.effects, self.noise, self.draw, self.best, self.runs = effects or {}, noise, draw, best, []

    def __call__(self, arm: Arm, seed: int, steps: int, lr: float) -> Outcome:
        self.runs.append((arm.name, seed, steps, lr))
        shared = random.Random(f"{self.draw} {seed}").gauss(0, 0.05)
        own = random.Random(f"{self.draw} {seed} {arm.name} {steps} {lr}").gauss(0, self.noise)
        far = math.log(lr / self.best, 10)
        learnt = (1 - math.exp(-steps / 30)) * (1 + self.effects.get(arm.name, 0.0)) / (1 + far**2)
        if far > 1.9:
            return Outcome(2 + shared, math.nan, steps * 0.1)
        return Outcome(2 + shared, 2 + shared - learnt + own, steps * 0.1)


LORA = Arm("lora", 2e-3)


def advice_of(trial, names=("one", "two"), budget=6000.0, steps=100, **options):
    return advise(LORA, [Arm(name, LORA.lr) for name in names], trial, steps=steps, budget=budget, **options)


# -- the verdict --------------------------------------------------------------------------------


@pytest.mark.parametrize("noise", [0.002, 0.02, 0.1])
def test_a_against_a_does_not_matter_or_is_unresolved(noise):
    """Four copies of LoRA, each tuned for itself, 100 draws."""
    words = Counter(advice_of(Curve(noise=noise, draw=d), "abcd", 10_000).word for d in range(100))
    assert words[USE] <= 5
    assert words[DOES_NOT_MATTER] > 90 or noise > 0.01


def test_a_challenger_that_is_better_is_found():
    trials = [Curve({"two": 0.1}, 0.01, d) for d in range(50)]
    assert sum(advice_of(t).arm.name == "two" for t in trials) >= 45


def test_of_two_better_ones_the_best_is_used():
    assert advice_of(Curve({"one": 0.2, "two": 0.4}, 0.002)).arm.name == "two"


def test_a_challenger_below_the_margin_is_not_used():
    found = advice_of(Curve({"one": 0.01, "two": -0.2}, 0.0005))
    assert (found.word, found.arm) == (DOES_NOT_MATTER, LORA)
    assert all(s.dropped for s in found.standings[1:])


def test_noise_leaves_it_unresolved_and_says_what_would_decide():
    found = advice_of(Curve({"one": 0.05}, 0.03, draw=3), ["one"], 2500)
    assert (found.word, found.arm) == (UNRESOLVED, LORA)
    assert found.more is not None and found.more > 0
    assert found.noise == pytest.approx(0.05, abs=0.06) and "one may still be better" in found.reason


CLEAR = [case for case in WINNERS if case is not ill_conditioned]


def used(case, draw: int) -> str:
    return asked(case(draw), draw, case(draw).arms()).arm.name


@pytest.mark.parametrize("case", CLEAR, ids=lambda case: case.__name__)
def test_a_planted_winner_is_found_by_training(case):
    """Four draws of those that benchmarks/advice.py counts, where 50 take minutes."""
    found = [used(case, draw) for draw in range(4)]
    assert sum(name in WINNERS[case] for name in found) >= 3, found


def test_where_the_winner_is_missed_nobody_else_is_named():
    found = {used(ill_conditioned, draw) for draw in range(6)}
    assert "scaled_gd" in found <= {"lora", "scaled_gd"}


# -- the account --------------------------------------------------------------------------------


@pytest.mark.parametrize("budget", [20, 77, 400, 3000, 20_000])
@pytest.mark.parametrize("cost", [0.5, 1.0, 2.0])
def test_the_budget_is_kept(budget, cost):
    trial = Curve()
    found = advise(LORA, [Arm(n, 1e-3, cost) for n in "abcd"], trial, steps=100, budget=budget)
    spent = sum(steps * (1.0 if name == "lora" else cost) for name, _, steps, _ in trial.runs)
    assert found.spent <= budget
    assert spent == pytest.approx(found.spent, abs=len(trial.runs) * max(cost, 1))


def test_a_budget_too_small_for_a_search_is_spent_on_runs_that_say_something():
    trial = Curve()
    found = advise(LORA, [Arm("one", 1e-3)], trial, steps=20, budget=60)
    assert {steps for _, _, steps, _ in trial.runs} == {20} and len({lr for *_, lr in trial.runs}) == 3
    assert found.spent <= 60 and found.arm == LORA


def test_an_arm_that_costs_twice_as_much_gets_half_of_the_steps():
    trial = Curve()
    advise(LORA, [Arm("one", 1e-3, 2.0)], trial, steps=100, budget=6000)
    longest = {name: max(r[2] for r in trial.runs if r[0] == name) for name in ("lora", "one")}
    assert longest == {"lora": 100, "one": 50}


def test_no_rate_has_seen_the_seeds_that_count():
    trial = Curve()
    advice_of(trial)
    tuned = {lr for name, seed, _, lr in trial.runs if seed < 2 and name == "lora"}
    counted = {(seed, lr) for name, seed, _, lr in trial.runs if seed > 1 and name == "lora"}
    assert len(tuned) > 3 and len({lr for _, lr in counted}) == 1
    assert {seed for _, seed, _, _ in trial.runs} >= {0, 1, 2, 3, 4}


def test_every_arm_is_tuned_with_as_many_runs():
    trial = Curve(best=2e-3)
    advise(LORA, [Arm("one", 2e-3)], trial, steps=100, budget=6000)
    counts = Counter(name for name, seed, _, _ in trial.runs if seed < 2)
    assert counts["lora"] == counts["one"] == 10


def test_copies_whose_first_rates_differ_end_at_rates_that_do_not_matter():
    """The fineness of the search must not make one copy look better than another."""
    ends = [
        advise(LORA, [Arm("one", 2e-3 * 3**k)], Curve(noise=0.0), steps=100, budget=6000) for k in (0.25, 0.5, 0.75)
    ]
    assert all(abs(e.standings[1].verdict.difference) < 0.02 for e in ends)


def test_a_rate_beyond_the_range_is_looked_for():
    found = advice_of(Curve(best=2e-3 * 27, noise=0.0))
    assert found.standings[0].lr == pytest.approx(2e-3 * 27)


def test_a_rate_that_diverges_is_not_chosen():
    found = advice_of(Curve(best=2e-5, noise=0.0), ["one"])
    assert found.word == DOES_NOT_MATTER and found.standings[0].lr < 1e-3


def test_where_nothing_learns_nothing_is_claimed():
    found = advice_of(lambda arm, seed, steps, lr: Outcome(2.0, 2.5))
    assert (found.word, found.gain) == (UNRESOLVED, 0.0)
    assert "no rate lowered the loss" in found.reason


def test_a_small_budget_drops_challengers_before_it_shortens_runs_below_a_quarter():
    assert layout(10_000, 100, 4) == (4, 100)
    count, worth = layout(1500, 100, 4)
    assert 0 < count < 4 and worth >= 25
    assert layout(60, 100, 4) == (0, 5)


def test_with_no_challenger_nothing_is_claimed():
    found = advice_of(Curve(), [])
    assert (found.word, found.more) == (UNRESOLVED, None) and "no challenger could be tried" in found.reason
    assert len(found.standings[0].losses) == 2 and found.noise is not None


def test_a_budget_for_lora_alone_says_what_more_would_take():
    found = advice_of(Curve(), budget=200)
    assert (found.word, len(found.standings)) == (UNRESOLVED, 1)
    enough = found.spent + (found.more or 0)
    assert layout(enough, 100, 2)[0] == 1 and layout(enough - 30, 100, 2)[0] == 0


@pytest.mark.parametrize("budget", [0, 19, 19.9])
def test_a_budget_below_20_steps_is_refused(budget):
    with pytest.raises(DataError, match="20 steps or more; found .* Use lora at its own rate"):
        advice_of(Curve(), budget=budget)


# -- the rules ----------------------------------------------------------------------------------


def test_rules_name_methods_once_and_cite():
    assert len({r.name for r in RULES}) == len(RULES)
    assert all(r.source and r.refuted and r.condition and r.challengers for r in RULES)


@pytest.mark.parametrize(
    ("facts", "rule"),
    [
        (Facts(20, 16), "few steps"),
        (Facts(500, 16, 4.0), "low bits"),
        (Facts(500, 16, probe=Probe(conditioning=30.0)), "ill-conditioned"),
        (Facts(500, 16, probe=Probe(rank=40.0)), "high rank"),
        (Facts(500, 16, probe=Probe(rank=1.0)), "rank one"),
        (Facts(500, 16), "always"),
    ],
)
def test_each_rule_nominates_where_it_holds(facts, rule):
    every = {written(*c) for r in RULES for c in r.challengers}
    named = nominate(facts, every)
    assert rule in {n.rule.name for n in named}
    assert len(named) <= 4 and len({n.name for n in named}) == len(named)
    assert {n.rule.name for n in nominate(Facts(500, 16), every)} == {"always"}


def test_only_what_is_allowed_is_nominated():
    assert [n.name for n in nominate(Facts(20, 16, 4.0), {"dora", "pissa"})] == ["pissa", "dora"]


def test_the_record_of_a_rule_is_kept_and_printed(tmp_path):
    path, named = tmp_path / "rules.jsonl", nominate(Facts(500, 16), {"dora", "lora_plus"})
    assert records(path) == {} and named[0].record == "no record yet"
    note(path, named, {"dora": "better", "lora_plus": "tie"})
    note(path, named, {"dora": "worse"})
    assert records(path)["always"] == Counter(better=1, tie=1, worse=1)
    assert "better 1 times of 3" in nominate(Facts(500, 16), {"dora"}, records(path))[0].record


# -- what is feasible -----------------------------------------------------------------------------


@pytest.fixture(scope="module")
def candidates(tiny_config):
    from rankwise.hf.run import Run
    from rankwise.select.case import _methods

    kept, out = _methods(Run.of({"model": tiny_config, "data": "-", "out": "-"}), 16, Constraints())
    assert not [e for e in out if "rank" not in e.reason and "divides its sides" not in e.reason]
    return [Candidate("lora", rw.recipe("lora"), 10_000), *kept.values()]


@pytest.fixture(scope="module")
def tiny_config(tmp_path_factory):
    import transformers

    folder = tmp_path_factory.mktemp("config")
    shape = {"hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    config = transformers.LlamaConfig(vocab_size=64, **shape)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(folder)
    return str(folder)


def exported(recipe, folder):
    """What PEFT's file says of the method, None where it has no such method: the truth that serving goes by."""
    import torch

    model = torch.nn.Sequential(torch.nn.Linear(64, 64))
    stats = rw.collect(model, [torch.randn(4, 64)], recipe, lambda m, x: m(x).square().mean())
    adapter = rw.attach(model, recipe, stats=stats)
    with torch.no_grad():  # a start at zero could lower to anything
        for p in adapter.parameters():
            p.add_(torch.randn_like(p) * 0.1)
    try:
        rw.export(adapter, folder, to="peft")
    except RankwiseError:
        return None
    return json.loads((folder / "adapter_config.json").read_text())


def test_no_infeasible_recommendation_on_1000_random_constraint_sets(candidates, tmp_path):
    """Whatever the trials say, what is recommended could be served: judged by what export writes."""
    said = {c.name: exported(c.recipe, tmp_path / str(i)) for i, c in enumerate(candidates)}
    assert None in said.values() and said["lora"] and said["lora"]["r"] == 16
    rng, seen = random.Random(0), Counter()
    for draw in range(1000):
        limits = Constraints(
            serve=rng.choice([*SERVE]),
            max_lora_rank=rng.choice([16, 32, 64]),
            adapter_bytes=rng.choice([None, 10_000, 50_000, 200_000]),
            adapters=rng.choice([1, 10, 1000]),
            serving_memory=rng.choice([None, 10**7, 10**8]),
        )
        kept, out = feasible(candidates, limits)
        assert {e.name for e in out} | kept.keys() == {c.name for c in candidates} and all(e.reason for e in out)
        probe = Probe(rng.choice([1.0, 8.0, 99.0]), rng.choice([1.0, 9.0]))
        facts = Facts(rng.choice([20, 500]), 16, rng.choice([4.0, 16.0]), probe)
        named = nominate(facts, kept.keys() - {"lora"})
        arms = [Arm(n.name, 1e-3) for n in named]
        effects = {arm.name: rng.uniform(-0.5, 0.5) for arm in arms}
        used = advise(LORA, arms, Curve(effects, 0.005, draw), steps=20, budget=1500).arm.name
        seen[used] += 1
        chosen = next(c for c in candidates if c.name == used)
        assert limits.adapter_bytes is None or chosen.bytes <= limits.adapter_bytes
        if limits.serve in ("vllm", "gguf", "bank"):
            config = said[used]
            assert config is not None and config["peft_type"] == "LORA" and not config.get("use_dora")
            assert limits.serve != "vllm" or config["r"] <= limits.max_lora_rank
        if limits.serve in ("vllm", "bank") and limits.serving_memory is not None:
            assert limits.adapters * chosen.bytes <= limits.serving_memory
    assert len(seen) > 4 and seen["lora"] < 900


def test_the_rank_that_is_served_is_that_of_the_exported_file(candidates, tmp_path):
    for i, candidate in enumerate(candidates):
        config = exported(candidate.recipe, tmp_path / str(i))
        plain = config if config and config["peft_type"] == "LORA" and not config.get("use_dora") else {}
        rank = served_rank(candidate.recipe.structure)  # on a wide layer; here the smaller side is 64
        assert (rank and min(rank, 64)) == plain.get("r"), candidate.name


def test_bytes_are_those_of_the_plan(tiny_config, candidates):
    from rankwise.select import plan

    for candidate in candidates[1:]:
        if candidate.name in ("dora", "hira", "lokr", "pissa"):
            found = plan(tiny_config, max_length=16, batch=1, device="l4", dtype="float32", **candidate.settings)
            assert candidate.bytes == found.step.file, candidate.name


def sized(recipe, size=1000):
    return Candidate(recipe.name, recipe, size)


@pytest.mark.parametrize(
    ("candidate", "limits", "says"),
    [
        (sized(rw.recipe("dora")), Constraints(serve="vllm"), "no plain LoRA, and is to be served by vLLM"),
        (sized(rw.recipe("oft")), Constraints(serve="bank"), "no plain LoRA"),
        (sized(rw.recipe("pissa")), Constraints(serve="vllm"), "rank 32, above --max-lora-rank 16"),
        (sized(rw.recipe("lora", sites=rw.Sites(train=("head",)))), Constraints(serve="gguf"), "trains tensors whole"),
        (sized(rw.recipe("lora"), 2**21), Constraints(adapter_bytes=2**20), "takes 2.0 MiB, an adapter may take 1.0"),
        (
            sized(rw.recipe("lora")),
            Constraints(serve="bank", adapters=2000, serving_memory=10**6),
            "2000 adapters take",
        ),
    ],
)
def test_an_exclusion_says_why(candidate, limits, says):
    assert says in str(objection(candidate, limits))
    assert objection(candidate, Constraints()) is None


def test_what_has_no_dense_form_is_not_merged():
    from rankwise.structures.convolutions import CrossGroup

    recipe = rw.recipe("lora").with_(structure=CrossGroup(4, 4))
    assert objection(sized(recipe), Constraints(serve="merge")) == "it has no dense form to merge"
    assert objection(sized(rw.recipe("lora").with_(structure=Magnitude(LoRA(4)))), Constraints(serve="merge")) is None


def test_lora_keeps_the_highest_rank_that_is_allowed():
    def at(rank: int) -> Candidate:
        return sized(rw.recipe("lora", rank=rank), 1000 * rank)

    assert largest(at, 64, Constraints(serve="vllm"))[1] == 16
    assert largest(at, 64, Constraints(adapter_bytes=9000))[1] == 8
    with pytest.raises(DoesNotFit, match="LoRA of rank 1 should meet the constraints"):
        largest(at, 64, Constraints(adapter_bytes=999))


@pytest.mark.parametrize("bad", [{"serve": "ftp"}, {"adapters": 0}, {"max_lora_rank": 0}])
def test_constraints_are_checked(bad):
    with pytest.raises(DataError, match="found"):
        Constraints(**bad)


def test_rates_of_planted_arms_are_known():
    assert {name for winners in WINNERS.values() for name in winners} <= RATES.keys()


# -- on a model -----------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A thousand sums, 200 more to validate on, and one file that repeats a training row."""
    folder, rng = tmp_path_factory.mktemp("data"), random.Random(0)
    pairs = rng.sample([(a, b) for a in range(99) for b in range(99)], 700)
    rows = [json.dumps({"prompt": f"{a} and {b}: ", "completion": f"{a + b}."}) + "\n" for a, b in pairs]
    for name, part in (("train", rows[:400]), ("held", rows[400:]), ("both", rows[399:]), ("few", rows[400:599])):
        (folder / f"{name}.jsonl").write_text("".join(part))
    return folder


def surveyed(data, validation="held.jsonl", budget=100, limits=Constraints(), **settings):  # noqa: B008
    from rankwise.hf.run import Run
    from rankwise.select.case import survey

    held = str(data / validation) if isinstance(validation, str) and "." in validation else validation
    given = {"model": "embedded", "data": str(data / "train.jsonl"), "out": "-", "validation": held, "steps": 20}
    return survey(Run.of({**given, "max_length": 32, "target": ("q_proj",), **settings}), budget, limits, "l4")


@pytest.mark.parametrize(
    ("given", "says"),
    [
        ({"validation": "few.jsonl"}, "200 validation examples or more; found 199"),
        ({"validation": 0.1}, "200 validation examples or more; found 40"),
        ({"validation": "both.jsonl"}, r"not trained on; 1 of 301 are \(.*both.jsonl"),
        ({"validation": None}, 'found validation "none"'),
        ({"budget": 19}, "20 steps or more; found 19"),
    ],
)
def test_bad_input_is_refused_with_its_reason(data, given, says):
    with pytest.raises(DataError, match=says):
        surveyed(data, **given)


def test_what_does_not_fit_is_refused_before_anything_is_loaded(data):
    with pytest.raises(DoesNotFit, match="does not fit"):
        surveyed(data, limits=Constraints(memory=2**20))


@pytest.mark.slow
def test_advice_on_a_model_end_to_end(data, tmp_path, monkeypatch):
    """Stages 0 to 2 with real runs, each in the ledger; the same question again trains nothing."""
    from rankwise.hf.run import Run
    from rankwise.select import case, ledger

    book = ledger.Ledger(tmp_path / "ledger.jsonl")
    found = case.conclude(surveyed(data, budget=20, steps=1, batch=20), book)
    report = found.to_dict()
    assert report["verdict"] in (USE, DOES_NOT_MATTER, UNRESOLVED) and report["spent_steps"] <= 20
    assert len(book.entries()) > 5 and [arm["name"] for arm in report["arms"]] == ["lora"]
    case.write(found, tmp_path / "out")
    assert json.loads((tmp_path / "out" / "advice.json").read_text())["use"] == report["use"]
    run = Run.read(tmp_path / "out" / "run.yaml")
    assert (run.lr, run.steps) == (report["lr"], 1)
    monkeypatch.setattr("rankwise.hf.finetune.finetune", lambda *_, **__: pytest.fail("trained again"))
    again = case.conclude(surveyed(data, budget=20, steps=1, batch=20), book).to_dict()
    assert {**again, "nominations": 0} == {**report, "nominations": 0}


def test_the_probe_keeps_to_a_hundredth_of_the_budget(data):
    from rankwise.select.case import _probed

    assert _probed(surveyed(data, budget=199), 16) == Probe()
    found = _probed(surveyed(data, budget=400, batch=4), 16)
    assert found.steps == 4 and (found.rank or 0) >= 1 and (found.conditioning or 0) >= 1 and found.noise is not None


def test_budgets_are_steps_or_times():
    from rankwise.select.case import steps_of

    assert [steps_of(t, lambda: 0.5) for t in ("400", "400 steps", "30s", "2min", "1h")] == [400, 400, 60, 240, 7200]
    with pytest.raises(DataError, match="found 'soon'"):
        steps_of("soon", lambda: 1.0)


def test_the_development_cases_have_rows_enough_and_none_in_two_parts(tmp_path):
    from benchmarks.race_screen import DATA
    from benchmarks.regret import TEST, VALID, cases, files

    if not DATA.exists():
        pytest.skip(f"{DATA} is not there")
    found = cases()
    assert len(found) == 8
    for name, rows in found.items():
        parts = {part: Path(file).read_text().splitlines() for part, file in files(tmp_path, name, rows).items()}
        assert (len(parts["valid"]), len(parts["test"])) == (VALID, TEST) and len(parts["train"]) >= 100, name
        assert len(set().union(*parts.values())) == len(rows), name


def test_the_table_of_regret_has_the_mean_of_its_rows():
    from benchmarks.regret import table

    row = {"case": "code", "word": "UNRESOLVED", "arm": "lora", "tried": ["dora"], "spent": 20.0}
    text = table([{**row, "tuned": 0.1, "equal": 0.2}, {**row, "tuned": 0.3, "equal": 0.4}])
    assert "+10.0%, +30.0%" in text and "| all | | | +20.0% [" in text and "| +30.0% [" in text
