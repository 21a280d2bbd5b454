"""L1 meaning, L2 identity, L3 batch, L4 closure: every structure on every kind of layer."""

import inspect
from dataclasses import dataclass, fields, is_dataclass

import pytest
import torch
from law_cases import CASES, STRUCTURES, TABLE, possible
from torch import Tensor

import rankwise as rw
from rankwise import structures
from rankwise.errors import TargetError
from rankwise.host import Site
from rankwise.ops import Dense, LinearOperator, Product
from rankwise.structures import Additive, Factor, Factors, LoRA, Start, Structure
from rankwise.testing import LAYERS, accepts, check_on, check_structure


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
        with pytest.raises(TargetError):
            rw.attach(layer.make(), rw.Recipe(structure, sites=layer.sites))


def parts(structure: Structure) -> set[type]:
    """The classes that a structure is made of."""
    assert is_dataclass(structure)
    inner = (getattr(structure, f.name) for f in fields(structure))
    return {type(structure)}.union(*(parts(s) for s in inner if isinstance(s, Structure)))


def test_every_exported_structure_is_in_the_table():
    exported = (getattr(structures, name) for name in structures.__all__)
    concrete = {c for c in exported if isinstance(c, type) and issubclass(c, Structure) and not inspect.isabstract(c)}
    assert concrete == set().union(*(parts(s) for s in STRUCTURES))


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
    """An operator whose ``mv`` forgets one output unit."""

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
