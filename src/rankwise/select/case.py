"""Advice on a user's own model and data: what is feasible there, what is measured, and trials that are real runs."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from typing import Any, final

import torch
from accelerate.utils import send_to_device
from torch.utils.data import DataLoader

from rankwise.errors import DataError, RankwiseError
from rankwise.hf.method import recipe_of, written
from rankwise.hf.prepare import prepare, task_of
from rankwise.hf.run import Run
from rankwise.methods import catalogue
from rankwise.select.advise import Advice, Arm, Outcome, advise, check_budget
from rankwise.select.devices import HERE, Device
from rankwise.select.feasible import Candidate, Constraints, Excluded, feasible, largest
from rankwise.select.ledger import Ledger
from rankwise.select.matching import sizes
from rankwise.select.plan import Plan, of_run
from rankwise.select.rules import RULES, Facts, Nomination, Probe, nominate, note, records
from rankwise.version import __version__

__all__ = ["Case", "Report", "conclude", "steps_of", "survey", "write"]

VALIDATION = 200  # examples: with fewer, the measuring itself is noisier than what methods differ by
_BITS = {None: 16.0, "nf4": 4.0, "int8": 8.0}
_RANK = 16  # of LoRA, where none is asked for; methods keep their size against it
_PROBED = 4  # LoRA's rank times this is how many directions the probe can see
_STEPS = 8  # batches that the probe looks at, at most

Say = Callable[[str], None]


@final
@dataclass(frozen=True)
class Case:
    """What is known before anything is trained.

    Attributes:
        run: the user's, as LoRA of the highest feasible rank.
        steps: of the run that advice is for.
        budget: steps of LoRA that advice may cost.
        limits: the constraints.
        plan: of a step of LoRA.
        candidates: feasible methods by name.
        excluded: the others, with reasons.
        validation: examples to measure on.
    """

    run: Run
    steps: int
    budget: int
    limits: Constraints
    plan: Plan
    candidates: dict[str, Candidate]
    excluded: list[Excluded]
    validation: int


@final
@dataclass(frozen=True)
class Report:
    """The advice on a case, with everything that led to it.

    Attributes:
        case: what was known beforehand.
        probe: what was measured first.
        nominations: who was nominated, by which rule.
        advice: what came of it; None on a dry run.
        run: ready for ``finetune``.
        seconds: of a step of LoRA, measured over the trials; None on a dry run.
    """

    case: Case
    probe: Probe
    nominations: list[Nomination]
    advice: Advice | None = None
    run: Run | None = None
    seconds: float | None = None
    excluded: list[Excluded] = field(default_factory=list)

    @property
    def minutes(self) -> float | None:
        """Further minutes that would probably decide."""
        more = self.advice.more if self.advice else None
        return None if more is None or self.seconds is None else more * self.seconds / 60

    def to_dict(self) -> dict[str, Any]:
        """Plain values."""
        case, advice = self.case, self.advice
        found: dict[str, Any] = {
            "budget_steps": case.budget, "steps": case.steps, "validation": case.validation,
            "constraints": asdict(case.limits), "peak": case.plan.peak, "memory": case.plan.memory,
            "feasible": {name: c.bytes for name, c in case.candidates.items()},
            "excluded": {e.name: e.reason for e in (*case.excluded, *self.excluded)},
            "probe": asdict(self.probe),
            "nominations": [
                {"challenger": n.name, "rule": n.rule.name, "condition": n.rule.condition, "source": n.rule.source,
                 "refuted_by": n.rule.refuted, "record": n.record}
                for n in self.nominations
            ],
        }  # fmt: skip
        if advice is None:
            return found
        arms = [
            {"name": s.arm.name, "lr": s.lr, "cost": s.arm.cost, "losses": s.losses, "dropped": s.dropped or None,
             "verdict": asdict(s.verdict) if s.verdict else None}
            for s in advice.standings
        ]  # fmt: skip
        return found | {
            "verdict": advice.word, "use": advice.arm.name, "lr": advice.lr, "reason": advice.reason, "arms": arms,
            "horizon": advice.horizon, "spent_steps": advice.spent, "gain": advice.gain, "noise": advice.noise,
            "seconds_per_step": self.seconds, "minutes_to_decide": self.minutes,
            "run": asdict(self.run) if self.run else None,
        }  # fmt: skip


def steps_of(text: str, seconds: Callable[[], float]) -> int:
    """A budget in steps of LoRA from "4000" or "30min"; ``seconds`` measures a step where it is needed.

    Raises:
        DataError: it is neither.
    """
    found = re.fullmatch(r"\s*([0-9.]+)\s*(steps?|s|min|h)?\s*", text)
    if found is None:
        raise DataError(f"A budget is written 4000 (steps), 90s, 30min or 2h; found {text!r}.")
    unit = {"s": 1, "min": 60, "h": 3600}.get(found[2] or "")
    return int(float(found[1]) * unit / seconds() if unit else float(found[1]))


def survey(run: Run, budget: int, limits: Constraints, device: str | Device = HERE) -> Case:
    """Stage 0: read the data, refuse what no advice can be given on, and say what is feasible. Nothing is trained.

    Args:
        run: model, data and settings; of the method only its rank and targets count.
        budget: steps of LoRA that advice may cost.
        limits: the constraints.
        device: for the plans.

    Returns:
        The case.

    Raises:
        DataError: a budget below 20 steps, fewer than 200 validation examples, or some that are trained on.
        DoesNotFit: not even LoRA of rank 1 meets the constraints.
        RankwiseError: whatever else is wrong with the run.
    """
    check_budget(budget)
    task = task_of(run)
    processor = task.processor(run.model)
    train: Any = task.examples(run.data, processor)
    task = task.settled(train)
    if run.validation is None:
        raise DataError('Advice goes by the loss on validation data; found validation "none". Give a file or a share.')
    if isinstance(run.validation, str):
        held: Any = task.examples(run.validation, processor)
    else:
        train, held = task.split(train, float(run.validation), run.seed)
    if len(held) < VALIDATION:
        raise DataError(
            f"Advice takes {VALIDATION} validation examples or more; found {len(held)}: fewer are noisier than what "
            f"methods differ by. Give more data, a larger share, or a file: validation=..."
        )
    known = {item.row.text() for item in train.items}
    both = [item.row.where for item in held.items if item.row.text() in known]
    if both:
        raise DataError(
            f"Validation examples are not trained on; {len(both)} of {len(held)} are ({both[0]} ...). "
            f"Remove them from one of the two."
        )
    rows = len(task.rows(train))
    steps = run.steps or max(1, round(run.epochs * math.ceil(rows / (run.batch * run.accumulate))))
    plain = replace(run, structure=None, init=None, solver=None, ranks=None, labels=getattr(task, "labels", None))
    lora, rank = largest(lambda r: _sized(plain, "lora", {"rank": r}), run.rank or _RANK, limits)
    found = of_run(replace(plain, **lora.settings), train, device, limits.memory)
    found.check()
    kept, out = _methods(plain, rank, limits)
    return Case(found.run, steps, budget, limits, found, {"lora": replace(lora, name="lora"), **kept}, out, len(held))


def conclude(
    case: Case,
    ledger: Ledger,
    *,
    margin: float = 0.02,
    level: float = 0.95,
    dry: bool = False,
    say: Say = lambda _: None,
) -> Report:
    """Stages 1 to 3: probe, nominate, tune and compare.

    Args:
        case: what ``survey`` found.
        ledger: keeps every run, and beside it how nominations ended.
        margin: the difference that matters, a share of the gain.
        level: of the verdict.
        dry: stop before anything is trained.
        say: told each trial.

    Returns:
        The report.

    Raises:
        RankwiseError: whatever is wrong with a run.
    """
    run, rank = case.run, case.run.rank or _RANK
    probe = Probe() if dry else _probed(case, rank)
    facts = Facts(case.steps, rank, _BITS[run.base], probe)
    told = ledger.path.with_name("rules.jsonl")
    named, arms, out = [], [], []
    for nomination in nominate(facts, case.candidates.keys() - {"lora"}, records(told), most=len(case.candidates)):
        if len(named) == 4:
            break
        arm, objection = _arm(case, case.candidates[nomination.name])
        if objection:
            out.append(Excluded(nomination.name, objection))
        else:
            named.append(nomination)
            arms.append(arm)
    if dry:
        return Report(case, probe, named, excluded=out)
    trials = _Trials(run, ledger)
    lora = Arm("lora", recipe_of(run).lr, 1.0, dict(case.candidates["lora"].settings))
    budget = case.budget - probe.steps
    asked = {"steps": case.steps, "margin": margin, "level": level, "seed": run.seed}
    advice = advise(lora, arms, trials, budget=budget, say=say, **asked)
    note(told, named, {s.arm.name: s.verdict.word for s in advice.standings if s.verdict})
    chosen = replace(run, **advice.arm.what, lr=advice.lr, steps=case.steps)
    return Report(case, probe, named, advice, chosen, trials.pace, out)


def write(report: Report, out: Path) -> None:
    """Leave ``advice.json``, and ``run.yaml`` ready for ``finetune``, in a folder."""
    out.mkdir(parents=True, exist_ok=True)
    (out / "advice.json").write_text(json.dumps(report.to_dict(), indent=2, default=str))
    if report.run is not None and report.advice is not None:
        said = f"rankwise {__version__}, advice: {report.advice.word}, {report.advice.arm.name}"
        replace(report.run, out=str(out / "adapter")).write(out / "run.yaml", said)


# -- sizes -------------------------------------------------------------------------------------


def _sized(run: Run, method: str, options: Mapping[str, Any]) -> Candidate:
    further = {name: value for name, value in options.items() if name != "rank"}
    settings: dict[str, Any] = {"method": method, "rank": options.get("rank"), "options": further}
    made = replace(run, **settings)
    return Candidate(written(method, options), recipe_of(made), sizes(made)["bytes"], settings)


def _methods(run: Run, rank: int, limits: Constraints) -> tuple[dict[str, Candidate], list[Excluded]]:
    """Every method of the catalogue at LoRA's size, and the variants that rules name."""
    named = {written(name, options): (name, dict(options)) for rule in RULES for name, options in rule.challengers}
    for name, entry in catalogue().items():
        own = entry.options.get("rank")
        named[name] = name, {"rank": max(1, own * rank // _RANK)} if own else {}
    found, out = [], []
    for label, (name, options) in named.items():
        if name not in catalogue() or (name == "lora" and options.get("rank", rank) == rank) or label == "lora":
            continue
        try:
            found.append(replace(_sized(run, name, options), name=label))
        except RankwiseError as error:
            out.append(Excluded(label, str(error)))
    kept, others = feasible(found, limits)
    return kept, [*out, *others]


def _arm(case: Case, candidate: Candidate) -> tuple[Arm, str]:
    """A candidate with what its step costs, by its plan; and why it is out, or nothing."""
    try:
        wanted = replace(case.run, **candidate.settings, max_length=case.plan.length, dtype=case.plan.dtype)
        made = of_run(wanted, None, case.plan.device, case.plan.memory)
    except RankwiseError as error:
        return Arm(candidate.name, candidate.recipe.lr), str(error)
    cost = max(made.seconds / case.plan.seconds, 0.1)
    objection = "" if made.fits else str(made).split("\n")[0].removeprefix("plan: ")
    return Arm(candidate.name, candidate.recipe.lr, cost, dict(candidate.settings)), objection


# -- measuring ---------------------------------------------------------------------------------


@final
class _Trials:
    """Real runs, taken from the ledger where it has them."""

    def __init__(self, run: Run, ledger: Ledger) -> None:
        self.run, self.ledger = run, ledger
        self.before: dict[int, float] = {}
        self.seconds = self.worth = 0.0

    @property
    def pace(self) -> float | None:
        """Seconds of a step of LoRA."""
        return self.seconds / self.worth if self.worth else None

    def __call__(self, arm: Arm, seed: int, steps: int, lr: float) -> Outcome:
        entry = self.ledger.done(replace(self.run, **arm.what, seed=seed, steps=steps, lr=lr, saves=1))
        if "before" in entry.scores:
            self.before[seed] = entry.scores["before"]["loss"]
        self.seconds += entry.seconds
        self.worth += entry.steps * arm.cost
        known = self.before.get(seed, max(self.before.values(), default=math.inf))
        return Outcome(known, entry.loss, entry.seconds, tuple(loss for _, loss in entry.curve.get("training", ())))


def _probed(case: Case, rank: int) -> Probe:
    """Stage 1: gradients of two halves of a few batches, on LoRA's B, at most a hundredth of the budget.

    At its start B is zero, so its gradient is G A^T, A random: a sketch of the layer's own gradient G, for the memory
    of an adapter.
    """
    half = min(_STEPS, case.budget // 200)
    if half < 1:
        return Probe()
    prepared, wide = None, _PROBED * rank
    while prepared is None:
        try:
            prepared = prepare(replace(case.run, rank=wide, options={}))
        except RankwiseError:
            if wide == 1:
                return Probe()
            wide //= 2
    run, model, adapter = prepared.run, prepared.model.train(), prepared.adapter
    order = torch.Generator().manual_seed(run.seed)
    rows = prepared.task.rows(prepared.train)
    loader = DataLoader(rows, run.batch, True, collate_fn=prepared.task.collator(prepared.processor), generator=order)
    halves, losses = [], []
    for number, batch in enumerate(loader, 1):
        if number > 2 * half:
            break
        loss = model(**send_to_device(batch, next(model.parameters()).device)).loss
        loss.backward()
        losses.append(loss.item())
        if number % half == 0:
            found = {name: f["b"].grad for name, f in adapter.items() if "b" in f}
            halves.append({name: g.float().cpu() for name, g in found.items() if g is not None})
            model.zero_grad()
    if len(halves) < 2:
        return Probe(steps=len(losses))
    ranks, conditions = zip(*(_spectrum(halves[0][name], halves[1][name], rank) for name in halves[0]), strict=True)
    one, other = sum(losses[:half]) / half, sum(losses[half:]) / half
    return Probe(float(median(ranks)), float(median(conditions)), abs(one - other) / (one + other) * 2, len(losses))


def _spectrum(one: torch.Tensor, other: torch.Tensor, rank: int) -> tuple[int, float]:
    """Directions with nine tenths of what two gradients share, and the first's conditioning at a rank."""
    u, values, vt = torch.linalg.svd(one, full_matrices=False)
    shared = (values * torch.einsum("ik,ij,kj->k", u, other, vt)).clamp(min=0).cumsum(0)
    least = values[min(rank, len(values)) - 1].clamp(min=1e-12)
    return 1 + int((shared < 0.9 * shared[-1]).sum()), float(values[0] / least)
