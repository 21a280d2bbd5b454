"""PEFT, both ways: its outputs are ours, and ours are its."""

from __future__ import annotations

import json
import shutil
from collections import OrderedDict
from functools import partial

import peft
import pytest
import torch
import transformers
from peft.tuners.lora import BdLoraConfig, KasaConfig
from peft_models import (
    FIXTURES,
    MHA,
    SHARED,
    Biases,
    Conv,
    Depthwise,
    Emb,
    Moe,
    Odd,
    Strided,
    distance,
    gpt2,
    inputs,
    llama,
    load_peft,
    made,
    mixture,
    output,
    save,
    with_peft,
)
from safetensors.torch import load_file, save_file
from torch import nn

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
    "gpt2 dora": (gpt2, lambda: L(r=4, fan_in_fan_out=True, target_modules=["c_attn"], use_dora=True)),
    "embedding": (Emb, lambda: L(r=4, target_modules=["lin", "emb"])),
    "embedding dora": (Emb, lambda: L(r=4, target_modules=["lin", "emb"], use_dora=True)),
    "convolution": (Conv, lambda: L(r=4, target_modules=["c1", "c2", "c2p", "c3"])),
    "convolution dora": (Conv, lambda: L(r=4, target_modules=["c1", "c2", "c2p", "c3"], use_dora=True)),
    "convolution in groups": (Conv, lambda: L(r=6, lora_alpha=3, target_modules=["c2g", "c1"])),
    "convolution in groups, rank above": (Conv, lambda: L(r=24, target_modules=["c2g", "c2"], use_rslora=True)),
    "depthwise": (Depthwise, lambda: L(r=16, lora_bias=True, target_modules=["0"])),
    "attention": (MHA, lambda: L(r=4, target_modules=["lin", "mha"])),
    "experts": (
        Moe,
        lambda: L(r=3, target_modules=["router"], target_parameters=["experts.gate_up_proj", "experts.down_proj"]),
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
    "one expert stack": (Moe, lambda: L(r=3, target_modules=[], target_parameters=["experts.down_proj"])),
    "bias all": (Emb, lambda: L(r=4, target_modules=["lin"], bias="all")),
    "bias lora_only": (Emb, lambda: L(r=4, target_modules=["lin"], bias="lora_only")),
    "lora_bias": (partial(llama, attention_bias=True), lambda: L(r=4, target_modules=QV, lora_bias=True, lora_alpha=3)),
    "lora_bias without one": (llama, lambda: L(r=4, target_modules=QV, lora_bias=True, lora_alpha=3)),
    "lora_bias of some": (Biases, lambda: L(r=4, target_modules=["0", "1", "2"], lora_bias=True, use_rslora=True)),
    "modules_to_save": (llama, lambda: L(r=4, target_modules=QV, modules_to_save=["lm_head"])),
    "modules_to_save tied": (
        tied,
        lambda: L(r=4, target_modules=QV, modules_to_save=["embed_tokens"], ensure_weight_tying=True),
    ),
    "embeddings": (llama, lambda: L(r=4, target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "embeddings tied": (tied, lambda: L(r=4, target_modules=["q_proj", "embed_tokens", "lm_head"])),
    "embeddings kept tied": (tied, lambda: L(r=4, target_modules=["q_proj", "embed_tokens"], ensure_weight_tying=True)),
    "tokens beside lora": (llama, lambda: L(r=4, target_modules=QV, trainable_token_indices=[3, 1])),
    "tokens beside lora, tied": (
        tied,
        lambda: L(r=4, target_modules=QV, trainable_token_indices={"embed_tokens": [1, 3]}),
    ),
    "tokens": (llama, lambda: peft.TrainableTokensConfig(token_indices=[9, 1, 3], target_modules=["embed_tokens"])),
    "tokens, tied": (tied, lambda: peft.TrainableTokensConfig(token_indices=[1, 3], target_modules=["embed_tokens"])),
    "pissa": (llama, lambda: L(r=4, lora_alpha=6, init_lora_weights="pissa", target_modules=QV)),
    "pissa gpt2": (gpt2, lambda: L(r=4, fan_in_fan_out=True, init_lora_weights="pissa", target_modules=["c_attn"])),
    "pissa dora": (llama, lambda: L(r=4, init_lora_weights="pissa", use_dora=True, target_modules=QV)),
    "gaussian": (llama, lambda: L(r=4, init_lora_weights="gaussian", target_modules=QV)),
    "adalora": (llama, lambda: peft.AdaLoraConfig(init_r=6, target_r=4, total_step=10, target_modules=QV)),
    "adalora convolution": (
        Conv,
        lambda: peft.AdaLoraConfig(init_r=3, target_r=2, total_step=10, target_modules=["c2"]),
    ),
    "loha": (llama, lambda: peft.LoHaConfig(r=4, alpha=3, target_modules=QV)),
    "loha tucker": (Conv, lambda: peft.LoHaConfig(r=4, target_modules=["c1", "c2", "c2p"], use_effective_conv2d=True)),
    "loha convolution": (Conv, lambda: peft.LoHaConfig(r=4, target_modules=["c1", "c2", "c2g"])),
    "lokr": (llama, lambda: peft.LoKrConfig(r=2, alpha=3, target_modules=QV)),
    "lokr low rank": (llama, lambda: peft.LoKrConfig(r=1, decompose_factor=2, target_modules=["q_proj", "up_proj"])),
    "lokr both": (llama, lambda: peft.LoKrConfig(r=1, decompose_both=True, decompose_factor=4, target_modules=QV)),
    "lokr full": (llama, lambda: peft.LoKrConfig(r=64, target_modules=QV)),
    "lokr tucker": (Conv, lambda: peft.LoKrConfig(r=1, target_modules=["c1", "c2", "c2p"], use_effective_conv2d=True)),
    "lokr convolution": (Conv, lambda: peft.LoKrConfig(r=1, target_modules=["c1", "c2", "c2g"])),
    "kasa": (llama, lambda: L(r=4, lora_alpha=6, kasa_config=KasaConfig(), target_modules=QV)),
    "kasa rslora": (llama, lambda: L(r=3, use_rslora=True, kasa_config=KasaConfig(), target_modules=["up_proj"])),
    "tinylora": (
        partial(llama, num_hidden_layers=11),  # layers.10 sorts before layers.2
        lambda: peft.TinyLoraConfig(r=2, u=5, target_modules=QV, init_weights="uniform"),
    ),
    "tinylora tied": (
        partial(llama, num_hidden_layers=3),
        lambda: peft.TinyLoraConfig(r=3, u=20, target_modules=QV, weight_tying=0.4),
    ),
    "tinylora gpt2": (gpt2, lambda: peft.TinyLoraConfig(u=4, fan_in_fan_out=True, target_modules=["c_attn"])),
    "hira": (llama, lambda: peft.HiraConfig(r=4, target_modules=QV)),
    "hira embedding": (Emb, lambda: peft.HiraConfig(r=4, target_modules=["lin", "emb"])),
    "hira convolution": (Conv, lambda: peft.HiraConfig(r=4, target_modules=["c1", "c2"])),
    "hira gpt2": (gpt2, lambda: peft.HiraConfig(r=4, target_modules=["c_attn"], fan_in_fan_out=True)),
    "gralora": (llama, lambda: peft.GraloraConfig(r=4, alpha=3, target_modules=QV)),
    "gralora hybrid": (llama, lambda: peft.GraloraConfig(r=8, gralora_k=4, hybrid_r=2, alpha=5, target_modules=QV)),
    "gralora gpt2": (gpt2, lambda: peft.GraloraConfig(r=4, fan_in_fan_out=True, target_modules=["c_attn"])),
    "glora": (llama, lambda: peft.GloraConfig(r=3, target_modules=QV)),
    "glora beside a bias": (
        Emb,
        lambda: peft.GloraConfig(r=3, config_C="none", config_D_E="none", target_modules=["lin"]),
    ),
    "glora vector": (llama, lambda: peft.GloraConfig(config_A_B="vector", target_modules=QV)),
    "glora constant": (llama, lambda: peft.GloraConfig(config_A_B="constant", target_modules=QV)),
    "fourierft": (llama, lambda: peft.FourierFTConfig(n_frequency=60, target_modules=QV)),
    "fourierft few": (
        gpt2,
        lambda: peft.FourierFTConfig(n_frequency=2, scaling=40.0, random_loc_seed=3, target_modules=["c_attn"]),
    ),
    "fourierft patterns": (
        llama,
        lambda: peft.FourierFTConfig(n_frequency=60, n_frequency_pattern={"v_proj": 20}, target_modules=QV),
    ),
    "waveft": (llama, lambda: peft.WaveFTConfig(n_frequency=60, target_modules=QV)),
    "waveft odd": (Odd, lambda: peft.WaveFTConfig(n_frequency=30, target_modules=["0", "1", "2"])),
    "waveft gpt2": (gpt2, lambda: peft.WaveFTConfig(n_frequency=60, target_modules=["c_attn"])),
    "waveft in proportion": (
        llama,
        lambda: peft.WaveFTConfig(n_frequency=60, proportional_parameters=True, target_modules=QV),
    ),
    "shira": (llama, lambda: peft.ShiraConfig(r=2, target_modules=QV)),
    "shira of a seed": (llama, lambda: peft.ShiraConfig(r=1, random_seed=3, target_modules=["up_proj"])),
    "c3a": (llama, lambda: peft.C3AConfig(block_size=8, target_modules=QV)),
    "c3a patterns": (
        llama,
        lambda: peft.C3AConfig(
            block_size=16,
            block_size_pattern={"v_proj": 4},
            init_weights="xavier_uniform",
            target_modules=["up_proj", *QV],
        ),
    ),
    "oft": (llama, lambda: peft.OFTConfig(oft_block_size=4, target_modules=QV)),
    "oft exact": (llama, lambda: peft.OFTConfig(oft_block_size=4, use_cayley_neumann=False, target_modules=QV)),
    "oft by number of blocks": (
        llama,
        lambda: peft.OFTConfig(r=2, oft_block_size=0, target_modules=["q_proj", "v_proj"]),
    ),
    "oft shared": (llama, lambda: peft.OFTConfig(oft_block_size=4, block_share=True, target_modules=QV)),
    "oft 3 terms": (llama, lambda: peft.OFTConfig(oft_block_size=4, num_cayley_neumann_terms=3, target_modules=QV)),
    "oft patches": (Conv, lambda: peft.OFTConfig(oft_block_size=4, target_modules=["c2"])),
    "oft patches exact": (
        Conv,
        lambda: peft.OFTConfig(oft_block_size=3, use_cayley_neumann=False, target_modules=["c2", "c2g"]),
    ),
    "oft patches shared": (Conv, lambda: peft.OFTConfig(oft_block_size=6, block_share=True, target_modules=["c2"])),
    "vera": (llama, lambda: peft.VeraConfig(r=5, target_modules=["q_proj", "k_proj", "down_proj"])),
    "vera gpt2": (gpt2, lambda: peft.VeraConfig(r=40, target_modules=["c_attn", "c_fc"], fan_in_fan_out=True)),
    "pvera": (llama, lambda: peft.PveraConfig(r=5, target_modules=["q_proj", "k_proj", "down_proj"])),
    "randlora": (
        partial(llama, num_hidden_layers=2),
        lambda: peft.RandLoraConfig(r=5, target_modules=["up_proj", "down_proj"]),
    ),
    "randlora gpt2": (
        gpt2,
        lambda: peft.RandLoraConfig(r=6, randlora_alpha=3, target_modules=["c_attn"], fan_in_fan_out=True),
    ),
    "vblora": (
        partial(llama, num_hidden_layers=2),
        lambda: peft.VBLoRAConfig(r=3, num_vectors=9, vector_length=4, target_modules=["q_proj", "k_proj", "up_proj"]),
    ),
    "vblora top k alone": (
        llama,
        lambda: peft.VBLoRAConfig(
            r=2, num_vectors=7, vector_length=8, topk=3, save_only_topk_weights=True, target_modules=QV
        ),
    ),
    "unilora": (
        partial(llama, num_hidden_layers=2),
        lambda: peft.UniLoraConfig(r=3, theta_d_length=50, save_indices=True, target_modules=["k_proj", "down_proj"]),
    ),
    "oft 1x1": (Conv, lambda: peft.OFTConfig(oft_block_size=2, target_modules=["c2p"])),
    "hra": (llama, lambda: peft.HRAConfig(r=4, target_modules=QV)),
    "hra convolution": (Conv, lambda: peft.HRAConfig(r=4, target_modules=["c2"])),
    "boft": (llama, lambda: peft.BOFTConfig(boft_block_size=4, target_modules=QV)),
    "boft by number of blocks": (
        llama,
        lambda: peft.BOFTConfig(boft_block_size=0, boft_block_num=2, target_modules=QV),
    ),
    "boft convolution": (Conv, lambda: peft.BOFTConfig(boft_block_size=3, target_modules=["c2"])),
    "road 1": (llama, lambda: peft.RoadConfig(group_size=8, target_modules=QV)),
    "road 2": (llama, lambda: peft.RoadConfig(variant="road_2", group_size=4, target_modules=QV)),
    "road 4": (llama, lambda: peft.RoadConfig(variant="road_4", group_size=8, target_modules=QV)),
    "psoft": (llama, lambda: peft.PsoftConfig(r=4, target_modules=QV)),
    "psoft series": (
        llama,
        lambda: peft.PsoftConfig(
            r=4, psoft_mag_a=False, psoft_mag_b=False, use_cayley_neumann=True, psoft_dropout=0.0, target_modules=QV
        ),
    ),
    "ia3": (llama, lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"])),
    "ia3 regex": (llama, lambda: peft.IA3Config(target_modules=["v_proj"], feedforward_modules=r".*\.v_proj")),
    "ia3 gpt2": (gpt2, lambda: peft.IA3Config(target_modules=["mlp.c_proj"], feedforward_modules=["mlp.c_proj"])),
    "ia3 convolution": (
        Conv,
        lambda: peft.IA3Config(target_modules=["c2", "c2p", "c3"], feedforward_modules=["c2", "c2p", "c3"]),
    ),
    "ia3 convolution, outputs": (Strided, lambda: peft.IA3Config(target_modules=["0"], feedforward_modules=[])),
    "delora": (
        llama,
        lambda: peft.DeloraConfig(
            r=4, delora_lambda=3, target_modules=QV, rank_pattern={"v_proj": 2}, lambda_pattern={"v_proj": 5}
        ),
    ),
    "miss": (llama, lambda: peft.MissConfig(r=4, target_modules=QV)),
    "miss with a rest": (llama, lambda: peft.MissConfig(r=5, target_modules=["q_proj", "down_proj"])),
    "miss mini": (llama, lambda: peft.MissConfig(r=4, mini_r=2, init_weights="mini", target_modules=QV)),
    "miss bat": (llama, lambda: peft.MissConfig(r=4, init_weights="bat", target_modules=QV)),
    "bd lora": (
        llama,
        lambda: L(
            r=4,
            target_modules=["q_proj", "o_proj", "v_proj"],
            use_bdlora=BdLoraConfig(["o_proj"], ["q_proj"], 2, match_strict=False),
        ),
    ),
}
SMALL = {"oft": 0.1}  # the Neumann series is a rotation for small generators only


def figures(one, two, base, x) -> float:
    """The larger distance of train and eval mode."""
    found = []
    for mode in (True, False):
        for m in (one, two, base):
            m.train(mode)
        each = []
        for m in (one, two, base):
            torch.manual_seed(0)  # PVeRA draws while training
            each.append(output(m, x))
        found.append(distance(*each))
    return max(found)


@pytest.mark.filterwarnings("ignore:Sparse invariant checks")  # PEFT's SHiRA
@pytest.mark.parametrize("case", CASES)
def test_both_directions(case, tmp_path, capsys, record_property):
    build, config = CASES[case]
    small = case.startswith(("oft", "psoft", "road", "ia3"))
    theirs = with_peft(build, config(), 0.1 if small else 0.3)
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

    rw.export(adapter, tmp_path / "back", to="peft")
    back = load_peft(build, tmp_path / "back")
    here = figures(back, theirs, base, x)
    record_property("writes", here)
    assert here <= TOLERANCE
    with capsys.disabled():
        print(f"\n{case}: PEFT -> us {there:.1e}, us -> PEFT {here:.1e}", end=" ")


# -- files that PEFT saved ------------------------------------------------------------------------

shared = pytest.mark.skipif(not FIXTURES.is_dir(), reason="the shared fixtures are not here")
OF_CONV, OF_EMB = (
    {"lora_conv", "lora_conv_dora", "loha_conv", "loha_conv_flat", "lokr_conv", "oft_conv"},
    {"lora_emb", "lora_emb_dora", "lora_bias_lora_only", "hira_emb"},
)
BASES = {
    **dict.fromkeys(OF_CONV, Conv),
    **dict.fromkeys(OF_EMB, Emb),
    "lora_mha": MHA,
    "lora_params_moe": Moe,
    "lora_gpt2": gpt2,
    **dict.fromkeys(("lora_embed_lmhead_tied", "lora_embed_tied_ensure", "lora_trainable_tokens_tied"), tied),
}
READ = [
    *("lora", "lora_bias", "lora_bias_lora_only", "lora_conv", "lora_conv_dora", "lora_dora", "lora_emb"),
    *("lora_emb_dora", "lora_embed_lmhead", "lora_embed_lmhead_tied", "lora_embed_tied_ensure"),
    *("lora_gpt2", "lora_mha", "lora_modules_to_save", "lora_params_moe", "lora_pattern"),
    *("lora_pissa", "lora_seqtask", "lora_trainable_tokens", "lora_trainable_tokens_tied"),
    *("trainable_tokens", "lora_mica", "adalora", "loha", "loha_conv", "loha_conv_flat", "lokr"),
    *("vera", "pvera", "randlora", "vblora"),
    *("lokr_both", "lokr_conv", "lokr_full", "hira", "hira_emb", "oft", "oft_conv", "oft_shared"),
    *("lora_kasa", "tinylora", "fourierft", "waveft", "c3a", "gralora", "gralora_hybrid", "glora"),
    *("lora_bdlora", "boft", "hra", "road", "psoft", "ia3", "delora", "miss", "miss_bat", "miss_mini"),
]
REFUSED = {
    "lora_alora": "alora_invocation_tokens",
    "lora_monteclora": "monteclora_config",
    "lora_velora": "velora_config",
    "unilora": "save_indices=True",
    "vera_noproj": "save_projection=True",
}


def drawn_again(source, target):
    """The folder with every factor drawn at random; copies of one tensor stay copies."""
    file = target / "adapter_model.safetensors"
    shutil.copytree(source, target)
    g = torch.Generator().manual_seed(5)
    found = load_file(file)
    for name, value in found.items():
        if any(mark in name for mark in ("base_layer.weight", "randlora_A", "randlora_B")):
            continue
        noise = torch.randn(value.shape, generator=g)
        found[name] = value * (1 + 0.2 * noise) if "magnitude" in name else value + 0.2 * noise
    if "tied_ensure" in source.name:
        emb, head = ("base_model.model.model.embed_tokens.lora_embedding_", "base_model.model.lm_head.lora_")
        found[f"{head}A.weight"] = found[f"{emb}B"].T.contiguous()
        found[f"{head}B.weight"] = found[f"{emb}A"].T.contiguous()
    save_file(found, file, {"format": "pt"})
    return target


@shared
@pytest.mark.parametrize("name", READ)
def test_every_fixture_of_these_kinds(name, tmp_path):
    """Its weights are of another base: the embeddings that it carries along replace this one's."""
    build = BASES.get(name, llama)
    folder = drawn_again(FIXTURES / name, tmp_path / "theirs")
    ours, base, theirs = made(build), made(build), load_peft(build, folder)
    adapter = rw.formats.peft.load(ours, folder)
    x = inputs(base)
    assert figures(ours, theirs, base, x) <= TOLERANCE
    adapter.save(tmp_path / "own")
    again = made(build)
    rw.load(again, tmp_path / "own")
    assert torch.equal(output(again.eval(), x), output(ours.eval(), x))
    rw.export(adapter, tmp_path / "back")
    assert figures(load_peft(build, tmp_path / "back"), theirs, base, x) <= TOLERANCE


@shared
@pytest.mark.parametrize("name", ["lora_bias", "lora_conv", "oft_conv"])
def test_fixtures_that_train_on(name, tmp_path):
    build = BASES.get(name, llama)
    model = made(build)
    base = {n: p.clone() for n, p in model.state_dict().items()}
    adapter = rw.formats.peft.load(model, drawn_again(FIXTURES / name, tmp_path / "theirs"), trainable=True)
    y = model(inputs(model))
    getattr(y, "logits", y).square().mean().backward()
    before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    adapter.optimizer().step()
    assert not [n for n, p in adapter.named_parameters() if torch.equal(p, before[n])]
    kept = {n: p for n, p in model.state_dict().items() if ".adapters." not in n}
    assert kept.keys() == base.keys() and all(torch.equal(p, base[n]) for n, p in kept.items())
    rw.export(adapter, tmp_path / "back")
    x = inputs(model)
    assert figures(load_peft(build, tmp_path / "back"), model, made(build), x) <= TOLERANCE
    other = made(build)
    rw.attach(other, adapter.recipe)  # its recipe finds the same places again
    assert rw.adapters(other)["default"].keys() == adapter.keys()


@shared
@pytest.mark.parametrize("name", REFUSED)
def test_a_fixture_whose_meaning_would_be_lost(name):
    model = made(BASES.get(name, llama))
    with pytest.raises(rw.errors.ConversionError, match=REFUSED[name]):
        rw.formats.peft.load(model, FIXTURES / name)


@shared
@pytest.mark.parametrize("name", ["lora_mlp", "lora_conv2d", "ia3_mlp"])
def test_files_of_an_old_peft(name):
    folder = SHARED / "data" / "adapter_peft061_dev" / name
    torch.manual_seed(0)
    if name == "lora_conv2d":
        layers = {"conv2d": nn.Conv2d(5, 10, 3), "relu": nn.ReLU(), "flat": nn.Flatten()}
        model = nn.Sequential(OrderedDict(**layers, lin0=nn.Linear(10, 2), sm=nn.LogSoftmax(-1)))
        x = torch.arange(90).float().reshape(2, 5, 3, 3)
    else:
        layers = {"lin0": nn.Linear(10, 20), "relu": nn.ReLU(), "lin1": nn.Linear(20, 2)}
        model = nn.Sequential(OrderedDict(**layers, sm=nn.LogSoftmax(-1)))
        x = torch.arange(90).reshape(9, 10).float()
    rw.formats.peft.load(model.eval(), folder)
    expected = torch.load(folder / "output.pt", "cpu", weights_only=True)
    torch.testing.assert_close(output(model, x), expected, rtol=1e-4, atol=1e-4)


# -- what cannot be kept --------------------------------------------------------------------------


def edited(tmp_path, build=llama, config=None, tensors=None, **settings):
    """A plain LoRA's folder with some settings and tensors changed."""
    save(with_peft(build, config or L(r=4, target_modules=QV)), tmp_path)
    file = tmp_path / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    if tensors:
        weights = tmp_path / "adapter_model.safetensors"
        save_file({**load_file(weights), **tensors}, weights)
    return tmp_path


@pytest.mark.parametrize(
    "settings",
    [
        {"init_lora_weights": "pissa_niter_4"},
        {"init_lora_weights": "olora"},
        {"init_lora_weights": "corda"},
        {"init_lora_weights": "loftq"},
        {"init_lora_weights": "lora_ga"},
        {"layer_replication": [[0, 1], [0, 1]]},
        {"use_qalora": True},
        {"a_key_of_tomorrow": "on"},
        {"peft_type": "PROMPT_TUNING"},
    ],
    ids=str,
)
def test_a_setting_whose_meaning_would_be_lost(settings, tmp_path):
    folder = edited(tmp_path, **settings)
    model = made(llama)
    with pytest.raises(rw.errors.ConversionError, match=next(iter(settings))):
        rw.formats.peft.load(model, folder)
    assert rw.adapters(model) == {}


@pytest.mark.filterwarnings("ignore:Specified to not save")
def test_a_tinylora_without_its_random_matrices(tmp_path):
    config = peft.TinyLoraConfig(u=4, target_modules=QV, save_projection=False)
    with pytest.raises(rw.errors.ConversionError, match="save_projection=True"):
        rw.formats.peft.load(made(llama), edited(tmp_path, config=config))


def test_a_kasa_that_is_cut_from_no_plain_layer(tmp_path):
    for name, build, config in (
        ("conv", Conv, L(r=2, target_modules=["c2p"])),
        ("pissa", llama, L(r=2, init_lora_weights="pissa", target_modules=QV)),
    ):
        folder = edited(tmp_path / name, build, config, kasa_config={"beta": 1e-4, "gamma": 1e-3})
        with pytest.raises(rw.errors.ConversionError, match="plain linear layers"):
            rw.formats.peft.load(made(build), folder)


def test_what_peft_accepts_loads_and_is_told(tmp_path, capsys):
    folder = edited(
        tmp_path,
        config=L(r=4, target_modules=QV, modules_to_save=["lm_head"]),
        modules_to_save=["lm_head", "classifier"],
        a_key_of_tomorrow=None,
        tensors={"base_model.model.classifier.weight": torch.randn(2, 16)},
    )
    rw.formats.peft.load(made(llama), folder)
    told = capsys.readouterr().err
    assert '"classifier.weight" of modules_to_save' in told and "a_key_of_tomorrow" in told


def test_tensors_outside_of_the_targets_are_dropped_as_in_peft(tmp_path, capsys):
    folder = edited(tmp_path, target_modules=["q_proj"])
    adapter = rw.formats.peft.load(made(llama), folder)
    assert list(adapter) == ["model.layers.0.self_attn.q_proj"]
    assert "outside of the target modules" in capsys.readouterr().err


@pytest.mark.parametrize(
    "tensors",
    [
        {"base_model.model.model.nowhere.lora_A.weight": torch.zeros(4, 16)},
        {"base_model.model.model.nowhere.weight": torch.zeros(4, 16)},
        {"base_model.model.model.embed_tokens.weight": torch.zeros(50, 16)},
    ],
    ids=["no such site", "no such tensor", "another size"],
)
def test_another_base(tensors, tmp_path):
    with pytest.raises(rw.errors.BaseMismatch):
        rw.formats.peft.load(made(llama), edited(tmp_path, tensors=tensors))


def test_damaged_files(tmp_path):
    name = "base_model.model.model.layers.0.self_attn.q_proj.lora_A.weight"
    for i, tensors in enumerate(({name: torch.zeros(5, 16)}, {name: torch.full((4, 16), torch.nan)})):
        with pytest.raises(rw.errors.FileFormatError):
            rw.formats.peft.load(made(llama), edited(tmp_path / str(i), tensors=tensors))
    (tmp_path / "0" / "adapter_model.safetensors").write_bytes(b"nothing")
    with pytest.raises(rw.errors.FileFormatError, match="damaged"):
        rw.formats.peft.load(made(llama), tmp_path / "0")
    with pytest.raises(rw.errors.FileFormatError, match="adapter_config.json"):
        rw.formats.peft.load(made(llama), tmp_path)


class Hostile:
    """Runs code when it is unpickled."""

    def __reduce__(self):
        return (exec, ("raise SystemExit('unpickled')",))


def test_a_pickle_is_never_run(tmp_path):
    folder = edited(tmp_path)
    (folder / "adapter_model.safetensors").unlink()
    torch.save({"base_model.model.x": Hostile()}, folder / "adapter_model.bin")
    with pytest.raises(rw.errors.FileFormatError, match="never run"):
        rw.formats.peft.load(made(llama), folder)


@pytest.mark.parametrize("changes", [{"dilation": 2}, {"padding_mode": "reflect"}])
def test_convolutions_that_peft_adapts_otherwise(changes, tmp_path):
    build = lambda: nn.Sequential(OrderedDict(c=nn.Conv2d(4, 8, 3, padding=1, **changes)))  # noqa: E731
    folder = edited(tmp_path, build, L(r=4, target_modules=["c"]))
    with pytest.raises(rw.errors.ConversionError, match=next(iter(changes))):
        rw.formats.peft.load(made(build), folder)
    model = made(build)
    adapter = rw.attach(model, rw.recipe("lora", rank=2, sites=rw.Sites(targets="c")))
    with pytest.raises(rw.errors.ConversionError, match=next(iter(changes))):
        rw.export(adapter, tmp_path / "back")


def test_lora_bias_only_where_peft_has_it(tmp_path):
    sites = rw.Sites(targets=["0", "1"], train=["1.bias"])
    _, adapter = attached(rw.recipe("dora", rank=2, sites=sites), Biases)
    with pytest.raises(rw.errors.ConversionError, match="plain LoRA"):
        rw.export(adapter, tmp_path)
    _, adapter = attached(rw.recipe("lora", rank=2, sites=rw.Sites(targets="0", train=["1.bias"])), Biases)
    with pytest.raises(rw.errors.ConversionError, match="plain LoRA"):
        rw.export(adapter, tmp_path)


def test_oft_of_a_weight_is_no_oft_of_patches(tmp_path):
    _, adapter = attached(rw.recipe("oft", block=4, sites=rw.Sites(targets="c2")), Conv)
    with pytest.raises(rw.errors.ConversionError, match="PatchOFT"):
        rw.export(adapter, tmp_path)


def test_a_magnitude_does_not_cross_groups(tmp_path):
    folder = edited(tmp_path, Conv, L(r=4, target_modules=["c2g"]), use_dora=True)
    with pytest.raises(rw.errors.ConversionError, match="crosses its groups"):
        rw.formats.peft.load(made(Conv), folder)
    _, adapter = attached(rw.recipe("dora", rank=2, sites=rw.Sites(targets="c2g")), Conv)
    with pytest.raises(rw.errors.ConversionError, match="no groups"):
        rw.export(adapter, tmp_path / "back")


GRALORA = peft.GraloraConfig(r=8, gralora_k=4, hybrid_r=2, target_modules=["q_proj"])
GLORA = peft.GloraConfig(r=3, target_modules=["q_proj"])
AS_THEIRS = {
    "gralora_A": ("a", lambda g: g.mT),
    "gralora_B": ("b", lambda g: g.mT),
    "gralora_A_general": ("whole_a", lambda g: g),
    "glora_A": ("gate", lambda g: g),
    "glora_B": ("update", lambda g: g),
}


@pytest.mark.parametrize("config", [GRALORA, GLORA], ids=["gralora", "glora"])
def test_gradients_are_peft_s(config, tmp_path):
    theirs = with_peft(llama, config)
    save(theirs, tmp_path)
    ours = made(llama)
    adapter = rw.formats.peft.load(ours, tmp_path, trainable=True)
    for model in (theirs, ours):
        output = model(inputs(ours)).logits
        output.square().sum().backward()
    (site,) = adapter
    compared = 0
    for name, p in theirs.named_parameters():
        if p.grad is None or (kind := name.split("q_proj.")[-1].split(".")[0]) not in AS_THEIRS:
            continue
        own, turn = AS_THEIRS[kind]
        own += {"Xu": "_a", "Xd": "_b"}.get(name.rpartition(".")[2], "")
        grad = adapter[site][own].grad
        assert (turn(grad) - p.grad).abs().max() <= 1e-5 * p.grad.abs().max(), name
        compared += 1
    assert compared == (3 if config is GRALORA else 4)


def test_a_glora_of_the_bias_is_refused(tmp_path):
    save(with_peft(Emb, peft.GloraConfig(r=3, target_modules=["lin"])), tmp_path)
    with pytest.raises(rw.errors.ConversionError, match="glora_C"):
        rw.formats.peft.load(made(Emb), tmp_path)


def test_a_glora_of_two_kinds_is_refused(tmp_path):
    _, adapter = attached(rw.recipe("glora", rank=2, gate="vector", sites=QVS))
    with pytest.raises(rw.errors.ConversionError, match="of one kind"):
        rw.export(adapter, tmp_path)


def test_our_lora_in_groups_is_one_across_them(tmp_path):
    recipe = rw.recipe("rslora", rank=3, sites=rw.Sites(targets=["c2", "c2g"]))
    report, figure = round_trip(recipe, tmp_path, Conv)
    assert report.method == "LORA"
    assert figure <= TOLERANCE


def test_a_peft_model_is_refused(tmp_path):
    with pytest.raises(rw.errors.ModelTypeError, match="unload"):
        rw.attach(with_peft(llama, L(r=4, target_modules=QV)), rw.recipe("lora"))


# -- what only we have ----------------------------------------------------------------------------


def attached(recipe, build=llama):
    """A model with an adapter off its start."""
    model = made(build)
    adapter = rw.attach(model, recipe)
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=g))
    return model, adapter


def round_trip(recipe, path, build=llama):
    model, adapter = attached(recipe, build)
    report = rw.export(adapter, path)
    base = made(build)
    return report, figures(load_peft(build, path), model, base, inputs(base))


QVS = rw.Sites(targets=("q_proj", "v_proj"))
MIXED = rw.Sites(targets=("q_proj", "v_proj"), overrides={"v_proj": {"rank": 2, "alpha": 5.0}})


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        (rw.recipe("lora", rank=4, sites=MIXED), "LORA"),
        (rw.recipe("rslora", rank=4, sites=QVS), "LORA"),
        (rw.recipe("pissa", rank=4, sites=MIXED), "LORA"),
        (rw.recipe("dora_svd", rank=4, sites=QVS), "LORA"),
        (rw.recipe("svd", rank=4, sites=MIXED), "ADALORA"),
        (rw.recipe("krona", sites=QVS), "LOKR"),
        (rw.recipe("loha", rank=2, sites=MIXED), "LOHA"),
        (rw.recipe("oft", block=8, sites=QVS), "OFT"),
        (rw.recipe("lora", rank=4, sites=rw.Sites(targets="q_proj", train="norm")), "LORA"),
        (rw.recipe("lora", rank=4, sites=rw.Sites(targets=(), tokens={"embed_tokens": (5, 2)})),)
        + ("TRAINABLE_TOKENS",),
    ],
    ids=lambda v: getattr(v, "name", v),
)
def test_ours_in_peft(recipe, kind, tmp_path):
    report, figure = round_trip(recipe, tmp_path)
    assert report.method == kind
    assert figure <= TOLERANCE


OTHERS = {"glm4_moe": "shared_experts.up_proj", "phimoe": "router"}


@pytest.mark.parametrize("kind", OTHERS)
def test_layers_that_peft_would_take_for_others(kind, tmp_path):
    """GLM's dense and shared projections are no parts of its experts; PhiMoE's router is more than a linear layer."""
    build = partial(mixture, kind)
    _, figure = round_trip(rw.recipe("lora", rank=4), tmp_path, build)
    assert figure <= TOLERANCE
    back, base, (model, _) = made(build), made(build), attached(rw.recipe("lora", rank=4), build)
    rw.formats.peft.load(back, tmp_path)
    assert figures(back, model, base, inputs(base)) <= TOLERANCE


@pytest.mark.parametrize("kind", OTHERS)
def test_a_dora_where_peft_would_take_a_layer_for_another_is_refused(kind, tmp_path):
    _, adapter = attached(rw.recipe("dora", rank=4, sites=rw.Sites(targets=OTHERS[kind])), partial(mixture, kind))
    with pytest.raises(rw.errors.ConversionError, match="no bare parameters"):
        rw.export(adapter, tmp_path)


def test_a_weight_that_the_model_reads_itself_is_told(tmp_path):
    """WavLM's attention never runs its projections; PEFT's adapters on them do nothing."""
    model = transformers.WavLMModel(
        transformers.WavLMConfig(
            hidden_size=16, num_hidden_layers=1, num_attention_heads=2, intermediate_size=16, conv_dim=(8,),
            conv_stride=(2,), conv_kernel=(2,), num_conv_pos_embeddings=4, num_conv_pos_embedding_groups=2,
        )
    )  # fmt: skip
    adapter = rw.attach(model, rw.recipe("lora", rank=2, sites=rw.Sites(targets=("q_proj", "intermediate_dense"))))
    (note,) = rw.export(adapter, tmp_path).notes
    assert note.startswith("encoder.layers.0.attention.q_proj: where the model reads this weight itself")


def test_parts_of_a_fused_projection_become_one_lora(tmp_path):
    sites = rw.Sites(targets="c_attn", parts={"c_attn": ("q", "v")})
    _, figure = round_trip(rw.recipe("lora", rank=3, sites=sites), tmp_path, gpt2)
    assert figure <= TOLERANCE


def test_what_peft_has_not_is_refused(tmp_path):
    _, adapter = attached(rw.recipe("dora_lokr", rank=2, sites=QVS))
    with pytest.raises(rw.errors.ConversionError, match="no such method"):
        rw.export(adapter, tmp_path / "none")
    assert not (tmp_path / "none").exists()


@pytest.mark.parametrize("method", ["hira", "dora_lokr", "quanta", "sinelora", "krona"])
def test_what_peft_has_not_is_truncated_where_a_rank_is_given(method, tmp_path):
    """The error that is told is that of the best approximation of the rank, and it is the file's."""
    model, adapter = attached(rw.recipe(method, sites=rw.Sites(targets="q_proj"), **RANKED.get(method, {})))
    report = rw.export(adapter, tmp_path, rank=5)
    if report.error == 0:  # PEFT has it
        assert method in ("krona", "hira")
        return
    assert report.method == "LORA" and f"{report.error:.1%}" in str(report)
    base, other, worst = made(llama), made(llama), 0.0
    rw.formats.peft.load(other, tmp_path)
    for site, factors in adapter.sites.items():
        w = base.get_submodule(site).weight.detach()
        change = factors.structure.weight({k: v.detach() for k, v in adapter[site].items()}, w) - w
        written = rw.adapters(other)["default"].sites[site]
        near = written.structure.weight({k: v.detach() for k, v in written.factors().items()}, w) - w
        s = torch.linalg.svdvals(change.detach().double())
        best = float(s[5:].norm() / s.norm())
        assert float((near - change).norm() / change.norm()) == pytest.approx(best, rel=1e-3)
        worst = max(worst, best)
    assert report.error == pytest.approx(worst, rel=1e-6)
    with pytest.raises(rw.errors.RankError):
        rw.export(adapter, tmp_path / "no", rank=10**6)


RANKED = {"hira": {"rank": 4}, "dora_lokr": {"rank": 2}, "sinelora": {"rank": 2}}


def test_dora_is_of_all_sites_or_of_none(tmp_path):
    sites = rw.Sites(targets=("q_proj", "v_proj"), overrides={"v_proj": rw.recipe("lora", rank=2).structure})
    _, adapter = attached(rw.recipe("dora", rank=4, sites=sites))
    with pytest.raises(rw.errors.ConversionError, match="DoRA"):
        rw.export(adapter, tmp_path)


def test_one_projection_of_an_attention(tmp_path):
    _, figure = round_trip(rw.recipe("lora", rank=2, sites=rw.Sites(targets="in_proj_weight")), tmp_path, MHA)
    assert figure <= TOLERANCE


def test_projections_of_an_attention_share_rank_and_alpha(tmp_path):
    sites = rw.Sites(targets=("in_proj_weight", "out_proj"), overrides={"out_proj": {"rank": 3}})
    _, adapter = attached(rw.recipe("lora", rank=2, sites=sites), MHA)
    with pytest.raises(rw.errors.ConversionError, match="one rank"):
        rw.export(adapter, tmp_path)


def test_oft_blocks_of_one_size(tmp_path):
    config = peft.OFTConfig(r=2, oft_block_size=0, target_modules=["q_proj", "down_proj"])
    save(with_peft(llama, config, 0.1), tmp_path / "theirs")
    adapter = rw.formats.peft.load(made(llama), tmp_path / "theirs")
    with pytest.raises(rw.errors.ConversionError, match="oft_block_size"):
        rw.export(adapter, tmp_path / "back")


def test_the_settings_are_whole_and_tell_nothing_of_this_machine(tmp_path):
    save(with_peft(llama, L(r=4, target_modules=QV)), tmp_path / "theirs")
    _, adapter = attached(rw.recipe("lora", rank=4, sites=QVS))
    rw.export(adapter, tmp_path / "ours")
    ours = json.loads((tmp_path / "ours" / "adapter_config.json").read_text())
    assert str(tmp_path) not in json.dumps(ours)
    theirs = peft.PeftConfig.from_pretrained(tmp_path / "theirs").to_dict()
    there = peft.PeftConfig.from_pretrained(tmp_path / "ours").to_dict()
    assert ours.keys() <= there.keys()  # every setting is one of PEFT's, and what is not written has its default
    differ = {k for k in there if there[k] != theirs[k]}
    assert differ <= {"target_modules", "task_type", "auto_mapping", "lora_alpha"}


def test_an_unknown_tool(tmp_path):
    _, adapter = attached(rw.recipe("lora", rank=4, sites=QVS))
    with pytest.raises(rw.errors.UnknownName, match="peft"):
        rw.export(adapter, tmp_path, to="elsewhere")


def test_a_converted_adapter_trains_on(tmp_path):
    save(with_peft(llama, L(r=4, target_modules=QV, modules_to_save=["lm_head"])), tmp_path)
    model = made(llama)
    adapter = rw.formats.peft.load(model, tmp_path, trainable=True)
    output_before = output(model, inputs(model))
    optimizer = adapter.optimizer()
    model(inputs(model)).logits.square().mean().backward()
    optimizer.step()
    assert not torch.equal(output(model, inputs(model)), output_before)
    assert {n for n, p in model.named_parameters() if p.requires_grad and "adapters" not in n} == set()
