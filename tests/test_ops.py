"""The operators' laws, for every operator that is exported, alone, nested and batched."""

import inspect
from collections.abc import Callable
from itertools import combinations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from rankwise import ops
from rankwise.ops import (
    BlockDiagonal,
    Butterfly,
    Circuit,
    Dense,
    Diagonal,
    Exchange,
    Fold,
    Hadamard,
    Kronecker,
    LinearOperator,
    Pairs,
    Patterned,
    Product,
    Scaled,
    Scattered,
    Sine,
    Sparse,
    Sum,
)
from rankwise.ops.operator import Cost, leaves, with_leaves
from rankwise.ops.spectral import Circulant, Fourier, Haar
from rankwise.testing.compare import Comparison

Batch = tuple[int, ...]


def check_operator(op: LinearOperator, batch: tuple[int, ...] = ()) -> float:
    """The laws: ``mv``, ``mm``, ``dense``, ``added``, ``T``, ``rows`` and ``lower`` agree; the worst figure."""
    (m, n), dense, lower = op.shape, op.dense(), op.lower()
    x, z = (torch.randn(*batch, 5, size, dtype=torch.float64) for size in (n, m))
    index = torch.randint(0, m, (*batch, 6))
    compare = Comparison(type(op).__name__)
    compare("operator law", dense, dense.expand(*batch, m, n), ".dense")
    compare("operator law", op.mv(x), x @ dense.mT, ".mv")
    compare("operator law", op.mm(x.mT), dense @ x.mT, ".mm")
    compare("operator law", op.T.dense(), dense.mT, ".T")
    compare("operator law", op.T.mv(z), z @ dense, ".T.mv")
    compare("operator law", op.T.T.mv(x), x @ dense.mT, ".T.T.mv")
    compare("operator law", op.rows(index), torch.take_along_dim(dense, index.unsqueeze(-1), dim=-2), ".rows")
    assert (op.rank is None) == (lower is None)
    if lower is not None:
        compare("operator law", lower.left @ lower.right, dense, ".lower")
        assert lower.left.shape[-1] == op.rank
    tensors = [t.clone().requires_grad_(t.is_floating_point()) for t in leaves(op)]
    other = with_leaves(op, iter(tensors))
    compare("operator law", other.dense(), dense, ".with_leaves")
    g = torch.randn(*batch, m, n, dtype=torch.float64)
    needed = [t for t in tensors if t.requires_grad]
    wanted = torch.autograd.grad(other.dense(), needed, g.expand_as(other.dense()))
    for one, how in ((other, ""), (other.formed(), ".formed()")):
        compare("operator law", one.added(x.new_ones(m, n), 2.0), 1 + 2 * dense, f"{how}.added")
        gradients = one.gradients(g)
        assert [found is None for found in gradients] == [not t.requires_grad for t in tensors]
        for found, want in zip([found for found in gradients if found is not None], wanted, strict=True):
            compare("operator law", found, want, f"{how}.gradients")
    return compare.figures["operator"]


def d(batch: Batch, m: int, n: int) -> Dense:
    return Dense(torch.randn(*batch, m, n, dtype=torch.float64))


def diagonal(batch: Batch, n: int) -> Diagonal:
    return Diagonal(torch.randn(*batch, n, dtype=torch.float64))


def blocks(batch: Batch, k: int, b: int) -> BlockDiagonal:
    return BlockDiagonal(torch.randn(*batch, k, b, b, dtype=torch.float64))


def exchange(batch: Batch, n: int, first: int, second: int) -> Exchange:
    return Exchange(n, first, second, torch.zeros(batch, dtype=torch.float64))


def fold(batch: Batch, size: int, side: int, wraps: bool = False) -> Fold:
    return Fold(size, side, torch.zeros(batch, dtype=torch.float64), wraps)


def patterned(batch: Batch, m: int, k: int, n: int) -> Patterned:
    row, col = torch.randint(0, k, (2, *batch, 4))
    return Patterned(
        d(batch, m, k).matrix, torch.randn(*batch, 4, dtype=torch.float64), row, col, d(batch, k, n).matrix
    )


def low(batch: Batch, m: int, r: int, n: int) -> Product:
    return Product(d(batch, m, r), d(batch, r, n))


def circuit(batch: Batch, modes: tuple[int, ...], shape: tuple[int, int]) -> Circuit:
    axes = list(combinations(range(len(modes)), 2))
    sizes = [modes[i] * modes[j] for i, j in axes]
    return Circuit([torch.randn(*batch, p, p, dtype=torch.float64) for p in sizes], axes, modes, shape)


def apart(batch: Batch, m: int, n: int, k: int) -> torch.Tensor:
    """Unlike places of a matrix, counted along its rows."""
    return torch.stack([torch.randperm(m * n)[:k] for _ in range(batch[0] if batch else 1)]).reshape(*batch, k)


def scattered(batch: Batch, m: int, n: int, k: int) -> Scattered:
    return Scattered(apart(batch, m, n, k), torch.randn(*batch, k, dtype=torch.float64), (m, n))


def sparse(batch: Batch, m: int, n: int, k: int) -> Sparse:
    place = apart(batch, m, n, k)
    return Sparse(torch.randn(*batch, k, dtype=torch.float64), place // n, place % n, (m, n))


OPERATORS: dict[str, Callable[[Batch], LinearOperator]] = {
    "dense": lambda b: d(b, 4, 7),
    "diagonal": lambda b: diagonal(b, 6),
    "blocks": lambda b: blocks(b, 3, 2),
    "one block": lambda b: blocks(b, 1, 5),
    "product": lambda b: low(b, 6, 2, 5),
    "three factors": lambda b: Product(d(b, 6, 2), Product(diagonal(b, 2), d(b, 2, 5))),
    "three factors, from the left": lambda b: Product(Product(d(b, 6, 2), diagonal(b, 2)), d(b, 2, 5)),
    "low rank on both sides": lambda b: Product(low(b, 6, 3, 4), low(b, 4, 1, 5)),
    "low rank on the right": lambda b: Product(blocks(b, 3, 2), low(b, 6, 2, 5)),
    "low rank on the left": lambda b: Product(low(b, 6, 2, 4), blocks(b, 2, 2)),
    "scaled": lambda b: Scaled(low(b, 6, 2, 5), -1.5),
    "scaled dense": lambda b: Scaled(d(b, 6, 5), 0.5),
    "sum": lambda b: Sum(low(b, 6, 2, 5), Scaled(low(b, 6, 3, 5), 2.0)),
    "sum with dense": lambda b: Sum(low(b, 6, 2, 5), d(b, 6, 5)),
    "kronecker": lambda b: Kronecker(d(b, 2, 3), d(b, 4, 5)),
    "kronecker, low rank": lambda b: Kronecker(d(b, 3, 2), low(b, 4, 2, 5)),
    "kronecker of kroneckers": lambda b: Kronecker(d(b, 2, 3), Kronecker(d(b, 3, 2), d(b, 2, 2))),
    "hadamard": lambda b: Hadamard(low(b, 6, 2, 5), low(b, 6, 3, 5)),
    "hadamard with dense": lambda b: Hadamard(low(b, 6, 2, 5), d(b, 6, 5)),
    "sine": lambda b: Sine(low(b, 6, 2, 5)),
    "sine of dense": lambda b: Sine(d(b, 6, 5)),
    "folded": lambda b: Product(d(b, 4, 3), fold(b, 6, 3)),
    "folded and cut": lambda b: Product(d(b, 4, 3), fold(b, 7, 3)),
    "folded, wrapping": lambda b: Product(d(b, 4, 3), fold(b, 7, 3, wraps=True)),
    "folded to more": lambda b: Product(d(b, 4, 5), fold(b, 3, 5)),
    "repeated": lambda b: Product(fold(b, 7, 3).T, low(b, 3, 2, 5)),
    "repeated, wrapping": lambda b: Product(fold(b, 7, 3, wraps=True).T, d(b, 3, 5)),
    "pairs": lambda b: Pairs(*torch.randn(2, *b, 12, dtype=torch.float64), 6),
    "butterfly": lambda b: Butterfly(torch.randn(*b, 4, 4, 4, dtype=torch.float64), 2),
    "butterfly without a stride": lambda b: Butterfly(torch.randn(*b, 3, 2, 2, dtype=torch.float64), 1),
    "exchange between blocks": lambda b: Product(blocks(b, 2, 4), Product(exchange(b, 8, 2, 2), blocks(b, 2, 4))),
    "exchange between low ranks": lambda b: Product(Product(d(b, 6, 4), exchange(b, 4, 2, 2)), d(b, 4, 7)),
    "exchange of unlike indices": lambda b: Product(d(b, 5, 12), Product(exchange(b, 12, 2, 3), d(b, 12, 4))),
    "product of rotations": lambda b: Product(blocks(b, 3, 2), blocks(b, 2, 3)),
    "patterned": lambda b: Patterned(
        d(b, 6, 3).matrix, torch.randn(*b, 4, dtype=torch.float64), *torch.randint(0, 3, (2, *b, 4)), d(b, 3, 5).matrix
    ),
    "scattered": lambda b: scattered(b, 6, 5, 9),
    "circuit": lambda b: circuit(b, (2, 3, 2), (12, 12)),
    "padded circuit": lambda b: circuit(b, (2, 2, 3), (7, 11)),
    "sparse": lambda b: sparse(b, 6, 5, 9),
    "full sparse": lambda b: sparse(b, 3, 2, 6),
    "fourier": lambda b: Fourier(sparse(b, 6, 5, 9)),
    "few waves": lambda b: Fourier(sparse(b, 8, 7, 1)),
    "haar": lambda b: Haar(sparse(b, 6, 4, 9), (6, 4)),
    "haar, odd": lambda b: Haar(sparse(b, 6, 8, 9), (5, 7)),
    "circulant": lambda b: Circulant(torch.randn(*b, 2, 3, 4, dtype=torch.float64)),
    "odd circulant": lambda b: Circulant(torch.randn(*b, 2, 1, 3, dtype=torch.float64)),
}
LOW = {
    "few waves",
    "product",
    "three factors",
    "three factors, from the left",
    "low rank on both sides",
    "low rank on the right",
    "low rank on the left",
    "scaled",
    "sum",
    "hadamard",
    "product of rotations",
    "exchange between blocks",
    "exchange between low ranks",
    "exchange of unlike indices",
    "folded",
    "folded and cut",
    "folded, wrapping",
    "folded to more",
    "repeated",
    "repeated, wrapping",
}


@pytest.mark.parametrize("batch", [(), (1,), (3,)], ids=str)
@pytest.mark.parametrize("name", OPERATORS)
def test_operator_laws(name, batch):
    torch.manual_seed(0)
    assert check_operator(OPERATORS[name](batch), batch) <= 1e-12


@pytest.mark.parametrize("name", OPERATORS)
def test_which_operators_lower(name):
    assert (OPERATORS[name](()).lower() is not None) == (name in LOW)


@pytest.mark.parametrize("inner", [lambda: diagonal((), 3), lambda: d((), 3, 3)], ids=["diagonal", "square"])
def test_of_factors_of_one_rank_the_last_stays_alone(inner):
    """Frozen, as in VeRA and LoRA-XS, it needs no gradient, and its input need not be kept."""
    b, a = d((), 6, 3), d((), 3, 5)
    for op in (Product(b, Product(inner(), a)), Product(Product(b, inner()), a)):
        pair = op.lower()
        assert pair is not None and pair.right is a.matrix


def parts(op: LinearOperator) -> list[LinearOperator]:
    """An operator and all that it is made of."""
    inner = [value for value in vars(op).values() if isinstance(value, LinearOperator)]
    return [op, *(part for value in inner for part in parts(value))]


def test_every_exported_operator_is_in_the_table():
    exported = {getattr(ops, name) for name in ops.__all__}
    concrete = {c for c in exported if issubclass(c, LinearOperator) and not inspect.isabstract(c)}
    assert concrete == {type(part) for make in OPERATORS.values() for part in parts(make(()))}


def test_a_wrong_operator_is_caught():
    class Wrong(Diagonal.__mro__[1]):
        shape = (3, 3)
        T = Diagonal(torch.ones(3, dtype=torch.float64))

        def mv(self, x):
            return 2 * x

        def dense(self):
            return torch.eye(3, dtype=torch.float64)

        def lower(self):
            return None

        rank = None
        cost = Cost(3, 9)

        def gradients(self, g):
            return []

    with pytest.raises(AssertionError, match=r"operator law: Wrong.mv differs"):
        check_operator(Wrong())


@pytest.mark.parametrize("name", OPERATORS)
def test_mv_keeps_the_dtype_of_its_input(name):
    op = OPERATORS[name](())
    x = torch.randn(2, op.shape[1], dtype=torch.bfloat16)
    assert op.mv(x).dtype == torch.bfloat16


def test_a_diagonal_between_two_matrices_makes_no_square():
    """As in VeRA, whose rank may be far above the layer's sides: B diag(u) A costs what B A does, and m or n r more."""
    (m, n), r = (3, 5), 1000
    b, u, a = (torch.randn(*shape, dtype=torch.float64, requires_grad=True) for shape in ((m, r), (r,), (r, n)))
    for op in (Product(Dense(b), Product(Diagonal(u), Dense(a))), Product(Product(Dense(b), Diagonal(u)), Dense(a))):
        assert op.cost.form <= m * r * n + max(m, n) * r and op.rank == r
        with FlopCounterMode(display=False) as seen:
            dense, pair = op.dense(), op.lower()
            op.gradients(torch.randn(m, n, dtype=torch.float64))
        assert seen.get_total_flops() / 2 <= 4 * m * r * n  # formed, formed again, and two gradients
        torch.testing.assert_close(pair.left @ pair.right, dense)


def test_a_product_lowers_to_its_least_inner_size():
    low_both = Product(low((), 6, 3, 4), low((), 4, 1, 5))
    assert low_both.rank == low_both.lower().left.shape[-1] == 1


@pytest.mark.parametrize("core", [diagonal((), 3), d((), 3, 3)], ids=["diagonal", "dense"])
def test_what_lies_between_goes_with_the_left_factor(core):
    """So that where A is frozen (VeRA, LoRA-XS) no trained factor multiplies x, and x is not kept."""
    a = torch.randn(3, 5, dtype=torch.float64)
    pair = Product(d((), 4, 3), Product(core, Dense(a))).lower()
    assert pair.right is a
