"""PEFT's methods whose layers have tensors in common: gradients, shapes that it cannot hold."""

from functools import partial

import peft
import pytest
import torch
from peft_models import inputs, llama, load_peft, made, output, save, with_peft

import rankwise as rw

TWO = partial(llama, num_hidden_layers=2)
QK = ["q_proj", "k_proj"]
CASES = {
    "vera": (peft.VeraConfig(r=5, target_modules=QK), {"u": "vera_lambda_d", "v": "vera_lambda_b"}),
    "randlora": (
        peft.RandLoraConfig(r=5, randlora_alpha=5, target_modules=["up_proj", "q_proj"]),
        {"l": "randlora_lambda", "g_in": "randlora_gamma"},
    ),
    "vblora": (
        peft.VBLoRAConfig(r=2, num_vectors=7, vector_length=4, target_modules=QK),
        {"logits_a": "vblora_logits_A", "logits_b": "vblora_logits_B", "bank": "vblora_vector_bank"},
    ),
    "unilora": (
        peft.UniLoraConfig(r=3, theta_d_length=40, save_indices=True, target_modules=QK),
        {"theta": "unilora_theta_d"},
    ),
}


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_pefts(case, tmp_path):
    config, names = CASES[case]
    theirs = with_peft(TWO, config).train()
    save(theirs, tmp_path)
    ours = made(TWO)
    adapter = rw.formats.peft.load(ours, tmp_path, trainable=True)
    x = inputs(ours)
    for model in (ours, theirs):
        model.train()
        model(x).logits.square().mean().backward()
    found = dict(theirs.named_parameters())
    for name, parameter in adapter.named_parameters(trainable=True):
        site, _, factor = name.rpartition("/")
        at = [p for n, p in found.items() if n.endswith(f"{site}.{names[factor]}.default")]
        at = at or [p for n, p in found.items() if n.endswith(f".{names[factor]}.default")]
        want = at[0].grad.mT if factor == "l" else at[0].grad
        torch.testing.assert_close(parameter.grad, want, rtol=1e-4, atol=1e-5 * float(want.abs().max()))
    assert len(list(adapter.parameters())) == sum(p.requires_grad for p in found.values())


def test_bases_of_layers_of_unlike_shapes_are_read_and_not_written(tmp_path):
    theirs = with_peft(TWO, CASES["randlora"][0])
    save(theirs, tmp_path)
    ours = made(TWO)
    adapter = rw.formats.peft.load(ours, tmp_path)
    x = inputs(ours)
    torch.testing.assert_close(output(ours, x), output(theirs, x), rtol=1e-4, atol=1e-4)
    with pytest.raises(rw.errors.ConversionError, match="layers of unlike shapes have their own"):
        rw.export(adapter, tmp_path / "back")


def test_a_pair_for_each_shape_is_not_written_and_a_wide_one_is_cut(tmp_path):
    sites = rw.Sites(("q_proj", "k_proj"))
    with pytest.raises(rw.errors.ConversionError, match="widths"):
        rw.export(rw.attach(made(TWO), rw.recipe("vera", rank=5, sites=sites)), tmp_path)
    model = made(TWO)
    adapter = rw.attach(model, rw.recipe("vera", rank=5, widths=(50, 40), sites=sites))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter))
    rw.export(adapter, tmp_path)
    x = inputs(model)
    assert (output(model, x) - output(made(TWO), x)).abs().max() > 0.1
    torch.testing.assert_close(output(load_peft(TWO, tmp_path), x), output(model, x), rtol=1e-4, atol=1e-5)
