"""Several methods on one's own model and data: each at a rate of its own, on equal terms, judged against tuned LoRA."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import fmean
from typing import Any, final

from rankwise.errors import DataError, TrainingError
from rankwise.hf import data
from rankwise.hf.method import FULL, spoken
from rankwise.hf.run import Run
from rankwise.select.evidence import Verdict, compare_all, holm
from rankwise.select.ledger import Entry, Ledger, code
from rankwise.select.matching import matched, sizes
from rankwise.select.robustness import measures, noisy
from rankwise.select.tune import ONCE, Tuned, Tuning, searched, tune

__all__ = ["AGAIN", "REFERENCE", "Checks", "Race", "Row", "arms", "judged", "race"]

REFERENCE, AGAIN = "lora", "lora again"
MATCHES = ("params", "seconds", "bytes")
_REDRAWN = 1_000_003  # apart from any seed of a race


@final
@dataclass(frozen=True)
class Checks:
    """Robustness columns of a race, none unless asked for. ``Run.base_text`` adds another: what the base forgot.

    Attributes:
        noise: share of wrong answers in the training data of further runs; needs test data.
        shifted: a file of another domain, on which the trained adapters are measured.
        merge4: whether to merge each adapter and round the whole to NF4.
    """

    noise: float = 0.0
    shifted: str | None = None
    merge4: bool = False


@final
@dataclass(frozen=True)
class Row:
    """A method in a race.

    Attributes:
        method: its name.
        run: its run, at its rate.
        edge: whether that rate is the lowest or the highest that was tried.
        steps: of a final run.
        parameters: trained ones.
        bytes: of the adapter's file.
        seconds: of training a final run, mean.
        tuning_steps: optimizer steps that finding the rate took.
        losses: on the test data, one a seed; infinite where training failed.
        verdict: against tuned LoRA; None for LoRA itself, and where a run failed.
        robust: by column: nats, mean over the seeds; above 0 is a loss that rose.
    """

    method: str
    run: Run
    edge: bool
    steps: int
    parameters: int
    bytes: int
    seconds: float
    tuning_steps: int
    losses: tuple[float, ...]
    verdict: Verdict | None = None
    robust: dict[str, float] = field(default_factory=dict)

    @property
    def word(self) -> str:
        """The verdict in one word."""
        if self.verdict is not None:
            return self.verdict.word
        return "reference" if self.method == REFERENCE else "failed"


@final
@dataclass(frozen=True)
class Race:
    """The outcome of a race.

    Attributes:
        rows: methods, from the lowest loss to the highest.
        base: loss of the base on the test data.
        gain: by how much full fine-tuning lowers it: the unit of every difference.
        seeds: of the final runs.
        match: what was made equal besides the tuning, if anything.
        margin: the difference that matters, as a share of the gain.
        code: versions of what ran.
    """

    rows: tuple[Row, ...]
    base: float
    gain: float
    seeds: tuple[int, ...]
    match: str | None
    margin: float
    code: str

    def to_dict(self) -> dict[str, Any]:
        """Plain values; a number that is not finite is None."""
        plain = [{**asdict(row), "word": row.word, "loss": fmean(row.losses)} for row in self.rows]
        return _finite({**asdict(self), "rows": plain})

    def draw(self, path: Path) -> None:
        """Draw each method's difference to LoRA with its interval into a PNG file; see :mod:`rankwise.hf.plots`."""
        from rankwise.hf.plots import differences

        judged = [(row.method, row.verdict) for row in self.rows if row.verdict is not None]
        bars = [(name, v.difference, v.low, v.high, v.word) for name, v in judged]
        differences(bars, self.margin, path, f"{len(self.seeds)} seeds, tuned LoRA = 0")


NONE = Checks()


def arms(run: Run, methods: Sequence[str], match: str | None = None) -> dict[str, Run]:
    """The runs of a race by name, LoRA, LoRA again and full fine-tuning among them; nothing is trained.

    "lora again" is LoRA with other random starts and a tuning of its own, over rates that lie between LoRA's, under the
    same order of the data: a race that calls it better or worse cannot be trusted.

    Args:
        run: model, data and settings for all.
        methods: names of the catalogue, with options or without: "relora(every=100)".
        match: "params" or "bytes" sets each method's rank so that it comes nearest to LoRA's size.

    Returns:
        The runs, LoRA's first.

    Raises:
        UnknownName: no method of that name.
        DataError: no such match.
        RankwiseError: a method that does not go onto the model.
    """
    if match not in (None, *MATCHES):
        raise DataError(f"match is one of {', '.join(MATCHES)}; found {match!r}.")
    start = replace(run, structure=None, init=None, solver=None, ranks=None, options={})
    found = {REFERENCE: replace(start, method=REFERENCE)}
    for name in dict.fromkeys(methods):
        found.setdefault(name, _entered(start, name))
    if match in ("params", "bytes"):
        size = sizes(found[REFERENCE])[match]
        found |= {name: matched(one, size, match) for name, one in found.items() if name != REFERENCE}
    found[AGAIN] = replace(found[REFERENCE], init_seed=_REDRAWN)
    found[FULL] = replace(start, method=FULL, rank=None)
    for one in found.values():
        sizes(one)  # whatever does not fit raises before anything is trained
    return found


def _entered(start: Run, text: str) -> Run:
    """A run of a method, without a rank where the method has none."""
    from rankwise.methods import catalogue

    name, options = spoken(text)
    entry = catalogue().get(name)
    rank = options.pop("rank", start.rank) if entry is None or "rank" in entry.options else None
    return replace(start, method=name, rank=rank, options=options)


def race(
    run: Run,
    methods: Sequence[str],
    ledger: Ledger,
    *,
    seeds: int = 3,
    tuning: Tuning = ONCE,
    match: str | None = None,
    test: str | None = None,
    checks: Checks = NONE,
    margin: float = 0.02,
    say: Callable[[str], None] = lambda _: None,
) -> Race:
    """Race methods against tuned LoRA.

    Every method has its rate tuned with equally many runs and steps. The final runs have new seeds; those of one seed
    see the same examples in the same order. Differences are shares of what full fine-tuning gains; verdicts are
    Holm-corrected, see :func:`rankwise.select.evidence.compare_all`.

    Args:
        run: model, data and settings for all; its method's axes are not used.
        methods: names of the catalogue, with options or without; LoRA, LoRA again and full fine-tuning run along.
        ledger: keeps every run; those that it holds are not run again.
        seeds: final runs of each method.
        tuning: how rates are looked for.
        match: what to make equal: "params" (trained), "bytes" (of the adapter's file), both by the rank; or "seconds"
            (of training, by the steps of the final runs, as measured while tuning). Full fine-tuning keeps its size.
        test: a file for the final losses; without it each seed sets its own share of the data aside.
        checks: robustness columns.
        margin: the difference that matters, as a share of the gain.
        say: told how it goes.

    Returns:
        The outcome.

    Raises:
        DataError: nothing to measure on, test rows among the training data, or no gain to compare with.
        UnknownName: no method of that name.
        TrainingError: LoRA or full fine-tuning failed.
        RankwiseError: whatever else is wrong.
    """
    if seeds < 1:
        raise DataError(f"A race has at least one seed; found {seeds}.")
    if checks.noise and test is None:
        raise DataError("With noise the answers of held-out rows would be wrong as well; give a test file of its own.")
    runs = arms(run, methods, match)
    for other in (test, run.validation):
        _apart(run.data, other)
    needed = (REFERENCE, FULL)  # without which nothing is said; any other method may fail
    tuned = {}
    for name, one in runs.items():
        find, how = tune if name in needed else searched, tuning.between() if name == AGAIN else tuning
        tuned[name] = find(one, ledger, how, say)
    finals = {name: replace(found.run, validation=test or run.validation) for name, found in tuned.items()}
    if match == "seconds":
        steps = {name: _steps(found, tuned[REFERENCE], tuning) for name, found in tuned.items()}
        finals = {name: replace(one, steps=steps[name]) for name, one in finals.items()}
    drawn = tuple(range(run.seed + tuning.seeds, run.seed + tuning.seeds + seeds))
    made: dict[str, list[Entry]] = {name: [] for name in finals}
    rise: dict[str, list[float]] = {name: [] for name in finals}
    wanted = measures(checks.shifted, checks.merge4)
    for seed in drawn:
        for name, one in finals.items():
            one = replace(one, seed=seed, init_seed=one.init_seed and one.init_seed + seed)
            made[name].append(ledger.done(one, wanted))
            say(f"{name}, seed {seed}: loss {made[name][-1].loss:.4f}")
            if checks.noise:
                folder = ledger.path.with_name(f"{ledger.path.name}.runs")
                one = replace(one, data=noisy(run.data, checks.noise, seed, folder))
                rise[name].append(ledger.done(one).loss - made[name][-1].loss)
    return _judged(finals, tuned, made, rise, drawn, match, margin)


def _judged(
    finals: dict[str, Run],
    tuned: dict[str, Tuned],
    made: dict[str, list[Entry]],
    rise: dict[str, list[float]],
    seeds: tuple[int, ...],
    match: str | None,
    margin: float,
) -> Race:
    losses = {name: tuple(entry.loss for entry in entries) for name, entries in made.items()}
    for name in (REFERENCE, FULL):
        if not all(map(math.isfinite, losses[name])):
            raise TrainingError(f"A race is run against {REFERENCE} and {FULL}; {name} failed: {made[name][-1].error}")
    base = fmean(entry.scores["before"]["loss"] for entry in made[REFERENCE])
    gain = base - fmean(losses[FULL])
    if gain <= 0:
        raise DataError(
            f"Differences are shares of what full fine-tuning gains; it gained {gain:.4f} nats over a base at "
            f"{base:.4f}. Give more steps, more data, or other rates."
        )
    said = judged(losses, gain, margin)
    rows = [
        Row(
            name,
            finals[name],
            tuned[name].edge,
            max(entry.steps for entry in entries),
            max(entry.parameters for entry in entries),
            max(entry.bytes for entry in entries),
            fmean(entry.seconds for entry in entries),
            sum(entry.steps for entry in tuned[name].entries),
            losses[name],
            said.get(name),
            _robust(entries, rise[name]),
        )
        for name, entries in made.items()
    ]
    rows.sort(key=lambda row: fmean(row.losses))
    return Race(tuple(rows), base, gain, seeds, match, margin, code())


def judged(losses: Mapping[str, Sequence[float]], gain: float, margin: float) -> dict[str, Verdict]:
    """The verdict of each method but LoRA whose runs did not fail, corrected for their number.

    Args:
        losses: of each method, one a seed; LoRA and LoRA again among them.
        gain: full fine-tuning's.
        margin: the difference that matters, as a share of the gain.

    Returns:
        By name.
    """
    sound = {name: own for name, own in losses.items() if all(map(math.isfinite, own))}
    found = compare_all(sound, REFERENCE, AGAIN if AGAIN in sound else REFERENCE, gain, margin)
    return dict(zip(found, holm([*found.values()]), strict=True))


def _robust(entries: Sequence[Entry], rise: Sequence[float]) -> dict[str, float]:
    whole = [entry for entry in entries if entry.scores]
    found = {"noise": fmean(rise)} if rise else {}
    for name in whole[0].measures if whole else ():
        found[name.split()[0]] = fmean(entry.measures[name] for entry in whole)
    if whole and "own_after" in whole[0].scores:
        scores = [entry.scores for entry in whole]
        found["forget"] = fmean(one["own_after"]["loss"] - one["own_before"]["loss"] for one in scores)
    return found


def _steps(found: Tuned, reference: Tuned, tuning: Tuning) -> int:
    """Steps in which a method takes the seconds of the reference, both timed while tuning."""

    def pace(one: Tuned) -> float:
        timed = [entry for entry in one.entries if entry.steps and not entry.resumed]
        return sum(entry.seconds for entry in timed) / sum(entry.steps for entry in timed)

    whole = max(entry.steps for entry in reference.entries) / tuning.rungs[-1]
    return max(1, round(whole * pace(reference) / pace(found)))


def _finite(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _finite(inner) for name, inner in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(inner) for inner in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def _apart(train: str, other: Any) -> None:
    """Refuse held-out rows that are trained on."""
    if not isinstance(other, str):
        return
    known = {row.text() for row in data.read(train).rows}
    both = [row.where for row in data.read(other).rows if row.text() in known]
    if both:
        raise DataError(f"What is measured on is not trained on; {len(both)} rows of {other} are ({both[0]} ...).")
