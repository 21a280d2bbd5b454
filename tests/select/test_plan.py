"""A plan's figures against real training, and what it says of runs that do not fit."""

import json
from pathlib import Path

import pytest
import torch
import transformers
from benchmarks.plan_cells import CELLS, folder_of, measured, planned
from torch.utils.flop_counter import FlopCounterMode, addmm_flop, sdpa_backward_flop_count, sdpa_flop_count

import rankwise as rw
from rankwise.errors import DataError, DoesNotFit, ModelFileError, PlanError, UnknownName
from rankwise.select import DEVICES, Device
from rankwise.select.devices import device_of, size_of

TRIED = [
    "llama, lora, 4 x 128, float32",
    "llama, hidden_key, 4 x 128, float32",
    "llama, dora, 4 x 128, bfloat16, checkpointing",
    "llama, lora, 1 x 512, bfloat16",
    "llama, lora_plus, 4 x 128, float32, accumulate 2",
    "llama, lora, 4 x 128, float32, task classification",
    "llama, lora, 4 x 128, float32, base nf4",
    "llama, lora, 4 x 128, float32, base int8",
    "gemma3, sliding, dora, 4 x 128, bfloat16",
    "gpt2, pissa, 2 x 256, bfloat16, checkpointing",
    "mixtral, lora, 4 x 128, float32",
]
SMALL = {"method": "lora", "batch": 8, "max_length": 64, "device": "l4", "dtype": "float32"}


@pytest.fixture(scope="module")
def folders(tmp_path_factory) -> Path:
    return tmp_path_factory.mktemp("models")


@pytest.fixture(scope="module")
def tiny(folders) -> str:
    """The config of two blocks of width 32."""
    shape = {"hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4}
    transformers.LlamaConfig(vocab_size=64, **shape).save_pretrained(folders / "tiny")
    return str(folders / "tiny")


@pytest.mark.parametrize("cell", [c for c in CELLS if c.name in TRIED], ids=lambda c: c.name)
def test_the_peak_is_what_torch_allocates(cell, folders):
    if "base" in cell.settings:
        pytest.importorskip("bitsandbytes")
    folder = folder_of(cell, folders)
    assert planned(cell, folder) == pytest.approx(measured(cell, folder), rel=0.05)


def test_every_tried_cell_exists():
    assert {cell.name for cell in CELLS} >= set(TRIED)


def test_nothing_is_loaded_or_made(tmp_path):
    """A config alone suffices, of a model that this machine could not hold; no SVD is taken of its weights."""
    config = transformers.LlamaConfig(hidden_size=16384, intermediate_size=65536, num_hidden_layers=8)
    config.architectures = ["LlamaForCausalLM"]
    config.save_pretrained(tmp_path)
    made = rw.plan(tmp_path, method="pissa", batch=1, max_length=64, device="h200")
    width, inner, vocabulary = 16384, 65536, config.vocab_size
    weights = 2 * (8 * (4 * width**2 + 3 * width * inner + 2 * width) + 2 * vocabulary * width + width)
    assert made.to_dict()["weights"] == pytest.approx(weights, rel=1e-6)
    factors = 16 * 8 * (4 * 2 * width + 3 * (width + inner))
    assert made.to_dict()["adapter_file"] == 2 * 4 * factors  # the start is stored beside the factors
    assert made.to_dict()["gradients"] == 4 * factors
    assert 2 * 4 * factors <= made.to_dict()["optimizer"] < 2 * 4 * factors * 1.001


def test_operations_are_those_of_a_real_step():
    made = rw.plan("embedded", **{**SMALL, "batch": 2}, rank=8)
    model, _ = rw.embedded.load()
    rw.attach(model.train(), rw.recipe("lora", rank=8))
    ids = torch.ones(2, 64, dtype=torch.long)
    mask = ids.clone()
    mask[0, -1] = 0
    cpu = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu
    back = torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward
    attention = {
        cpu: lambda q, k, v, *_, **__: sdpa_flop_count(q, k, v),
        torch.ops.aten.addmm_: lambda y, a, b, **_: addmm_flop(y, a, b),
        back: lambda grad, q, k, v, *_, **__: sdpa_backward_flop_count(grad, q, k, v),
    }
    with FlopCounterMode(display=False, custom_mapping=attention) as counter, rw.hf.deferred_logits(model):
        model(input_ids=ids, labels=ids, attention_mask=mask, use_cache=False).loss.backward()
    assert made.to_dict()["flops"] == counter.get_total_flops()


# -- does it fit ------------------------------------------------------------------------------


def test_a_run_that_does_not_fit_is_told_what_would_help(tiny):
    whole = rw.plan(tiny, **SMALL)
    assert whole.fits and not whole.remedies
    limit = whole.peak * 4 // 5
    made = rw.plan(tiny, **SMALL, memory=limit)
    assert not made.fits and {name for r in made.remedies for name in r.changes} >= {"checkpointing", "batch"}
    for remedy in made.remedies:
        again = rw.plan(tiny, **{**SMALL, **remedy.changes}, memory=limit)
        assert again.fits and again.peak == remedy.peak
    (batch,) = (r.changes["batch"] for r in made.remedies if "batch" in r.changes)
    assert not rw.plan(tiny, **{**SMALL, "batch": 2 * batch}, memory=limit).fits  # the mildest one
    with pytest.raises(DoesNotFit, match=r"(?s)does not fit: .* MiB of .* MiB .*checkpointing=true"):
        made.check()


def test_a_run_that_no_single_change_saves(tiny):
    made = rw.plan(tiny, **SMALL, memory="1KiB")
    assert not made.remedies and "no single change" in str(made)


def test_a_change_that_the_model_does_not_allow_is_no_remedy(tmp_path):
    """CTRL has no activation checkpointing."""
    config = transformers.CTRLConfig(vocab_size=64, n_positions=64, n_embd=32, dff=64, n_layer=2, n_head=4)
    config.save_pretrained(tmp_path)
    made = rw.plan(tmp_path, **SMALL, memory=rw.plan(tmp_path, **SMALL).peak * 4 // 5)
    assert {name for r in made.remedies for name in r.changes} == {"batch", "accumulate"}
    with pytest.raises(PlanError, match=r"support activation checkpointing\. Measure"):
        rw.plan(tmp_path, **SMALL, checkpointing=True)


def test_a_lower_rank_or_a_quantised_base_can_be_the_remedy(tiny):
    pytest.importorskip("bitsandbytes")
    settings = {**SMALL, "batch": 1, "max_length": 8, "rank": 16, "checkpointing": True}
    made = rw.plan(tiny, **settings, memory=rw.plan(tiny, **settings).peak - 1)
    assert {"base", "rank"} <= {name for r in made.remedies for name in r.changes}


@pytest.mark.parametrize("inside", [False, True])
def test_the_state_of_a_solver_on_weights_is_its_formula(tiny, inside):
    made = rw.plan(tiny, **{**SMALL, "method": "galore"}, rank=4, options={"in_backward": inside})
    values = 2 * 4 * (4 * (32 + 2 * 32) + 3 * (32 + 2 * 64))  # r (min + 2 max) of seven matrices in each of two blocks
    assert made.to_dict()["optimizer"] == 4 * values


def test_a_penalty_that_takes_gradients_away_can_be_planned(tiny):
    made = rw.plan(tiny, **{**SMALL, "method": "autolora"}, rank=4).to_dict()
    assert made["gradients"] == 4 * (4 * (64 + 1) * 4 + 3 * (96 + 1) * 4) * 2  # r (out + in + 1) of two blocks' layers


def test_a_model_that_asks_for_values_cannot_be_planned(tiny, monkeypatch):
    def asking(self, x):
        return x * float(x.sum())

    monkeypatch.setattr(transformers.models.llama.modeling_llama.LlamaMLP, "forward", asking)
    with pytest.raises(PlanError, match="without values"):
        rw.plan(tiny, **SMALL)


def test_bad_settings_are_told(tiny):
    with pytest.raises(DataError, match="dtype"):
        rw.plan(tiny, **{**SMALL, "dtype": "float31"})
    with pytest.raises(ModelFileError):
        rw.plan("nowhere", **SMALL)


# -- data, devices, sizes ---------------------------------------------------------------------


def test_the_longest_row_of_the_data_decides(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text("".join(json.dumps({"prompt": "a" * n, "completion": "b"}) + "\n" for n in (3, 200)))
    made = rw.plan("embedded", file, **{**SMALL, "max_length": 64})
    assert made.length == 64
    assert rw.plan("embedded", file, **{**SMALL, "max_length": 1024}).length < 1024
    assert not made.uniform


def test_a_batch_without_padding_needs_no_mask(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"prompt": "the king ", "completion": "was good"}) + "\n")
    uniform, padded = rw.plan("embedded", file, **SMALL), rw.plan("embedded", **SMALL)
    assert uniform.uniform
    same = rw.plan("embedded", **{**SMALL, "max_length": uniform.length})
    assert uniform.peak < same.peak < padded.peak


def test_a_named_device_gives_the_roofline():
    work = {(10, 4, torch.bfloat16): 2, (0, 6, torch.float32): 1}
    assert Device("toy", 1, {"bfloat16": 5.0, "float32": 1.0}, 3.0).seconds(work) == 2 * 2 + 2
    made = rw.plan("embedded", **SMALL)
    assert made.device == DEVICES["l4"] and made.memory == 24 * 10**9
    assert made.seconds == DEVICES["l4"].seconds(made.step.work) > made.to_dict()["flops"] / 30.3e12
    with pytest.raises(UnknownName, match="h100"):
        device_of("abacus")


def test_this_machine_is_measured():
    here = device_of()
    assert here.memory > 2**20 and here.bandwidth > 0 and min(here.flops.values()) > 0


def test_three_steps_are_timed():
    made = rw.plan("embedded", **{**SMALL, "batch": 1, "max_length": 8, "device": "here"}, probe=True)
    assert made.measured is not None and made.measured > 0


@pytest.mark.parametrize(("text", "size"), [("24GiB", 24 * 2**30), ("24 GB", 24 * 10**9), ("1.5k", 1500), ("7", 7)])
def test_sizes_in_words(text, size):
    assert size_of(text) == size


def test_a_size_that_is_none():
    with pytest.raises(DataError, match="24GiB"):
        size_of("much")
