"""Factors that several sites have in common: one parameter, one tensor in the file, one update."""

import copy
import pickle

import pytest
import torch
from safetensors import safe_open
from torch import nn

import rankwise as rw
from rankwise.structures import VeRA
from tiny_models import llama, shake, tokens

SITES = rw.Sites(targets=("q_proj", "k_proj", "v_proj", "o_proj"))  # 32 x 32 and 16 x 32, of two blocks


def adapted(name="share_lora", **options):
    torch.manual_seed(0)
    model = llama()
    adapter = rw.attach(model, rw.recipe(name, rank=4, sites=SITES, **options))
    return model, adapter


def test_a_shared_factor_is_one_parameter():
    model, adapter = adapted()
    assert len({id(adapter[site]["a"]) for site in adapter}) == 1
    assert len({id(adapter[site]["b"]) for site in adapter}) == 8
    names = [name for name, _ in adapter.named_parameters()]
    assert len(names) == len(set(names)) == 9
    ours = {id(p) for p in adapter.parameters()}
    assert ours == {id(p) for p in model.parameters() if p.requires_grad}
    assert sum(p.numel() for p in adapter.parameters()) == 4 * 32 + 4 * (4 * 32 + 4 * 16)
    assert rw.targets(llama(), adapter.recipe).parameters == sum(p.numel() for p in adapter.parameters())


def test_factors_of_unlike_shapes_are_apart():
    _, adapter = adapted("tied_lora")
    assert len({id(adapter[site]["a"]) for site in adapter}) == 2  # of 32 x 32 and of 16 x 32
    assert sum(p.numel() for p in adapter.parameters()) == 4 * (64 + 48) + 4 * (4 + 32) + 4 * (4 + 16)


def test_the_gradient_is_the_sum_over_the_sites():
    model, adapter = adapted("share_lora")
    shake(adapter, 0.05)
    x = tokens()
    model(input_ids=x, labels=x).loss.backward()
    shared = adapter["model.layers.0.self_attn.q_proj"]["a"].grad
    other = llama()
    apart = rw.attach(other, rw.recipe("lora", rank=4, sites=SITES))
    with torch.no_grad():
        for site in apart:
            for name, value in adapter[site].items():
                apart[site][name].copy_(value)
    other(input_ids=x, labels=x).loss.backward()
    torch.testing.assert_close(shared, sum(apart[site]["a"].grad for site in apart))


@pytest.mark.parametrize("name", ["share_lora", "tied_lora", "vera"])
def test_the_file_has_it_once(name, tmp_path):
    model, adapter = adapted(name)
    shake(adapter, 0.05)
    adapter.save(tmp_path)
    with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        assert len(file.keys()) == len(list(adapter.named_parameters()))
    other = llama()
    loaded = rw.load(other, tmp_path, trainable=True)
    x = tokens()
    assert torch.equal(other(x).logits, model(x).logits)
    one, two = (loaded[f"model.layers.{i}.self_attn.q_proj"]["a"] for i in (0, 1))
    assert one is two


def test_copies_and_pickles_keep_it_shared():
    model, _ = adapted()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        sites = rw.adapters(other)["default"].sites if "default" in rw.adapters(other) else {}
        assert len({id(f.factors()["a"]) for f in sites.values()}) == 1
        pool = other._modules["adapters"]._modules["default"]
        assert {id(p) for p in pool.parameters()} == {id(f.factors()["a"]) for f in sites.values()}
        assert torch.equal(other(tokens()).logits, model(tokens()).logits)


def test_detach_leaves_the_model_as_it_was():
    model, adapter = adapted()
    adapter.detach()
    base = llama()
    assert [n for n, _ in model.named_parameters()] == [n for n, _ in base.named_parameters()]
    assert [n for n, _ in model.named_modules()] == [n for n, _ in base.named_modules()]


def test_two_adapters_have_pools_of_their_own():
    model, one = adapted()
    two = rw.attach(model, rw.recipe("share_lora", rank=4, sites=SITES), "two")
    site = "model.layers.0.self_attn.q_proj"
    assert one[site]["a"] is not two[site]["a"]
    one.detach()
    assert two[site]["a"] is two["model.layers.1.self_attn.q_proj"]["a"]
    assert model(tokens()).logits.isfinite().all()


def test_the_bases_own_checkpoint_has_no_shared_factor(tmp_path):
    model, _ = adapted()
    model.save_pretrained(tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        assert not [key for key in file.keys() if "adapters" in key]  # noqa: SIM118


def test_a_container_as_a_model():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    x = torch.randn(2, 8)
    before = model(x)
    adapter = rw.attach(model, rw.Recipe(VeRA(4)))
    assert torch.equal(model(x), before) and adapter["0"]["a"] is adapter["2"]["a"]
    adapter.detach()
    assert [n for n, _ in model.named_modules()] == ["", "0", "1", "2"]


def test_every_solver_meets_it_once():
    for solver in (rw.solvers.AdamW(), rw.solvers.LoRAPlus(), rw.solvers.SGD()):
        model, adapter = adapted("share_lora", solver=solver)
        shake(adapter, 0.05)
        optimizer = adapter.optimizer(1e-3)
        held = [id(p) for group in optimizer.param_groups for p in group["params"]]
        assert len(held) == len(set(held)) == 9
        x = tokens()
        model(input_ids=x, labels=x).loss.backward()
        optimizer.step()
        assert adapter["model.layers.0.self_attn.q_proj"]["a"] is adapter["model.layers.1.self_attn.q_proj"]["a"]


def test_the_start_of_the_first_site_is_that_of_all():
    _, adapter = adapted("share_lora", init=rw.inits.Orthogonal())
    a = adapter["model.layers.1.self_attn.o_proj"]["a"]
    torch.testing.assert_close(a @ a.mT, torch.eye(4))
