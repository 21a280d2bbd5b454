"""The theorems of the lab: runs, figures and numbers of docs/lab.md.

``python -m benchmarks.lab`` runs everything on one core in some minutes, prints the numbers and writes the pictures
into docs/img. The tests of tests/lab/test_theorems.py call the same functions.
"""

import argparse
import math
from pathlib import Path
from typing import Any

import torch

import rankwise as rw
from rankwise import embedded
from rankwise.lab import (
    Bilinear,
    Curve,
    Factorisation,
    Given,
    Planted,
    Problem,
    Sensing,
    cases,
    given,
    gradient,
    halves,
    run,
)
from rankwise.lab.cases import RATES
from rankwise.penalties import HiddenKey
from rankwise.ranks import Constant
from rankwise.solvers import SGD, AdamW, LoRAPlus, ScaledAdamW, ScaledGD, Solver
from rankwise.structures import HiRA, LoHa, LoRA

CONDITIONS = (1.0, 10.0, 100.0, 1e3, 1e4)
IMG = Path(__file__).parent.parent / "docs" / "img"


def _recipe(rank: int, solver: Solver) -> rw.Recipe:
    return rw.Recipe(LoRA(rank, None), init=Given(), solver=solver)


def near(problem: Factorisation, share: float = 0.1) -> dict[str, Any]:
    """Factors at ``share`` times the smallest singular value from the balanced true ones, in the metric of ScaledGD."""
    f = halves(problem.update, problem.rank)
    root = torch.linalg.svdvals(problem.update)[: problem.rank].sqrt()
    b = problem.draw(20, problem.rows, problem.rank) / root
    a = problem.draw(21, problem.rank, problem.cols) / root.unsqueeze(1)
    size = ((b * root).square().sum() + (a * root.unsqueeze(1)).square().sum()).sqrt()
    step = share * root[-1] ** 2 / size
    return given(b=f["b"] + step * b, a=f["a"] + step * a)


def local(condition: float, solver: Solver, steps: int, rate: float = 0.5) -> Curve:
    """From near the truth to 1e-8 of the smallest singular value (|M| is at least 1)."""
    problem = Factorisation(condition=condition)
    until = 1e-8 / condition / float(problem.update.norm())
    return run(problem, _recipe(4, solver), steps, rate, until=until, stats=near(problem))


def sensing(condition: float, solver: Solver, steps: int, rate: float = 0.5) -> Curve:
    """From the spectral start to a relative error of 1e-8, of 5 n r measurements, as Tong, Ma and Chi's figure 2."""
    problem = Sensing(24, 24, 2, condition)
    start = given(**halves(-gradient(problem), 2))
    return run(problem, _recipe(2, solver), steps, rate, until=1e-8, stats=start)


def one_sided(condition: float, nystrom: bool, rate: float = 1.0, steps: int = 4) -> Curve:
    """B a sketch of the target (or Gaussian), A = 0, ScaledGD."""
    problem = Factorisation(condition=condition)
    b = problem.update @ problem.draw(20, 24, 4) if nystrom else problem.draw(21, 32, 4)
    start = given(b=b, a=torch.zeros(4, 24, dtype=torch.float64))
    return run(problem, _recipe(4, ScaledGD(1e-15)), steps, rate, stats=start)  # damped: A = 0 has no inverse


def symmetric(condition: float, nystrom: bool, steps: int = 60) -> Curve:
    """B = A^T a sketch of a positive semidefinite target (or Gaussian), ScaledGD at rate 1/2."""
    problem = Factorisation(24, 24, 4, condition, symmetric=True)
    b = problem.update @ problem.draw(20, 24, 4) if nystrom else problem.draw(21, 24, 4)
    return run(problem, _recipe(4, ScaledGD(0.0)), steps, 0.5, until=1e-14, stats=given(b=b, a=b.mT.clone()))


# -- figures ----------------------------------------------------------------------------------


def _axes(width: float, count: int) -> Any:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"font.size": 9, "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "axes.titlesize": 9}
    )
    plt.rcParams.update({"grid.alpha": 0.25, "legend.frameon": False, "axes.titlesize": 9})
    figure, axes = plt.subplots(1, count, figsize=(width, 3.4), squeeze=False, layout="constrained")
    return figure, axes[0]


def _save(figure: Any, name: str) -> None:
    IMG.mkdir(exist_ok=True)
    figure.savefig(IMG / f"lab-{name}.png", dpi=120)


def _label(condition: float) -> str:
    return f"condition {condition:g}"


def scaled_figure(descent: int) -> None:
    """Error by step and steps by condition number, for gradient descent and for ScaledGD."""
    figure, (left, right) = _axes(9, 2)
    methods = (
        ("ScaledGD", ScaledGD(0.0), 200, "tab:blue", "o"),
        ("gradient descent", SGD(), descent, "tab:orange", "s"),
    )
    for name, solver, steps, colour, mark in methods:
        reached = []
        for condition in CONDITIONS:
            curve = local(condition, solver, steps)
            taken = len(curve.errors) - 1
            done = taken < steps
            print(f"near the truth, {name}, {_label(condition)}: {taken} steps{'' if done else ', not there'}")
            heights = [e / curve.errors[0] for e in curve.errors]
            style = "-" if name == "ScaledGD" else "--"
            label = f"{name}, conditions 1 to 1e4" if condition == 1 else None
            left.loglog(range(1, taken + 2), heights, style, color=colour, lw=1.4, label=label)
            if name != "ScaledGD" and condition > 1:
                left.annotate(f"{condition:g}", (taken + 1, heights[-1]), (4, 0), textcoords="offset points")
            if done:
                reached.append((condition, taken))
            else:
                right.loglog(condition, taken, marker="^", color=colour, mfc="white")
                right.annotate("more", (condition, taken), (0, -14), textcoords="offset points", ha="center")
        right.loglog(*zip(*reached, strict=True), marker=mark, color=colour, label=name)
    left.set(xlabel="step + 1", ylabel="error over the start's", ylim=(1e-9, 3), xlim=(0.8, 3 * descent))
    left.legend(loc="lower left")
    right.set(xlabel="condition number of the target", ylabel="steps to 1e-8 of its smallest singular value")
    right.set(xlim=(0.6, 2e4), ylim=(10, 2 * descent))
    right.legend(loc="center right")
    _save(figure, "scaledgd")


def nystrom_figure() -> None:
    """One step against two, and quadratic against linear."""
    figure, (left, right) = _axes(9, 2)
    panels = ((left, one_sided, "any target, A = 0, rate 1", 5), (right, symmetric, "symmetric, B = A^T, rate 1/2", 3))
    for ax, make, title, count in panels:
        for condition in CONDITIONS[:count]:
            for nystrom, colour in ((True, "tab:green"), (False, "tab:gray")):
                curve = make(condition, nystrom)
                name = "Nystrom start" if nystrom else "Gaussian start"
                print(f"{title}, {name}, {_label(condition)}: {[f'{e:.1e}' for e in curve.errors[:14]]}")
                label = name if condition == 1 else None
                ax.semilogy([max(e, 1e-16) for e in curve.errors], ".-", color=colour, lw=1, ms=4, label=label)
        title = f"{title}, conditions 1 to {CONDITIONS[count - 1]:g}"
        ax.set(xlabel="step", ylabel="error", title=title, xlim=(None, 25 if make is symmetric else None))
        ax.legend(loc="upper right")
    left.set_xticks(range(5))
    _save(figure, "nystrom")


def winners_figure() -> None:
    """The error of both sides of every case."""
    figure, (ax,) = _axes(7, 1)
    table = {name: (case.best(case.winner), case.best(case.loser)) for name, case in cases().items()}
    for name, (winner, loser) in table.items():
        print(f"{name}: {winner:.2g} against {loser:.2g}")
    places = range(len(table))
    ax.barh([p - 0.2 for p in places], [w for w, _ in table.values()], 0.38, label="winner", color="tab:green")
    ax.barh([p + 0.2 for p in places], [x for _, x in table.values()], 0.38, label="the other side", color="tab:gray")
    ax.set(
        xscale="log", xlabel="error at the best of five learning rates", yticks=list(places), yticklabels=list(table)
    )
    ax.invert_yaxis()
    ax.legend(loc="lower left", bbox_to_anchor=(0, 1), ncols=2)
    ax.grid(visible=False, axis="y")
    _save(figure, "winners")


def sensing_table(descent: int) -> None:
    """Steps of both solvers on the sensing problem."""
    for condition in CONDITIONS:
        for name, solver, steps in (("ScaledGD", ScaledGD(0.0), 1000), ("gradient descent", SGD(), descent)):
            curve = sensing(condition, solver, steps)
            print(f"sensing, {name}, {_label(condition)}: {len(curve.errors) - 1} steps, error {curve.errors[-1]:.1e}")


def _best(problem: Problem, recipe: rw.Recipe, steps: int, rates: tuple[float, ...] = RATES) -> float:
    errors = (run(problem, recipe, steps, rate).errors[-1] for rate in rates)
    return min((e for e in errors if math.isfinite(e)), default=math.inf)


def findings() -> None:
    """What docs/lab.md and docs/mechanisms.md say besides: the least error at the best of five learning rates."""
    hadamard, gated = Planted(structure=LoHa(4, None)), Planted(structure=HiRA(4))
    for recipe in (rw.Recipe(LoHa(4, None), name="LoHa"), rw.recipe("lora", rank=8)):
        print(f"planted Hadamard, 600 steps, {recipe.name}: {_best(hadamard, recipe, 600):.2g}")
    for recipe in (rw.recipe("lora", rank=4), rw.recipe("dora", rank=4)):
        print(f"planted W * low rank, 300 steps, {recipe.name}: {_best(gated, recipe, 300):.2g}")
    print(f"factorisation, 300 steps, oft: {_best(Factorisation(condition=10.0), rw.recipe('oft', block=8), 300):.2g}")
    lora = rw.recipe("lora", rank=4)
    for condition in CONDITIONS[1:4]:
        for kind in (Factorisation, Bilinear):
            for solver in (AdamW(), LoRAPlus(), ScaledAdamW(), ScaledGD(1e-6)):
                error = _best(kind(condition=condition), lora.with_(solver=solver), 200)
                print(f"{kind.__name__}, {_label(condition)}, 200 steps, {type(solver).__name__}: {error:.1e}")


# -- stable rank --------------------------------------------------------------------------------

SPREAD = Factorisation(64, 48, 32, 100.0)
RANKS = (2, 4, 8, 16)


def stable_rank(update: torch.Tensor) -> float:
    """``|X|_F^2 / |X|_2^2``: how many singular values count, 1 where one does."""
    spectrum = torch.linalg.svdvals(update)
    return float(spectrum.square().sum() / spectrum[0] ** 2)


def best_stable_rank(rank: int) -> float:
    """Of the best update of this rank, the truncated SVD of the target."""
    spectrum = torch.linalg.svdvals(SPREAD.update)[:rank]
    return float(spectrum.square().sum() / spectrum[0] ** 2)


def spread(name: str, rank: int, rate: float = 0.01, steps: int = 200) -> tuple[float, float]:
    """The error and the update's stable rank after some steps."""
    model = SPREAD.model()
    torch.manual_seed(0)
    adapter = rw.attach(model, rw.recipe(name, rank=rank, alpha=rank))
    optimizer = adapter.optimizer(rate)
    for _ in range(steps):
        optimizer.zero_grad()
        SPREAD.loss(model).backward()
        optimizer.step()
    with torch.no_grad():
        return SPREAD.error(model), stable_rank(SPREAD.weight(model) - SPREAD.base)


def written(name: str, rank: int, rate: float, steps: int = 60) -> tuple[float, float]:
    """The loss and the mean stable rank over the sites of the embedded model, trained on this repository's licence."""
    torch.manual_seed(0)
    model, tokenizer = embedded.load()
    text = " ".join((IMG.parent.parent / "LICENSE").read_text().split())
    ids = torch.tensor([t for line in text.split(". ") for t in tokenizer(line)["input_ids"]])
    adapter = rw.attach(model, rw.recipe(name, rank=rank, alpha=rank))
    optimizer, losses = adapter.optimizer(rate), []
    for _ in range(steps):
        batch = torch.stack([ids[k : k + 64] for k in torch.randint(len(ids) - 64, (4,))])
        optimizer.zero_grad()
        loss = model(input_ids=batch, labels=batch).loss
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    found: list[float] = []
    for path, site in adapter.sites.items():
        w: Any = model.get_submodule(path).weight
        found.append(stable_rank(site.structure.weight(site.factors(), w).detach() - w.detach()))
    return sum(losses[-20:]) / 20, sum(found) / len(found)


def spread_tables() -> None:
    """Stable rank by rank, on a planted target and on text."""
    for rank in RANKS:
        print(f"stable rank, planted, r = {rank}, best: {best_stable_rank(rank):.2f}")
        for name in ("lora", "polar", "stella"):
            error, found = min(spread(name, rank, rate) for rate in (0.003, 0.01, 0.03))
            print(f"stable rank, planted, r = {rank}, {name}: {found:.2f}, error {error:.3g}", flush=True)
    for rank in RANKS:
        for name, rates in (("lora", (2e-3, 1e-2)), ("polar", (4e-3, 2e-2))):
            for rate in rates:
                loss, found = written(name, rank, rate)
                print(f"stable rank, text, r = {rank}, {name} at {rate}: {found:.2f}, loss {loss:.2f}", flush=True)


def catalogue() -> None:
    """Methods of constant rank that read neither statistics nor layers, at rank 4, on an ill-conditioned target."""
    problem = Factorisation(condition=100.0)
    for name, entry in rw.catalogue().items():
        inside = any(isinstance(penalty, HiddenKey) for penalty in entry.recipe.penalties)
        if not (entry.recipe.init.needs or inside) and isinstance(entry.recipe.ranks, Constant):
            recipe = rw.recipe(name, **({"rank": 4} if "rank" in entry.options else {}))
            print(f"factorisation, {_label(100)}, 200 steps, {name}: {_best(problem, recipe, 200):.1e}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--descent", type=int, default=5000, help="most steps of gradient descent")
    parser.add_argument(
        "--only", choices=["scaledgd", "sensing", "nystrom", "winners", "findings", "spread", "catalogue"]
    )
    options = parser.parse_args()
    torch.set_num_threads(1)
    parts = {
        "scaledgd": lambda: scaled_figure(options.descent),
        "sensing": lambda: sensing_table(options.descent),
        "nystrom": nystrom_figure,
        "winners": winners_figure,
        "findings": findings,
        "spread": spread_tables,
        "catalogue": catalogue,
    }
    for name, part in parts.items():
        if options.only in (None, name):
            part()


if __name__ == "__main__":
    main()
