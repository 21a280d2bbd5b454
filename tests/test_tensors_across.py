"""Tensors across layers: the papers' sizes of whole models, what is shared with whom, ranks, tasks, and bad input."""

import copy

import pytest
import torch
from torch import nn

import rankwise as rw
from rankwise.errors import IncompatibleAxes, RankError
from rankwise.structures import CaRA, FacTTK, FacTTT, LoRTA, LoTR, MetaTT
from rankwise.testing import randomise
from tiny_models import llama, shake, tokens

D, LAYERS, HEADS = 16, 3, 4


class Block(nn.Module):
    """A block of a transformer, with square projections and an MLP four times as wide."""

    def __init__(self) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (nn.Linear(D, D) for _ in range(4))
        self.up, self.down = nn.Linear(D, 4 * D), nn.Linear(4 * D, D)

    def forward(self, x):
        """Everything once."""
        y = self.o_proj(torch.tanh(self.q_proj(x) * self.k_proj(x) + self.v_proj(x)))
        return x + y + self.down(torch.relu(self.up(x + y)))


class Transformer(nn.Module):
    """Blocks one after another."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(LAYERS))

    def forward(self, x):
        """All blocks."""
        for block in self.blocks:
            x = block(x)
        return x


ALL = ("q_proj", "k_proj", "v_proj", "o_proj", "up", "down")
R = 3
FORMULAS = [
    (FacTTT(R), ALL, 2 * D * R + 12 * LAYERS * R**2),
    (FacTTK(R), ALL, 2 * D * R + R**3 + 12 * LAYERS * R),
    (LoTR(R), ("q_proj", "v_proj"), 2 * (R * 2 * D + LAYERS * R**2)),
    (LoTR(R), ("up", "down"), 2 * (R * 5 * D + LAYERS * R**2)),
    (LoRTA(R, heads=HEADS), ALL[:4], R * (D + D // HEADS + HEADS + LAYERS + 4)),
    (CaRA(R, heads=HEADS), ALL, R * (3 * LAYERS + D + HEADS + D // HEADS) + R * (9 * LAYERS + 2 * D) + 2 * R),
    (MetaTT(R), ALL[:4], R * 2 * D + (LAYERS + 4) * R**2),
    (MetaTT(R, heads=HEADS), ALL[:4], R * (D + D // HEADS) + (LAYERS + 4 + HEADS) * R**2),
    (MetaTT(R, tasks=5), ALL[:4], R * 2 * D + (LAYERS + 4 + 5) * R**2),
]
STRUCTURES = pytest.mark.parametrize(
    "structure", [FacTTT(2), FacTTK(2), LoTR(2, 2.0), LoRTA(2), CaRA(2), MetaTT(2)], ids=repr
)


def attached(structure, roles=ALL, **options):
    torch.manual_seed(0)
    model = Transformer().double()
    return model, rw.attach(model, rw.Recipe(structure, sites=rw.Sites(list(roles)), **options))


def total(adapter):
    return sum(p.numel() for p in adapter.parameters())


@pytest.mark.parametrize(("structure", "roles", "size"), FORMULAS, ids=lambda v: repr(v))
def test_the_whole_model_has_the_papers_size(structure, roles, size):
    model, adapter = attached(structure, roles)
    assert total(adapter) == size == sum(p.numel() for p in model.parameters() if p.requires_grad)
    assert rw.targets(Transformer(), adapter.recipe).parameters == size


@pytest.mark.parametrize(
    ("structure", "size"),
    [  # q and o are 32 x 32, k and v 16 x 32, gate and up 64 x 32, down 32 x 64; 2 layers
        (FacTTT(2), 2 * 32 * 2 + 2 * 16 * 2 + 2 * 4 * (2 * 1 + 2 * 2 + 2 * 2 + 2)),
        (FacTTK(2), 2 * 32 * 2 + 2 * 16 * 2 + 2**3 + 2 * 2 * (2 * 1 + 2 * 2 + 2 * 2 + 2)),
        (LoTR(2), 2 * (2 * 64 + 2 * 48 + 2 * 96 + 96) + 2 * 7 * 4),
        (LoRTA(2, heads=4), 2 * ((32 + 64) + (8 + 4 + 16) + 4 + 2 + 7)),
        (MetaTT(2), 2 * ((32 + 64) + (32 + 16 + 64)) + (2 + 7) * 4),
    ],
    ids=lambda v: repr(v),
)
def test_unlike_widths_are_grouped_by_shape(structure, size):
    adapter = rw.attach(llama(), rw.Recipe(structure, sites=rw.Sites("all-linear")))
    assert total(adapter) == size


def test_the_whole_of_grouped_heads_is_in_both_tensors():
    adapter = rw.attach(llama(), rw.Recipe(CaRA(2, heads=4), sites=rw.Sites("all-linear")))
    attention = 2 * (
        32 + 4 + (8 + 4) + 1 + 2 * 3
    )  # inputs, heads, rows of a head of q and of k and v, weights, matrices
    rest = 2 * (32 + 32 + 1 + 2 * (1 + 3 * 2))  # both sides of a block, weights, o and three matrices of two blocks
    assert total(adapter) == attention + rest


def test_rows_are_those_of_the_layer_and_of_the_role():
    _, adapter = attached(LoRTA(R, heads=HEADS), ALL[:4])
    at = {(i, role): adapter[f"blocks.{i}.{role}"] for i in range(LAYERS) for role in ALL[:4]}
    for (i, role), f in at.items():
        for (j, other), g in at.items():
            assert (f["layer"] is g["layer"]) == (i == j)
            assert (f["role"] is g["role"]) == (role == other)
            assert f["a"] is g["a"] and f["b"] is g["b"] and f["head"] is g["head"]


def test_encoder_and_decoder_count_their_layers_apart():
    model = nn.ModuleDict({k: nn.ModuleList([nn.Linear(8, 8), nn.Linear(8, 8)]) for k in ("encoder", "decoder")})
    adapter = rw.attach(model, rw.Recipe(LoRTA(2, heads=2), sites=rw.Sites(nn.Linear)))
    assert len({id(f["layer"]) for f in adapter.values()}) == 4
    assert total(adapter) == 2 * (8 + 4 + 2 + 4 + 2)  # roles are called "0" and "1" here


@STRUCTURES
def test_each_layer_merges_to_its_exact_rank(structure):
    model, adapter = attached(structure)
    x = torch.randn(5, D, dtype=torch.float64)
    randomise(adapter, lambda: model(x))
    for name, site in adapter.sites.items():
        delta = site.structure.delta(site.factors())
        spectrum = torch.linalg.svdvals(delta.dense())
        assert delta.rank == 2, name
        assert spectrum[1] > 1e-6 * spectrum[0] and spectrum[2] < 1e-12 * spectrum[0], name
    y = model(x)
    rw.merge(model)
    torch.testing.assert_close(model(x), y)


@STRUCTURES
def test_training_lowers_the_loss_and_the_file_gives_the_same_bits(structure, tmp_path):
    model, x = llama(), tokens()
    base = copy.deepcopy(model)
    torch.manual_seed(0)
    adapter = rw.attach(model, rw.Recipe(structure, sites=rw.Sites("all-linear")))
    torch.testing.assert_close(model(x).logits, base(x).logits)
    optimizer, losses = adapter.optimizer(lr=1e-2), []
    for _ in range(25):
        loss = model(input_ids=x, labels=x).loss
        losses.append(loss.item())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert losses[-1] < losses[0] - 0.05
    adapter.save(tmp_path)
    rw.load(base, tmp_path)
    with torch.no_grad():
        assert torch.equal(base(x).logits, model(x).logits)


def test_one_block_more_wide_than_high_is_not_split():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(24, 16, bias=False))
    adapter = rw.attach(model, rw.Recipe(FacTTT(3)))
    assert {k: tuple(v.shape) for k, v in adapter["0"].items()} == {"s": (3, 3), "u": (3, 24), "v": (16, 3)}
    model = nn.Sequential(nn.Linear(24, 16, bias=False))
    adapter = rw.attach(model, rw.Recipe(FacTTT(3, width=8)))
    assert {k: tuple(v.shape) for k, v in adapter["0"].items()} == {"s": (6, 9), "u": (3, 8), "v": (8, 3)}


def test_a_task_is_chosen_for_all_layers_at_once():
    model, adapter = attached(MetaTT(R, tasks=2), ALL[:4])
    x = torch.randn(5, D, dtype=torch.float64)
    start = model(x)
    shake(adapter, 0.3)
    chosen, cores = (adapter["blocks.1.v_proj"][name] for name in ("chosen", "task"))
    assert chosen is adapter["blocks.0.q_proj"]["chosen"] and not chosen.requires_grad
    outputs = []
    for task in range(2):
        with torch.no_grad():
            chosen.copy_(torch.eye(2)[task])
        outputs.append(model(x))
        (gradient,) = torch.autograd.grad(outputs[-1].square().sum(), [cores])
        assert gradient[task].any() and not gradient[1 - task].any()
    assert not torch.allclose(*outputs)
    with torch.no_grad():
        cores[1] = cores[0]
    torch.testing.assert_close(model(x), outputs[0])
    assert not torch.allclose(start, outputs[0])


def test_cores_start_at_the_identity_and_the_first_task():
    _, adapter = attached(MetaTT(R, heads=HEADS, tasks=2), ALL[:4])
    f = adapter["blocks.2.o_proj"]
    for name in ("layer", "role", "head", "task"):
        assert torch.equal(f[name], torch.eye(R).double().expand_as(f[name]))
    assert f["chosen"].tolist() == [1, 0] and not f["b"].any()


@pytest.mark.parametrize(
    ("structure", "error", "message"),
    [
        (FacTTT(2, width=7), IncompatibleAxes, r"found width=7 for the 16 x 16 of blocks.0.q_proj"),
        (FacTTK(2, width=-4), IncompatibleAxes, "found width=-4"),
        (FacTTT(9, width=8), RankError, "found rank=9"),
        (LoTR(17), RankError, "found rank=17"),
        (LoRTA(2, heads=0), IncompatibleAxes, "one head or more; found heads=0"),
        (CaRA(0), RankError, "found rank=0"),
        (MetaTT(2, heads=-1), IncompatibleAxes, "found heads=-1"),
    ],
    ids=repr,
)
def test_sizes_that_do_not_fit_are_refused(structure, error, message):
    with pytest.raises(error, match=message):
        attached(structure)


def test_no_task_is_refused():
    with pytest.raises(IncompatibleAxes, match="one task or more; found tasks=0"):
        MetaTT(2, tasks=0)
