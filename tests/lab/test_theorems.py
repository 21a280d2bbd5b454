"""What papers prove of solvers and starts, met in the lab; and the cases whose winner is known."""

import math

import pytest
import torch
from benchmarks.lab import CONDITIONS, RANKS, SPREAD, best_stable_rank, local, one_sided, sensing, spread, symmetric

from rankwise.lab import Sensing, cases, gradient, halves
from rankwise.solvers import SGD, ScaledGD

CASES = cases()


def steps(curve) -> int:
    return len(curve.errors) - 1


def test_scaled_gd_does_not_see_the_condition_number():
    """Tong, Ma and Chi (2021, arXiv 2005.08898): a linear rate that does not depend on the condition number.

    A 32 x 24 target of rank 4, rate 1/2, from within a tenth of the smallest singular value to 1e-8 of it: 23 to 24
    steps for condition numbers from 1 to 1e4. The error shrinks by 1 - rate = 1/2 a step once it is small, as the
    linearised step says: of a tangent residual P E + E Q - P E Q it leaves (1 - rate)(P E + E Q - 2 P E Q) and
    (1 - 2 rate) P E Q.
    """
    curves = [local(condition, ScaledGD(0.0), 60) for condition in CONDITIONS]
    counts = [steps(curve) for curve in curves]
    assert max(counts) <= 30
    assert max(counts) - min(counts) <= 2
    for curve in curves:
        late = [now / before for before, now in zip(curve.errors[5:19], curve.errors[6:20], strict=True)]
        assert late == pytest.approx([0.5] * len(late), abs=1e-3)


def test_the_runs_are_those_of_the_published_iteration():
    """Both solvers through attach, autograd and optimizer, against the two lines of matrices that the paper writes."""
    problem = Sensing(24, 24, 2, 10.0)
    start = halves(-gradient(problem), 2)
    for solver in (ScaledGD(0.0), SGD()):
        left, right = start["b"], start["a"].mT  # X = L R^T
        for error in sensing(10.0, solver, 15).errors:
            x = left @ right.mT - problem.update
            assert error == pytest.approx(float(x.norm() / problem.update.norm()), rel=1e-9)
            z = (problem.matrices.mT @ (problem.matrices @ x.flatten())).reshape(24, 24)
            scale_left, scale_right = torch.eye(2).double(), torch.eye(2).double()
            if isinstance(solver, ScaledGD):
                scale_left, scale_right = torch.linalg.inv(right.mT @ right), torch.linalg.inv(left.mT @ left)
            left, right = left - 0.5 * z @ right @ scale_left, right - 0.5 * z.mT @ left @ scale_right


def test_gradient_descent_does():
    """The same starts and rate: steps grow with the condition number, 10 times from 1 to 10 and 3 times to 30."""
    one, ten, thirty = (steps(local(condition, SGD(), 3000)) for condition in (1.0, 10.0, 30.0))
    assert 8 * one < ten < 20 * one
    assert 2 * ten < thirty < 4 * ten


def test_scaled_gd_senses_ill_conditioned_targets_from_the_spectral_start():
    """The setting of figure 2 of the same paper, with n = 24, r = 2, 5 n r measurements and rate 1/2: to 1e-8."""
    counts = [steps(sensing(condition, ScaledGD(0.0), 400)) for condition in CONDITIONS]
    assert max(counts) < 400
    assert max(counts) <= 1.5 * counts[0]
    assert sensing(100.0, SGD(), 2 * max(counts)).errors[-1] > 1e-4


@pytest.mark.parametrize("condition", CONDITIONS)
def test_a_nystrom_start_needs_one_step(condition):
    """Li, Zhang, Mokhtari and He (2024, arXiv 2410.18965), asymmetric: B = M Omega and A = 0, ScaledGD at rate 1.

    B gets no gradient, A becomes B^+ M, and B B^+ M = M since M's columns are those of B. A Gaussian B takes a second
    step. B^+ comes from B's Gram matrix, whose condition is the square of B's: rounding leaves eps times that square.
    """
    errors = one_sided(condition, nystrom=True).errors
    assert errors[0] == pytest.approx(1)
    assert errors[1] < 1e-10 + 1e-14 * condition**2
    other = one_sided(condition, nystrom=False).errors
    assert other[1] > 0.5
    assert other[2] < 1e-6


@pytest.mark.parametrize("condition", [1.0, 10.0, 100.0])
def test_a_nystrom_start_converges_quadratically(condition):
    """The same paper, symmetric: X = M Omega at rate 1/2 is Newton's iteration for a square root, the error is squared.

    From a Gaussian X the part outside of M's columns is halved at every step, no more: 46 steps against 10 to 1e-13.
    """
    curve = symmetric(condition, nystrom=True)
    small = [e for e in curve.errors if e < 0.1]
    assert len(small) >= 3
    assert all(now < max(10 * before**2, 1e-14) for before, now in zip(small, small[1:], strict=False))
    assert min(curve.errors[:13]) <= 1e-13
    other = symmetric(condition, nystrom=False)
    late = [now / before for before, now in zip(other.errors[15:39], other.errors[16:40], strict=True)]
    assert late == pytest.approx([0.5] * len(late), abs=0.01)
    assert min(other.errors[:40]) > 1e-13


@pytest.mark.parametrize("rank", RANKS[:3])
def test_every_update_is_as_spread_as_the_best_one(rank):
    """Lion, Zhang, Li and He (2025, arXiv 2506.03133) find LoRA's stable rank near 1 and PoLAR's above it. Not here.

    Where every entry is seen both end at the truncated SVD of the target, whose stable rank grows with r: 1.74, 2.71
    and 3.53 for r = 2, 4 and 8.
    """
    best = best_stable_rank(rank)
    assert best > 1.7
    for name, rate in (("lora", 0.01), ("polar", 0.03)):
        error, found = spread(name, rank, rate)
        assert error == pytest.approx(SPREAD.floor(rank), rel=1e-2)
        assert found == pytest.approx(best, rel=1e-2)


LEAST = {
    "ill-conditioned": 3.0,
    "full rank, gated by W": 100.0,
    "full rank, Kronecker": 100.0,
    "2-bit base": 1.1,
    "rank 1": 100.0,
    "20 steps": 1.4,
}  # the loser's error over the winner's


def test_every_case_has_a_margin():
    assert LEAST.keys() == CASES.keys()


@pytest.mark.parametrize("name", CASES)
def test_the_known_winner_wins(name):
    """Each side at its best of three of the rates of the figure."""
    case, rates = CASES[name], (0.01, 0.03, 0.1)
    winner, loser = case.best(case.winner, rates), case.best(case.loser, rates)
    assert math.isfinite(loser)
    assert winner * LEAST[name] < loser
