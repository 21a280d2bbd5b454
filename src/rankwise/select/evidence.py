"""Which of two methods is better, and whether it can be said: paired losses, an interval, a word.

Losses are scalars, one a run; lower is better. Everything is arithmetic on them, no model is needed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from statistics import fmean, stdev, variance
from typing import final

import torch

from rankwise.errors import DataError

__all__ = ["Verdict", "adjusted", "compare", "compare_all", "holm", "tail", "two_sided"]


@final
@dataclass(frozen=True)
class Verdict:
    """What paired runs say of a challenger against a reference.

    Attributes:
        difference: mean of (reference's loss - challenger's loss) / gain: above 0 where the challenger is better.
        low: lower end of its interval.
        high: upper end.
        word: "better", "worse", "tie" or "unresolved".
        pvalue: two-sided, of no difference.
        pairs: how many.
    """

    difference: float
    low: float
    high: float
    word: str
    pvalue: float
    pairs: int

    def __str__(self) -> str:
        return f"{self.word} {self.difference:+.1%} [{self.low:+.1%}, {self.high:+.1%}] of the gain, {self.pairs} pairs"


def compare(
    challenger: Sequence[float], reference: Sequence[float], gain: float, margin: float = 0.02, level: float = 0.95
) -> Verdict:
    """Compare two methods run by run.

    The interval is Student's on the differences of the pairs. It assumes that pairs are independent of one another
    (other seeds, other orders of the data) and that their differences are about normal; it does not assume that both
    methods are equally noisy. One pair gives none, two hardly any: 12.7 standard errors at 95 %. It covers at its
    level for a number of pairs that was fixed beforehand; who looks several times divides 1 - level by the looks.

    Args:
        challenger: final losses, one a run.
        reference: of the runs with the same seeds and the same order of the data, in the same order.
        gain: by how much full fine-tuning lowers the base's loss; the unit of the difference.
        margin: the difference that matters, a share of the gain.
        level: of the interval.

    Returns:
        The verdict: "better" or "worse" where the interval excludes 0 and the difference exceeds the margin, "tie"
        where the interval lies within the margin, else "unresolved".

    Raises:
        DataError: losses that are not pairs of finite numbers, or a gain that is not positive.

    Examples:
        >>> compare([1.0, 1.1, 0.9], [1.5, 1.7, 1.4], gain=2.0).word
        'better'
    """
    _check(challenger, reference, gain, level)
    shares = [(theirs - own) / gain for own, theirs in zip(challenger, reference, strict=True)]
    mean, count = fmean(shares), len(shares)
    error = stdev(shares) / math.sqrt(count) if count > 1 else math.inf
    return _verdict(mean, error, max(count - 1, 1), count, margin, level)


FEWEST = 8  # methods, from which on their spreads tell one another's


def compare_all(
    losses: Mapping[str, Sequence[float]],
    reference: str,
    twin: str,
    gain: float,
    margin: float = 0.02,
    level: float = 0.95,
) -> dict[str, Verdict]:
    """Compare many methods with one of them, each one's spread over the seeds estimated with the help of the others'.

    With two or three seeds a method's own spread is hardly known, which makes intervals wide, and two differences
    that happen to be equal look certain. Here the seed's own effect (the mean over the methods, without the outer
    quarters) is taken out of the losses, and the variance of what is left is shrunk towards that of all methods, as
    far as they are alike: an empirical Bayes estimate under a scaled inverse chi-square prior, which also adds to the
    degrees of freedom. It never lowers what a method itself shows. Of the reference and its twin, one method under
    two names, the larger variance counts, since it enters every comparison. Intervals are Welch's.

    With fewer than 8 methods, or one seed, each is compared alone, see :func:`compare`. What :func:`holm` promises is
    then approximate: in simulations of unequally noisy methods some false word comes up in up to 10 % of races of
    three seeds and 15 % of two, in place of 5 % (``tests/select/test_evidence.py``).

    Args:
        losses: of each method, one a seed, in the same order; the reference and its twin among them.
        reference: the method that the others are compared with.
        twin: the same method once more, of other random starts.
        gain: as in :func:`compare`.
        margin: as there.
        level: of each interval.

    Returns:
        The verdict of every method but the reference, not yet corrected for their number.

    Raises:
        DataError: as in :func:`compare`.

    References:
        Smyth 2004, Statistical Applications in Genetics and Molecular Biology 3(1), 3, section 6.2; Welch 1947,
        Biometrika 34, 28-35.
    """
    own = losses[reference]
    for one in losses.values():
        _check(one, own, gain, level)
    seeds, methods = len(own), len(losses)
    if methods < FEWEST or seeds < 2:
        return {name: compare(one, own, gain, margin, level) for name, one in losses.items() if name != reference}
    shares = {name: [loss / gain for loss in one] for name, one in losses.items()}
    means = {name: fmean(one) for name, one in shares.items()}
    middle = slice(methods // 4, methods - methods // 4)
    effects = [fmean(sorted(one[i] - means[n] for n, one in shares.items())[middle]) for i in range(seeds)]
    left = {name: [x - effect for x, effect in zip(one, effects, strict=True)] for name, one in shares.items()}
    seen = {name: variance(one) * methods / (methods - 1) for name, one in left.items()}
    more, common = _prior([*seen.values()], seeds - 1)
    freedom = more + seeds - 1
    spread = {name: max(one, (more * common + (seeds - 1) * one) / freedom) for name, one in seen.items()}
    theirs = max(spread[reference], spread[twin])
    found = {}
    for name in filter(lambda name: name != reference, losses):
        both = spread[name] + theirs
        degrees = int(freedom * both**2 / (spread[name] ** 2 + theirs**2)) if both else 1
        error = math.sqrt(both / seeds)
        found[name] = _verdict(means[reference] - means[name], error, degrees, seeds, margin, level)
    return found


def _check(challenger: Sequence[float], reference: Sequence[float], gain: float, level: float) -> None:
    if len(challenger) != len(reference) or not challenger:
        raise DataError(f"Losses come in pairs, at least one; found {len(challenger)} and {len(reference)}.")
    if not all(map(math.isfinite, (*challenger, *reference))):
        raise DataError("Losses are finite numbers; found nan or inf: a run that diverged has lost, drop it first.")
    if not (gain > 0 and math.isfinite(gain)):
        raise DataError(f"A gain is positive, the base's loss less full fine-tuning's; found {gain}.")
    if not 0 < level < 1:
        raise DataError(f"A level lies in (0, 1), such as 0.95; found {level}.")


def _verdict(mean: float, error: float, freedom: int, count: int, margin: float, level: float) -> Verdict:
    half, pvalue = math.inf, 1.0
    if error < math.inf:
        half = tail(1 - level, freedom) * error
        pvalue = two_sided(abs(mean) / error, freedom) if error else float(mean == 0)
    low, high = mean - half, mean + half
    if -margin <= low and high <= margin:
        word = "tie"
    elif (low > 0 or high < 0) and abs(mean) > margin:
        word = "better" if mean > 0 else "worse"
    else:
        word = "unresolved"
    return Verdict(mean, low, high, word, pvalue, count)


def _prior(variances: Sequence[float], freedom: int) -> tuple[float, float]:
    """Degrees of freedom and scale of the prior that variances of so many degrees of freedom come from.

    Smyth's moments of their logarithms. No more degrees of freedom than all of them together have.
    """
    least = 1e-5 * sorted(variances)[len(variances) // 2] or 1e-300
    logs = [math.log(max(v, least)) - _polygamma(0, freedom / 2) + math.log(freedom / 2) for v in variances]
    excess, most = variance(logs) - _polygamma(1, freedom / 2), float(freedom * (len(variances) - 1))
    low, high = math.log(1e-3), math.log(most)  # of what is found, by halving: trigamma falls
    for _ in range(60):
        middle = (low + high) / 2
        low, high = (middle, high) if _polygamma(1, math.exp(middle) / 2) > excess else (low, middle)
    found = math.exp(high)
    return found, math.exp(fmean(logs) + _polygamma(0, found / 2) - math.log(found / 2))


def _polygamma(order: int, x: float) -> float:
    return float(torch.special.polygamma(order, torch.tensor(x, dtype=torch.float64)))


def holm(verdicts: Sequence[Verdict], level: float = 0.95) -> list[Verdict]:
    """Verdicts on several challengers of one reference, read together.

    The chance that any "better" or "worse" is wrong stays within 1 - level, however the comparisons hang together
    (they share a reference). Intervals stay each challenger's own; ties are left as they are.

    Args:
        verdicts: one a challenger.
        level: of all of them together.

    Returns:
        The verdicts with adjusted p-values; "better" and "worse" that do not survive are "unresolved".

    References:
        Holm 1979, Scandinavian Journal of Statistics 6, 65-70.
    """
    read = []
    for verdict, pvalue in zip(verdicts, adjusted([v.pvalue for v in verdicts]), strict=True):
        lost = verdict.word in ("better", "worse") and pvalue > 1 - level
        read.append(replace(verdict, pvalue=pvalue, word="unresolved" if lost else verdict.word))
    return read


def adjusted(pvalues: Sequence[float]) -> list[float]:
    """Holm's step-down p-values, in the order given.

    Args:
        pvalues: one a comparison.

    Returns:
        As many; a comparison is significant at ``level`` where its own is at most 1 - level.

    Examples:
        >>> adjusted([0.04, 0.01, 0.5])
        [0.08, 0.03, 0.5]
    """
    found, highest = [0.0] * len(pvalues), 0.0
    for done, index in enumerate(sorted(range(len(pvalues)), key=pvalues.__getitem__)):
        highest = max(highest, min(1.0, (len(pvalues) - done) * pvalues[index]))
        found[index] = highest
    return found


def two_sided(t: float, freedom: int) -> float:
    """The chance that Student's T is further than t from 0.

    Args:
        t: at least 0.
        freedom: degrees of freedom, a whole number from 1.

    Returns:
        The chance, exact to 1e-15.

    References:
        Abramowitz & Stegun 1964, 26.7.3 and 26.7.4.
    """
    angle = math.atan2(t, math.sqrt(freedom))
    sine, cosine = math.sin(angle), math.cos(angle)
    odd = freedom % 2
    term, total = (sine * cosine, 0.0) if odd else (sine, 0.0)
    for k in range(1, freedom // 2 + 1):
        total += term
        term *= (2 * k / (2 * k + 1) if odd else (2 * k - 1) / (2 * k)) * cosine**2
    inside = (angle + total) * 2 / math.pi if odd else total
    return min(max(1 - inside, 0.0), 1.0)


@cache
def tail(chance: float, freedom: int) -> float:
    """How far from 0 Student's T is with this chance at most: 2.262 for 0.05 and 9 degrees of freedom."""
    low, high = 0.0, math.pi / 2
    for _ in range(60):
        middle = (low + high) / 2
        above = two_sided(math.tan(middle) * math.sqrt(freedom), freedom) > chance
        low, high = (middle, high) if above else (low, middle)
    return math.tan(high) * math.sqrt(freedom)
