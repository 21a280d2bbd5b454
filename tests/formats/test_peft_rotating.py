"""PEFT's rotations, gates, bounded and shared updates: gradients, levels of a butterfly, and what is refused."""

import json

import peft
import pytest
import torch
from peft.tuners.boft import layer as boft
from peft.tuners.lora import BdLoraConfig
from peft_models import Conv, distance, gpt2, inputs, llama, load_peft, made, output, save, with_peft

import rankwise as rw
from rankwise.errors import ConversionError, FileFormatError

QV = ["q_proj", "v_proj"]
CONFIGS = {
    "hra": lambda: peft.HRAConfig(r=4, target_modules=QV),
    "boft": lambda: peft.BOFTConfig(boft_block_size=4, target_modules=QV),
    "road": lambda: peft.RoadConfig(variant="road_4", group_size=8, target_modules=QV),
    "psoft": lambda: peft.PsoftConfig(r=4, target_modules=QV),
    "ia3": lambda: peft.IA3Config(target_modules=["k_proj", "down_proj"], feedforward_modules=["down_proj"]),
    "delora": lambda: peft.DeloraConfig(r=4, delora_lambda=3, target_modules=QV),
    "miss": lambda: peft.MissConfig(r=5, target_modules=QV),
    "miss mini": lambda: peft.MissConfig(r=4, mini_r=2, init_weights="mini", target_modules=QV),
    "miss bat": lambda: peft.MissConfig(r=4, init_weights="bat", target_modules=QV),
    "bd lora": lambda: peft.LoraConfig(
        r=4, target_modules=["q_proj", "o_proj"], use_bdlora=BdLoraConfig(["o_proj"], ["q_proj"], 2)
    ),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_the_gradients_are_pefts(name, tmp_path):
    """PEFT's gradients, saved in place of its factors, are read as ours."""
    theirs = with_peft(llama, CONFIGS[name](), 0.1)
    save(theirs, tmp_path / "factors")
    ours, shown = made(llama), made(llama)
    adapter = rw.formats.peft.load(ours, tmp_path / "factors", trainable=True)
    x = inputs(ours)
    for model in (ours, theirs):
        model.eval()(x).logits.square().sum().backward()
    with torch.no_grad():
        for p in theirs.parameters():
            if p.requires_grad:
                p.copy_(p.grad)
    save(theirs, tmp_path / "gradients")
    wanted = rw.formats.peft.load(shown, tmp_path / "gradients")
    compared = 0
    for site, factors in adapter.items():
        for factor, value in factors.items():
            if value.requires_grad:
                # PEFT's Q - Q^T holds every number of our generators twice
                want = wanted[site][factor].detach() * (2 if (name, factor) == ("boft", "q") else 1)
                torch.testing.assert_close(value.grad, want, rtol=1e-4, atol=1e-4 * float(want.abs().max()))
                assert want.any()
                compared += 1
    assert compared == len(list(adapter.named_parameters(trainable=True)))


class Blocks:
    """What PEFT's CUDA extension does, in PyTorch."""

    @staticmethod
    def apply(blocks):
        return torch.stack([torch.block_diag(*level) for level in blocks])


@pytest.mark.parametrize("levels", [2, 3])
def test_levels_of_a_butterfly(levels, tmp_path, monkeypatch):
    """PEFT takes more than one only with its CUDA extension."""
    monkeypatch.setattr(boft, "get_fbd_cuda", lambda: True)
    monkeypatch.setattr(boft, "FastBlockDiag", Blocks)
    config = peft.BOFTConfig(boft_block_size=4, boft_n_butterfly_factor=levels, target_modules=QV)
    theirs = with_peft(llama, config, 0.3).eval()
    save(theirs, tmp_path / "theirs")
    ours, base = made(llama).eval(), made(llama).eval()
    adapter = rw.formats.peft.load(ours, tmp_path / "theirs")
    x = inputs(ours)
    assert adapter.recipe.structure.levels == levels
    assert distance(output(ours, x), output(theirs, x), output(base, x)) <= 1e-5
    rw.export(adapter, tmp_path / "back")
    back = load_peft(llama, tmp_path / "back").eval()
    assert distance(output(back, x), output(theirs, x), output(base, x)) <= 1e-5


def changed(folder, config, build=llama, **settings):
    save(with_peft(build, config, 0.1), folder)
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **settings}))
    return folder


@pytest.mark.parametrize(
    ("config", "settings", "build", "message"),
    [
        (lambda: peft.HRAConfig(r=3, target_modules=QV), {}, llama, "even"),
        (CONFIGS["hra"], {"apply_GS": True}, llama, "apply_GS"),
        (CONFIGS["psoft"], {"psoft_svd": "lowrank"}, llama, "psoft_svd"),
        (CONFIGS["psoft"], {"ab_svd_init": "pissa_init"}, llama, "pissa_init"),
        (lambda: peft.PsoftConfig(r=4, psoft_orth=False, target_modules=QV), {}, llama, "psoft_orth"),
        (lambda: peft.PsoftConfig(r=4, psoft_mag_a=False, target_modules=QV), {}, llama, "one of its two vectors"),
        (CONFIGS["psoft"], {"use_cayley_neumann": True, "num_cayley_neumann_terms": 2}, llama, "fewer than 3"),
        (lambda: peft.IA3Config(target_modules=["c_attn"], feedforward_modules=[]), {}, gpt2, "a bias, on which"),
        (lambda: peft.IA3Config(target_modules=["c2g"], feedforward_modules=["c2g"]), {}, Conv, "groups=2"),
    ],
)
def test_what_is_another_map_is_refused(config, settings, build, message, tmp_path):
    folder = changed(tmp_path, config(), build, **settings)
    with pytest.raises(ConversionError, match=message):
        rw.formats.peft.load(made(build), folder)


def test_tensors_and_settings_that_differ(tmp_path):
    with pytest.raises(FileFormatError, match="q_proj"):
        rw.formats.peft.load(made(llama), changed(tmp_path, CONFIGS["road"](), variant="road_1"))


def exported(recipe, path, build=llama):
    """The report, and how far PEFT's outputs are from ours."""
    model = made(build)
    adapter = rw.attach(model, recipe)
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.1 * torch.randn(p.shape, generator=torch.Generator().manual_seed(3)))
    report, x = rw.export(adapter, path), inputs(model)
    back = load_peft(build, path)
    return report, distance(output(back.eval(), x), output(model.eval(), x), output(made(build).eval(), x))


QVS = rw.Sites(targets=("q_proj", "v_proj"))


@pytest.mark.parametrize(
    ("recipe", "kind"),
    [
        (rw.recipe("hra", rank=4, sites=QVS), "HRA"),
        (rw.recipe("boft", block=4, levels=1, sites=QVS), "BOFT"),
        (rw.recipe("road", variant=2, group=8, sites=QVS), "ROAD"),
        (rw.recipe("psoft", rank=4, terms=6, sites=QVS), "PSOFT"),
        (rw.recipe("ia3", sites=rw.Sites(("k_proj", "down_proj"), overrides={"down_proj": {"side": "in"}})), "IA3"),
        (rw.recipe("delora", rank=4, strength=2.0, from_zero=True, sites=QVS), "DELORA"),
        (rw.recipe("delora", rank=4, strength=2.0, sites=QVS), "LORA"),
        (rw.recipe("miss", rank=4, shard=2, sites=QVS), "MISS"),
        (rw.recipe("bat", rank=4, sites=QVS), "MISS"),
        (rw.recipe("bd_lora", rank=4, sites=QVS), "LORA"),
    ],
    ids=lambda v: getattr(v, "name", v),
)
def test_ours_in_peft(recipe, kind, tmp_path):
    report, figure = exported(recipe, tmp_path)
    assert report.method == kind
    assert figure <= 1e-5


def test_what_peft_cannot_say_is_refused(tmp_path):
    with pytest.raises(ConversionError, match="position of a kernel"):
        exported(rw.recipe("ia3", side="in", sites=rw.Sites("c2")), tmp_path, Conv)
    with pytest.raises(ConversionError, match="4 terms"):
        exported(rw.recipe("psoft", rank=4, terms=3, sites=QVS), tmp_path)
    with pytest.raises(ConversionError, match="a bias, on which"):
        exported(rw.recipe("ia3", sites=rw.Sites("c_attn")), tmp_path, gpt2)


def test_another_principal_part_is_refused(tmp_path):
    model = made(llama)
    adapter = rw.attach(model, rw.recipe("psoft", rank=4, sites=QVS))
    with torch.no_grad():
        model.model.layers[0].self_attn.q_proj.weight.add_(0.5)
    with pytest.raises(ConversionError, match="makes .* anew"):
        rw.export(adapter, tmp_path)
