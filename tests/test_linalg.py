"""Decompositions against torch.linalg and PEFT."""

import pytest
import torch
from peft.tuners.lokr.layer import factorization

from rankwise.ops.linalg import cayley, near_square, skew, truncated_svd


def spectrum(m: int, n: int) -> torch.Tensor:
    torch.manual_seed(0)
    u, _ = torch.linalg.qr(torch.randn(m, n, dtype=torch.float64))
    v, _ = torch.linalg.qr(torch.randn(n, n, dtype=torch.float64))
    return u * 0.5 ** torch.arange(n, dtype=torch.float64) @ v.mT


@pytest.mark.parametrize("iterations", [None, 8])
@pytest.mark.parametrize("shape", [(20, 8), (8, 8), (30, 12)])
def test_truncated_svd_is_the_svd(shape, iterations):
    w = spectrum(*shape)
    u, s, v = truncated_svd(w, 4, iterations=iterations)
    full = torch.linalg.svd(w, full_matrices=False)
    best = full.U[:, :4] * full.S[:4] @ full.Vh[:4]
    torch.testing.assert_close(s, full.S[:4], rtol=1e-9, atol=1e-12)
    torch.testing.assert_close(u * s @ v.mT, best, rtol=1e-9, atol=1e-9)
    torch.testing.assert_close(u.mT @ u, torch.eye(4, dtype=torch.float64))
    assert (u.gather(0, u.abs().argmax(0, keepdim=True)) > 0).all()


def test_truncated_svd_leaves_the_generator_alone():
    state = torch.get_rng_state()
    one, two = (truncated_svd(spectrum(20, 8), 3, iterations=2, seed=5) for _ in range(2))
    torch.set_rng_state(state)
    truncated_svd(torch.ones(6, 5), 2, iterations=2)
    assert torch.equal(torch.get_rng_state(), state)
    assert torch.equal(one.u, two.u)


def test_truncated_svd_of_bfloat16_is_float32():
    assert truncated_svd(torch.randn(6, 5).bfloat16(), 2).u.dtype == torch.float32


@pytest.mark.parametrize("factor", [-1, 1, 2, 3, 4, 7, 8, 16, 50])
def test_near_square_is_pefts_factorization(factor):
    for size in range(1, 400):
        m, n = near_square(size, factor)
        assert m * n == size
        assert (m, n) == factorization(size, factor), (size, factor)


@pytest.mark.parametrize("size", [1, 2, 5, 16])
def test_cayley_is_orthogonal(size):
    torch.manual_seed(0)
    q = skew(torch.randn(7, size * (size - 1) // 2, dtype=torch.float64), size)
    assert torch.equal(q, -q.mT)
    r = cayley(q)
    eye = torch.eye(size, dtype=torch.float64)
    torch.testing.assert_close(r @ r.mT, eye.expand(7, size, size), rtol=0, atol=1e-12)
    torch.testing.assert_close(torch.linalg.det(r), torch.ones(7, dtype=torch.float64))
    torch.testing.assert_close(r, (eye + q) @ torch.linalg.inv(eye - q), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("terms", range(3, 9))
def test_cayley_series_is_the_sum_of_its_powers(terms):
    torch.manual_seed(0)
    q = skew(0.3 * torch.randn(3, 10, dtype=torch.float64), 5)
    powers = [torch.linalg.matrix_power(q, i) for i in range(terms)]
    wanted = powers[0] + 2 * sum(powers[1:-1]) + powers[-1]
    torch.testing.assert_close(cayley(q, terms), wanted, rtol=0, atol=1e-12)


def test_cayley_series_converges_for_small_generators():
    torch.manual_seed(0)
    q = skew(1e-2 * torch.randn(3, 10, dtype=torch.float64), 5)
    errors = [float((cayley(q, terms) - cayley(q)).abs().max()) for terms in (3, 5, 8)]
    assert errors[0] > 10 * errors[1] > 100 * errors[2]
    assert errors[2] < 1e-9
