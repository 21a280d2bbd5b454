"""The algebra of tensor formats: every entry against a contraction written out, every cut, and the modes of a size."""

import doctest
from math import prod

import pytest
import torch

from rankwise.errors import IncompatibleAxes
from rankwise.ops import tensors
from rankwise.ops.tensors import CP, TensorTrain, Tucker, balanced_modes, checked_modes, even_modes

MODES = (2, 3, 4, 5)
BATCHES = pytest.mark.parametrize("batch", [(), (3,)])


def normal(*shape):
    return torch.randn(*shape, dtype=torch.float64)


def train(batch):
    cores = [normal(*batch, *shape) for shape in ((1, 2, 3), (3, 3, 2), (2, 4, 4), (4, 5, 1))]
    dense = torch.einsum("...aib,...bjc,...ckd,...dle->...ijkl", *cores)
    return TensorTrain(cores), dense, (3, 2, 4)


def cp(batch):
    factors, weights = [normal(*batch, n, 3) for n in MODES], normal(*batch, 3)
    dense = torch.einsum("...r,...ir,...jr,...kr,...lr->...ijkl", weights, *factors)
    return CP(factors, weights), dense, (3, 3, 3)


def tucker(batch):
    ranks = (2, 1, 3, 2)
    core, factors = normal(*batch, *ranks), [normal(*batch, n, r) for n, r in zip(MODES, ranks, strict=True)]
    dense = torch.einsum("...abcd,...ia,...jb,...kc,...ld->...ijkl", core, *factors)
    return Tucker(core, factors), dense, (2, 2, 2)


FORMATS = pytest.mark.parametrize("made", [train, cp, tucker])


@BATCHES
@FORMATS
def test_every_cut_is_the_dense_tensor_unfolded(made, batch):
    torch.manual_seed(0)
    tensor, dense, inner = made(batch)
    assert tensor.modes == MODES
    torch.testing.assert_close(tensor.dense(), dense, rtol=0, atol=1e-12)
    for cut in (1, 2, 3):
        left, right = tensor.split(cut)
        rows = prod(MODES[:cut])
        assert left.shape == (*batch, rows, inner[cut - 1]) and right.shape[-1] == prod(MODES) // rows
        torch.testing.assert_close(left @ right, dense.reshape(*batch, rows, -1), rtol=0, atol=1e-12)


def test_tensors_of_one_and_two_modes_are_matrices():
    one, two = normal(1, 4, 2), normal(2, 6, 1)
    torch.testing.assert_close(TensorTrain([one, two]).dense(), one[0] @ two[..., 0])
    core, u, v = normal(2, 3), normal(4, 2), normal(6, 3)
    torch.testing.assert_close(Tucker(core, [u, v]).dense(), u @ core @ v.mT)
    torch.testing.assert_close(CP([u, v[:, :2]], torch.ones(2).double()).dense(), u @ v[:, :2].mT)


def test_examples():
    assert doctest.testmod(tensors).failed == 0


@pytest.mark.parametrize("count", [1, 2, 3, 4])
def test_modes_of_every_size(count):
    for size in range(1, 200):
        modes = balanced_modes(size, count)
        assert len(modes) == count and prod(modes) == size and modes == tuple(sorted(modes))
        even = even_modes(size, count)
        assert prod(even) >= size and even[-1] <= 2 * even[0]


def test_a_perfect_power_has_equal_modes():
    assert balanced_modes(11008, 3) == (16, 16, 43)
    assert all(balanced_modes(2**k, k) == (2,) * k for k in range(1, 12))


def test_given_modes_are_kept():
    assert checked_modes((4, 1, 3), 12, "x") == (4, 1, 3)
    assert checked_modes([12], 12, "x") == (12,)
    assert checked_modes((4, 4), 12, "x", padded=True) == (4, 4)
    assert checked_modes(2, 12, "x") == (3, 4)


@pytest.mark.parametrize(
    ("modes", "padded", "message"),
    [
        (
            (4, 4),
            False,
            r"product of tensor modes is the size .* \(4, 4\) with the product 16 for the 12 of x. Give \(3, 4",
        ),
        ((2, 5), True, r"at least the size .* product 10 for the 12 of x"),
        ((3, 0, 4), False, "whole numbers above zero, .*found \\(3, 0, 4\\) for x. Give 3, or modes such as"),
        ((), False, "whole numbers"),
        (0, False, "whole numbers"),
        ((3, 4.0), False, "whole numbers"),
        (True, False, "whole numbers"),
    ],
)
def test_wrong_modes_are_refused(modes, padded, message):
    with pytest.raises(IncompatibleAxes, match=message):
        checked_modes(modes, 12, "x", padded=padded)
