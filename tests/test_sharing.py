"""Factors that several sites have in common: one parameter, one tensor in the file, one update."""

import copy
import pickle

import pytest
import torch
from safetensors import safe_open
from torch import nn

import rankwise as rw
from rankwise.errors import IncompatibleAxes, RankError
from rankwise.structures import NOLA, BSLoRA, LoRA, Magnitude, PVeRA, RandLoRA, RaSA, UniLoRA, VBLoRA, VeRA
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


OPTIONS = {
    "share_lora": {},
    "tied_lora": {},
    "vera": {"widths": (32, 32)},
    "rasa": {},
    "bslora": {"intra": 2, "inter": 3, "widths": (32, 32)},
    "vblora": {"vectors": 8, "length": 8},
    "randlora": {},
    "unilora": {"size": 90},
    "nola": {"bases": 5},
}


@pytest.mark.parametrize("name", OPTIONS)
def test_the_file_has_it_once(name, tmp_path):
    model, adapter = adapted(name, **OPTIONS[name])
    shake(adapter, 0.05)
    adapter.save(tmp_path)
    with safe_open(tmp_path / "adapter.safetensors", "pt") as file:
        assert len(file.keys()) == len(list(adapter.named_parameters()))
    other = llama()
    loaded = rw.load(other, tmp_path, trainable=True)
    x = tokens()
    assert torch.equal(other(x).logits, model(x).logits)
    one, two = (loaded[f"model.layers.{i}.self_attn.q_proj"] for i in (0, 1))
    for key, factor in loaded.sites["model.layers.0.self_attn.q_proj"].described.items():
        block = factor.shared is not None and "block 0" in factor.shared  # BSLoRA's own of a block
        assert (one[key] is two[key]) == (factor.shared is not None and not block)
    again = copy.deepcopy(model)
    assert torch.equal(again(x).logits, model(x).logits)


def test_copies_and_pickles_keep_it_shared():
    model, _ = adapted()
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        sites = rw.adapters(other)["default"].sites if "default" in rw.adapters(other) else {}
        assert len({id(f.factors()["a"]) for f in sites.values()}) == 1
        pool = other._modules["adapters"]._modules["default"]
        assert {id(p) for p in pool.parameters()} == {id(f.factors()["a"]) for f in sites.values()}
        assert torch.equal(other(tokens()).logits, model(tokens()).logits)


# of tiny_models.llama's attention: q, o 32 x 32 and k, v 16 x 32, two blocks; r = 4
FORMULAS = {
    "pvera": 8 * 2 * 4 + 4 * (32 + 16),
    "vera": 8 * 4 + 4 * (32 + 16),
    "rasa": 4 * (64 + 48) * 4 + 8 * (4 - 1 + 2),
    "bslora": 4 * 4 * (64 + 48) + (2 * 2 + 3) * 64,
    "vblora": 8 * 8 + 8 * 4 * (4 * 8 + 4 * 6),
    "randlora": 4 * 8 * (4 + 32) + 4 * 4 * (4 + 16),
    "unilora": 90,
    "nola": 8 * 2 * 5,
}


@pytest.mark.parametrize("name", FORMULAS)
def test_the_size_of_the_whole_model_is_the_papers(name):
    _, adapter = adapted(name, **OPTIONS.get(name, {}))
    assert sum(p.numel() for p in adapter.parameters()) == FORMULAS[name]
    assert rw.targets(llama(), adapter.recipe).parameters == FORMULAS[name]


def low(adapter, site):
    """The update of a site as LoRA."""
    held = adapter.sites[site]
    return held.structure.correction(held.factors(), None).op.lower()


@pytest.mark.parametrize(
    ("name", "rank"), [("vera", 4), ("rasa", 5), ("bslora", 9), ("vblora", 4), ("unilora", 4), ("nola", 4)]
)
def test_the_rank_of_an_export(name, rank):
    _, adapter = adapted(name, **OPTIONS[name])
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(torch.randn_like(parameter))
    pair = low(adapter, "model.layers.1.self_attn.k_proj")
    assert pair.left.shape[-1] == rank == torch.linalg.matrix_rank(pair.left.double() @ pair.right.double())


def test_bases_give_full_rank():
    _, adapter = adapted("randlora")
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.copy_(torch.randn_like(parameter))
    pair = low(adapter, "model.layers.1.self_attn.k_proj")
    assert torch.linalg.matrix_rank(pair.left.double() @ pair.right.double()) == 16


@pytest.mark.parametrize("size", [90, 3000])
def test_one_vector_by_an_isometry(size):
    """||P theta|| = ||theta|| over all sites of the model, wherever theta is used."""
    adapter = rw.attach(llama(), rw.recipe("unilora", rank=4, size=size, sites=SITES))
    first = next(iter(adapter.values()))
    chosen = torch.cat([f[k].flatten() for f in adapter.values() for k in ("index_a", "index_b")])
    assert torch.equal(first["count"], torch.bincount(chosen, minlength=size).float())
    assert (first["count"] > 0).all() == (size == 90)
    theta = torch.randn(size) * (first["count"] > 0)
    scaled = theta * first["count"].clamp_min(1).rsqrt()
    torch.testing.assert_close(scaled[chosen].square().sum(), theta.square().sum())


def test_an_anchor_counts_all_sites():
    model = llama()
    adapter = rw.attach(model, rw.Recipe(rw.structures.Anchored(UniLoRA(4, 90)), sites=SITES))
    torch.testing.assert_close(model(tokens()).logits, llama()(tokens()).logits)
    f = adapter["model.layers.1.self_attn.q_proj"]
    assert torch.equal(f["anchor_count"], f["count"]) and f["anchor_count"] is not f["count"]


def test_layers_of_all_widths_slice_one_pair():
    model = llama()
    adapter = rw.attach(model, rw.recipe("vera", rank=50, widths=(64, 64), sites=rw.Sites(("attention", "mlp"))))
    assert len({id(f["a"]) for f in adapter.values()}) == 1 == len({id(f["b"]) for f in adapter.values()})
    assert torch.equal(model(tokens()).logits, llama()(tokens()).logits)


@pytest.mark.parametrize("wrap", [lambda s: s, Magnitude])
def test_a_drawn_latent_vector_has_its_mean_and_variance(wrap):
    torch.manual_seed(0)
    layer = nn.Linear(6, 5).double()
    model = nn.Sequential(layer).eval()
    adapter = rw.attach(model, rw.Recipe(wrap(PVeRA(3, None))))
    shake(adapter, 0.5)
    x = torch.randn(6, dtype=torch.float64)
    f, whole = adapter["0"], adapter.sites["0"].structure.weight(adapter["0"], layer.weight)
    want, many = whole @ x + layer.bias, model.train()(x.expand(20000, 6))
    inner = layer.weight + f["v"][:, None] * (f["b"] @ torch.diag(f["u"][:3]) @ f["a"][:3])
    scale = f["magnitude"] / inner.norm(dim=1) if "magnitude" in f else torch.ones(5)
    deviation = torch.diag((f["u"][3:] * (f["a"][3:] @ x) / 2).exp())
    std = scale.abs() * (f["v"][:, None] * (f["b"] @ deviation)).norm(dim=1)
    torch.testing.assert_close(many.std(0), std, rtol=0.03, atol=0)
    assert ((many.mean(0) - want).abs() < 5 * std / 20000**0.5).all()
    torch.testing.assert_close(model.eval()(x[None])[0], want)


def test_where_nothing_can_be_drawn():
    with pytest.raises(IncompatibleAxes, match="Take VeRA there"):
        rw.attach(nn.Sequential(nn.Conv1d(4, 4, 1)), rw.Recipe(PVeRA(2), sites=rw.Sites("0")))
    for make in (lambda: rw.structures.Stack(LoRA(2), PVeRA(2)), lambda: rw.structures.Rows(PVeRA(2), (("q", 0, 2),))):
        with pytest.raises(IncompatibleAxes, match="drawn while training"):
            make()


def test_ranks_are_pooled_by_name():
    _, adapter = adapted("rasa")
    q0, q1, o0 = (adapter[f"model.layers.{at[1]}.self_attn.{at[0]}_proj"] for at in ("q0", "q1", "o0"))
    assert q0["a_s"] is q1["a_s"] and q0["a_s"] is not o0["a_s"] and q0["a"] is not q1["a"]
    assert q0["e"].tolist() == pytest.approx([4 / 6] * 3) and q0["e_s"].tolist() == pytest.approx([1.0] * 2)


def test_the_same_random_numbers_for_the_same_key():
    """Those of a key and place are these, whatever draws elsewhere."""
    from rankwise.structures.bases import uniform

    some = uniform(torch.tensor([[7], [8]]), 2, 3, 5, torch.float64)
    assert torch.equal(some[0, 1:], uniform(torch.tensor([7]), 3, 2, 5, torch.float64))
    assert torch.equal(some.float(), uniform(torch.tensor([[7], [8]]), 2, 3, 5, torch.float32))
    many = uniform(torch.tensor([7]), 0, 100, 1000, torch.float64)
    assert many.abs().max() <= 1 and abs(many.mean()) < 0.01 and abs(many.var() * 3 - 1) < 0.02
    assert torch.corrcoef(many).fill_diagonal_(0).abs().max() < 0.2


@pytest.mark.parametrize(
    ("make", "error", "match"),
    [
        (lambda: VBLoRA(2, 3, 8, topk=4), IncompatibleAxes, "topk=4 of vectors=3"),
        (lambda: VBLoRA(2, 8, 12), IncompatibleAxes, "length=12 at .*q_proj"),
        (lambda: UniLoRA(2, 0), IncompatibleAxes, "size=0"),
        (lambda: VeRA(4, widths=(32, 16)), IncompatibleAxes, "32 x 32"),
        (lambda: BSLoRA(1, 1, 1, widths=(16, 32)), IncompatibleAxes, "32 x 32"),
        (lambda: BSLoRA(0, 0, 0), RankError, "one of them is not 0"),
        (lambda: RaSA(4, given=4), RankError, "given=4 of rank=4"),
        (lambda: RandLoRA(17), RankError, "rank=17"),
        (lambda: NOLA(4, bases=0), IncompatibleAxes, "bases=0"),
        (lambda: VeRA(0), RankError, "rank=0"),
    ],
)
def test_bad_sizes(make, error, match):
    model = llama()
    with pytest.raises(error, match=match):
        rw.attach(model, rw.Recipe(make(), sites=SITES))
    assert not rw.adapters(model)


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
