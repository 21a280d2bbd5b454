"""What rotations, gates, bounded and shared updates promise beyond the laws: ranks, norms, reach, and refusals."""

import numpy as np
import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.errors import IncompatibleAxes, RankError
from rankwise.structures import BOFT, HRA, IA3, PSOFT, Added, Bat, BlockLoRA, DeLoRA, MiSS, RoAd


def adapted(structure, out=16, size=24, move=0.3):
    """W, the factors moved at random, and the adapted weight, on a float64 layer."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(size, out)).double()
    adapter = rw.attach(model, rw.Recipe(structure, sites=rw.Sites("0")))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(move * torch.randn_like(p))
    f = {name: value.detach() for name, value in adapter["0"].items()}
    w = model[0].weight.detach()
    return w, f, structure.weight(f, w)


@pytest.mark.parametrize(
    ("structure", "rank"),
    [(DeLoRA(3), 3), (MiSS(5), 5), (MiSS(6, 4), 4), (PSOFT(5), 5), (BlockLoRA(4), 4), (BlockLoRA(6, None, 3, "a"), 6)],
    ids=repr,
)
def test_the_update_is_a_lora_of_this_rank(structure: Added, rank):
    w, f, changed = adapted(structure)
    pair = structure.delta(f).lower()
    assert pair is not None
    torch.testing.assert_close(pair.left @ pair.right, changed - w, rtol=0, atol=1e-12)
    assert pair.left.shape[-1] == structure.rank
    assert torch.linalg.matrix_rank(changed - w) == rank


def test_reflections_keep_singular_values_and_change_w_by_rank_r():
    w, _, changed = adapted(HRA(4))
    torch.testing.assert_close(torch.linalg.svdvals(changed), torch.linalg.svdvals(w))
    assert torch.linalg.matrix_rank(changed - w) == 4


def test_reflections_start_in_pairs():
    _, f, _ = adapted(HRA(4), move=0.0)
    assert torch.equal(f["u"][::2], f["u"][1::2])
    assert not torch.equal(f["u"][0], f["u"][2])


@pytest.mark.parametrize("levels", [1, 2, 3, 4])
def test_a_butterfly_is_a_rotation_whose_reach_doubles_with_each_level(levels):
    _, f, _ = adapted(BOFT(4, levels), size=32)
    _, right = BOFT(4, levels).sides(f)
    turn = right.dense()
    torch.testing.assert_close(turn @ turn.T, torch.eye(32).double())
    assert (turn.abs() > 1e-9).sum(1).eq(4 * 2 ** (levels - 1)).all()


def test_the_principal_part_is_the_nearest_of_its_rank_and_keeps_its_columns_gram():
    w, f, changed = adapted(PSOFT(5, relaxed=False))
    u, s, vh = np.linalg.svd(w.numpy())
    nearest = torch.from_numpy(u[:, :5] * s[:5] @ vh[:5])
    torch.testing.assert_close(f["b"] @ f["a"], nearest)
    rows = lambda v: v @ v.T  # noqa: E731  the columns of the paper's W, which is ours transposed
    assert torch.dist(changed, w) > 0.1
    torch.testing.assert_close(torch.linalg.svdvals(changed - w + nearest)[:5], torch.from_numpy(s[:5]))
    torch.testing.assert_close(rows(f["a"]), torch.eye(5).double())


def test_a_bounded_update_has_its_bound_whatever_its_factors():
    structure = DeLoRA(3, 0.5)
    for move in (1e-3, 1.0, 1e3):
        w, f, changed = adapted(structure, move=move)
        bound = f["strength"].abs() * w.norm(dim=0).max()
        assert torch.dist(changed, w) <= bound
        f["strength"] = f["strength"] * 0 + 0.5
        one = torch.dist(structure.weight(f, w), w)
        f["a"], f["b"] = 7 * f["a"], 100 * f["b"]
        torch.testing.assert_close(torch.dist(structure.weight(f, w), w), one)


def test_turns_of_one_scale_keep_the_norm_of_the_outputs():
    w, f, _ = adapted(RoAd())
    f["alpha"] = torch.ones_like(f["alpha"])
    torch.testing.assert_close(RoAd().weight(f, w).norm(dim=0), w.norm(dim=0))


def test_the_columns_of_a_shard_repeat():
    w, _, changed = adapted(MiSS(5))
    change = changed - w
    for j in range(24):
        torch.testing.assert_close(change[:, j], change[:, j % 5])


@pytest.mark.parametrize(
    ("structure", "message"),
    [
        (HRA(3), "in pairs"),
        (HRA(26), "between 1 and"),
        (BOFT(4, 5), "fewer levels"),
        (BOFT(1), "larger block"),
        (BOFT(4, 0), "between 1 and"),
        (PSOFT(17), "between 1 and"),
        (RoAd(1, 1), "pairs of outputs"),
        (DeLoRA(0), "between 1 and"),
        (MiSS(25), "between 1 and"),
        (MiSS(4, 5), "shard of a MiSS"),
        (Bat(5), "block of a Bat"),
        (BlockLoRA(3), "number of blocks"),
        (BlockLoRA(5, None, 5, "a"), "number of blocks"),
    ],
    ids=repr,
)
def test_sizes_that_do_not_fit(structure, message):
    with pytest.raises(RankError, match=message):
        adapted(structure)


@pytest.mark.parametrize(
    "make",
    [
        lambda: IA3("both"),
        lambda: RoAd(3),
        lambda: PSOFT(4, terms=2),
        lambda: BlockLoRA(4, side="c"),
        lambda: BlockLoRA(4, scale_rule="alpha"),
    ],
)
def test_options_that_do_not_exist(make):
    with pytest.raises(IncompatibleAxes, match="found"):
        make()
