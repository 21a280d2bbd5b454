"""PEFT, both ways: its outputs are ours, and ours are its."""

from __future__ import annotations

import json
import warnings
from functools import partial
from pathlib import Path

import peft
import pytest
import torch
from peft_models import (
    FIXTURES,
    MHA,
    SHARED,
    Conv,
    Emb,
    Moe,
    distance,
    gpt2,
    inputs,
    llama,
    load_peft,
    made,
    output,
    save,
    with_peft,
)

import rankwise as rw

TOLERANCE = 1e-5


@pytest.fixture(autouse=True)
def _kron(monkeypatch):
    """PEFT's Tucker LoKr fails on torch 2.13, whose kron refuses einsum's strides: clone first."""
    kron = torch.kron
    monkeypatch.setattr(torch, "kron", lambda a, b: kron(a.clone(), b.reshape(-1).view(b.shape)))


QV = ["q_proj", "v_proj"]
L = peft.LoraConfig
tied = partial(llama, tie_word_embeddings=True)

CASES = {
    "lora": (llama, lambda: L(r=4, target_modules=QV)),
    "rslora": (llama, lambda: L(r=4, lora_alpha=3, use_rslora=True, target_modules=QV)),
    "rank above the layer": (llama, lambda: L(r=24, target_modules=QV)),
    "patterns": (
        partial(llama, num_hidden_layers=3),
        lambda: L(
            r=4,
            target_modules=QV,
            rank_pattern={"q_proj": 2, "^model.layers.2.self_attn.v_proj": 3},
            alpha_pattern={"layers.0.self_attn.v_proj": 32},
            layers_to_transform=[0, 2],
            layers_pattern="layers",
        ),
    ),
    "regex": (llama, lambda: L(r=4, target_modules=r".*\.(q|k)_proj")),
    "dora": (llama, lambda: L(r=4, use_dora=True, use_rslora=True, target_modules=QV)),
    "gpt2": (gpt2, lambda: L(r=4, fan_in_fan_out=True, target_modules=["c_attn"])),
    "gpt2 dora": (
        gpt2,
        lambda: L(r=4, fan_in_fan_out=True, target_modules=["c_attn"], use_dora=True),
    ),
    "embedding": (Emb, lambda: L(r=4, target_modules=["lin", "emb"])),
    "embedding dora": (Emb, lambda: L(r=4, target_modules=["lin", "emb"], use_dora=True)),
    "convolution": (Conv, lambda: L(r=4, target_modules=["c1", "c2", "c2p", "c3"])),
    "convolution dora": (
        Conv,
        lambda: L(r=4, target_modules=["c1", "c2", "c2p", "c3"], use_dora=True),
    ),
    "attention": (MHA, lambda: L(r=4, target_modules=["lin", "mha"])),
    "experts": (
        Moe,
        lambda: L(
            r=3,
            target_modules=["router"],
            target_parameters=["experts.gate_up_proj", "experts.down_proj"],
        ),
    ),
    "experts transposed": (
        partial(Moe, True),
        lambda: L(
            r=3,
            target_modules=["router"],
            target_parameters=["experts.down_proj", "experts.gate_up_proj"],
            rank_pattern={"experts.gate_up_proj": 2},
        ),
    ),
    "one expert stack": (
        Moe,
        lambda: L(r=3, target_modules=[], target_parameters=["experts.down_proj"]),
    ),
    "bias all": (Emb, lambda: L(r=4, target_modules=["lin"], bias="all")),
    "bias lora_only": (Emb, lambda: L(r=4, target_modules=["lin"], bias="lora_only")),
    "lora_bias": (
        partial(llama, attention_bias=True),
        lambda: L(r=4, target_modules=QV, lora_bias=True, lora_alpha=3),
    ),
    "modules_to_save": (llama, lambda: L(r=4, target_modules=QV, modules_to_save=["lm_head"])),
    "modules_to_save tied": (
        tied,
        lambda: L(
            r=4, target_modules=QV, modules_to_save=["embed_tokens"], ensure_weight_tying=True
        ),
    ),
    "embeddings": (llama, lambda: L(r=4, target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "embeddings tied": (tied, lambda: L(r=4, target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "embeddings kept tied": (
        tied,
        lambda: L(r=4, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True),
    ),
    "tokens beside lora": (
        llama,
        lambda: L(r=4, target_modules=QV, trainable_token_indices=[3, 1]),
    ),
    "tokens beside lora, tied": (
        tied,
        lambda: L(r=4, target_modules=QV, trainable_token_indices={"embed_tokens": [1, 3]}),
    ),
    "tokens": (
        llama,
        lambda: peft.TrainableTokensConfig(
            token_indices=[9, 1, 3], target_modules=["embed_tokens"]
        ),
    ),
    "tokens, tied": (
        tied,
        lambda: peft.TrainableTokensConfig(token_indices=[1, 3], target_modules=["embed_tokens"]),
    ),
    "pissa": (llama, lambda: L(r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=QV)),
    "pissa gpt2": (
        gpt2,
        lambda: L(r=4, fan_in_fan_out=True, init_lora_weights="pissa", target_modules=["c_attn"]),
    ),
    "pissa dora": (
        llama,
        lambda: L(r=4, init_lora_weights="pissa", use_dora=True, target_modules=QV),
    ),
    "olora": (llama, lambda: L(r=4, init_lora_weights="olora", target_modules=QV)),
    "eva": (llama, lambda: L(r=4, init_lora_weights="gaussian", target_modules=QV)),
    "adalora": (
        llama,
        lambda: peft.AdaLoraConfig(init_r=6, target_r=4, total_step=10, target_modules=QV),
    ),
    "adalora convolution": (
        Conv,
        lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=["c2"]),
    ),
    "loha": (llama, lambda: peft.LoHaConfig(r=4, alpha=3, target_modules=QV)),
    "loha tucker": (
        Conv,
        lambda: peft.LoHaConfig(r=4, target_modules=["c1", "c2", "c2p"], use_effective_conv2d=True),
    ),
    "loha convolution": (Conv, lambda: peft.LoHaConfig(r=4, target_modules=["c1", "c2", "c2g"])),
    "lokr": (llama, lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=QV)),
    "lokr low rank": (
        llama,
        lambda: peft.LoKrConfig(r=1, decompose_factor=2, target_modules=["q_proj", "up_proj"]),
    ),
    "lokr both": (
        llama,
        lambda: peft.LoKrConfig(r=1, decompose_both=True, decompose_factor=4, target_modules=QV),
    ),
    "lokr full": (llama, lambda: peft.LoKrConfig(r=64, target_modules=QV)),
    "lokr tucker": (
        Conv,
        lambda: peft.LoKrConfig(r=1, target_modules=["c1", "c2", "c2p"], use_effective_conv2d=True),
    ),
    "lokr convolution": (Conv, lambda: peft.LoKrConfig(r=1, target_modules=["c1", "c2", "c2g"])),
    "hira": (llama, lambda: peft.HiraConfig(r=4, target_modules=QV)),
    "hira embedding": (Emb, lambda: peft.HiraConfig(r=4, target_modules=["lin", "emb"])),
    "hira convolution": (Conv, lambda: peft.HiraConfig(r=4, target_modules=["c1", "c2"])),
    "hira gpt2": (
        gpt2,
        lambda: peft.HiraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True),
    ),
    "oft": (llama, lambda: peft.OFTConfig(oft_block_size=4, target_modules=QV)),
    "oft exact": (
        llama,
        lambda: peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=QV),
    ),
    "oft by number of blocks": (
        llama,
        lambda: peft.OFTConfig(r=2, oft_block_size=0, target_modules=["q_proj", "down_proj"]),
    ),
    "oft shared": (
        llama,
        lambda: peft.OFTConfig(oft_block_size=4, block_share=True, target_modules=QV),
    ),
    "oft 3 terms": (
        llama,
        lambda: peft.OFTConfig(oft_block_size=4, num_cayley_neumann_terms=3, target_modules=QV),
    ),
    "oft 1x1": (Conv, lambda: peft.OFTConfig(oft_block_size=2, target_modules=["c2p"])),
}
SMALL = {"oft": 0.1}  # the Neumann series is a rotation for small generators only


def figures(one, two, base, x) -> float:
    """The larger distance of train and eval mode."""
    found = []
    for mode in (True, False):
        for m in (one, two, base):
            m.train(mode)
        found.append(distance(output(one, x), output(two, x), output(base, x)))
    return max(found)


@pytest.mark.parametrize("case", CASES)
def test_both_directions(case, tmp_path, capsys, record_property):
    build, config = CASES[case]
    theirs = with_peft(build, config(), 0.1 if case.startswith("oft") else 0.3)
    save(theirs, tmp_path / "theirs")
    ours, base = made(build), made(build)
    x = inputs(base)
    adapter = rw.formats.peft.load(ours, tmp_path / "theirs")
    there = figures(ours, theirs, base, x)
    record_property("reads", there)
    assert there <= TOLERANCE

    adapter.save(tmp_path / "own")  # our own format holds a converted adapter like any other
    again = made(build)
    rw.load(again, tmp_path / "own")
    assert torch.equal(output(again.eval(), x), output(ours.eval(), x))

    report = rw.export(adapter, tmp_path / "back", to="peft")
    assert report.exact
    back = load_peft(build, tmp_path / "back")
    here = figures(back, theirs, base, x)
    record_property("writes", here)
    assert here <= TOLERANCE
    with capsys.disabled():
        print(f"\n{case}: PEFT -> us {there:.1e}, us -> PEFT {here:.1e}", end=" ")
