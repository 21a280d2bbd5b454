"""The benchmark's own measure: its statistics on known data, and that every group runs on a tiny cell."""

import contextlib
import copy
import json
import random

import pytest
import torch
import transformers
from torch import nn

peft = pytest.importorskip("peft")

from benchmarks import criteria, large, memory, paired, random_runs, report, together, where, zoo  # noqa: E402
from benchmarks.__main__ import EVERY  # noqa: E402
from benchmarks.models import Case, batch, forward, llama, stepper  # noqa: E402
from benchmarks.paired import Rounds, conditions, interval, measure, overhead, ratio  # noqa: E402
from benchmarks.step_time import build, share, step_cell  # noqa: E402

import rankwise as rw  # noqa: E402

pytestmark = pytest.mark.filterwarnings("ignore")  # of transformers and PEFT

TINY = Case(hidden=64, layers=1, batch=2, tokens=8, vocabulary=64)


# -- statistics -----------------------------------------------------------------------------------


def test_paired_ratio_removes_drift_that_a_ratio_of_medians_keeps():
    drift = [1.0, 5.0, 2.0, 9.0, 3.0]
    found = ratio([1.3 * d for d in drift], drift)
    assert found == pytest.approx({"value": 1.3, "low": 1.3, "high": 1.3})


def test_interval_covers_the_true_median_as_often_as_it_says():
    rng, inside = random.Random(1), 0
    for _ in range(200):
        sample = [rng.gauss(2.0, 0.3) for _ in range(31)]
        found = ratio(sample, [1.0] * 31)
        inside += found["low"] <= 2.0 <= found["high"]
    assert 0.90 <= inside / 200 <= 0.99


def test_interval_of_a_mean_has_the_known_width():
    rng = random.Random(0)
    sample = [rng.gauss(0.0, 1.0) for _ in range(400)]
    found = interval(lambda rows: sum(sample[i] for i in rows) / len(rows), 400)
    assert found["high"] - found["low"] == pytest.approx(2 * 1.96 / 400**0.5, rel=0.15)


def test_overhead_is_a_share_of_the_others_and_of_a_unit():
    floor, drift = [1.0, 2.0, 4.0], [1.0, 2.0, 4.0]
    ours, theirs = [1.2 * d for d in drift], [1.4 * d for d in drift]
    assert overhead(ours, theirs, floor)["value"] == pytest.approx(0.5)
    assert overhead(ours, ours, floor, [0.1 * d for d in drift])["value"] == pytest.approx(2.0)


def test_every_variant_runs_once_a_round_in_changing_order():
    seen: list[str] = []
    found = measure({name: lambda name=name: seen.append(name) for name in "abc"}, rounds=8, warmup=2)
    rounds = [tuple(seen[i : i + 3]) for i in range(0, len(seen), 3)]
    assert len(rounds) == 10 and {tuple(sorted(r)) for r in rounds} == {("a", "b", "c")} and len(set(rounds)) > 2
    assert {len(times) for times in found.cpu.values()} == {8}


def test_the_least_of_several_times_counts(monkeypatch):
    clock, spent = [0], iter([9, 3, 2, 4, 7, 8, 6])  # the first one warms up

    def variant():
        clock[0] += next(spent)

    monkeypatch.setattr(paired.time, "perf_counter", lambda: clock[0])
    assert measure({"a": variant}, rounds=2, warmup=1, least=3).wall["a"] == [2, 6]


def test_what_a_fresh_variant_prepares_is_outside_the_clock():
    seen: list[str] = []

    def prepare():
        seen.append("prepared")
        return lambda: seen.append("timed")

    assert isinstance(measure({"a": prepare}, rounds=2, warmup=0, fresh=True), Rounds)
    assert seen == ["prepared", "timed"] * 2


# -- what is counted ------------------------------------------------------------------------------


def test_saved_bytes_of_a_known_graph():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            self.weight = nn.Parameter(torch.ones(8, 8))

        def forward(self, inputs_embeds, labels):
            y = (inputs_embeds @ self.weight).exp()  # saves its input (2 x 8) and, by exp, its output (2 x 8)
            (y * y).detach()  # saves y again, and is dropped
            return type("Out", (), {"loss": y.sum()})

    given = {"inputs_embeds": torch.ones(2, 8), "labels": torch.zeros(2)}
    assert memory.saved(Twice(), given) == {"saved": 128, "packed": 128}


def test_dropped_graphs_count_as_packed_only():
    class Dropped(nn.Module):
        def forward(self, inputs_embeds, labels):
            inputs_embeds.exp().detach()
            return type("Out", (), {"loss": inputs_embeds.sum()})

    given = {"inputs_embeds": torch.ones(2, 8), "labels": torch.zeros(2)}
    assert memory.saved(Dropped(), given) == {"saved": 0, "packed": 64}


def test_peak_is_no_less_than_what_is_saved():
    case = Case(hidden=64, layers=1, batch=2, tokens=32)
    model, given = llama(case).requires_grad_(True), batch(case)
    most = memory.peak(lambda: forward(model, given)[0].backward(), "cpu")
    assert most >= memory.saved(model, given)["saved"]


def test_gradients_count_in_a_peak():
    model = torch.nn.Linear(256, 256, bias=False)
    x = torch.ones(1, 256)

    def step():
        model.zero_grad()
        model(x).sum().backward()

    assert memory.peak(step, "cpu") >= model.weight.nbytes


def test_blocks_that_died_unseen_do_not_move_a_peak():
    case = Case(hidden=64, layers=1, batch=2, tokens=8)
    step = stepper(llama(case).requires_grad_(True), batch(case))
    alone = memory.peak(step, "cpu")
    kept: list[torch.Tensor] = []
    memory.most_allocated(lambda: kept.extend(torch.empty(n) for n in range(16, 40_000, 61)))
    kept.clear()  # outside of the profiler, which takes what lies there next for these
    assert memory.peak(step, "cpu") == alone


def test_most_allocated_follows_every_block():
    def run():
        for _ in range(2):
            first = torch.empty(2**18)
            second = torch.empty(2**17)
            del first
            assert second.numel()

    assert memory.most_allocated(run) == 4 * (2**18 + 2**17 + 2**17)  # the second of one turn outlives the next first


def test_the_zoo_finds_what_does_not_hold(monkeypatch):
    for name, method in (("llama", "dora"), ("resnet", "lora")):
        model, given = zoo.built(name)
        assert zoo.problems(model, given, method) == []
    model, given = zoo.built("gpt2", transformers.AutoModelForCausalLM)
    assert zoo.language_problems(copy.deepcopy(model), given) == []

    @contextlib.contextmanager
    def other_logits(model, tell):
        hook = model.lm_head.register_forward_hook(lambda head, given, y: 2 * y)
        yield
        hook.remove()

    with monkeypatch.context() as patch:
        patch.setattr(zoo, "deferred_logits", other_logits)
        assert "differ" in zoo.language_problems(copy.deepcopy(model), given)[0]
    monkeypatch.setattr(rw, "merge", lambda adapted: next(iter(rw.adapters(adapted).values())).detach())
    assert zoo.problems(model, given, "lora") == ["merges to another function"]
    monkeypatch.setattr(zoo, "moved", lambda adapter: None)
    assert "has next to no effect" in zoo.problems(model, given, "lora")
    with pytest.raises(zoo.Unbuilt):
        zoo.built("vision-encoder-decoder")


def test_random_runs_find_what_does_not_hold(monkeypatch):
    run = random_runs.Run(14)
    assert str(run) == str(random_runs.Run(14)) != str(random_runs.Run(8))
    assert random_runs.problems(run) == []
    whole = random_runs.Run.trained

    def others(run, folder, since=None):
        model, adapter = whole(run, folder, since)
        with torch.no_grad():
            for p in adapter.parameters() if since else ():
                p.add_(1)
        return model, adapter

    with monkeypatch.context() as patch:
        patch.setattr(random_runs.Run, "trained", others)
        (found,) = random_runs.problems(run)
        assert found.startswith("resumes to another run")
    with monkeypatch.context() as patch:
        patch.setattr(random_runs.Run, "trained", lambda run, *_: run.attached())
        assert random_runs.problems(run) == ["does not move"]
    monkeypatch.setattr(rw, "merge", lambda adapted: next(iter(rw.adapters(adapted).values())).detach())
    monkeypatch.setattr(rw, "load", lambda model, path: run.attached()[1] and rw.attach(model, run.recipe))
    assert random_runs.problems(run) == ["reloads to another function", "merges to another function"]


def test_least_arithmetic_of_a_square_layer():
    model = nn.ModuleDict({"q_proj": nn.Linear(32, 32, bias=False)})
    assert share(nn.Sequential(model), 4) == pytest.approx(6 * 4 * 64 / (4 * 32 * 32))


# -- it runs --------------------------------------------------------------------------------------


def test_every_method_computes_pefts_function_and_makes_a_page(tmp_path):
    torch.manual_seed(0)
    row = step_cell(TINY, EVERY, rounds=2, full=True)
    assert row["trained"]["rankwise loha@8"] == row["trained"]["rankwise lora"] == row["trained"]["peft lora"]
    results = {
        "command": "python -m benchmarks",
        **conditions("cpu"),
        "step": [row, step_cell(Case(hidden=64, dtype="bfloat16", layers=1, batch=2, tokens=8), rounds=2)],
        "memory": [memory.memory_cell(TINY, ("lora",))],
        "together": [together.together_cell(Case(hidden=64, layers=1, batch=4, tokens=8), 2, 2)],
        "where": [where.where_cell(TINY)],
    }
    report.write(results, tmp_path / "page.md", tmp_path / "img", beside={**results, "step": [], "cores": 64})
    page = (tmp_path / "page.md").read_text()
    assert all(f"`{name}`" in page for name in EVERY) and (tmp_path / "img" / "benchmark-methods.png").exists()
    assert "Not measured in this run: compiled, life." in page
    other = page.split("## On another processor")[1].split("## LoRA")[0]
    assert "64 cores" in other and "8 adapters" in other and "LoRA's overhead" not in other  # not measured there
    spent = results["where"][0]["rows"]["rankwise lora"]
    assert spent["products"] > 0 and spent["step"] == pytest.approx(sum(v for k, v in spent.items() if k != "step"))


def test_a_criterion_is_judged_by_the_worse_end_of_its_worst_cell():
    def row(hidden: int, low: float, high: float) -> dict:
        found = {"overhead_over_peft": {"value": (low + high) / 2, "low": low, "high": high}}
        case = {**Case(hidden).__dict__}
        return {"case": case, "trained": {"rankwise lora": 1}, "cpu": {"rankwise lora": found}}

    verdicts = {v.criterion.text: v for v in criteria.judge({"step": [row(256, 0.5, 0.7), row(512, 0.5, 0.59)]})}
    narrow, wide = (v for text, v in verdicts.items() if text.startswith(criteria.LORA) and "float32" in text)
    assert (narrow.holds, wide.holds) == (False, True)
    assert verdicts["LoKr's step over our LoRA's"].holds is None


def test_table_of_the_large_model_runs_as_a_stand_in(tmp_path, capsys):
    large.main(["--device", "cpu", "--quick", "--rounds", "3", "--out", str(tmp_path)])
    found = json.loads((tmp_path / "large.json").read_text())
    printed = capsys.readouterr().out
    assert found["stand_in"] and "A STAND-IN" in printed and found["roofline_device"]["name"] in printed
    assert list(found["methods"]) == ["lora", "dora"]
    for name, row in found["methods"].items():
        variants, ours = row["variants"], row["variants"][f"rankwise {name}"]
        assert set(variants) == {f"{who} {name}" for who in ("rankwise", "peft", "peft-own-dtype")}
        for variant, own in variants.items():
            assert variant in printed and own["peak_bytes"] > 0
            assert own["trained"] == ours["trained"] and own["loss"] == pytest.approx(ours["loss"], rel=0.05)
            assert own["optimizer_bytes"] >= 2 * own["trained"] * (2 if "own-dtype" in variant else 4)
            assert own["in_all_bytes"] == own["model_bytes"] + own["above_model_bytes"]
            assert 0 < own["tokens_per_second"]["low"] <= own["tokens_per_second"]["high"]
            assert own["tokens_per_second"]["value"] == pytest.approx(64 / own["seconds"]["value"])
            if own is not ours:
                assert own["time_of_ours"]["low"] <= own["time_of_ours"]["value"] <= own["time_of_ours"]["high"]
                assert own["memory_of_ours"] == ours["in_all_bytes"] / own["in_all_bytes"]
        roofline = row["roofline"]
        assert 0 < roofline["seconds"] == pytest.approx(64 / roofline["tokens_per_second"])
        assert roofline["planned_bytes"] == pytest.approx(ours["in_all_bytes"], rel=0.1)


def test_all_variants_of_the_large_model_hold_one_base_in_its_dtype():
    base = large.llama(large.STAND_IN)
    own = {p.data_ptr() for p in base.parameters()}
    assert {p.dtype for p in base.parameters()} == {torch.bfloat16}
    for model in build(large.STAND_IN, ("dora",), full=False, base=base).values():
        assert {p.data_ptr() for p in model.parameters() if not p.requires_grad} == own


def test_large_model_has_the_shape_of_llama_3_8b():
    made = large.llama(Case(**{**large.LARGE.__dict__, "device": "meta"}))
    assert sum(p.numel() for p in made.parameters()) == 8_030_261_248


@pytest.mark.parametrize(
    "name, key",
    [
        ("NVIDIA H200", "h200"), ("NVIDIA A100-SXM4-80GB", "a100-80gb"), ("NVIDIA GeForce RTX 4090", "rtx4090"),
        ("NVIDIA L40S", "l40s"), ("NVIDIA H200 MIG 1g.18gb", None), ("NVIDIA A100 80GB PCIe", None),
    ],
)  # fmt: skip
def test_gpu_is_looked_up_only_by_a_name_that_means_it(name, key):
    assert getattr(large.device_named(name), "name", None) == key
