"""What the structures of augmented rank promise: their exact rank, their limits, their start, what they refuse."""

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.errors import IncompatibleAxes, RankError
from rankwise.structures import ABBA, BoRA, GLoRA, GraLoRA, LoRA, MELoRA, MoRA, PRoLoRA, SineLoRA

OUT, IN = 48, 64


def adapted(structure, moved=True):
    """W, the structure's factors at a layer of 48 x 64, at random or at their start."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(IN, OUT, bias=False)).double()
    w = model[0].weight.detach().clone()
    adapter = rw.attach(model, rw.Recipe(structure))
    if moved:
        with torch.no_grad():
            for p in adapter.parameters():
                p.copy_(torch.randn_like(p))
    return w, {name: p.detach() for name, p in adapter["0"].items()}


@pytest.mark.parametrize(
    ("structure", "rank"),
    [
        (ABBA(3), 9),
        (MoRA(4, "sharing"), 21),
        (MELoRA(3, blocks=4), 12),
        (BoRA(3, blocks=4), 12),
        (GraLoRA(8, blocks=4), 32),
        (GraLoRA(8, blocks=4, hybrid=3), 35),
        (GraLoRA(5, blocks=1), 5),
        (GLoRA(3, "none"), 3),
        (GLoRA(3, "none", "vector"), 1),
        (PRoLoRA(8, unshared=2), 8),
    ],
    ids=repr,
)
def test_it_is_an_exact_lora_of_this_rank(structure, rank):
    w, f = adapted(structure)
    change = structure.weight(f, w) - w
    assert torch.linalg.matrix_rank(change) == rank
    if isinstance(structure, GLoRA):
        return
    op = structure.delta(f)
    left, right = op.lower()
    assert op.rank == rank == left.shape[-1] == right.shape[-2]
    torch.testing.assert_close(left @ right, change, rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    "structure", [MoRA(4), SineLoRA(2, frequency=5.0), GLoRA(2), GLoRA(2, update="none")], ids=repr
)
def test_it_is_of_more_rank_than_any_lora_of_its_size(structure):
    w, f = adapted(structure)
    assert torch.linalg.matrix_rank(structure.weight(f, w) - w) == OUT


def test_abba_starts_at_the_best_approximation_of_w():
    w, f = adapted(ABBA(5), moved=False)
    u, s, v = torch.linalg.svd(w)
    torch.testing.assert_close(f["b1"] @ f["a1"], (u[:, :5] * s[:5]) @ v[:5], rtol=0, atol=1e-6)
    torch.testing.assert_close(f["b1"].norm(dim=0), f["a1"].norm(dim=1), rtol=0, atol=1e-6)
    _, roughly = adapted(ABBA(5, iterations=30), moved=False)
    torch.testing.assert_close(roughly["b1"] @ roughly["a1"], f["b1"] @ f["a1"], rtol=0, atol=1e-3)


def test_blocks_that_do_not_differ_are_lora():
    w, f = adapted(BoRA(3, 6.0, blocks=4))
    f["e"] = torch.ones_like(f["e"])
    pair = {"b": f["b"].flatten(0, 1), "a": torch.cat([*f["a"]], -1)}
    torch.testing.assert_close(BoRA(3, 6.0, blocks=4).weight(f, w), LoRA(3, 6.0).weight(pair, w), rtol=0, atol=1e-12)


def test_a_small_sine_is_lora():
    structure = SineLoRA(3, 6.0, frequency=10.0)
    w, f = adapted(structure)
    f = {name: value * 1e-4 for name, value in f.items()}
    lora = LoRA(3, 6.0 * 10.0 / IN**0.5).weight(f, w) - w
    torch.testing.assert_close(structure.weight(f, w) - w, lora, rtol=1e-6, atol=0)


def test_the_shared_chunk_is_drawn_as_for_all_columns():
    _, f = adapted(PRoLoRA(33, unshared=1, shares_in=16), moved=False)
    bound = IN**-0.5
    assert 0.9 * bound < f["a"].abs().max() <= bound
    assert f["own_a"].abs().max() <= bound


@pytest.mark.parametrize("structure", [MELoRA(2, blocks=5), BoRA(2, blocks=0), GraLoRA(5, blocks=5)], ids=repr)
def test_blocks_divide_the_layer(structure):
    with pytest.raises(RankError, match=r"divide both sides .* \(48 x 64\)\. Choose another"):
        adapted(structure)


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (GraLoRA(6, blocks=4), "multiple of the blocks"),
        (GraLoRA(8, blocks=4, hybrid=49), "here 48"),
        (MELoRA(13, blocks=4), "here 12"),
        (ABBA(49), "here 48"),
        (MoRA(22), "a side of 50 for rank=22"),
        (PRoLoRA(4, unshared=4), "Fewer ranks are unshared"),
        (PRoLoRA(4, shares_in=5), "shares_in=5"),
        (PRoLoRA(4, shares_out=0), "shares_out=0"),
    ],
    ids=repr,
)
def test_sizes_that_do_not_fit_are_refused(structure, message):
    with pytest.raises(RankError, match=message):
        adapted(structure)


@pytest.mark.parametrize(
    "make", [lambda: MoRA(4, "type 3"), lambda: GLoRA(4, "none", "none"), lambda: GLoRA(4, "matrix")]
)
def test_kinds_that_there_are_not_are_refused(make):
    with pytest.raises(IncompatibleAxes, match="; found "):
        make()


@pytest.mark.parametrize("name", ["abba", "melora", "bora", "localized", "prolora"])
def test_it_leaves_for_peft_as_lora(name, tmp_path):
    model = nn.Sequential(nn.Linear(IN, OUT))
    adapter = rw.attach(model, rw.recipe(name))
    report = rw.export(adapter, tmp_path)
    assert report.method == ("GRALORA" if name == "localized" else "LORA")
