"""Verdicts on paired losses: against tables, and by simulation."""

import math
import random

import pytest

from rankwise.errors import DataError
from rankwise.select.evidence import _prior, adjusted, compare, compare_all, holm, tail, two_sided

# Two-sided 5 % and 1 % points of Student's t, as every table prints them.
TABLE = {1: (12.706, 63.657), 2: (4.303, 9.925), 3: (3.182, 5.841), 4: (2.776, 4.604), 5: (2.571, 4.032)}
TABLE |= {9: (2.262, 3.250), 10: (2.228, 3.169), 29: (2.045, 2.756), 30: (2.042, 2.750), 120: (1.980, 2.617)}


@pytest.mark.parametrize("freedom", TABLE)
def test_points_of_student_are_those_of_the_tables(freedom):
    assert tail(0.05, freedom) == pytest.approx(TABLE[freedom][0], abs=6e-4)
    assert tail(0.01, freedom) == pytest.approx(TABLE[freedom][1], abs=6e-4)


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 7, 8, 31])
def test_chances_are_the_integral_of_the_density(freedom):
    """Simpson's rule on the density, which shares nothing with the closed form."""
    constant = math.exp(math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2)) / math.sqrt(freedom * math.pi)

    def density(t: float) -> float:
        return constant * (1 + t * t / freedom) ** (-(freedom + 1) / 2)

    for t in (0.3, 1.0, 2.5):
        steps = 2000
        sides = [density(i * t / steps) * (4 if i % 2 else 2) for i in range(1, steps)]
        inside = 2 * (density(0) + sum(sides) + density(t)) * t / steps / 3
        assert two_sided(t, freedom) == pytest.approx(1 - inside, abs=1e-12)


def drawn(rng: random.Random, pairs: int, effect: float, noise: float = 0.05) -> tuple[list[float], list[float]]:
    """Runs that share what a seed does, each with noise of its own."""
    shared = [rng.gauss(3.0, 0.5) for _ in range(pairs)]
    return [s - effect + rng.gauss(0, noise) for s in shared], [s + rng.gauss(0, noise) for s in shared]


@pytest.mark.parametrize(("pairs", "level"), [(2, 0.95), (3, 0.95), (5, 0.9), (8, 0.99)])
def test_the_interval_covers_at_its_level(pairs, level):
    """Binomial: 4,000 draws stray 4 standard errors once in 16,000 times."""
    rng, draws = random.Random(pairs), 4000
    found = (compare(*drawn(rng, pairs, 0.1), gain=0.5, level=level) for _ in range(draws))
    hits = sum(v.low <= 0.1 / 0.5 <= v.high for v in found)
    assert abs(hits / draws - level) < 4 * math.sqrt(level * (1 - level) / draws)


@pytest.mark.parametrize("pairs", [2, 3, 5, 10])
def test_a_against_a_is_never_better_more_than_the_level(pairs):
    rng, draws = random.Random(pairs), 4000
    words = [compare(*drawn(rng, pairs, 0.0), gain=1.0, margin=0.0).word for _ in range(draws)]
    assert 0 < words.count("better") / draws < 0.025 + 4 * math.sqrt(0.025 / draws)
    assert 0 < words.count("worse") / draws < 0.025 + 4 * math.sqrt(0.025 / draws)


def test_the_chance_of_any_false_word_among_many_stays_within_the_level():
    rng, draws = random.Random(0), 1500
    plain = together = 0
    for _ in range(draws):
        found = [compare(*drawn(rng, 4, 0.0), gain=1.0, margin=0.0) for _ in range(6)]
        plain += any(v.word in ("better", "worse") for v in found)
        together += any(v.word in ("better", "worse") for v in holm(found))
    assert plain / draws > 0.2
    assert 0 < together / draws < 0.05 + 4 * math.sqrt(0.05 / draws)


REFERENCE = [2.0, 2.1, 1.9, 2.05]


def lower_by(effect: float, spread: float) -> list[float]:
    """Losses that lie this far below the reference's, two of them a spread off."""
    return [x - effect + e * spread for x, e in zip(REFERENCE, (1, -1, 0, 0), strict=True)]


def test_words():
    assert compare(lower_by(0.3, 0.01), REFERENCE, 1.0).word == "better"
    assert compare(lower_by(-0.3, 0.01), REFERENCE, 1.0).word == "worse"
    assert compare(REFERENCE, REFERENCE, 1.0).word == "tie"
    assert compare(lower_by(0.1, 0.5), REFERENCE, 1.0).word == "unresolved"


def test_a_difference_below_the_margin_is_never_better():
    """Certain, but too small to matter: a tie, and not better even where the interval excludes 0."""
    found = compare(lower_by(0.010, 0.001), REFERENCE, 1.0)
    assert found.low > 0
    assert found.word == "tie"
    straddling = compare(lower_by(0.019, 0.004), REFERENCE, 1.0)
    assert straddling.low > 0 and straddling.high > 0.02
    assert straddling.word == "unresolved"


def test_the_unit_is_the_gain_and_the_sign_the_challengers():
    assert compare([1.0, 1.2], [1.5, 1.7], gain=2.0).difference == pytest.approx(0.25)
    assert compare([1.5, 1.7], [1.0, 1.2], gain=2.0).difference == pytest.approx(-0.25)


def test_pairing_removes_what_runs_share():
    rng = random.Random(1)
    challenger, reference = drawn(rng, 6, 0.2, 0.02)
    paired = compare(challenger, reference, 1.0)
    shuffled = compare(challenger, reference[1:] + reference[:1], 1.0)
    assert paired.word == "better"
    assert shuffled.high - shuffled.low > 5 * (paired.high - paired.low)


def test_one_pair_says_nothing():
    found = compare([1.0], [2.0], gain=1.0)
    assert (found.word, found.low, found.high, found.pvalue) == ("unresolved", -math.inf, math.inf, 1.0)


def test_pairs_that_all_differ_alike_leave_no_doubt():
    found = compare([1.0, 2.0], [1.5, 2.5], gain=1.0)
    assert (found.word, found.pvalue) == ("better", 0.0)
    assert (found.low, found.high) == (0.5, 0.5)


# -- many methods together ----------------------------------------------------------------------


def field(rng: random.Random, methods: int, seeds: int, spread: float, noisy: float = 0.0) -> dict[str, list[float]]:
    """Methods that are all alike but for their noise: log-normal in size, or twenty times as large here and there."""
    shared = [rng.gauss(3.0, 0.5) for _ in range(seeds)]
    sizes = [math.exp(rng.gauss(0, spread)) * (20 if rng.random() < noisy else 1) for _ in range(methods)]
    sizes[1] = sizes[0]  # the twin
    return {str(i): [s + 0.01 * size * rng.gauss(0, 1) for s in shared] for i, size in enumerate(sizes)}


@pytest.mark.parametrize(
    ("methods", "seeds", "spread", "noisy", "covered", "wrong"),
    [
        (60, 2, 0.0, 0.0, 0.96, 0.05),
        (60, 2, 0.7, 0.0, 0.94, 0.15),  # over the promise: two seeds do not tell who is noisy
        (60, 3, 0.7, 0.0, 0.94, 0.10),
        (60, 3, 0.0, 0.05, 0.94, 0.10),
        (9, 3, 0.7, 0.0, 0.93, 0.10),
    ],
)
def test_intervals_of_many_methods_cover_and_few_alike_ones_are_told_apart(
    methods, seeds, spread, noisy, covered, wrong
):
    rng, draws = random.Random(methods + seeds), 150
    inside, told, narrower = 0, 0, []
    for _ in range(draws):
        losses = field(rng, methods, seeds, spread, noisy)
        found = compare_all(losses, "0", "1", gain=1.0, margin=0.0)
        inside += sum(v.low <= 0 <= v.high for v in found.values())
        told += any(v.word in ("better", "worse") for v in holm([*found.values()]))
        alone = {name: compare(losses[name], losses["0"], 1.0) for name in found}
        narrower += [(found[n].high - found[n].low) / (alone[n].high - alone[n].low) for n in found]
    assert inside / draws / (methods - 1) >= covered
    assert told / draws <= wrong
    assert sorted(narrower)[len(narrower) // 2] < {2: 0.4, 3: 0.9}[seeds]


def test_what_few_seeds_agree_on_by_accident_is_not_certain():
    rng = random.Random(3)
    losses = field(rng, 20, 2, 0.0)
    losses["5"] = [loss - 0.025 for loss in losses["0"]]
    assert compare(losses["5"], losses["0"], 1.0).pvalue < 1e-9
    assert compare_all(losses, "0", "1", 1.0)["5"].pvalue > 0.01


def test_a_method_that_is_noisy_itself_stays_so():
    losses = field(random.Random(4), 20, 3, 0.0)
    losses["7"] = [loss + 0.5 * k for k, loss in enumerate(losses["7"])]
    found = compare_all(losses, "0", "1", 1.0)
    alone = compare(losses["7"], losses["0"], 1.0)
    assert found["7"].high - found["7"].low > 0.5 * (alone.high - alone.low)
    assert found["8"].high - found["8"].low < 0.2 * (found["7"].high - found["7"].low)


def test_the_noisier_of_the_reference_and_its_twin_counts():
    losses = field(random.Random(5), 20, 3, 0.0)
    before = compare_all(losses, "0", "1", 1.0)["2"]
    losses["1"] = [loss + 0.3 * k for k, loss in enumerate(losses["1"])]
    after = compare_all(losses, "0", "1", 1.0)["2"]
    assert after.high - after.low > 5 * (before.high - before.low)


def test_few_methods_or_one_seed_are_compared_alone():
    losses = field(random.Random(6), 7, 3, 0.0)
    assert compare_all(losses, "0", "1", 2.0) == {n: compare(losses[n], losses["0"], 2.0) for n in "123456"}
    assert compare_all({n: one[:1] for n, one in losses.items()}, "0", "1", 2.0)["3"].word == "unresolved"
    with pytest.raises(DataError, match="in pairs"):
        compare_all({**losses, "3": [1.0]}, "0", "1", 2.0)


def test_a_prior_of_variances_is_found_again():
    """Scaled inverse chi-square of 4 degrees of freedom around 2, seen with 3: Smyth's model itself."""
    rng = random.Random(7)
    chi = lambda freedom: rng.gammavariate(freedom / 2, 2.0)  # noqa: E731
    seen = [2.0 * 4 / chi(4) * chi(3) / 3 for _ in range(4000)]
    freedom, scale = _prior(seen, 3)
    assert freedom == pytest.approx(4, rel=0.15) and scale == pytest.approx(2.0, rel=0.08)
    freedom, scale = _prior([chi(3) / 3 for _ in range(4000)], 3)
    assert freedom > 50 and scale == pytest.approx(1.0, rel=0.05)


def test_holm_by_hand():
    """Holm 1979: the smallest of n times n, the next times n - 1, never below an earlier one."""
    assert adjusted([0.01, 0.04, 0.03, 0.005]) == pytest.approx([0.03, 0.06, 0.06, 0.02])
    assert adjusted([0.6, 0.5]) == [1.0, 1.0]
    assert adjusted([]) == []


def test_holm_takes_back_what_does_not_survive():
    strong = compare([1.0, 1.1, 0.9, 1.0], [2.0, 2.11, 1.9, 2.01], gain=1.0)
    weak = compare([1.0, 1.1, 0.9], [1.3, 1.7, 1.5], gain=1.0)
    assert weak.word == "better" and 0.01 < weak.pvalue < 0.05
    read = holm([strong, weak, weak])
    assert [v.word for v in read] == ["better", "unresolved", "unresolved"]
    assert (read[1].low, read[1].high) == (weak.low, weak.high)


@pytest.mark.parametrize(
    ("challenger", "reference", "gain", "level", "says"),
    [
        ([1.0], [1.0, 2.0], 1.0, 0.95, "in pairs, at least one; found 1 and 2"),
        ([], [], 1.0, 0.95, "found 0 and 0"),
        ([math.nan, 1.0], [1.0, 1.0], 1.0, 0.95, "a run that diverged has lost"),
        ([1.0], [2.0], 0.0, 0.95, "A gain is positive.*found 0.0"),
        ([1.0], [2.0], math.inf, 0.95, "A gain is positive"),
        ([1.0], [2.0], 1.0, 95, "in \\(0, 1\\).*found 95"),
    ],
)
def test_what_is_no_evidence_is_refused(challenger, reference, gain, level, says):
    with pytest.raises(DataError, match=says):
        compare(challenger, reference, gain, level=level)
