"""L4 over the product of all axes: what is legal works from end to end, all else is refused."""

import contextlib
import copy
import inspect
import io
import random
from collections import Counter
from dataclasses import is_dataclass
from itertools import product

import pytest
import torch
from law_cases import LEAVES, WRAPPED
from torch import nn

import rankwise as rw
from rankwise import inits, ranks, solvers
from rankwise.errors import IncompatibleAxes
from rankwise.inits import (
    EVA,
    QR,
    CorDA,
    Gaussian,
    Init,
    Kaiming,
    LoRAGA,
    LoRAOne,
    LoRASB,
    Minor,
    MinorOutput,
    NonZero,
    Nystrom,
    Orthogonal,
    Principal,
    PrincipalFrame,
    Xavier,
)
from rankwise.ranks import Budget, Constant, Following, Pruning, Ranks, Rescaling, Restarts, Sampled, Shrinking
from rankwise.solvers import (
    ALS,
    LORO,
    SGD,
    AdamW,
    AltLoRA,
    AltLoRAPlus,
    Apollo,
    ApolloMini,
    Fira,
    Flora,
    GaLore,
    Landing,
    LoFT,
    LoRAPlus,
    LoRAPro,
    LoRARITE,
    Muon,
    RefLoRA,
    RefLoRAS,
    Riemannion,
    RoLoRA,
    ScaledAdamW,
    ScaledGD,
    Solver,
    StelLA,
)
from rankwise.structures import OFT, Anchored, LoHa, LoRA, Magnitude, Structure
from rankwise.testing import SAMPLES, check_init, check_solver, train_step
from rankwise.testing.laws import legal

STRUCTURES = (*LEAVES, *WRAPPED)
INITS = (
    *(Kaiming(), Gaussian(), Gaussian(0.02), Orthogonal(), Xavier(), NonZero()),
    *(Principal(), Principal(4), Minor(), QR(), MinorOutput(), Nystrom(), PrincipalFrame()),
    *(CorDA(), CorDA("knowledge"), EVA(), LoRAGA(), LoRAOne(), LoRAOne(iterations=4), LoRASB()),
)
SOLVERS = (
    *(AdamW(), AdamW(weight_decay=0.1), LoRAPlus(ratio=4.0), ScaledGD(0.1), ScaledAdamW()),
    *(SGD(), SGD(0.9)),
    *(Landing(), StelLA(), StelLA(16.0)),
    *(RefLoRA(warmup=2), RefLoRAS(warmup=2), LoRARITE(), AltLoRA(0.1), AltLoRAPlus(), ALS(0.1), RoLoRA(), LoFT()),
    *(LoRAPro(), LoRAPro("zero"), Riemannion(), Riemannion(orthogonal=False), Muon(), Muon(whiten=True)),
    *(LORO(), LORO(1), LORO(2, lazy=1.0)),
    *(GaLore(4, every=5), GaLore(4, iterations=2, weight_decay=0.1), Fira(4), Apollo(4), ApolloMini(), Flora(4)),
)
RANKS = (
    Constant(),
    Budget(6, budget=1, warmup=1, final=2),
    Sampled(),
    Shrinking(0.01),
    Restarts(2),
    Restarts(2, keep=0.5, prune=0.9, blocks=1),
    Rescaling(2),
    Following(2),
    Pruning(2),
)
DROPOUTS = (0.0, 0.1)


def concrete(module, base) -> set[type]:
    found = (getattr(module, name) for name in module.__all__)
    return {c for c in found if isinstance(c, type) and issubclass(c, base) and is_dataclass(c)}


@pytest.mark.parametrize(
    ("module", "base", "values"),
    [(inits, Init, INITS), (solvers, Solver, SOLVERS), (ranks, Ranks, RANKS)],
    ids=["inits", "solvers", "ranks"],
)
def test_every_exported_axis_is_in_the_product(module, base, values):
    assert {c for c in concrete(module, base) if not inspect.isabstract(c)} == set(map(type, values))


def check_ranks(ranks: Ranks, steps: int = 6) -> None:
    """A plan keeps every factor's shape and what is finite, and a run that stops and resumes is the same to the bit."""
    for recipe in legal(SAMPLES, ranks=ranks):
        torch.manual_seed(0)
        base, batches = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 8)).double(), torch.randn(steps, 6, 12).double()

        def begin(recipe: rw.Recipe = recipe, base: nn.Module = base):
            torch.manual_seed(1)
            adapter = rw.attach(copy.deepcopy(base), recipe)
            return adapter, adapter.optimizer(1e-2)

        def train(adapter: rw.Adapter, optimizer: torch.optim.Optimizer, batches: torch.Tensor = batches):
            for x in batches:
                optimizer.zero_grad()
                (adapter.model(x) - x[:, :8]).square().mean().backward()
                optimizer.step()
            return {name: p.detach().clone() for name, p in adapter.named_parameters()}

        one, first = begin()
        start = {name: p.detach().clone() for name, p in one.named_parameters()}
        whole = train(one, first)
        assert all(p.isfinite().all() and p.shape == start[name].shape for name, p in whole.items()), repr(recipe)
        two, second = begin()
        half, remembered = train(two, second, batches[:3]), copy.deepcopy(second.state_dict())
        three, third = begin()
        for name, p in three.named_parameters():
            p.data.copy_(half[name])
        third.load_state_dict(remembered)
        again = train(three, third, batches[3:])
        assert all(torch.equal(whole[name], again[name]) for name in whole), f"resuming {recipe!r} is another run"


def lives(recipe: rw.Recipe, base: nn.Module, folder) -> None:
    """One life: a step of training, a file, another model, merging."""
    x = torch.randn(6, 12, dtype=torch.float64)
    model = copy.deepcopy(base)
    stats = rw.collect(base, [x[:3], x[3:]], recipe, lambda model, x: model(x).square().mean())
    adapter = rw.attach(model, recipe, stats=stats)
    adapter.optimizer()
    rescue = {n: p for n, p in adapter.named_parameters(trainable=True) if not p.any()}
    with torch.no_grad():  # two factors at zero would give no gradient to each other
        for p in rescue.values():
            p.add_(0.1)
    train_step(repr(recipe), model.train(), adapter, x)
    y = model.eval()(x)
    other = copy.deepcopy(base)
    with contextlib.redirect_stderr(io.StringIO()):
        adapter.save(folder)
        loaded = rw.load(other, folder)
    assert loaded.recipe == recipe
    assert torch.equal(other(x), y)
    rw.merge(other)
    torch.testing.assert_close(other(x), y, rtol=0, atol=1e-9)


AXES = (INITS, SOLVERS, RANKS, DROPOUTS)
DRAWN = 12  # points of the product a structure, besides those on its axes


def points(structure: Structure) -> list[tuple]:
    """Points of the product: every value of each axis with the others at their first, and some at random."""
    first = tuple(values[0] for values in AXES)
    lines = [(*first[:i], value, *first[i + 1 :]) for i, values in enumerate(AXES) for value in values]
    draw = random.Random(repr(structure))
    return list(dict.fromkeys([*lines, *(tuple(map(draw.choice, AXES)) for _ in range(DRAWN))]))


@pytest.mark.parametrize("structure", STRUCTURES, ids=repr)
def test_the_product(structure, tmp_path):
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(12, 16), nn.Tanh(), nn.Linear(16, 8)).double().eval()
    count = Counter()
    for init, solver, rank, dropout in points(structure):
        needs = init.requires | solver.requires | rank.requires | ({"drops"} if dropout else set())
        axes = {"init": init, "solver": solver, "ranks": rank, "dropout": dropout}
        if needs <= structure.traits:
            lives(rw.Recipe(structure, **axes), base, tmp_path)
            count["legal"] += 1
        else:
            with pytest.raises(IncompatibleAxes, match=r";.+\."):  # the sentence names a remedy
                rw.Recipe(structure, **axes)
            count["refused"] += 1
    assert count["legal"] >= 2


def test_the_product_is_wide():
    points = product(STRUCTURES, INITS, SOLVERS, RANKS, DROPOUTS)
    legal = sum(
        i.requires | s.requires | r.requires | ({"drops"} if d else set()) <= t.traits for t, i, s, r, d in points
    )
    assert legal >= 400


@pytest.mark.parametrize("init", INITS, ids=repr)
def test_inits(init):
    check_init(init)


@pytest.mark.parametrize("solver", SOLVERS, ids=repr)
def test_solvers(solver):
    check_solver(solver)


@pytest.mark.parametrize("plan", RANKS, ids=repr)
def test_ranks(plan):
    check_ranks(plan)


@pytest.mark.parametrize(
    ("make", "remedy"),
    [
        (lambda: Magnitude(Magnitude(LoRA(2))), "Keep one"),
        (lambda: Anchored(OFT(4)), "Anchor the additive structure"),
        (lambda: Anchored(Magnitude(LoRA(2))), r"Magnitude\(Anchored"),
        (lambda: LoRA(2, scale_rule="r"), "alpha/r"),
        (lambda: OFT(4, terms=2), "at least 3"),
        (lambda: rw.Recipe(LoRA(2), dropout=1.0), "dropout lies in"),
        (lambda: rw.Recipe(LoRA(2), base="nf3"), "base is one of"),
        (lambda: rw.Recipe(LoRA(2), sites=rw.Sites(())), "somewhere to go"),
    ],
)
def test_what_clashes_is_refused_when_it_is_made(make, remedy):
    with pytest.raises(IncompatibleAxes, match=remedy):
        make()


@pytest.mark.parametrize(
    "axes", [{"init": Principal()}, {"solver": LoRAPlus()}, {"dropout": 0.1}], ids=lambda a: next(iter(a))
)
def test_an_override_must_be_legal_too(axes):
    sites = rw.Sites(overrides={"2": OFT(4)})
    with pytest.raises(IncompatibleAxes, match="OFT"):
        rw.Recipe(Anchored(LoRA(2)), sites=sites, **axes)


def test_samples_hold_every_trait_that_an_axis_asks_for():
    asked = set().union(*(a.requires for a in (*INITS, *SOLVERS, *RANKS)))
    assert asked <= set().union(*(s.traits for s in SAMPLES))
    assert LoHa(4) in SAMPLES
