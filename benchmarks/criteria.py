"""What the library promises about speed and memory, and whether a result keeps it.

A criterion holds when the worse end of the 95 % interval keeps the bound in every cell that it speaks
of. On one CPU thread the clock is CPU time, otherwise wall time: idle threads spin, and a GPU has none.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks.models import Case
from benchmarks.paired import Interval

Results = Mapping[str, Any]
Found = tuple[str, Interval]  # where it was measured, and what


SHARE = "overhead_over_peft"


@dataclass(frozen=True)
class Criterion:
    """``values`` finds in the results all that must not exceed ``bound``."""

    text: str
    bound: float
    values: Callable[[Results], Iterator[Found]]
    command: str


def clock(case: Mapping[str, Any]) -> str:
    """By which clock a cell is judged."""
    return "cpu" if case["threads"] == 1 and case["device"] == "cpu" else "wall"


def exactly(value: float) -> Interval:
    """A number without noise."""
    return {"value": value, "low": value, "high": value}


def of_lora(row: Mapping[str, Any]) -> bool:
    """Whether a cell compares LoRA; else it compares methods, and says less about LoRA alone."""
    return "rankwise lora" in row["trained"] and "rankwise loha" not in row["trained"]


def step(variant: str, key: str, compiled: bool = False, **case: Any) -> Callable[[Results], Iterator[Found]]:
    """Values of a variant's ratio in the cells of these properties; a property may be a tuple of choices."""
    wanted = {"rank": 16, "dropout": 0.0, **case}

    def values(results: Results) -> Iterator[Found]:
        for row in results.get("compiled" if compiled else "step", ()):
            is_ = row["case"]
            if (key != SHARE or of_lora(row)) and all(
                is_[k] in (v if isinstance(v, tuple) else (v,)) for k, v in wanted.items()
            ):
                found = row[clock(is_)].get(variant, {})
                if key in found:
                    yield str(Case(**is_)), found[key]

    return values


def any_method(results: Results) -> Iterator[Found]:
    """Every method's step over PEFT's same method, in every eager cell; DoRA's slower trade is listed apart."""
    for row in results.get("step", ()):
        for variant, found in row[clock(row["case"])].items():
            if "over_peft" in found and variant != "rankwise dora_again":
                yield f"{variant.removeprefix('rankwise ')}, {Case(**row['case'])}", found["over_peft"]


def memory(variant: str, dropout: float, what: str = "packed") -> Callable[[Results], Iterator[Found]]:
    """Bytes saved for backward over PEFT's, on a bfloat16 base."""

    def values(results: Results) -> Iterator[Found]:
        for row in results.get("memory", ()):
            if row["case"]["dtype"] == "bfloat16" and row["case"]["dropout"] == dropout:
                yield str(Case(**row["case"])), exactly(row["variants"][f"rankwise {variant}"][f"{what}_over_peft"])

    return values


def together(results: Results) -> Iterator[Found]:
    """The better of one optimiser for all and one each: the user's choice."""
    for row in results.get("together", ()):
        found = row[clock(row["case"])]
        values = [found[name]["over one"] for name in ("together", "together, one optimizer")]
        where = f"{row['k']} adapters on {row['b']} rows of {row['case']['tokens']}, {Case(**row['case'])}"
        yield where, min(values, key=lambda v: v["high"])


def life(*path: str) -> Callable[[Results], Iterator[Found]]:
    """One value of the life group; the step "clock" is the clock of its case."""

    def values(results: Results) -> Iterator[Found]:
        found: Any = results.get("life")
        for key in path:
            key = clock(results["life"]["case"]) if found and key == "clock" else key
            found = found.get(key) if isinstance(found, Mapping) else None
        if found is not None:
            yield (
                ", ".join(key for key in path if key != "clock"),
                found if isinstance(found, dict) else exactly(float(found)),
            )

    return values


STEP, LIFE = "python -m benchmarks --only step", "python -m benchmarks --only life"
FP32, BF16, WIDE = "float32", "bfloat16", (512, 1024, 2048)
LORA = "LoRA's overhead over the floor as a share of PEFT's"
CRITERIA = [
    Criterion(f"{LORA}, float32, hidden 256", 0.65, step("rankwise lora", SHARE, dtype=FP32, hidden=256), STEP),
    Criterion(f"{LORA}, float32, 512 to 2048", 0.6, step("rankwise lora", SHARE, dtype=FP32, hidden=WIDE), STEP),
    Criterion(f"{LORA}, bfloat16, hidden 256", 0.45, step("rankwise lora", SHARE, dtype=BF16, hidden=256), STEP),
    Criterion(f"{LORA}, bfloat16, 512 to 2048", 0.4, step("rankwise lora", SHARE, dtype=BF16, hidden=WIDE), STEP),
    Criterion(
        f"{LORA}, both with dropout 0.05, bfloat16", 0.75,
        step("rankwise lora", SHARE, dtype=BF16, dropout=0.05), STEP,
    ),
    Criterion(
        f"{LORA}, both compiled", 0.8, step("rankwise lora", SHARE, compiled=True),
        "python -m benchmarks --only compiled",
    ),
    Criterion("step of any method over PEFT's same method", 1.03, any_method, STEP),
    Criterion("DoRA's step over our LoRA's", 1.2, step("rankwise dora", "over_lora"), STEP),
    Criterion("LoKr's step over our LoRA's", 1.25, step("rankwise lokr", "over_lora"), STEP),
    Criterion("OFT's step over our LoRA's, five terms", 1.25, step("rankwise oft", "over_lora"), STEP),
    Criterion("OFT's step over our LoRA's, exact inverse", 1.25, step("rankwise oft_exact", "over_lora"), STEP),
    Criterion("LoHa's step over our LoRA's at equal parameters", 1.3, step("rankwise loha@8", "over_lora"), STEP),
    Criterion("LoHa's step over PEFT's LoHa, rank 16", 0.75, step("rankwise loha", "over_peft"), STEP),
    Criterion("HiRA's step over its hand-written dense form, float32", 1.05, step("rankwise hira", "over_bound"), STEP),
    *(
        Criterion(
            f"saved for backward, bfloat16 base: {name} over PEFT's", bound, memory(variant, dropout, what),
            "python -m benchmarks --only memory",
        )
        for name, bound, variant, dropout, what in (
            ("LoRA", 0.64, "lora", 0.0, "packed"),
            ("LoRA with dropout", 0.45, "lora", 0.05, "packed"),
            ("DoRA", 0.35, "dora", 0.0, "packed"),
            ("DoRA, output recomputed,", 0.35, "dora_again", 0.0, "packed"),
            ("DoRA, output recomputed, what is held when backward begins", 0.35, "dora_again", 0.0, "saved"),
        )
    ),
    Criterion("8 adapters together over one adapter", 1.15, together, "python -m benchmarks --only together"),
    Criterion(
        "seconds to attach 1,000 sites of 256 x 256", 1.0,
        life("attach", "clock", "rankwise 1000 sites", "seconds"), LIFE,
    ),
    Criterion(
        "switching among 100 adapters over switching with one", 1.25,
        life("switch", "clock", "rankwise 100", "over rankwise 1"), LIFE,
    ),
    Criterion("file over trained tensors, bytes", 1.05, life("keep", "rankwise_file_over_tensors"), LIFE),
    *(
        Criterion(f"seconds that import rankwise{more} adds to torch's", 0.3, life("start", "over_torch", name), LIFE)
        for more, name in (
            ("", "torch and rankwise"), (", with attach, load and merge from it,", "torch and rankwise, used"),
        )
    ),
    Criterion("seconds of rankwise --help", 0.6, life("start", "seconds", "rankwise --help"), LIFE),
    Criterion("rankwise --help imports torch (1 for yes)", 0.0, life("start", "help_imports_torch"), LIFE),
]  # fmt: skip


@dataclass(frozen=True)
class Verdict:
    """A criterion after a run; ``worst`` is the cell whose interval reaches highest, None if none was measured."""

    criterion: Criterion
    worst: Found | None
    cells: int
    kept: int

    @property
    def holds(self) -> bool | None:
        return None if self.worst is None else self.kept == self.cells


def judge(results: Results) -> list[Verdict]:
    """Every criterion on these results."""
    out = []
    for criterion in CRITERIA:
        found = list(criterion.values(results))
        worst = max(found, key=lambda f: f[1]["high"], default=None)
        kept = sum(value["high"] <= criterion.bound for _, value in found)
        out.append(Verdict(criterion, worst, len(found), kept))
    return out
