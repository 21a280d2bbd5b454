"""What the structures of tensor formats promise besides the laws: ranks, starts, sizes, costs, and bad input."""

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.errors import IncompatibleAxes, RankError
from rankwise.structures import LoRETTA, QuanTA, TTLoRA


def linear(n, m):
    return nn.Sequential(nn.Linear(n, m, bias=False)).double()


def moved(model, recipe, seed=0):
    """The one site's structure and factors, at random values."""
    torch.manual_seed(seed)
    adapter = rw.attach(model, recipe)
    with torch.no_grad():
        for p in adapter.parameters():
            p.copy_(torch.randn_like(p))
    (site,) = adapter.sites.values()
    return site.structure, site.factors()


@pytest.mark.parametrize(
    ("recipe", "rank"),
    [
        (rw.recipes.tt_lora(3), 3),
        (rw.recipes.tt_lora(5, out_modes=(4, 6), in_modes=(36,)), 5),
        (rw.recipes.loretta(4, 6), 4),
        (rw.recipes.loretta(6, 4), 4),
    ],
    ids=repr,
)
def test_a_train_lowers_to_its_exact_rank(recipe, rank):
    structure, f = moved(linear(36, 24), recipe)
    delta = structure.delta(f)
    pair = delta.lower()
    assert delta.rank == pair.left.shape[-1] == rank
    spectrum = torch.linalg.svdvals(delta.dense())
    assert spectrum[rank - 1] > 1e-3 * spectrum[0] and spectrum[rank] < 1e-12 * spectrum[0]
    torch.testing.assert_close(pair.left @ pair.right, delta.dense())


def test_a_circuit_is_of_full_rank_and_never_dense(monkeypatch):
    model = linear(200, 256)
    structure, f = moved(model, rw.recipes.quanta((4, 4, 4, 4)))
    delta = structure.delta(f)
    assert delta.lower() is None
    spectrum = torch.linalg.svdvals(delta.dense())
    assert spectrum[199] > 1e-9 * spectrum[0]
    assert structure.inner.operator(f).cost.apply == 256 * 6 * 16  # a token: six gates of 16 on 256 numbers
    x = torch.randn(2, 200, dtype=torch.float64)
    wanted = x @ structure.weight(f, model[0].weight).mT
    monkeypatch.setattr("rankwise.ops.Circuit.dense", lambda self: pytest.fail("formed"))
    torch.testing.assert_close(model(x), wanted)


def test_the_method_is_the_difference_from_its_start():
    model = linear(20, 30)
    x = torch.randn(3, 20, dtype=torch.float64)
    y = model(x)
    adapter = rw.attach(model, rw.recipes.quanta(3))
    torch.testing.assert_close(model(x), y)
    alone = linear(20, 30)
    alone.load_state_dict({"0.weight": model[0].weight.detach()})
    rw.attach(alone, rw.Recipe(QuanTA(3)))
    assert not torch.allclose(alone(x), y)
    assert "moves_at_start" in QuanTA(3).traits and "moves_at_start" not in adapter.recipe.structure.traits


@pytest.mark.parametrize("make", [lambda r: TTLoRA(r), lambda r: LoRETTA(r, r)], ids=["TTLoRA", "LoRETTA"])
def test_the_size_of_what_is_drawn_does_not_grow_with_the_rank(make):
    """Of the in side, whose cores keep their drawn values: the mean square of x at the bond."""
    sizes = []
    for rank in (2, 16):
        found = []
        for seed in range(8):
            model = linear(512, 64)
            torch.manual_seed(seed)
            adapter = rw.attach(model, rw.Recipe(make(rank)))
            (site,) = adapter.sites.values()
            right = site.structure.operator(site.factors()).right.dense()
            found.append((torch.randn(64, 512, dtype=torch.float64) @ right.mT).square().mean().item())
        sizes.append(sum(found) / 8)
    assert 0.3 < sizes[1] / sizes[0] < 3


@pytest.mark.parametrize(
    ("structure", "error", "message"),
    [
        (
            TTLoRA(2, out_modes=(5, 5)),
            IncompatibleAxes,
            r"found \(5, 5\) with the product 25 for the 24 of the outputs of 0",
        ),
        (TTLoRA(2, in_modes=(4, 4)), IncompatibleAxes, "36 of the inputs of 0"),
        (TTLoRA(2, in_modes=0), IncompatibleAxes, "whole numbers above zero"),
        (TTLoRA(25), RankError, "between 1 and the smaller side"),
        (LoRETTA(0, 2), RankError, "found rank=0"),
        (LoRETTA(2, 30), RankError, "found rank=30"),
        (LoRETTA(2, 2, out_modes=(23,)), IncompatibleAxes, "product 23"),
        (QuanTA((5, 7)), IncompatibleAxes, r"at least the size .*product 35 for the 36 of the larger side of 0"),
        (QuanTA(1), RankError, "Give at least two modes"),
    ],
    ids=repr,
)
def test_sizes_that_do_not_fit_are_refused(structure, error, message):
    with pytest.raises(error, match=message):
        rw.attach(linear(36, 24), rw.Recipe(structure))


@pytest.mark.parametrize(
    "recipe", [rw.recipes.tt_lora(3), rw.recipes.quanta(), rw.recipes.metatt(2, heads=4, tasks=2)], ids=lambda r: r.name
)
def test_a_forward_is_one_graph(recipe):
    """Nothing about modes is worked out while it runs."""
    torch.compiler.reset()
    model = linear(16, 32)
    structure, f = moved(model, recipe)
    x = torch.randn(4, 16, dtype=torch.float64)
    y = torch.compile(model, backend="aot_eager", fullgraph=True)(x)
    torch.testing.assert_close(y, x @ structure.weight(f, model[0].weight).mT)
