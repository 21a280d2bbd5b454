"""L1 meaning, L2 identity, L3 batch, L4 closure: every structure on every kind of layer."""

import inspect
from dataclasses import dataclass, fields, is_dataclass

import pytest
import torch
from law_cases import (
    ACROSS,
    ACTIVATIONS,
    CASES,
    CONV,
    LEAVES,
    PATCHES,
    STRUCTURES,
    TABLE,
    ids,
    normal,
    possible,
    refusal,
)
from law_cases import layer as of
from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D

import rankwise as rw
from rankwise import structures
from rankwise.errors import IncompatibleAxes, NotMergeable, RankError, TargetError
from rankwise.host import Site
from rankwise.ops import Dense, LinearOperator, Product
from rankwise.ops.operator import Cost
from rankwise.structures import (
    Additive,
    CrossGroup,
    Factor,
    Factors,
    LoRA,
    Magnitude,
    PatchOFT,
    Stack,
    Start,
    Structure,
)
from rankwise.testing import LAYERS, accepts, check_on, check_structure, randomise


@pytest.mark.parametrize(("structure", "layer"), CASES, ids=lambda v: getattr(v, "name", repr(v)))
def test_laws(structure, layer):
    figures = check_on(structure, layer)
    assert figures["effect"] >= 0.01


def test_the_table_is_wide():
    assert len(TABLE) >= 40
    assert len(CASES) >= 1500


def test_impossible_pairs_are_refused():
    pairs = [(s, layer) for layer in LAYERS for s in STRUCTURES if not possible(s, layer)]
    for structure, layer in pairs:
        with pytest.raises((TargetError, RankError, IncompatibleAxes)):
            rw.attach(layer.make(), rw.Recipe(structure, sites=layer.sites))


def test_leaves_go_onto_nearly_every_layer():
    """Of sizes that every block size divides: 16 x 32."""
    kinds = [
        of(nn.Linear, 32, 16, inputs=normal(32)),
        of(Conv1D, 16, 32, inputs=normal(32)),
        of(nn.Conv2d, 32, 16, 1, inputs=normal(32, 2, 2)),
        of(nn.Embedding, 16, 32, inputs=ids(3)),
    ]
    for kind in kinds:
        refused = [s for s in LEAVES if refusal(s, kind)]
        assert len(refused) <= len(LEAVES) / 10, (kind.name, refused)


def parts(structure: Structure) -> set[type]:
    """The classes that a structure is made of."""
    assert is_dataclass(structure)
    inner = (getattr(structure, f.name) for f in fields(structure))
    return {type(structure)}.union(*(parts(s) for s in inner if isinstance(s, Structure)))


def test_every_exported_structure_is_in_the_table():
    exported = (getattr(structures, name) for name in structures.__all__)
    concrete = {c for c in exported if isinstance(c, type) and issubclass(c, Structure) and not inspect.isabstract(c)}
    assert concrete == set().union(*(parts(s) for s in STRUCTURES))


# -- L1 of what has no weight of the layer's shape ------------------------------------------------

GROUPED = [layer for layer in CONV if possible(CrossGroup(6), layer)]


def adapted(structure, layer):
    """A model with random factors, its base, those factors and inputs."""
    torch.manual_seed(0)
    base, model, x = *(layer.make().double() for _ in range(2)), layer.inputs(3)
    model.load_state_dict(base.state_dict())
    adapter = rw.attach(model, rw.Recipe(structure, sites=layer.sites))
    randomise(adapter, lambda: model(x))
    return model, base, adapter["0"], x


@pytest.mark.parametrize("layer", GROUPED, ids=lambda v: v.name)
def test_across_groups_is_a_convolution_without_groups(layer):
    model, base, f, x = adapted(CrossGroup(6, 3.0), layer)
    conv = base[0]
    g, n = conv.groups, 6 // conv.groups
    at = [o // (conv.out_channels // g) * n for o in range(conv.out_channels)]  # the group's first channel of A
    kernel = torch.stack([b @ f["a"][i : i + n] for b, i in zip(f["b"], at, strict=True)])
    dense = type(conv)(
        *(conv.in_channels, conv.out_channels, conv.kernel_size, conv.stride, conv.padding),
        **{"dilation": conv.dilation, "padding_mode": conv.padding_mode, "bias": False},
        **({"output_padding": conv.output_padding} if conv.transposed else {}),
    ).double()
    kernel = kernel.unflatten(1, (conv.in_channels, *conv.kernel_size))
    dense.weight.data = kernel.transpose(0, 1) if conv.transposed else kernel
    torch.testing.assert_close(model(x), base(x) + 3 / 6 * dense(x), rtol=0, atol=1e-12)


def test_patches_are_rotated_and_added_up():
    """One pixel of one patch after another, as PEFT 0.21.2 lays them."""
    layer = next(c for c in CONV if c.name == "Conv2d(4, 8, (3, 2), stride=(1, 2), padding=(1, 0))")
    model, base, f, x = adapted(PatchOFT(6), layer)
    rotation = PatchOFT(6).operator(f).dense()
    torch.testing.assert_close(rotation @ rotation.T, torch.eye(24).double())
    n, c, h, w = x.shape
    rows, cols = h - 3 + 1, w - 2 + 1
    turned = torch.zeros(n, c, rows * cols * 6, dtype=torch.float64)  # a channel's values: position, then kernel
    for i in range(rows):
        for j in range(cols):
            patch = x[:, :, i : i + 3, j : j + 2].reshape(n, -1) @ rotation.T
            turned[:, :, (i * cols + j) * 6 :][:, :, :6] = patch.reshape(n, c, 6)
    image = torch.zeros_like(x)
    for place in range(rows * cols * 6):  # read as kernel, then position
        k, at = divmod(place, rows * cols)
        image[:, :, at // cols + k // 2, at % cols + k % 2] += turned[:, :, place]
    torch.testing.assert_close(model(x), base(image), rtol=0, atol=1e-12)


@pytest.mark.parametrize("structure", [*ACROSS, *PATCHES, *ACTIVATIONS], ids=repr)
def test_what_has_no_weight_says_so(structure):
    layer = next(layer for layer in TABLE if possible(structure, layer))
    model, _, f, x = adapted(structure, layer)
    y = model(x)
    with pytest.raises(NotMergeable, match="Serve it unmerged"):
        structure.weight(f, torch.zeros(12, 36, dtype=torch.float64))
    with pytest.raises(NotMergeable, match="the structures at \\['0'\\] have none. Serve them unmerged"):
        rw.merge(model)
    with pytest.raises(NotMergeable), rw.merged(model):
        raise AssertionError("it merged")
    assert torch.equal(model(x), y)
    for wrap in (Magnitude, lambda s: Stack(s, LoRA(2)), structures.Anchored):
        with pytest.raises(IncompatibleAxes, match=r"\."):
            wrap(structure)


def test_a_rank_across_groups_is_a_multiple_of_them():
    conv = nn.Sequential(nn.Conv2d(6, 6, 3, groups=3))
    with pytest.raises(RankError, match="multiple"):
        rw.attach(conv, rw.Recipe(CrossGroup(4), sites=rw.Sites("0")))


# -- a method from outside, and what the laws catch -----------------------------------------------


@dataclass(frozen=True)
class Outside(Additive):
    """LoRA with a core, written by somebody else; ``wrong`` names a mistake."""

    rank: int = 4
    wrong: str = ""

    traits = frozenset({"additive", "two_sided", "random_start", "drops"})

    @property
    def scale(self) -> float:
        return 2.0

    def factors(self, site: Site) -> dict[str, Factor]:
        r = self.rank
        return {
            "a": Factor({"rank": r, "in": site.cols}, Start.RANDOM),
            "c": Factor({"rank": r, "core": r}, Start.RANDOM),
            "b": Factor({"out": site.rows, "rank": r}, self.first()),
        }

    def first(self) -> Start:
        return Start.RANDOM if self.wrong == "L2" else Start.ZEROS

    def operator(self, f: Factors) -> LinearOperator:
        a, b, c = f["a"], f["b"], f["c"]
        if self.wrong == "unused":
            c = torch.eye(self.rank, dtype=a.dtype).expand_as(c)
        if self.wrong == "L3":
            a = a + a.mean()  # over the batch of adapters too
        if self.wrong == "L1":
            return OneWay(b @ c @ a)
        return Product(Dense(b), Product(Dense(c), Dense(a)))


class OneWay(LinearOperator):
    """An operator whose ``mv``, said to be cheap, forgets one output unit."""

    def __init__(self, matrix: Tensor) -> None:
        self.matrix = matrix
        self.inner = Dense(matrix)
        self.shape = self.inner.shape

    def mv(self, x):
        y = self.inner.mv(x)
        return torch.cat([y[..., :-1], 0 * y[..., -1:]], dim=-1)

    def dense(self):
        return self.matrix

    @property
    def T(self):
        return self.inner.T

    @property
    def cost(self):
        return Cost(apply=1, form=1)

    def lower(self):
        return None


def test_a_structure_from_outside_passes():
    figures = check_structure(Outside(), known=[Outside])
    assert set(figures) == {"L1", "L2", "L3", "L4", "effect"}


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("L1", "L1 meaning: .*on Linear"),
        ("L2", "L2 identity: .*on Linear"),
        ("L3", "L3 batch: .*on Linear"),
        ("unused", r"L4 closure: .* gives no gradient to \['0/c'\]"),
    ],
)
def test_each_law_catches_its_mistake(wrong, message):
    with pytest.raises(AssertionError, match=message):
        check_structure(Outside(wrong=wrong), known=[Outside])


def test_an_unknown_class_in_a_file_is_refused():
    with pytest.raises(ValueError, match="names only known axes"):
        check_structure(Outside())


def test_accepts_tells_kinds_apart():
    tokens = structures.TokenRows((1,))
    assert [layer.name for layer in LAYERS if accepts(tokens, layer)] == ["Embedding", "tied head"]
    assert all(accepts(LoRA(4), layer) for layer in LAYERS)


def test_anchors_are_stored_and_not_trained():
    model = torch.nn.Sequential(torch.nn.Linear(8, 8))
    adapter = rw.attach(model, rw.Recipe(structures.Anchored(LoRA(2))))
    trained = [name for name, _ in adapter.named_parameters(trainable=True)]
    assert trained == ["0/a", "0/b"]
    assert [n for n, _ in adapter.named_parameters()] == [*trained, "0/anchor_a", "0/anchor_b"]
