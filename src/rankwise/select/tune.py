"""The learning rate of one method, by successive halving over runs that the ledger keeps."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from statistics import fmean
from typing import Any, final

from rankwise.errors import DataError, MissingDependency, TrainingError
from rankwise.hf.method import recipe_of
from rankwise.hf.run import Run
from rankwise.select.ledger import Entry, Ledger

__all__ = ["Trial", "Tuned", "Tuning", "tune"]

Say = Callable[[str], None]


@final
@dataclass(frozen=True)
class Tuning:
    """How a rate is looked for; equal values cost equally many steps, whatever the method.

    Each bracket begins with ``rates`` rates; the better half of them goes on to the next rung. **A rung is a run of its
    own**, from the start, its schedule scaled to its own length: no rung is a longer run that was stopped, so each loss
    is that of a finished schedule, and every run can be taken from the ledger. At the end the rates on both sides of
    the best are tried at full length, nearer each time.

    Attributes:
        rates: in each bracket.
        span: the highest rate is so many times the lowest.
        rungs: lengths, as shares of the run's.
        brackets: the first has its rates on an even (logarithmic) grid, later ones where Optuna's TPE proposes.
        seeds: runs for each rate and rung, over which losses are averaged.
        centre: the middle of the range, in units of the method's own rate: above 1 for models far narrower than those
            that the catalogue's rates are for.
        refinements: how often the best rate's two neighbours are tried: half a step of the grid away, then a quarter.
    """

    rates: int = 4
    span: float = 64.0
    rungs: tuple[float, ...] = (0.25, 0.5, 1.0)
    brackets: int = 1
    seeds: int = 1
    centre: float = 1.0
    refinements: int = 1

    def __post_init__(self) -> None:
        whole = min(self.rates, self.brackets, self.seeds) >= 1
        rise = bool(self.rungs) and sorted({*self.rungs}) == [*self.rungs] and self.rungs[0] > 0
        if not (whole and rise and self.span > 1 and self.centre > 0 and self.refinements >= 0):
            raise DataError(
                f"Rates, brackets and seeds are at least 1, a span is above 1, a centre above 0, refinements at least "
                f"0, rungs rise; found {self}."
            )

    @property
    def step(self) -> float:
        """The ratio of two neighbours on the grid."""
        return self.span ** (1 / max(self.rates - 1, 1))

    def between(self) -> Tuning:
        """The same over rates that lie between those that this may choose from, as far from both."""
        return replace(self, centre=self.centre * self.step ** (0.5 ** (self.refinements + 1)))

    def counts(self) -> list[int]:
        """How many rates there are at each rung."""
        return [math.ceil(self.rates / 2**rung) for rung in range(len(self.rungs))]

    def runs(self) -> dict[float, int]:
        """How many runs of each length it takes to tune a method."""
        found = {share: self.brackets * n for share, n in zip(self.rungs, self.counts(), strict=True)}
        found[self.rungs[-1]] += 2 * self.refinements
        return {share: self.seeds * n for share, n in found.items()}

    def cost(self) -> float:
        """What tuning one method costs, in runs of full length."""
        return sum(share * n for share, n in self.runs().items())


ONCE = Tuning()


@final
@dataclass(frozen=True)
class Trial:
    """A rate at a rung.

    Attributes:
        lr: the rate.
        share: length of the run, as a share of the whole.
        loss: on the validation data, mean over the seeds; infinite where training failed.
    """

    lr: float
    share: float
    loss: float


@final
@dataclass(frozen=True)
class Tuned:
    """A rate, and how it was found.

    Attributes:
        run: the run with the best rate.
        loss: of that rate at the last rung.
        trials: all, in order.
        entries: the runs behind them.
        edge: whether the best rate is the lowest or the highest that was tried, so that a better one may lie outside.
    """

    run: Run
    loss: float
    trials: tuple[Trial, ...]
    entries: tuple[Entry, ...]
    edge: bool


def tune(run: Run, ledger: Ledger, tuning: Tuning = ONCE, say: Say = lambda _: None) -> Tuned:
    """Find the learning rate of a run.

    Args:
        run: the run, with validation data; its rate is the middle of the range.
        ledger: where the trials are kept; those that it holds are not run again.
        tuning: how to look.
        say: told each trial.

    Returns:
        The best rate: the lowest loss at the last rung.

    Raises:
        DataError: nothing to validate on.
        MissingDependency: Optuna is needed and not installed.
        TrainingError: no rate trains.
        RankwiseError: whatever else is wrong with the run.
    """
    found = searched(run, ledger, tuning, say)
    if not math.isfinite(found.loss):
        rates = [trial.lr for trial in found.trials]
        raise TrainingError(
            f"Some rate between {min(rates):.3g} and {max(rates):.3g} should train; all failed: "
            f"{found.entries[-1].error} Give a lower lr."
        )
    return found


def searched(run: Run, ledger: Ledger, tuning: Tuning, say: Say) -> Tuned:
    """As :func:`tune`; where no rate trains, the loss is infinite."""
    if run.validation is None:
        raise DataError("A rate is chosen by the loss on validation data; give a file or a share, such as 0.1.")
    middle = tuning.centre * (recipe_of(run).lr if isinstance(run.lr, str) else run.lr)
    low, high = middle / math.sqrt(tuning.span), middle * math.sqrt(tuning.span)
    study, distribution = _study(low, high, tuning, run.seed)
    trials: list[Trial] = []
    entries: list[Entry] = []

    def loss_at(lr: float, share: float) -> float:
        made = [ledger.done(shortened(replace(run, lr=lr, seed=run.seed + i), share)) for i in range(tuning.seeds)]
        entries.extend(made)
        trials.append(Trial(lr, share, fmean(entry.loss for entry in made)))
        say(f"{made[0].recipe['name']}, rate {lr:.3g}, {made[0].steps} steps: loss {trials[-1].loss:.4f}")
        return trials[-1].loss

    best: list[tuple[float, float]] = []  # (loss, rate) at the last rung, of each bracket
    for _ in range(tuning.brackets):
        asked = [study.ask({"lr": distribution}) for _ in range(tuning.rates)]
        left, losses = {trial.number: trial.params["lr"] for trial in asked}, {}
        for count, share in zip(tuning.counts(), tuning.rungs, strict=True):
            keep = sorted(left, key=lambda number: (losses.get(number, 0.0), number))[:count]
            left = {number: left[number] for number in keep}
            losses |= {number: loss_at(lr, share) for number, lr in left.items()}
        best += [(losses[number], lr) for number, lr in left.items()]
        for trial in asked:
            study.tell(trial, losses[trial.number])
    step = tuning.step
    for _ in range(tuning.refinements):
        step, (_, lr) = math.sqrt(step), min(best)
        best += [(loss_at(near, tuning.rungs[-1]), near) for near in (lr / step, lr * step)]
    loss, lr = min(best)
    tried = {trial.lr for trial in trials}
    edge = len(tried) > 1 and lr in (min(tried), max(tried))
    return Tuned(replace(run, lr=lr), loss, tuple(trials), tuple(entries), edge)


def shortened(run: Run, share: float) -> Run:
    """The run at a share of its length, with a single validation, at its end."""
    if run.steps:
        return replace(run, saves=1, steps=max(1, round(run.steps * share)))
    return replace(run, saves=1, epochs=run.epochs * share)


def grid(low: float, high: float, count: int) -> Sequence[float]:
    """Rates at even ratios from low to high; the geometric mean where there is only one."""
    if count == 1:
        return [math.sqrt(low * high)]
    between = [low * (high / low) ** (i / (count - 1)) for i in range(1, count - 1)]
    return [low, *between, high]


def _study(low: float, high: float, tuning: Tuning, seed: int) -> tuple[Any, Any]:
    """Optuna's study in memory, and the distribution of the rate; the ledger is what lasts."""
    if find_spec("optuna") is None:
        raise MissingDependency("Tuning needs optuna: pip install 'rankwise[tune]'.")
    import optuna

    optuna.logging.set_verbosity(optuna.logging.WARNING)
    study = optuna.create_study(sampler=optuna.samplers.TPESampler(seed=seed, n_startup_trials=tuning.rates))
    for lr in grid(low, high, tuning.rates):
        study.enqueue_trial({"lr": lr})
    return study, optuna.distributions.FloatDistribution(low, high, log=True)
