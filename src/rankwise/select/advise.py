"""Advice on a method: LoRA with a tuned rate is the default, and a challenger must earn its place at equal cost.

The procedure knows nothing of models. It is given arms, and a function that trains one of them; so the same code
advises on a user's model (:mod:`rankwise.select.case`) and on a planted problem whose answer is known. Costs are
counted in steps of LoRA.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from statistics import fmean, stdev
from typing import Any, final

from rankwise.errors import DataError
from rankwise.select.evidence import Verdict, compare, holm, tail

__all__ = ["DOES_NOT_MATTER", "UNRESOLVED", "USE", "Advice", "Arm", "Outcome", "Standing", "Trial", "advise"]

USE, DOES_NOT_MATTER, UNRESOLVED = "USE", "IT DOES NOT MATTER", "UNRESOLVED"
LEAST = 20  # steps: below, no rate can be told from another
RATES, FACTOR, SHARE, LAST = 5, 3.0, 0.25, 3  # rates tried on short runs, their ratio, how short; rates on whole runs
LOOKS = (3, 5, 8)  # numbers of pairs at which a challenger may be called better; fixed, so that its error is divided
_FURTHER = 2  # rates beyond an end of either range
_LOWER = 2  # rates below the tuned one, where it diverges on a seed that counts
_TUNE = SHARE * (RATES + _FURTHER) + LAST + _FURTHER + 2  # what tuning one arm costs at most, in whole runs


@final
@dataclass(frozen=True)
class Arm:
    """One method that may be tried.

    Attributes:
        name: for reports.
        lr: the rate to begin with.
        cost: of a step, in steps of LoRA; an arm that costs twice as much is given half of the steps.
        what: what the trial makes of it, such as the settings of a run.
    """

    name: str
    lr: float
    cost: float = 1.0
    what: Any = None


@final
@dataclass(frozen=True)
class Outcome:
    """What a trial came to.

    Attributes:
        before: loss on the validation data before training.
        after: and after; nan or infinite where training diverged.
        seconds: of training.
        curve: training losses by step, where they are known.
    """

    before: float
    after: float
    seconds: float = 0.0
    curve: tuple[float, ...] = ()

    @property
    def kept(self) -> float:
        """The loss that a user is left with, who keeps the base where training made it worse."""
        return self.after if self.after < self.before else self.before


Trial = Callable[[Arm, int, int, float], Outcome]  # (arm, seed, steps, lr)


@final
@dataclass(frozen=True)
class Standing:
    """Where an arm stands.

    Attributes:
        arm: the arm.
        lr: its tuned rate.
        losses: of the runs that count, one a seed.
        verdict: against LoRA; None for LoRA itself, and before the first look.
        dropped: why it is tried no more.
    """

    arm: Arm
    lr: float
    losses: list[float] = field(default_factory=list)
    verdict: Verdict | None = None
    dropped: str = ""


@final
@dataclass(frozen=True)
class Advice:
    """What came of it.

    Attributes:
        word: ``USE``, ``DOES_NOT_MATTER`` or ``UNRESOLVED``.
        arm: to use: LoRA, unless a challenger was better.
        lr: its tuned rate.
        reason: in a sentence.
        standings: of all arms, LoRA's first.
        horizon: steps of LoRA that each run that counts was worth.
        spent: steps of LoRA in all.
        gain: of the best rate seen while tuning, in loss; the unit of all differences.
        noise: standard deviation of LoRA's loss from seed to seed, a share of the gain; None below two seeds.
        more: steps of LoRA that would probably decide, None where it is decided or nothing affordable would.
    """

    word: str
    arm: Arm
    lr: float
    reason: str
    standings: tuple[Standing, ...]
    horizon: int
    spent: float
    gain: float
    noise: float | None = None
    more: float | None = None


@final
class _Bench:
    """Runs trials and keeps the account."""

    def __init__(self, trial: Trial, say: Callable[[str], None]) -> None:
        self.trial, self.say, self.spent, self.gain, self.diverged = trial, say, 0.0, 0.0, False

    def loss(self, arm: Arm, seed: int, worth: float, lr: float) -> float:
        """The loss that is kept of a run worth so many steps of LoRA."""
        found = self.trial(arm, seed, max(1, round(worth / arm.cost)), lr)
        self.spent += worth
        self.say(f"{arm.name}, rate {lr:.2g}, seed {seed}: {found.before:.4f} -> {found.after:.4f}")
        self.gain = max(self.gain, found.before - found.kept)
        self.diverged = not found.after < found.before
        return found.kept

    def tuned(self, arm: Arm, seed: int, worth: float) -> float:
        """The arm's rate: a coarse search on short runs, then a finer one on whole runs around the best.

        The best rate of one seed is often the last before divergence, so a second seed chooses between it and the next
        lower one.
        """
        short = self.searched(arm, seed, SHARE * worth, arm.lr, RATES, FACTOR)
        whole = self.searched(arm, seed, worth, min(short, key=short.__getitem__), LAST, math.sqrt(FACTOR))
        best = min(whole, key=whole.__getitem__)
        lower = max((lr for lr in whole if lr < best), default=best)
        return min({best, lower}, key=lambda lr: whole[lr] + self.loss(arm, seed + 1, worth, lr))

    def nearby(self, arm: Arm, seed: int, worth: float, runs: int) -> float:
        """The best of the arm's own rate and the two beside it, as many as there are runs for."""
        rates = [arm.lr * ratio for ratio in (1.0, 1 / math.sqrt(FACTOR), math.sqrt(FACTOR))][:runs]
        losses = {lr: self.loss(arm, seed, worth, lr) for lr in rates}
        return min(losses, key=losses.__getitem__)

    def searched(
        self, arm: Arm, seed: int, worth: float, middle: float, count: int, ratio: float
    ) -> dict[float, float]:
        """Losses of some rates at an even ratio; further out where an end is best."""
        rates = [middle * ratio**i for i in range(-(count // 2), count // 2 + 1)]
        losses = {lr: self.loss(arm, seed, worth, lr) for lr in rates}
        for _ in range(_FURTHER):
            best = min(losses, key=losses.__getitem__)
            if best not in (min(losses), max(losses)):
                break
            further = best * (ratio if best == max(losses) else 1 / ratio)
            losses[further] = self.loss(arm, seed, worth, further)
        return losses

    def extended(self, standing: Standing, seed: int, worth: float) -> Standing:
        """One more run that counts.

        A rate at which one of them made the base worse is no rate to use: the next lower one takes its place, on the
        same seeds, twice at most.
        """
        found, count = standing, len(standing.losses) + 1
        for lr in (standing.lr / FACTOR ** (i / 2) for i in range(1 + _LOWER)):
            losses = list(standing.losses) if lr == standing.lr else []
            found, self.diverged = replace(standing, lr=lr, losses=losses), False
            while len(losses) < count and not self.diverged:
                losses.append(self.loss(standing.arm, seed + 2 + len(losses), worth, lr))
            if not self.diverged:
                return found
        losses = [*standing.losses, self.loss(standing.arm, seed + 2 + len(standing.losses), worth, standing.lr)]
        return replace(standing, losses=losses)

    def defended(self, own: Standing, seed: int, worth: float) -> Standing:
        """LoRA at the best of its rate and the two beside it, on the runs that count: luck chose its rate too."""
        found = [own]
        for lr in (own.lr * math.sqrt(FACTOR), own.lr / math.sqrt(FACTOR)):
            losses = [self.loss(own.arm, seed + 2 + i, worth, lr) for i in range(len(own.losses))]
            found.append(replace(own, lr=lr, losses=losses))
        return min(found, key=lambda s: fmean(s.losses))


def check_budget(budget: float) -> None:
    """Refuse a budget that is too small for any advice.

    Raises:
        DataError: it is below 20 steps.
    """
    if budget < LEAST:
        raise DataError(
            f"Advice takes a budget of {LEAST} steps or more; found {budget:g}: no rate can be told from another in "
            f"that. Use lora at its own rate."
        )


def _runs(challengers: int, pairs: int) -> float:
    """What comparing so many challengers costs, in runs: tuning, pairs, and LoRA's answer."""
    return (challengers + 1) * (_TUNE + pairs) + 2 * pairs


def _shortest(steps: int) -> int:
    """Steps of a run that still says something of one of so many."""
    return max(min(LEAST, steps), steps // 4)


def layout(budget: float, steps: int, count: int) -> tuple[int, int]:
    """How many challengers a budget allows, and how long a run: all of them at full length if it can, else fewer.

    Returns:
        Challengers, and steps a run.
    """
    for pairs in (LOOKS[1], LOOKS[0]):
        for challengers in range(count, 0, -1):
            worth = min(steps, int(budget / _runs(challengers, pairs)))
            if worth >= _shortest(steps):
                return challengers, worth
    return 0, max(1, min(steps, int(budget / (_TUNE + 2))))


def advise(
    lora: Arm,
    challengers: Sequence[Arm],
    trial: Trial,
    *,
    steps: int,
    budget: float,
    margin: float = 0.02,
    level: float = 0.95,
    seed: int = 0,
    say: Callable[[str], None] = lambda _: None,
) -> Advice:
    """Tune LoRA, tune each challenger as LoRA was, and compare them on runs of seeds that no rate has seen.

    A challenger is better where the interval of its paired differences says so, at a level divided by the looks and
    read together with the others'; but before it is, LoRA may answer with the rates beside its own. It is dropped where
    its interval says that it cannot be better by the margin.

    Args:
        lora: the default.
        challengers: nominated arms, the likeliest first.
        trial: trains an arm.
        steps: of the run that advice is for.
        budget: steps of LoRA that advice may cost.
        margin: the difference that matters, a share of the gain.
        level: of the verdict as a whole.
        seed: of tuning, as the next one; the pairs have those that follow.
        say: told each trial.

    Returns:
        The advice.

    Raises:
        DataError: a budget below 20 steps.
    """
    check_budget(budget)
    bench = _Bench(trial, say)
    count, worth = layout(budget, steps, len(challengers))
    if worth < _shortest(steps):  # too little for a search: runs that say something, around the rate that is known
        worth = min(_shortest(steps), int(budget))
        own, others = Standing(lora, bench.nearby(lora, seed, worth, int(budget / worth))), []
    else:
        own, *others = (Standing(arm, bench.tuned(arm, seed, worth)) for arm in (lora, *challengers[:count]))
    alive, winners, pair = others, [], 0

    def affordable() -> bool:
        defence = 2 * (pair + 1) if others else 0
        return bench.spent + (len(alive) + 1 + defence) * worth <= budget

    while not winners and pair < LOOKS[-1] and (alive or pair < 2) and affordable():
        pair += 1
        own, *alive = (bench.extended(standing, seed, worth) for standing in (own, *alive))
        others = [next((s for s in alive if s.arm is old.arm), old) for old in others]
        if alive and bench.gain > 0 and (pair in LOOKS or (pair > 1 and not affordable())):
            looked = _look(own, others, bench.gain, margin, level)
            if any(map(_better, looked)):
                own = bench.defended(own, seed, worth)
                looked = _look(own, others, bench.gain, margin, level)
            others, winners = looked, [s for s in looked if _better(s)]
            alive = [s for s in looked if not s.dropped]
    least = _shortest(steps) if challengers else None
    return _concluded(own, others, bench, worth, least, margin, level)


def _better(standing: Standing) -> bool:
    return standing.verdict is not None and standing.verdict.word == "better"


def _look(own: Standing, others: list[Standing], gain: float, margin: float, level: float) -> list[Standing]:
    """Compare all challengers that are left with LoRA; who is better is said at a level divided by the looks."""
    strict = 1 - (1 - level) / len(LOOKS)

    def against(standing: Standing, level: float) -> Verdict:
        return compare(standing.losses, own.losses[: len(standing.losses)], gain, margin, level)

    read = holm([against(s, strict) for s in others], strict)
    found = []
    for standing, verdict in zip(others, read, strict=True):
        plain, sure = against(standing, level), verdict.word == "better"
        word = verdict.word if sure else plain.word if plain.word != "better" else "unresolved"
        shown = replace(plain, word=word, pvalue=verdict.pvalue)
        out = f"better by {plain.high:+.1%} of the gain at most" if not sure and plain.high < margin else ""
        found.append(replace(standing, verdict=shown, dropped=standing.dropped or out))
    return found


def _concluded(
    own: Standing, others: list[Standing], bench: _Bench, worth: int, least: int | None, margin: float, level: float
) -> Advice:
    """The verdict; ``least`` is the length of a run that a challenger would need, None where nobody is nominated."""
    winners, alive = [s for s in others if _better(s)], [s for s in others if not s.dropped]
    word, best, more = UNRESOLVED, own, None
    if winners:
        best = max(winners, key=lambda s: s.verdict.difference if s.verdict else 0.0)
        word, reason = USE, f"{best.arm.name} against LoRA: {best.verdict}"
    elif bench.gain <= 0:
        reason = f"no rate lowered the loss of the base in {worth} steps"
    elif not others:
        reason = "no challenger could be tried within the budget and the constraints"
        more = max(0.0, _runs(1, LOOKS[0]) * least - bench.spent) if least else None
    elif alive:
        more = sum(_pairs_left(s, own, bench.gain, margin, level) * worth for s in alive) * (1 + 1 / len(alive))
        more = more if math.isfinite(more) else None
        reason = f"{', '.join(s.arm.name for s in alive)} may still be better by more than {margin:.0%} of the gain"
    else:
        word = DOES_NOT_MATTER
        reason = f"no challenger can be better than LoRA by more than {margin:.0%} of the gain"
    noise = stdev(own.losses) / bench.gain if len(own.losses) > 1 and bench.gain > 0 else None
    return Advice(word, best.arm, best.lr, reason, (own, *others), worth, bench.spent, bench.gain, noise, more)


def _pairs_left(standing: Standing, own: Standing, gain: float, margin: float, level: float, most: int = 60) -> float:
    """Further pairs after which the interval would decide, if the mean and the noise stay what they are."""
    shares = [(b - a) / gain for a, b in zip(standing.losses, own.losses, strict=False)]
    if len(shares) < 2:
        return math.inf if not shares else float(LOOKS[0])
    mean, noise = fmean(shares), stdev(shares)
    for count in range(len(shares) + 1, most + 1):
        half = tail((1 - level) / len(LOOKS), count - 1) * noise / math.sqrt(count)
        if mean + half < margin or (mean - half > 0 and mean > margin):
            return count - len(shares)
    return math.inf
