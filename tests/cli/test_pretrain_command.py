"""rankwise pretrain: a fresh model, trained by each method, resumed, repeated, refused."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
import yaml
from benchmarks.pretraining import kept, table
from safetensors.torch import load_file

from rankwise.hf.prepare import prepare
from rankwise.hf.pretrain import RATES, SIZES, fresh, settled
from rankwise.hf.run import Run

METHODS = {
    "full": (), "galore": ("-o", "every=3"), "apollo": ("-o", "every=3"), "relora": ("-o", "every=3"),
    "sltrain": ("-o", "density=0.1"), "loro": ("-o", "every=3"), "cola_act": (),
}  # fmt: skip
SHORT = ("--steps", 6, "--batch", 4, "--saves", 2)


def weights(folder):
    return load_file(folder / "model.safetensors")


@pytest.mark.parametrize("method", METHODS)
def test_every_method_learns_from_nothing(rankwise, tiny, files, tmp_path, method):
    given = (files / "text.txt", "--out", "run", "-m", method, "--seed", 5)
    done = rankwise("pretrain", tiny, *given, *METHODS[method], *SHORT)
    assert done.code == 0, done.err
    out = tmp_path / "run"
    assert {p.name for p in out.iterdir()} >= {"adapter.safetensors", "run.yaml", "metrics.jsonl", "base", "loss.png"}
    result = json.loads((out / "metrics.jsonl").read_text().splitlines()[-1])["result"]
    assert result["after"]["loss"] < result["before"]["loss"] - 0.01
    run = yaml.safe_load((out / "run.yaml").read_text())
    assert (run["task"], run["model"], run["pack"]) == ("pretraining", "run/base", True)
    assert run["rank"] == (None if method == "full" else 8)  # a quarter of 32
    drawn, given = weights(out / "base"), weights(tiny)
    moved = {name for name, w in drawn.items() if not torch.equal(w, given[name])}
    assert moved == {name for name in drawn if "norm" not in name}  # norms start at one, the rest is drawn anew
    sites = rankwise("inspect", "run", "--json").json["sites"]
    assert len(sites) == 14 + 2 * 2 + 1 + 2  # linear layers; norms, embedding and head, all of them trained
    if method in ("sltrain", "cola_act"):  # from here on every method goes the same way
        done = rankwise("evaluate", "run/base", files / "text.txt", "--adapter", "run", "--json")
        assert done.json["adapted"]["loss"] < done.json["base"]["loss"]
        done = rankwise("merge", "run/base", "run", "--out", "plain")
        assert done.code == (2 if method == "cola_act" else 0), done.err


def test_a_size_is_a_llama_of_so_many_parameters(tmp_path):
    for size, (width, _, blocks) in SIZES.items():
        fresh(size, tmp_path / size, 0)
        count = sum(w.numel() for w in weights(tmp_path / size).values())
        assert count == pytest.approx(float(size[:-1]) * 1e6, rel=0.1)
        config = json.loads((tmp_path / size / "config.json").read_text())
        assert (config["hidden_size"], config["num_hidden_layers"]) == (width, blocks)
    fresh("1M", tmp_path / "again", 0)
    fresh("1M", tmp_path / "other", 1)
    one, same, other = (weights(tmp_path / name)["model.embed_tokens.weight"] for name in ("1M", "again", "other"))
    assert torch.equal(one, same) and not torch.equal(one, other)


def test_a_shared_embedding_is_trained_once_and_stays_shared(rankwise, files):
    done = rankwise("pretrain", "0.3M", files / "text.txt", "--dry-run", "-m", "loro", "--json")
    assert done.code == 0, done.err
    shared = [row for row in done.json["rows"] if "lm_head" in row["pattern"]]
    assert len(shared) == 1 and shared[0]["count"] == 1 and shared[0]["parameters"] == 2048 * 64
    assert done.json["sites"] == 21 + 1 + 7 and done.json["method"] == "loro"


def test_what_is_left_open_is_set():
    def run(**given):
        return settled(Run("3M", "-", "-", **given))

    assert (run().method, run().rank, run().lr, run().task) == ("full", None, RATES["full"], "pretraining")
    assert (run(method="galore").rank, run(method="galore").lr) == (48, RATES["galore"])
    assert (run(method="loro", rank=3, lr=0.1).rank, run(method="loro", rank=3, lr=0.1).lr) == (3, 0.1)
    assert run(method="sltrain").lr == "auto" and run(method="sltrain", options={"rank": 5}).rank is None


def test_resume_ends_where_the_whole_run_ends(rankwise, tiny, files, tmp_path):
    given = (files / "text.txt", "--out", "run", "-m", "loro", "-o", "every=4", *SHORT)
    assert rankwise("pretrain", tiny, *given).code == 0
    out = tmp_path / "run"
    whole = (out / "adapter.safetensors").read_bytes()
    (out / "adapter.safetensors").unlink()
    shutil.rmtree(out / "checkpoint-6")
    done = rankwise("pretrain", tiny, *given, "--resume")
    assert done.code == 0 and "going on from step 3" in done.err, done.err
    assert (out / "adapter.safetensors").read_bytes() == whole
    done = rankwise("pretrain", "run/run.yaml", "out=again")
    assert done.code == 0, done.err
    assert (tmp_path / "again" / "adapter.safetensors").read_bytes() == whole
    done = rankwise("pretrain", "1M", *given, "--rank", 8, "--resume")
    assert done.code == 2 and "hidden_size" in done.err and "another --out" in done.err
    done = rankwise("pretrain", tiny, *given, "--seed", 1, "--resume")
    assert done.code == 2 and "seed 0 and now 1" in done.err


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (("2M", "{text}", "--out", "o"), "nothing at 2M"),
        (("0.3M", "{text}"), "--out"),
        (("0.3M", "{text}", "--out", "o", "-m", "slrain"), "sltrain"),
        (("0.3M", "{text}", "--out", "o", "-m", "loro", "--rank", "65"), "smaller side"),
        (("0.3M", "absent.txt", "--out", "o"), "absent.txt"),
        (("0.3M", "{text}", "--out", "o", "-m", "sltrain", "-o", "density=2"), "between 0 and 1"),
        (("0.3M", "{text}", "--out", "o", "-m", "full", "--rank", "4"), "no axis, rank"),
    ],
)
def test_wrong_input_is_told_and_leaves_nothing(rankwise, files, tmp_path, arguments, says):
    done = rankwise("pretrain", *(a.format(text=files / "text.txt") for a in arguments))
    assert done.code == 2 and says in done.err and "Traceback" not in done.err
    assert not list(tmp_path.iterdir())


def test_nothing_is_overwritten_unasked(rankwise, tiny, files, tmp_path):
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / "mine").write_text("")
    done = rankwise("pretrain", tiny, files / "text.txt", "--out", "run")
    assert done.code == 2 and "mine" in done.err
    assert [p.name for p in (tmp_path / "run").iterdir()] == ["mine"]


# -- the benchmark's measure --------------------------------------------------------------------


@pytest.mark.parametrize("method", ["full", "relora", "loro"])
def test_what_training_keeps_is_counted(tiny, files, method):
    """Weights and Adam's two moments, 4 bytes each; ReLoRA also reads W and a sum of finished pairs."""
    run = settled(Run(str(tiny), str(files / "text.txt"), "-", method=method, pack=True, options=dict(every=3)))
    prepared = prepare(run if method != "full" else replace(run, options={}))
    trained = sum(p.numel() for p in prepared.adapter.parameters())
    linear = 2 * (32 * 32 * 2 + 32 * 16 * 2 + 3 * 32 * 64)
    want = 12 * trained + (8 * linear if method == "relora" else 0)
    assert want <= kept(prepared) <= want + 2000  # the optimizer's counts of steps
    row = {"size": "3M", "method": method, "lr": 1e-3, "parameters": trained, "bytes": want, "base": 4e6}
    shown = table([row | {"loss": 2.0, "seconds": 3.0}, row | {"loss": 4.0, "seconds": 5.0}])
    assert f"| 3M | {method} | 0.001 | {trained:,} | {want / 1e6:.2f} | 4.00 | 4 | 2.000, 4.000 |" in shown
