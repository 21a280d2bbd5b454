"""Which challengers are worth a try against LoRA, as data: a condition, a claim, its source, what would refute it.

A rule nominates, it never decides. How often its challengers won is kept in a file, and printed with it.
"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, final

from rankwise.hf.method import written

__all__ = ["RULES", "Facts", "Nomination", "Probe", "Rule", "nominate", "note", "records"]


@final
@dataclass(frozen=True)
class Probe:
    """What little is measured before any rule is asked; None where it was not.

    Attributes:
        rank: directions with nine tenths of what the gradients of two halves of the data share, in the median layer.
        conditioning: largest singular value of a layer's gradient over the one at LoRA's rank, likewise.
        noise: difference of the mean losses of the two halves, relative.
        steps: of training that it cost.
    """

    rank: float | None = None
    conditioning: float | None = None
    noise: float | None = None
    steps: int = 0


@final
@dataclass(frozen=True)
class Facts:
    """What a rule may ask about.

    Attributes:
        steps: of the run that advice is for.
        rank: of LoRA.
        bits: of a frozen weight.
        probe: what was measured.
    """

    steps: int
    rank: int
    bits: float = 16.0
    probe: Probe = field(default_factory=Probe)


@final
@dataclass(frozen=True)
class Rule:
    """When which challengers are nominated.

    Attributes:
        name: for reports and the record.
        condition: in words.
        holds: the same, of the facts.
        challengers: names of methods with their options, the likeliest first.
        claim: what the source says.
        source: authors, year, arXiv.
        refuted: what would take the rule out.
    """

    name: str
    condition: str
    holds: Callable[[Facts], bool]
    challengers: tuple[tuple[str, Mapping[str, Any]], ...]
    claim: str
    source: str
    refuted: str


@final
@dataclass(frozen=True)
class Nomination:
    """A challenger, and the rule that named it."""

    name: str
    rule: Rule
    record: str


def _few(*names: str, **options: Any) -> tuple[tuple[str, Mapping[str, Any]], ...]:
    return tuple((name, options) for name in names)


_SELDOM = "fewer than one win in ten nominations, of twenty or more"

RULES = (
    Rule(
        "few steps",
        "at most 30 steps",
        lambda f: f.steps <= 30,
        _few("lora_one", "lora_ga", "pissa"),
        "a start along the gradient or the weight learns sooner",
        "Wang et al. 2024, arXiv 2407.05000; Meng et al. 2024, arXiv 2404.02948",
        _SELDOM,
    ),
    Rule(
        "low bits",
        "a base of at most 4 bits",
        lambda f: f.bits <= 4,
        _few("loftq", "qerror", "pissa"),
        "factors that start at the quantisation error give back what rounding took",
        "Li et al. 2023, arXiv 2310.08659",
        _SELDOM,
    ),
    Rule(
        "ill-conditioned",
        "a gradient whose largest direction is 4 times that at LoRA's rank, or more",
        lambda f: (f.probe.conditioning or 0) >= 4,
        _few("scaled_adamw", "scaled_gd", "lora_rite"),
        "steps preconditioned by the other factor do not slow down with the condition number",
        "Tong et al. 2021, arXiv 2005.08898; Zhang & Pilanci 2024, arXiv 2402.02347",
        _SELDOM,
    ),
    Rule(
        "high rank",
        "a gradient of twice LoRA's rank or more",
        lambda f: (f.probe.rank or 0) >= 2 * f.rank,
        _few("hira", "lokr", "loha"),
        "an update of high rank with as many parameters",
        "Huang et al. 2025, ICLR; Yeh et al. 2023, arXiv 2309.14859",
        _SELDOM,
    ),
    Rule(
        "rank one",
        "a gradient of at most two directions",
        lambda f: f.probe.rank is not None and f.probe.rank <= 2,
        _few("lora", rank=1),
        "rank 1 already suffices on some tasks, and fits less noise",
        "Hu et al. 2021, arXiv 2106.09685, table 6",
        _SELDOM,
    ),
    Rule(
        "always",
        "nothing more is known",
        lambda f: True,
        _few("lora_plus", "dora"),
        "a faster B, or a magnitude of its own, is said to learn better at an equal rank",
        "Hayou et al. 2024, arXiv 2402.12354; Liu et al. 2024, arXiv 2402.09353",
        _SELDOM,
    ),
)


def nominate(
    facts: Facts,
    allowed: Collection[str],
    record: Mapping[str, Counter[str]] | None = None,
    rules: Sequence[Rule] = RULES,
    most: int = 4,
) -> list[Nomination]:
    """Ask every rule, and take the likeliest challenger of each before the second of any.

    Args:
        facts: of the case.
        allowed: names that the constraints leave.
        record: words by the rule's name, from ``records``.
        rules: to ask.
        most: nominations.

    Returns:
        The nominations, each method once.
    """
    named: dict[str, Nomination] = {}
    holding = [rule for rule in rules if rule.holds(facts)]
    for place in range(max((len(rule.challengers) for rule in holding), default=0)):
        for rule in holding:
            left = [n for n in (written(*c) for c in rule.challengers) if n in allowed]
            if place < len(left):
                named.setdefault(left[place], Nomination(left[place], rule, _told((record or {}).get(rule.name))))
    return list(named.values())[:most]


def _told(words: Counter[str] | None) -> str:
    count = words.total() if words else 0
    return f"so far better {words['better']} times of {count}" if words and count else "no record yet"


def records(path: Path) -> dict[str, Counter[str]]:
    """How the nominations of each rule ended: words by the rule's name."""
    found: dict[str, Counter[str]] = {}
    for line in path.read_text().splitlines() if path.exists() else []:
        row = json.loads(line)
        found.setdefault(row["rule"], Counter())[row["word"]] += 1
    return found


def note(path: Path, nominations: Sequence[Nomination], words: Mapping[str, str]) -> None:
    """Add to the record how nominations ended; ``words`` by the challenger's name."""
    rows = [{"rule": n.rule.name, "challenger": n.name, "word": words[n.name]} for n in nominations if n.name in words]
    with path.open("a") as journal:
        journal.writelines(json.dumps(row) + "\n" for row in rows)
