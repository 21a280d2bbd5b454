"""TRL's trainers with the mixin: SFT, DPO, KTO, GRPO, and the reference without a second copy."""

from __future__ import annotations

import copy
import gc
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from trainer_models import adapted, arguments, equal, llama, nf4, preferences, tokenizer, values

import rankwise as rw
import rankwise.hf
from rankwise.errors import TrainingError

trl = pytest.importorskip("trl")
pytestmark = [
    pytest.mark.filterwarnings("ignore::FutureWarning"),  # trl 1.16 under transformers 5.23
    pytest.mark.filterwarnings("ignore:.*pin_memory.*:UserWarning"),
]


class SFT(rw.hf.AdapterMixin, trl.SFTTrainer):
    pass


class DPO(rw.hf.AdapterMixin, trl.DPOTrainer):
    pass


class KTO(rw.hf.AdapterMixin, trl.KTOTrainer):
    pass


class GRPO(rw.hf.AdapterMixin, trl.GRPOTrainer):
    pass


EXACT = {"bf16": False, "gradient_checkpointing": False}


def texts(n: int = 8) -> Any:
    from datasets import Dataset

    return Dataset.from_list([{"text": f"{r['prompt']} {r['chosen']}"} for r in preferences(n)])


def judged(n: int = 8) -> Any:
    from datasets import Dataset

    return Dataset.from_list(
        [{"prompt": r["prompt"], "completion": r["chosen"], "label": i % 2 == 0} for i, r in enumerate(preferences(n))]
    )


def sft(model: Any, folder: Path, **changes: Any) -> SFT:
    args = arguments(folder, trl.SFTConfig, **changes)
    return SFT(model, args, train_dataset=texts(), processing_class=tokenizer())


def dpo(model: Any, folder: Path, ref_model: Any = None, **changes: Any) -> DPO:
    args = arguments(folder, trl.DPOConfig, **{"lr_scheduler_type": "constant", **changes})
    return DPO(model, args, train_dataset=preferences(), processing_class=tokenizer(), ref_model=ref_model)


def losses(run: Any) -> list[float]:
    run.train()
    return [entry["loss"] for entry in run.state.log_history if "loss" in entry]


def base(kind: str, folder: Path) -> Any:
    if kind == "nf4":
        pytest.importorskip("bitsandbytes")
        return nf4(folder / "base")
    return llama().to(torch.bfloat16 if kind == "bf16" else torch.float32)


@pytest.mark.parametrize("kind", ["fp32", "bf16", "nf4"])
@pytest.mark.parametrize("make", [sft, dpo])
def test_sft_and_dpo_train_any_base(tmp_path, make, kind):
    """With TRL's own defaults: bf16 and activation checkpointing."""
    model, adapter = adapted(base(kind, tmp_path))
    before = values(adapter)
    run = make(model, tmp_path, save_strategy="steps", save_steps=2)
    run.train()
    after = values(adapter)
    assert all(p.dtype == torch.float32 for p in after.values())
    assert all(not torch.equal(before[n], after[n]) for n in before)
    saved = rw.load(base(kind, tmp_path), tmp_path / "checkpoint-3")
    assert equal(after, values(saved))
    assert not list(tmp_path.glob("checkpoint-*/model.safetensors"))


def alive() -> int:
    gc.collect()
    return len(
        {p.data_ptr() for m in gc.get_objects() if isinstance(m, transformers.LlamaForCausalLM) for p in m.parameters()}
    )


@pytest.mark.parametrize("precompute", [False, True], ids=["live", "precomputed"])
def test_dpo_equals_an_explicit_copy_of_the_reference(tmp_path, precompute):
    model, _ = adapted(moved=True)
    before = alive()
    run = dpo(model, tmp_path / "shared", **EXACT, precompute_ref_log_probs=precompute)
    assert alive() == before
    ours = losses(run)
    assert alive() == before
    twin, _ = adapted(moved=True)
    theirs = losses(dpo(twin, tmp_path / "copy", ref_model=llama(), **EXACT))
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-6
    assert abs(ours[0] - 0.6931) > 1e-3  # log 2: what an adapted reference would give


def test_dpo_on_a_quantised_base_equals_an_explicit_copy(tmp_path):
    pytest.importorskip("bitsandbytes")
    model, _ = adapted(nf4(tmp_path / "base"), moved=True)
    ours = losses(dpo(model, tmp_path / "shared", **EXACT))
    twin, _ = adapted(nf4(tmp_path / "base"), moved=True)
    copied = rw.hf.reference(adapted(nf4(tmp_path / "base"))[0])
    theirs = losses(dpo(twin, tmp_path / "copy", ref_model=copied, **EXACT))
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-6


def test_an_earlier_adapter_that_stays_on_is_part_of_the_reference(tmp_path):
    model, first = adapted(moved=True)
    first.requires_grad_(False)
    second = rw.attach(model, rw.recipe("lora", rank=2), name="second")
    rw.set_active(model, ["default", "second"])
    ours = losses(dpo(model, tmp_path, **EXACT, max_steps=1))
    assert abs(ours[0] - 0.693147) < 1e-5  # the policy starts where the reference is
    assert all(torch.count_nonzero(f["b"]) for f in second.values())


def test_the_reference_leaves_modes_and_choice_as_they_were():
    model, _ = adapted(moved=True, dropout=0.5)
    model.train()
    ids = torch.randint(4, 64, (2, 6))
    expected = llama()(ids).logits
    shared = rw.hf.reference(model)
    assert {id(p) for p in shared.parameters()} == {id(p) for p in model.parameters()}
    with torch.enable_grad():
        y = shared(ids).logits
    assert torch.equal(y, expected)
    assert not y.requires_grad
    assert all(m.training for m in model.modules())
    model.eval()
    assert not torch.equal(model(ids).logits, expected)
    with pytest.raises(rw.errors.UnknownName):
        rw.hf.reference(model, "nobody")


def test_kto(tmp_path):
    model, adapter = adapted(moved=True)
    args = arguments(tmp_path, trl.KTOConfig, **EXACT, per_device_train_batch_size=4, max_steps=2)
    run = KTO(model, args, train_dataset=judged(), processing_class=tokenizer())
    before = values(adapter)
    ours = losses(run)
    twin, _ = adapted(moved=True)
    args = copy.copy(args)
    args.output_dir = str(tmp_path / "copy")
    run = KTO(twin, args, train_dataset=judged(), processing_class=tokenizer(), ref_model=llama())
    theirs = losses(run)
    assert max(abs(a - b) for a, b in zip(ours, theirs, strict=True)) < 1e-6
    assert not equal(before, values(adapter))


def test_grpo_with_a_reference(tmp_path):
    model, adapter = adapted(moved=True)
    args = arguments(
        tmp_path, trl.GRPOConfig, **EXACT, max_steps=2, beta=0.1, num_generations=2, max_completion_length=4
    )

    def reward(completions: list[str], **kwargs: Any) -> list[float]:
        return [float(i) for i, _ in enumerate(completions)]

    before = values(adapter)
    run = GRPO(
        model,
        args,
        reward_funcs=reward,
        train_dataset=preferences().remove_columns(["chosen", "rejected"]),
        processing_class=tokenizer(),
    )
    assert (run.beta, args.beta) == (0.1, 0.1)
    run.train()
    kl = [entry["kl"] for entry in run.state.log_history if "kl" in entry]
    assert kl[0] > 1e-4  # the adapter was moved away from the base
    assert not equal(before, values(adapter))


def test_an_adapter_on_the_output_head_is_refused_before_training(tmp_path):
    model, _ = adapted(sites=rw.Sites(("attention", "lm_head")))
    with pytest.raises(TrainingError, match=r"lm_head has one.*rw.hf.Trainer"):
        sft(model, tmp_path)
    tied = llama(tie_word_embeddings=True)
    rw.attach(tied, rw.recipe("lora", rank=2, sites=rw.Sites("embed_tokens", tied="tie")))
    with pytest.raises(TrainingError, match="embed_tokens has one"):
        sft(tied, tmp_path)


def test_a_synchronised_reference_is_refused(tmp_path):
    with pytest.raises(TrainingError, match="sync_ref_model=False"):
        dpo(adapted()[0], tmp_path, sync_ref_model=True)


@pytest.mark.parametrize("make", [sft, dpo])
def test_resuming_is_bit_exact(tmp_path, make):
    changes = {"max_steps": 5, "save_strategy": "steps", "save_steps": 3, "logging_steps": 2}
    model, adapter = adapted(dropout=0.1)
    make(model, tmp_path, **changes).train()
    journal = (tmp_path / "metrics.jsonl").read_text()
    twin, other = adapted(dropout=0.1)
    make(twin, tmp_path, **changes).train(str(tmp_path / "checkpoint-3"))
    assert equal(values(adapter), values(other))
    assert (tmp_path / "metrics.jsonl").read_text() == journal


def test_passes_without_logits_cannot_be_compared(tmp_path):
    model, _ = adapted(method="hidden_key")
    with pytest.raises(TrainingError, match="Set agree=0"):
        sft(model, tmp_path).train()
