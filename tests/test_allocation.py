"""Ranks that are found: drawn gates on a budget, ablations, softmax gates, and what a layer puts out."""

import copy
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import rankwise as rw
from rankwise import ranks
from rankwise.adapter import SiteFactors
from rankwise.errors import IncompatibleAxes, RankError, StatisticsError
from rankwise.inits import EVA
from rankwise.penalties import Alternation, ExpectedRank, backward
from rankwise.structures import OFT, Anchored, HardConcrete, LoRA, Magnitude, Rising, Rows, ShareLoRA, Switched
from rankwise.structures.lowrank import chance_of_open

SIZES = (12, 16, 12, 8)


class Net(nn.Module):
    """Three layers that can be checkpointed."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.ModuleList(nn.Linear(m, n).double() for m, n in zip(SIZES, SIZES[1:], strict=False))
        self.checkpointed = False

    def run(self, x: Tensor) -> Tensor:
        for layer in self.layers:
            x = torch.tanh(layer(x))
        return x

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.run, x, use_reentrant=False) if self.checkpointed else self.run(x)


def made(recipe: rw.Recipe, moved: float = 0.0) -> rw.Adapter:
    torch.manual_seed(1)
    adapter = rw.attach(Net().train(), recipe)
    for i, p in enumerate(adapter.parameters()):
        p.data.add_(torch.randn(p.shape, generator=torch.Generator().manual_seed(i)).to(p) * moved)
    return adapter


def data(part: int = 0, rows: int = 20) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(part)
    x, y = (torch.randn(rows, n, generator=draw).double() for n in (SIZES[0], SIZES[-1]))
    return x, y.tanh()


def error(model: nn.Module, part: int = 0) -> Tensor:
    x, y = data(part)
    return (model(x) - y).square().mean()


def values(adapter: rw.Adapter) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in adapter.named_parameters()}


def same(one: dict[str, Tensor], two: dict[str, Tensor]) -> bool:
    return one.keys() == two.keys() and all(torch.equal(one[k], two[k]) for k in one)


def train(adapter: rw.Adapter, optimizer: torch.optim.Optimizer, steps: range) -> None:
    for step in steps:
        torch.manual_seed(step)  # of the draws
        optimizer.zero_grad()
        backward(adapter, lambda step=step: error(adapter.model, step % 2), step)
        optimizer.step()


def resumed(recipe: rw.Recipe) -> None:
    """Six steps at once, and three in another adapter from what was saved of the first three: the same bits."""
    one, two, three = (made(recipe) for _ in range(3))
    whole, first, second = (adapter.optimizer(1e-2) for adapter in (one, two, three))
    train(one, whole, range(6))
    train(two, first, range(3))
    state = copy.deepcopy(first.state_dict())
    for (_, p), q in zip(three.named_parameters(), values(two).values(), strict=True):
        p.data.copy_(q)
    second.load_state_dict(state)
    train(three, second, range(3, 6))
    assert same(values(one), values(three))
    assert not same(values(one), values(two))


def dense(w: Tensor, f: Any, weights: np.ndarray, scale: float) -> np.ndarray:
    a, b = f["a"].detach().numpy(), f["b"].detach().numpy()
    return w.numpy() + scale * sum(g * np.outer(b[:, i], a[i]) for i, g in enumerate(weights))


# -- SaLoRA -------------------------------------------------------------------------------------


def drawn(odds: float, n: int) -> np.ndarray:
    """Louizos et al. 2017, eq. 10 and 11, with their constants."""
    u = np.random.default_rng(0).uniform(size=n)
    s = 1 / (1 + np.exp(-(np.log(u) - np.log(1 - u) + odds) / (2 / 3)))
    return np.minimum(1, np.maximum(0, s * (1.1 + 0.1) - 0.1))


def test_drawn_gates_have_the_hard_concrete_distribution():
    n = 40_000
    for odds in (-2.0, 0.0, 1.0, 3.0):
        e = torch.full((n,), odds, dtype=torch.float64)
        torch.manual_seed(0)
        got, want = HardConcrete(2).weights({"e": e, "sampled": torch.ones(())}).numpy(), drawn(odds, n)
        at = np.linspace(0, 1, 41)
        assert max(abs((got <= z).mean() - (want <= z).mean()) for z in at) < 0.02
        assert float(chance_of_open(e[0])) == pytest.approx((want > 0).mean(), abs=0.01)


def test_what_is_served_has_no_draw_and_closed_gates_are_cut():
    adapter = made(rw.recipe("salora_struct", rank=4), 0.5)
    f, site = adapter["layers.0"], adapter.sites["layers.0"]
    f["e"].data.copy_(torch.tensor([-3.0, -1.0, 0.5, 4.0]))
    weights = np.clip(1.2 / (1 + np.exp(-f["e"].detach().numpy())) - 0.1, 0, 1)
    assert (weights[0], weights[3]) == (0, 1)
    w = adapter.model.layers[0].weight.detach()
    np.testing.assert_allclose(site.structure.weight(f, w).detach().numpy(), dense(w, f, weights, 1.0), atol=1e-12)
    x = data()[0]
    assert not torch.equal(adapter.model(x), adapter.model(x))
    y = adapter.model.eval()(x)
    assert torch.equal(adapter.model(x), y)
    small = rw.compact(adapter)
    assert small.sites["layers.0"].structure == LoRA(3, None)
    torch.testing.assert_close(small.model(x), y)


def test_a_start_from_data_leaves_the_multiplier_at_zero():
    x = data()[0]
    recipe = rw.Recipe(HardConcrete(2), init=EVA())
    model = Net()
    adapter = rw.attach(model, recipe, stats=rw.collect(model, [x[:10], x[10:]], recipe))
    assert [float(f["multiplier"]) for f in adapter.values()] == [0.0] * 3
    assert all(f["e"].eq(1).all() for f in adapter.values())


def test_a_checkpointed_layer_draws_the_same_gates_again():
    adapter = made(rw.recipe("salora_struct", rank=4), 0.5)
    found = []
    for adapter.model.checkpointed in (False, True):
        torch.manual_seed(5)
        adapter.model.zero_grad()
        error(adapter.model).backward()
        found.append({n: p.grad.clone() for n, p in adapter.named_parameters(trainable=True)})
    assert same(*found)


def test_the_multiplier_climbs_as_long_as_the_rank_is_above_its_budget():
    recipe = rw.recipe("salora_struct", rank=4, budget=1.5, gamma=0.0, rate=0.7)
    adapter = made(recipe, 0.3)
    optimizer, by_hand = adapter.optimizer(1e-2), 0.0
    for step in range(4):
        odds = np.concatenate([f["e"].detach().numpy() for f in adapter.values()])
        above = ((1 / (1 + np.exp(-(odds + 2 / 3 * np.log(11))))).sum() - 3 * 1.5) / 12
        assert adapter.penalty(step).item() == pytest.approx(by_hand * above)
        train(adapter, optimizer, range(step, step + 1))
        odds = np.concatenate([f["e"].detach().numpy() for f in adapter.values()])
        by_hand += 0.7 * ((1 / (1 + np.exp(-(odds + 2 / 3 * np.log(11))))).sum() - 3 * 1.5) / 12
        assert [float(f["multiplier"]) for f in adapter.values()] == pytest.approx([by_hand] * 3)
    assert by_hand > 0
    for f in adapter.values():
        f["e"].data.fill_(-9.0)
    train(adapter, adapter.optimizer(0.0), range(1))
    assert float(adapter["layers.0"]["multiplier"]) == 0.0


def expected_rank(adapter: rw.Adapter) -> float:
    return sum(float(chance_of_open(f["e"].detach()).sum()) for f in adapter.values()) / len(adapter)


def test_the_rank_is_driven_to_its_budget():
    adapter = made(rw.recipe("salora_struct", rank=8, budget=3.0, gamma=0.0))
    begun = expected_rank(adapter)
    train(adapter, adapter.optimizer(2e-2), range(400))
    free = made(rw.recipe("salora_struct", rank=8, budget=8.0, gamma=0.0))
    train(free, free.optimizer(2e-2), range(100))
    assert begun > 7
    assert abs(expected_rank(adapter) - 3.0) < 0.5
    assert expected_rank(free) > 6


def test_experts_draw_gates_of_their_own():
    from rankwise.testing.layers import LAYERS

    (layer,) = [x for x in LAYERS if x.name == "experts"]
    torch.manual_seed(0)
    model = layer.make().double().train()
    adapter = rw.attach(model, rw.Recipe(HardConcrete(4), sites=layer.sites, penalties=(ExpectedRank(2.0),)))
    assert {tuple(f["e"].shape) for f in adapter.values()} == {(3, 4)}
    optimizer = adapter.optimizer(1e-2)
    backward(adapter, lambda: model(layer.inputs(3)).square().mean(), 0)
    optimizer.step()
    assert all((f["multiplier"] > 0).all() for f in adapter.values())


# -- ALoRA --------------------------------------------------------------------------------------


def switched(open: int = 2) -> rw.Adapter:
    return made(rw.recipe("alora_alloc", rank=open, most=4), 0.3)


def test_an_ablation_is_the_loss_without_a_component_and_with_it_alone():
    adapter = switched()
    before = values(adapter)
    found = ranks.ablations(adapter.sites.values(), lambda: error(adapter.model))
    assert same(values(adapter), before)
    layers: Any = adapter.model.layers
    weights = [layer.weight.detach() for layer in layers]
    biases = [layer.bias.detach().numpy() for layer in layers]
    x, y = (t.numpy() for t in data())

    def loss(gates: np.ndarray) -> float:
        h = x
        for w, bias, f, g in zip(weights, biases, adapter.values(), gates, strict=True):
            h = np.tanh(h @ dense(w, f, g, 1.0).T + bias)
        return float(np.square(h - y).mean())

    opened = np.array([[1.0, 1.0, 0.0, 0.0]] * 3)
    assert np.array_equal(np.stack([f["e"].numpy() for f in adapter.values()]), opened)
    for site, scores in enumerate(found.values()):
        for i in range(2):
            without, alone = opened.copy(), np.zeros_like(opened)
            without[site, i], alone[site, i] = 0, 1
            assert float(scores[i]) == pytest.approx(loss(without) - loss(alone), abs=1e-10)
        assert torch.isinf(scores[2:]).all()


def test_the_least_important_components_move_to_sites_that_lost_none():
    adapter = switched()
    optimizer = adapter.optimizer(1e-2)
    train(adapter, optimizer, range(3))
    names, inf = [*adapter], [torch.inf] * 2
    scores = {n: torch.tensor([*s, *inf]) for n, s in zip(names, ([0.1, 0.9], [0.5, 0.6], [0.7, 0.8]), strict=True)}
    before, x = values(adapter), data()[0]
    plan = ranks.reallocated(adapter.sites.values(), scores, 1, optimizer.state, seed=4)
    ranks.carry_out(adapter.sites.values(), plan, optimizer)
    got = [f["e"].tolist() for f in adapter.values()]
    assert got == [[0, 1, 0, 0], [1, 1, 0, 0], [1, 1, 1, 0]]  # the one that goes, to the site of the higher mean
    last = adapter[names[2]]
    assert not last["b"][:, 2].any()
    bound = last["a"].shape[1] ** -0.5
    assert 0 < last["a"][2].abs().max() <= bound
    assert not torch.equal(last["a"][2], before[f"{names[2]}/a"][2])
    rest = torch.tensor([0, 1, 3])
    for dim, name in enumerate("ab"):
        state, then = optimizer.state[last[name]], before[f"{names[2]}/{name}"]
        assert torch.equal(last[name].index_select(dim, rest), then.index_select(dim, rest))
        assert state["exp_avg"].select(dim, 0).any()
        assert not state["exp_avg"].select(dim, 2).any()
        assert not state["exp_avg_sq"].select(dim, 2).any()
    y = adapter.model(x)
    last["e"].data[2] = 0  # what is new adds nothing yet
    torch.testing.assert_close(adapter.model(x), y, rtol=0, atol=0)
    last["e"].data[2] = 1
    train(adapter, optimizer, range(3, 5))
    assert last["b"][:, 2].any()
    assert torch.equal(adapter[names[0]]["e"], torch.tensor([0.0, 1, 0, 0], dtype=torch.float64))


def test_what_is_freed_is_spread_as_in_the_paper():
    """Its footnote: eight components among three modules, of which the third is the least important: 3, 3, 2."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(24, 24) for _ in range(4)))
    adapter = rw.attach(model, rw.recipe("alora_alloc", rank=8, most=16))
    low, inf = torch.arange(8.0) / 100, torch.full((8,), torch.inf)
    scores = {str(i): torch.cat([low + v, inf]) for i, v in enumerate([0.0, 3.0, 2.0, 1.0])}
    sites = adapter.sites.values()
    plan = ranks.reallocated(sites, scores, 8, {})
    assert [int(plan.factors[name]["e"].sum()) for name in adapter] == [0, 11, 11, 10]
    scores = {str(i): torch.cat([low + (i == 3), inf]) for i in range(4)}
    plan = ranks.reallocated(sites, scores, 24, {})  # more than there is room for
    assert [int(plan.factors[name]["e"].sum()) for name in adapter] == [0, 0, 0, 16]
    plan = ranks.reallocated(sites, {name: s - 1.0 * (s == 0.07) for name, s in scores.items()}, 4, {})
    assert sum(int(f["e"].sum()) for f in plan.factors.values()) == 32


def test_every_expert_is_a_module_of_its_own():
    from rankwise.testing.layers import LAYERS

    (layer,) = [x for x in LAYERS if x.name == "experts"]
    adapter = rw.attach(layer.make(), rw.Recipe(Switched(4, open=2), sites=layer.sites))
    scores = {name: torch.where(f["e"] > 0, 1.0, torch.inf) for name, f in adapter.items()}
    name = next(iter(adapter))
    scores[name][1, 0] = 0.0
    scores[name][2] += torch.tensor([1.0, 1.0, 0.0, 0.0])
    plan = ranks.reallocated(adapter.sites.values(), scores, 1, {})
    assert plan.factors[name]["e"].tolist() == [[1, 1, 0, 0], [0, 1, 0, 0], [1, 1, 1, 0]]


def test_components_open_and_close_without_a_change_of_anything_else():
    resumed(rw.recipe("alora_alloc", rank=2, most=4))
    adapter = switched()
    kept = values(adapter)
    train(adapter, adapter.optimizer(1e-2), range(2))
    for f, name in zip(adapter.values(), adapter, strict=True):
        assert torch.equal(f["b"][:, 2:], kept[f"{name}/b"][:, 2:])  # closed ones learn nothing


# -- AutoLoRA -----------------------------------------------------------------------------------


def test_factors_and_gates_are_trained_in_turn():
    """Against two optimizers of torch, on the dense weight."""
    adapter = made(rw.recipe("autolora", rank=4), 0.2)
    twin = {name: {n: p.detach().clone().requires_grad_() for n, p in f.items()} for name, f in adapter.items()}
    sides = torch.optim.AdamW([f[n] for f in twin.values() for n in "ab"], 1e-2, weight_decay=0.0)
    gates = torch.optim.AdamW([f["e"] for f in twin.values()], 1e-2, weight_decay=0.0)
    optimizer = adapter.optimizer(1e-2)
    for step in range(6):
        x, y = data(step % 2)
        for layer, f in zip(adapter.model.layers, twin.values(), strict=True):
            w = layer.weight.detach() + 4.0 * f["b"] @ torch.diag(torch.exp(f["e"]) / torch.exp(f["e"]).sum()) @ f["a"]
            x = torch.tanh(x @ w.T + layer.bias.detach())
        sides.zero_grad()
        gates.zero_grad()
        (x - y).square().mean().backward()
        (gates if step % 2 else sides).step()
        train(adapter, optimizer, range(step, step + 1))
        for name, f in adapter.items():
            for n, p in f.items():
                torch.testing.assert_close(p, twin[name][n], rtol=0, atol=1e-10)
    assert not torch.equal(adapter["layers.0"]["e"], made(rw.recipe("autolora", rank=4), 0.2)["layers.0"]["e"])


def test_the_ranks_that_were_found_are_trained_anew():
    adapter = made(rw.recipe("autolora", rank=4, alpha=8.0))
    assert [o.structure for o in ranks.selected(adapter.sites.values())] == [LoRA(4, 8.0)] * 3  # of equal gates all
    for f, e in zip(adapter.values(), ([2.0, 0, 0, 0], [1, 1, -1, 0], [0.1, 0.1, 0.1, -3]), strict=True):
        f["e"].data.copy_(torch.tensor(e))
    overrides = ranks.selected(adapter.sites.values())
    again = rw.attach(Net(), rw.recipe("lora", sites=rw.Sites(overrides=overrides)))
    assert [s.structure for s in again.sites.values()] == [LoRA(1, 8.0), LoRA(2, 8.0), LoRA(3, 8.0)]


# -- LoRA-drop ----------------------------------------------------------------------------------


def test_the_share_of_a_site_is_that_of_its_outputs():
    adapter = made(rw.recipe("lora", rank=2), 0.3)
    adapter.model.eval()
    x = data()[0]
    shares = ranks.output_shares(adapter, lambda: adapter.model(x))
    sizes, h = [], x.numpy()
    for layer, f in zip(adapter.model.layers, adapter.values(), strict=True):
        update = dense(torch.zeros(layer.weight.shape), f, np.ones(2), 1.0)
        sizes.append(np.square(h @ update.T).sum())
        h = np.tanh(h @ (layer.weight.detach().numpy() + update).T + layer.bias.detach().numpy())
    assert [*shares] == [*adapter]
    np.testing.assert_allclose([*shares.values()], np.array(sizes) / sum(sizes), rtol=1e-6)
    untrained = made(rw.recipe("lora", rank=2))
    assert [*ranks.output_shares(untrained, lambda: untrained.model(x)).values()] == [1 / 3] * 3


def test_the_fewest_sites_with_that_share_are_kept():
    shares = {"a": 0.1, "b": 0.5, "c": 0.35, "d": 0.05}
    assert ranks.important(shares, 0.5) == ("b",)
    assert ranks.important(shares) == ("b", "c", "a")
    assert ranks.important(shares, 0.85) == ("b", "c")
    assert ranks.important(shares, 1.0) == ("b", "c", "a", "d")


def test_others_share_one(tmp_path):
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(12, 12) for _ in range(4))).double()
    base = copy.deepcopy(model)
    recipe = rw.recipe("lora_drop", rank=2, kept=["1"], sites=rw.Sites(overrides={"3": {"rank": 3}}))
    adapter = rw.attach(model, recipe)
    kinds = [s.structure for s in adapter.sites.values()]
    rest = ShareLoRA(2, 2, share="both")
    assert kinds == [rest, LoRA(2, 2), rest, ShareLoRA(3, 2, share="both")]
    assert adapter["0"]["a"] is adapter["2"]["a"]
    assert sum(p.numel() for p in adapter.parameters()) == 24 * (2 + 2 + 3)
    optimizer, x = adapter.optimizer(1e-2), data()[0]
    for _ in range(2):
        model(x).square().mean().backward()
        optimizer.step()
    adapter.save(tmp_path)
    y = model(x)
    rw.load(base, tmp_path)
    assert torch.equal(base(x), y)


# -- all ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["salora_struct", "autolora", "lora_drop"])
def test_stopping_and_resuming_is_bit_exact(name):
    resumed(rw.recipe(name, rank=4))


def test_pruning_resumes_to_the_bit():
    resumed(rw.recipe("prilora", rank=4, every=2))


def scored(adapter: rw.Adapter, count: int) -> Any:
    scores = {name: torch.where(f["e"] > 0, 1.0, torch.inf) for name, f in adapter.items()}
    return ranks.reallocated(adapter.sites.values(), scores, count, {})


def sites(structure: Any) -> list[SiteFactors]:
    return [*made(rw.Recipe(structure)).sites.values()]


@pytest.mark.parametrize(
    ("make", "wrong", "match"),
    [
        (lambda: ExpectedRank(0.0), IncompatibleAxes, "above 0; found.*budget=0.0"),
        (lambda: ExpectedRank(2.0, -1.0), IncompatibleAxes, "rate=-1.0"),
        (lambda: rw.Recipe(LoRA(2), penalties=(ExpectedRank(),)), IncompatibleAxes, "HardConcrete"),
        (lambda: rw.Recipe(LoRA(2), penalties=(Alternation(),)), IncompatibleAxes, "Selection"),
        (lambda: rw.Recipe(HardConcrete(2), ranks=ranks.Shrinking()), IncompatibleAxes, "trained gates"),
        (lambda: Anchored(HardConcrete(2)), IncompatibleAxes, "drawn while training"),
        (lambda: Rows(HardConcrete(2), (("q", 0, 4),)), IncompatibleAxes, "drawn while training"),
        (lambda: switched(5), RankError, "between 1 and .* 4; found rank=5"),
        (lambda: switched(0), RankError, "found rank=0"),
        (lambda: ranks.Pruning(0), IncompatibleAxes, "every=0"),
        (lambda: ranks.Pruning(5, 1.0), IncompatibleAxes, "share=1.0"),
        (lambda: rw.Recipe(LoRA(2), ranks=ranks.Pruning()), IncompatibleAxes, "Rising"),
        (lambda: rising(spread=1.0), RankError, "found rank=0"),
        (lambda: ranks.ablations(sites(LoRA(2)), lambda: 0.0), IncompatibleAxes, "switched components"),
        (lambda: scored(switched(), 0), IncompatibleAxes, "count=0"),
        (lambda: scored(switched(), 7), IncompatibleAxes, "count=7"),
        (lambda: ranks.selected(sites(LoRA(2))), IncompatibleAxes, "softmax gates"),
        (lambda: ranks.important({"a": 1.0}, 0.0), IncompatibleAxes, "least=0.0"),
        (lambda: ranks.output_shares(made(rw.Recipe(OFT(4))), lambda: None), IncompatibleAxes, "Take LoRA"),
    ],
)
def test_bad_input_is_refused(make, wrong, match):
    with pytest.raises(wrong, match=match):
        make()


def test_outputs_are_those_of_layers_that_multiply_what_they_read():
    adapter = rw.attach(nn.Sequential(nn.Embedding(9, 6)), rw.Recipe(LoRA(2), sites=rw.Sites("0")))
    with pytest.raises(StatisticsError, match="linear layers"):
        ranks.output_shares(adapter, lambda: adapter.model(torch.arange(4)))


def test_a_failing_loss_leaves_the_gates_as_they_were():
    adapter = switched()
    before = values(adapter)

    def fail() -> float:
        raise RuntimeError("no batch")

    with pytest.raises(RuntimeError, match="no batch"):
        ranks.ablations(adapter.sites.values(), fail)
    assert same(values(adapter), before)


# -- PRILoRA ------------------------------------------------------------------------------------


def rising(moved: float = 0.3, **options: Any) -> rw.Adapter:
    return made(rw.recipe("prilora", rank=4, **options), moved)


def test_the_rank_rises_with_depth(tmp_path):
    adapter = rising()
    assert [f["a"].shape[0] for f in adapter.values()] == [2, 4, 6]
    assert [f["a"].shape[0] for f in rising(spread=0.25).values()] == [3, 4, 5]
    adapter.save(tmp_path)
    again = Net()
    rw.load(again, tmp_path)
    assert torch.equal(again.eval()(data()[0]), adapter.model.eval()(data()[0]))
    alone = rw.attach(nn.Sequential(nn.Linear(12, 12)), rw.recipe("prilora", rank=4))
    assert alone["0"]["a"].shape[0] == 4


@pytest.mark.parametrize("checkpointed", [False, True])
def test_inputs_are_remembered_in_training_alone_and_once(checkpointed):
    adapter = rising(every=100)
    adapter.model.checkpointed = checkpointed
    norms = {name: np.zeros(f["norms"].shape) for name, f in adapter.items()}
    optimizer = adapter.optimizer(1e-2)
    for step in range(3):
        h = data(step % 2)[0].numpy()
        for layer, (name, f) in zip(adapter.model.layers, adapter.items(), strict=True):
            norms[name] = 0.9 * norms[name] + 0.1 * np.sqrt(np.square(h).sum(0))
            w = dense(layer.weight.detach(), f, np.ones(len(f["a"])), 1.0)
            h = np.tanh(h @ w.T + layer.bias.detach().numpy())
        train(adapter, optimizer, range(step, step + 1))
        adapter.model.eval()(data(7)[0])
        adapter.model.train()
        with rw.disabled(adapter.model):
            adapter.model(data(7)[0])
    for name, f in adapter.items():
        np.testing.assert_allclose(f["norms"].numpy(), norms[name], rtol=1e-6)


def test_the_least_half_of_each_row_goes_and_may_come_back():
    adapter, twin = rising(every=2), rising(every=100)
    one, two = adapter.optimizer(1e-2), twin.optimizer(1e-2)
    train(adapter, one, range(2))
    train(twin, two, range(2))
    by_size = []
    for f, g in zip(adapter.values(), twin.values(), strict=True):
        a, norms = g["a"].detach().numpy(), g["norms"].numpy()
        want = a.copy()
        for row in want:
            row[np.argsort(np.abs(row) * norms)[: len(row) // 2]] = 0
        assert np.array_equal(f["a"].detach().numpy(), want)
        assert torch.equal(f["b"], g["b"])
        kept = [np.abs(row) > np.sort(np.abs(row))[len(row) // 2 - 1] for row in a]
        by_size.append(np.array_equal(kept, want != 0))
    assert not all(by_size)  # the inputs count
    train(adapter, one, range(2, 3))
    assert all(f["a"].all() for f in adapter.values())


def test_siblings_and_wrappers_remember_too():
    class Attention(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.q_proj, self.k_proj, self.v_proj = (nn.Linear(6, 6) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            return self.q_proj(x) + self.k_proj(x) + self.v_proj(x)

    for structure in (Rising(2), Magnitude(Rising(2))):
        model, x = Attention().train(), torch.randn(2, 5, 6)
        adapter = rw.attach(model, rw.Recipe(structure, ranks=ranks.Pruning(1)))
        optimizer = adapter.optimizer()
        model(x).sum().backward()
        want = 0.1 * x.flatten(0, 1).norm(dim=0)
        for f in adapter.values():
            torch.testing.assert_close(f["norms"].data, want)
        optimizer.step()
        assert all((f["a"] == 0).sum() == f["a"].numel() // 2 for f in adapter.values())


def test_what_was_never_read_cannot_be_pruned():
    adapter = rising(every=1)
    for p in adapter.parameters():
        p.grad = torch.zeros_like(p)
    with pytest.raises(StatisticsError, match="found none that has read"):
        adapter.optimizer().step()
