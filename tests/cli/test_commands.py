"""The other commands, exit codes, and what a wrong input is told."""

import json
import subprocess
import sys
from dataclasses import fields

import pytest
from transformers import AutoModelForCausalLM

import rankwise.methods  # noqa: F401  (for sys.modules)
from rankwise import attach, recipe
from rankwise.errors import OutputExists
from rankwise.hf.folder import LOCK, claimed
from rankwise.hf.run import Run


def test_help_lists_the_commands_and_imports_no_torch():
    command = [sys.executable, "-X", "importtime", "-m", "rankwise", "--help"]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    for name in ("finetune", "pretrain", "methods", "merge", "convert", "inspect", "data", "generate"):
        assert name in done.stdout
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "rankwise.cli" in imported
    assert not imported & {"torch", "transformers", "numpy"}


def test_methods(rankwise):
    named = {entry["name"] for entry in rankwise("methods", "--json").json}
    assert {"lora", "dora", "pissa"} <= named
    assert "2402.09353" in rankwise("methods", "dora").out
    done = rankwise("methods", "doraa")
    assert done.code == 2 and "dora" in done.err


def test_targets_and_data(rankwise, tiny, files):
    done = rankwise("targets", tiny, "-t", "q_proj", "-t", "*.mlp.*", "--rank", 2, "--json")
    assert [row["count"] for row in done.json["rows"]] == [2, 6]
    assert "q_proj" in rankwise("targets", tiny).out
    done = rankwise("data", tiny, files / "pairs.jsonl")
    assert "«good king.</s>»" in done.out and "completion" in done.out
    assert rankwise("data", tiny, files / "mood.csv", "--json").json["classes"] == {"n": 24, "p": 24}


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["nowhere", "{pairs}", "--out", "o"], "nothing at nowhere"),
        (["{tiny}", "{pairs}"], "--out"),
        (["{tiny}", "--out", "o"], "one DATA"),
        (["{tiny}", "absent.jsonl", "--out", "o"], "absent.jsonl"),
        (["{tiny}", "{mood}", "--out", "o"], "--task classification"),
        (["{tiny}", "{pairs}", "--out", "o", "-m", "doraa"], "dora"),
        (["{tiny}", "{pairs}", "--out", "o", "--structure", "nope"], "No structure"),
        (["{tiny}", "{pairs}", "--out", "o", "-m", "oft", "--rank", "4"], "oft"),
        (["{tiny}", "{pairs}", "--out", "o", "-t", "q_prj"], "q_proj"),
        (["{tiny}", "{pairs}", "--out", "o", "--lr", "fast"], "lr"),
        (["{tiny}", "{pairs}", "--out", "o", "--steps", "0"], "steps"),
        (["{tiny}", "{pairs}", "--out", "o", "rnak=3"], "rank"),
        (["{tiny}", "{pairs}", "--out", "o", "--base", "int3"], "nf4"),
        (["{tiny}", "{pairs}", "--out", "o", "--task", "vision"], "causal-lm"),
        (["{tiny}", "{pairs}", "--out", "o", "--bogus"], "bogus"),
        (["{tiny}", "{pairs}", "-o", "folder"], "--out"),
        (["absent.yaml"], "absent.yaml"),
        (["{tiny}", "{pairs}", "--out", "o", "--steps", "4", "--lr", "1e30"], "learning rate"),
    ],
)
def test_wrong_input_is_told_so_in_a_sentence(rankwise, tiny, files, arguments, says):
    places = {"tiny": tiny, "pairs": files / "pairs.jsonl", "mood": files / "mood.csv"}
    done = rankwise("finetune", *(a.format(**places) for a in arguments))
    assert done.code == 2
    assert says in done.err and "Traceback" not in done.err
    assert not done.out


def test_places_are_no_parameters(rankwise, tiny, tmp_path):
    model = AutoModelForCausalLM.from_pretrained(tiny)
    adapter = attach(model, recipe("shira", rank=2))
    adapter.save(tmp_path / "few")
    found = rankwise("inspect", "few", "--json").json
    assert found["parameters"] == sum(p.numel() for p in adapter.parameters() if p.requires_grad)
    assert found["largest_value"] == 0  # of the entries, not of their rows and columns


def test_every_setting_of_a_run_is_an_option(rankwise, tiny, files, tmp_path, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")
    said = rankwise("finetune", "--help").out
    for field in fields(Run):
        flag = "--option " if field.name == "options" else f"--{field.name.replace('_', '-')} "
        assert (flag in said) == (field.name not in ("model", "data", "labels")), flag
    assert "Passes over the data, unless steps are given." in said and "default: (3.0)" in said
    assert rankwise("evaluate", tiny, files / "pairs.jsonl", "--rank", 2).code == 2
    options = ("--accumulate", 2, "--checkpointing", "--validation", "none", "-o", "dropout=0.1", "--saves", 1)
    done = rankwise("finetune", tiny, files / "pairs.jsonl", "--out", "run", "--steps", 2, *options)
    assert done.code == 0, done.err
    run = Run.read(tmp_path / "run" / "run.yaml")
    assert (run.accumulate, run.checkpointing, run.validation, run.saves) == (2, True, None, 1)
    assert run.options == {"dropout": 0.1}


def test_a_model_that_brings_code_or_is_broken(rankwise, files, tmp_path):
    for config, says in (
        ({"model_type": "strange", "auto_map": {"AutoConfig": "code.Config"}}, "custom code"),
        ({"model_type": "strange"}, "does not recognize"),
    ):
        (tmp_path / "m").mkdir(exist_ok=True)
        (tmp_path / "m" / "config.json").write_text(json.dumps(config))
        done = rankwise("targets", "m")
        assert done.code == 2 and says in done.err
    (tmp_path / "m" / "config.json").write_text("{")
    assert "not a valid JSON file" in rankwise("targets", "m").err
    assert rankwise("inspect", "m").code == 2
    assert rankwise("evaluate", "m", files / "own.txt", "--adapter", "absent").code == 2


def test_memory_that_does_not_suffice_exits_3(rankwise, monkeypatch):
    def hungry():
        raise RuntimeError("DefaultCPUAllocator: can't allocate memory: you tried 1 TB")

    monkeypatch.setattr(sys.modules["rankwise.methods"], "catalogue", hungry)
    done = rankwise("methods")
    assert done.code == 3 and "does not fit" in done.err


# -- the folder ---------------------------------------------------------------------------------


def test_nothing_is_overwritten_unasked(tmp_path):
    (tmp_path / "notes.txt").write_text("mine")
    (tmp_path / "adapter.safetensors").write_text("old")
    with pytest.raises(OutputExists, match="--overwrite"), claimed(tmp_path):
        pass
    with claimed(tmp_path, overwrite=True):
        assert [p.name for p in tmp_path.iterdir() if p.name != LOCK] == ["notes.txt"]
    with claimed(tmp_path, resume=True):
        assert (tmp_path / "notes.txt").exists()
    assert not (tmp_path / LOCK).exists()


def test_a_failed_run_leaves_no_empty_folder(tmp_path):
    with pytest.raises(ValueError, match="no"), claimed(tmp_path / "new"):
        raise ValueError("no")
    assert not (tmp_path / "new").exists()


def test_two_processes_cannot_write_one_folder(tmp_path):
    code = "import sys, time; from rankwise.hf.folder import claimed\n"
    code += "with claimed(sys.argv[1]): print('held', flush=True); time.sleep(60)"
    other = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert other.stdout is not None and other.stdout.readline().strip() == "held"
        with pytest.raises(OutputExists, match="another"), claimed(tmp_path, resume=True):
            pass
    finally:
        other.kill()
        other.communicate()
    assert (tmp_path / LOCK).exists()  # a dead process cleans nothing up, and holds nothing
    with claimed(tmp_path) as folder:
        assert folder == tmp_path
