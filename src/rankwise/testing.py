"""The laws of the library as functions, for anybody's method.

``check_structure(MyStructure(rank=4), known=[MyStructure])`` runs L1 to L4 over every kind of layer
that the structure accepts; ``check_init``, ``check_solver``, ``check_ranks`` and ``check_operator``
do the same for the other axes. Each returns the worst figures it met and raises AssertionError,
which says the law, the place and the figure. All arithmetic is float64.
"""

from __future__ import annotations

import contextlib
import copy
import io
import tempfile
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, final

import torch
from torch import Tensor, nn

from rankwise._recipe import Recipe
from rankwise.adapter import LAYER, SiteFactors
from rankwise.attach import Adapter, attach, load, route, set_active
from rankwise.errors import IncompatibleAxes, TargetError
from rankwise.host import ParameterHost, kind_of
from rankwise.inits import Init
from rankwise.io import carried
from rankwise.lifecycle import merge
from rankwise.ops import LinearOperator
from rankwise.ranks import Ranks, carry_out
from rankwise.sites import Sites
from rankwise.solvers import Solver
from rankwise.structures import Anchored, LoHa, LoKr, LoRA, Magnitude, Structure, SVDForm

TOLERANCE = 1e-9
EFFECT = 0.01  # a law that is tested on a change too small to see tests nothing
Figures = dict[str, float]


# -- kinds of layer -----------------------------------------------------------------------------


@final
@dataclass(frozen=True)
class Layer:
    """One kind of layer, inside a model that maps one tensor to one tensor.

    Attributes:
        name: of the kind.
        make: builds the model.
        inputs: a batch of so many rows.
        sites: where its layer is.
        rowwise: whether every row of a batch can have an adapter of its own.
    """

    name: str
    make: Callable[[], nn.Module]
    inputs: Callable[[int], Tensor]
    sites: Sites
    rowwise: bool = True


class SelfAttention(nn.Module):
    """``nn.MultiheadAttention`` of x with itself, or with part of it as keys and values."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(12, 2, **options)
        self.widths = (options.get("kdim") or 12, options.get("vdim") or 12)

    def forward(self, x: Tensor) -> Tensor:
        """Attend."""
        k, v = self.widths
        return self.mha(x, x[..., :k], x[..., :v], need_weights=False)[0]


class Experts(nn.Module):
    """Two stacked matrices a token is sent through, in transformers' layout or transposed."""

    def __init__(self, transposed: bool) -> None:
        super().__init__()
        self.is_transposed = transposed
        up, down = (3, 16, 12), (3, 12, 16)
        self.up = nn.Parameter(torch.randn(up if not transposed else (3, 12, 16)) / 3)
        self.down = nn.Parameter(torch.randn(down if not transposed else (3, 16, 12)) / 3)

    def forward(self, x: Tensor) -> Tensor:
        """Every third token to its expert."""
        parts = []
        for e in range(3):
            up, down = self.up[e], self.down[e]
            if not self.is_transposed:
                up, down = up.mT, down.mT
            parts.append(torch.tanh(x[:, e::3] @ up) @ down)
        return torch.cat(parts, dim=1)


class Tied(nn.Module):
    """An embedding and an output head of one weight."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.mid = nn.Embedding(20, 12), nn.Linear(12, 12)
        self.lm_head = nn.Linear(12, 20, bias=False)
        self.lm_head.weight = self.embed.weight

    def get_output_embeddings(self) -> nn.Module:
        """The head, as transformers calls it."""
        return self.lm_head

    def forward(self, x: Tensor) -> Tensor:
        """Logits."""
        return self.lm_head(torch.tanh(self.mid(self.embed(x))))


def _tokens(rows: int) -> Tensor:
    return torch.randint(0, 20, (rows, 7))


def _normal(*shape: int) -> Callable[[int], Tensor]:
    return lambda rows: torch.randn(rows, *shape, dtype=torch.float64)


LAYERS: tuple[Layer, ...] = (
    Layer("Linear", lambda: nn.Sequential(nn.Linear(12, 16)), _normal(5, 12), Sites()),
    Layer(
        "Conv2d",
        lambda: nn.Sequential(nn.Conv2d(8, 12, 3, 2, padding=1, groups=2)),
        _normal(8, 6, 5),
        Sites(nn.Conv2d),
    ),
    Layer(
        "ConvTranspose1d",
        lambda: nn.Sequential(nn.ConvTranspose1d(8, 12, 3, 2, padding=1, groups=2)),
        _normal(8, 6),
        Sites(nn.ConvTranspose1d),
    ),
    Layer(
        "Embedding",
        lambda: nn.Sequential(nn.Embedding(20, 12, padding_idx=3)),
        _tokens,
        Sites(nn.Embedding),
    ),
    Layer("tied head", Tied, _tokens, Sites(nn.Embedding, tied="tie")),
    Layer("MultiheadAttention", SelfAttention, _normal(5, 12), Sites(), rowwise=False),
    Layer("experts", lambda: Experts(False), _normal(6, 12), Sites(), rowwise=False),
    Layer("transposed experts", lambda: Experts(True), _normal(6, 12), Sites(), rowwise=False),
    Layer(
        "fused rows",
        lambda: nn.Sequential(nn.Linear(12, 24)),
        _normal(5, 12),
        Sites("0", parts={"0": (("v", 16, 24), ("q", 0, 8))}),
    ),
)


# -- tools --------------------------------------------------------------------------------------


def _compare(law: str, where: str, got: Tensor, want: Tensor, tolerance: float) -> float:
    """The largest difference relative to the largest wanted value."""
    assert got.shape == want.shape, (
        f"{law}: {where} has shape {tuple(got.shape)}, wanted {tuple(want.shape)}"
    )
    scale = float(want.detach().abs().max().clamp_min(1e-30))
    figure = float((got - want).detach().abs().max()) / scale
    assert figure <= tolerance, (
        f"{law}: {where} differs by {figure:.2g} of its largest value (tolerance {tolerance:g})"
    )
    return figure


def _note(figures: Figures, law: str, figure: float) -> None:
    figures[law] = max(figures.get(law, 0.0), figure)


def worst(many: Iterable[Mapping[str, float]]) -> Figures:
    """The largest figure of each law; the smallest effect."""
    found: Figures = {}
    for figures in many:
        for law, figure in figures.items():
            pick = min if law == "effect" else max
            found[law] = pick(found.get(law, figure), figure)
    return found


@torch.no_grad()
def randomise(adapter: Adapter, outputs: Callable[[], Tensor], generator_seed: int = 0) -> float:
    """Draw every factor at random around its start, so far that the outputs move by 1 %.

    Args:
        adapter: the adapter, at its start.
        outputs: runs the adapted model.
        generator_seed: of the draw.

    Returns:
        The effect, as a share of the outputs' norm.
    """
    generator = torch.Generator().manual_seed(generator_seed)
    parameters = list(adapter.parameters(trainable=False))
    starts = [p.clone() for p in parameters]
    moves = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in parameters]
    before, effect = outputs(), 0.0
    for size in (0.1, 0.2, 0.5, 1.0, 2.0, 5.0):
        for p, start, move in zip(parameters, starts, moves, strict=True):
            p.copy_(start + size * move.to(p))
        effect = float((outputs() - before).norm() / before.norm())
        if effect >= EFFECT:
            return effect
    raise AssertionError(
        f"{adapter.recipe.structure!r}: with every factor drawn at random the outputs move by "
        f"{effect:.2g} only; some factor is not used"
    )


def truth(base: nn.Module, adapter: Adapter) -> nn.Module:
    """A copy of the base whose weights are ``structure.weight(f, W)``: what L1 compares with."""
    model = copy.deepcopy(base)
    with torch.no_grad():
        for placement in adapter.placements:
            module, slot, _ = carried(model, placement)[0]
            kind = kind_of(module) if slot == LAYER else None
            host: Any = kind(module) if kind else ParameterHost(module, slot)
            host.write(placement.structure.weight(adapter[placement.site.name], host.weight()))
    return model


def accepts(structure: Structure, layer: Layer) -> bool:
    """Whether the structure can sit on the layer; it refuses with a TargetError."""
    try:
        attach(layer.make().double(), Recipe(structure, sites=layer.sites))
    except TargetError:
        return False
    return True


# -- structures ---------------------------------------------------------------------------------


def check_structure(
    structure: Structure,
    layers: Sequence[Layer] = LAYERS,
    *,
    known: Iterable[type] = (),
    tolerance: float = TOLERANCE,
) -> Figures:
    """L1 to L4 over every kind of layer that the structure accepts.

    Args:
        structure: the structure, of a rank that fits layers of 8 rows (4, say).
        layers: kinds of layer; those that it refuses with a TargetError are left out.
        known: classes that a saved recipe may name: the structure's own, if it is not ours.
        tolerance: of every comparison, in units of the largest value.

    Returns:
        The worst figure of each law, and the smallest effect of the random factors.
    """
    accepted = [layer for layer in layers if accepts(structure, layer)]
    assert accepted, f"{structure!r} accepts none of {[layer.name for layer in layers]}"
    return worst(check_on(structure, layer, known, tolerance) for layer in accepted)


def check_on(
    structure: Structure,
    layer: Layer,
    known: Iterable[type] = (),
    tolerance: float = TOLERANCE,
) -> Figures:
    """L1 to L4 on one kind of layer.

    Args:
        structure: the structure.
        layer: a kind of layer that it accepts.
        known: classes that a saved recipe may name.
        tolerance: of every comparison.

    Returns:
        The figure of each law, and the effect of the random factors.
    """
    torch.manual_seed(0)
    figures: Figures = {}
    where = f"{structure!r} on {layer.name}"
    base = layer.make().double().eval()
    x = layer.inputs(3)
    recipe = Recipe(structure, sites=layer.sites)
    model = copy.deepcopy(base)
    adapter = attach(model, recipe)
    if "moves_at_start" not in structure.traits:
        _note(figures, "L2", _compare("L2 identity", where, model(x), base(x), tolerance))
    figures["effect"] = randomise(adapter, lambda: model(x))
    _meaning(figures, where, base, model, adapter, x, tolerance)
    _batch(figures, where, adapter, tolerance)
    if layer.rowwise:
        _rows(figures, where, base, recipe, x, tolerance)
    _closure(figures, where, base, model, adapter, x, known, tolerance)
    return figures


def _meaning(
    figures: Figures,
    where: str,
    base: nn.Module,
    model: nn.Module,
    adapter: Adapter,
    x: Tensor,
    tolerance: float,
) -> None:
    """L1, in both modes, and for the gradient with respect to the input."""
    dense = truth(base, adapter)
    for mode in (True, False):
        got, want = model.train(mode)(x), dense.train(mode)(x)
        state = f"{where}, {'training' if mode else 'evaluation'}"
        _note(figures, "L1", _compare("L1 meaning", state, got, want, tolerance))
    if x.is_floating_point():
        along = torch.randn_like(got)
        grads = []
        for m in (model, dense):
            z = x.clone().requires_grad_()
            grads.append(torch.autograd.grad((m(z) * along).sum(), z)[0])
        figure = _compare("L1 meaning", f"{where}, gradient of x", *grads, tolerance)
        _note(figures, "L1", figure)


@torch.no_grad()
def _batch(figures: Figures, where: str, adapter: Adapter, tolerance: float) -> None:
    """L3 for the dense form: stacked factors give stacked weights."""
    for module in adapter.sites.values():
        shape = [module.site.rows, module.site.cols]
        f = module.factors()
        if module.site.stack is None:
            f = {k: torch.stack([v, v + torch.randn_like(v) / 4]) for k, v in f.items()}
        count = next(iter(f.values())).shape[0]
        w = torch.randn(*([count] if module.site.stack else []), *shape, dtype=torch.float64)
        got = module.structure.weight(f, w)
        each = [
            module.structure.weight({k: v[i] for k, v in f.items()}, w[i] if w.dim() == 3 else w)
            for i in range(count)
        ]
        figure = _compare("L3 batch", f"{where}, weight", got, torch.stack(each), tolerance)
        _note(figures, "L3", figure)


@torch.no_grad()
def _rows(
    figures: Figures, where: str, base: nn.Module, recipe: Recipe, x: Tensor, tolerance: float
) -> None:
    """L3 for the map: a batch of several adapters equals each row alone."""
    model = copy.deepcopy(base)
    names: list[str | None] = ["one", "two", None]
    for seed, name in enumerate(n for n in names if n):
        adapter = attach(model, recipe, name)
        randomise(adapter, lambda: model(x), seed)
    names = ["two", None, "one", "two"]
    x = torch.cat([x, x[:1]])
    with route(model, names):
        got = model(x)
    for i, name in enumerate(names):
        with set_active(model, name):
            want = model(x[i : i + 1])
        figure = _compare("L3 batch", f"{where}, row {i}", got[i : i + 1], want, tolerance)
        _note(figures, "L3", figure)


def _closure(
    figures: Figures,
    where: str,
    base: nn.Module,
    model: nn.Module,
    adapter: Adapter,
    x: Tensor,
    known: Iterable[type],
    tolerance: float,
) -> None:
    """L4: it trains a step, saves, loads to the same bits, merges."""
    train_step(where, model.train(), adapter, x)
    y = model.eval()(x)
    other = copy.deepcopy(base)
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stderr(io.StringIO()):
        adapter.save(folder)
        load(other, folder, known=known)
    assert torch.equal(other(x), y), f"L4 closure: {where} is not bit-equal after loading"
    merge(other)
    _note(figures, "L4", _compare("L4 closure", f"{where}, merged", other(x), y, tolerance))
    assert all(torch.equal(p, q) for p, q in _pairs(base, model)), (
        f"L4 closure: training {where} changed the base"
    )


def _pairs(base: nn.Module, model: nn.Module) -> Iterator[tuple[Tensor, Tensor]]:
    now = dict(model.named_parameters())
    return ((p, now[name]) for name, p in base.named_parameters())


def train_step(where: str, model: nn.Module, adapter: Adapter, x: Tensor) -> None:
    """One optimizer step, in which every trainable factor gets a gradient and moves.

    Args:
        where: for the error.
        model: the adapted model, in the mode that is meant.
        adapter: the adapter.
        x: a batch.
    """
    optimizer = adapter.optimizer(lr=1e-3)
    y = model(x)
    (y - torch.randn_like(y)).square().sum().backward()
    trained = {n: p for n, p in adapter.named_parameters(trainable=True) if p.numel()}
    silent = [n for n, p in trained.items() if p.grad is None or not p.grad.any()]
    assert not silent, f"L4 closure: {where} gives no gradient to {silent}"
    before = {n: p.detach().clone() for n, p in adapter.named_parameters()}
    optimizer.step()
    for name, p in adapter.named_parameters():
        moved = not torch.equal(p, before[name])
        assert moved == (name in trained), (
            f"L4 closure: a step {'moves' if moved else 'does not move'} {name} of {where}"
        )


# -- the other axes -----------------------------------------------------------------------------

SAMPLES: tuple[Structure, ...] = (
    LoRA(4),
    SVDForm(4),
    LoKr(4),
    LoHa(4),
    Magnitude(LoRA(4)),
    Anchored(LoRA(4)),
    Anchored(SVDForm(4)),
)


def legal(
    axis: Init | Solver | Ranks, structures: Sequence[Structure] = SAMPLES
) -> list[Structure]:
    """The structures that an axis accepts; all others must be refused at construction."""
    name = "init" if isinstance(axis, Init) else "solver" if isinstance(axis, Solver) else "ranks"
    found: list[Structure] = []
    for structure in structures:
        fits = axis.requires <= structure.traits
        try:
            Recipe(structure, **{name: axis})
        except IncompatibleAxes:
            assert not fits, f"L4 closure: {axis!r} refuses {structure!r}, which has its traits"
        else:
            assert fits, f"L4 closure: {axis!r} accepts {structure!r}, which lacks its traits"
            found.append(structure)
    assert found, f"{axis!r} accepts none of {structures}"
    return found


def check_init(
    init: Init,
    structures: Sequence[Structure] = SAMPLES,
    *,
    stats: Mapping[str, Any] | None = None,
    tolerance: float = TOLERANCE,
) -> Figures:
    """An init gives every factor, finite, of its shape, the same for one seed, and keeps L2.

    Args:
        init: the init.
        structures: structures to try; those without its required traits must be refused.
        stats: what ``collect`` would have gathered, for inits that read data.
        tolerance: of L2.

    Returns:
        The worst figure of L2.
    """
    figures: Figures = {}
    for structure in legal(init, structures):
        for layer in LAYERS:
            where = f"{init!r} with {structure!r} on {layer.name}"
            torch.manual_seed(0)
            base, x = layer.make().double().eval(), layer.inputs(3)
            values = []
            for _ in range(2):
                model = copy.deepcopy(base)
                torch.manual_seed(1)
                adapter = attach(model, Recipe(structure, init, sites=layer.sites), stats=stats)
                values.append(dict(adapter.named_parameters()))
            for name, value in values[0].items():
                assert torch.isfinite(value).all(), f"{where}: {name} is not finite"
                assert torch.equal(value, values[1][name]), f"{where}: {name} ignores the seed"
            for module in adapter.sites.values():
                _check_shapes(where, module)
            if "moves_at_start" not in structure.traits:
                figure = _compare("L2 identity", where, model(x), base(x), tolerance)
                _note(figures, "L2", figure)
    return figures


def _check_shapes(where: str, module: SiteFactors) -> None:
    lead = () if module.site.stack is None else (module.site.stack,)
    for name, factor in module.described.items():
        found = tuple(module.factors()[name].shape)
        assert found == lead + factor.shape, f"{where}: {name} has shape {found}"


def check_solver(solver: Solver, structures: Sequence[Structure] = SAMPLES) -> Figures:
    """A solver's groups hold each trainable factor once, and its steps lower a loss.

    Args:
        solver: the solver.
        structures: structures to try; those without its required traits must be refused.

    Returns:
        The largest ratio of the loss after 20 steps to the one before.
    """
    figures: Figures = {}
    for structure in legal(solver, structures):
        torch.manual_seed(0)
        where = f"{solver!r} with {structure!r}"
        model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 8)).double()
        x, y = torch.randn(32, 12).double(), torch.randn(32, 8).double()
        adapter = attach(model, Recipe(structure, solver=solver))
        held = [id(p) for group in adapter.groups(1e-3) for p in group["params"]]
        assert sorted(held) == sorted(map(id, adapter.parameters())), (
            f"{where}: its groups do not hold each trainable factor once"
        )
        assert all(g["params"] and g["name"] for g in adapter.groups(1e-3)), f"{where}: empty group"
        optimizer, losses = adapter.optimizer(lr=3e-3), []
        for _ in range(21):
            loss = (model(x) - y).square().mean()
            losses.append(float(loss))
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert losses[-1] < losses[0], f"{where}: the loss went from {losses[0]} to {losses[-1]}"
        _note(figures, "loss", losses[-1] / losses[0])
    return figures


def check_ranks(ranks: Ranks, structures: Sequence[Structure] = SAMPLES, steps: int = 20) -> None:
    """A rank plan is masks that fit the sites, and carrying it out zeroes what they hide.

    Args:
        ranks: the plan.
        structures: structures to try; those without its required traits must be refused.
        steps: how many optimizer steps to ask for.
    """
    for structure in legal(ranks, structures):
        model = nn.Sequential(nn.Linear(12, 16), nn.Linear(16, 8)).double()
        adapter = attach(model, Recipe(structure, ranks=ranks))
        sizes = {
            name: next((f.dims["rank"] for f in m.described.values() if "rank" in f.dims), None)
            for name, m in adapter.sites.items()
        }
        given = {name: torch.rand(size) for name, size in sizes.items() if size is not None}
        for step in range(1, steps + 1):
            plan = ranks.plan(step, given)
            if plan is None:
                continue
            for name, mask in plan.masks.items():
                assert tuple(mask.shape) == (sizes[name],), (
                    f"{ranks!r} with {structure!r}: the mask of {name} has shape {mask.shape}"
                )
                assert set(mask.unique().tolist()) <= {0.0, 1.0}, f"{ranks!r}: no mask at {name}"
            carry_out(adapter.sites.values(), plan)


def check_operator(op: LinearOperator, batch: tuple[int, ...] = ()) -> float:
    """The operator's laws: ``mv``, ``dense``, ``T``, ``rows`` and ``lower`` agree.

    Args:
        op: the operator, in float64.
        batch: its batch dims, none or one.

    Returns:
        The worst figure.
    """
    name, (m, n), dense = type(op).__name__, op.shape, op.dense()
    x, z = (torch.randn(*batch, 5, size, dtype=torch.float64) for size in (n, m))
    index = torch.randint(0, m, (*batch, 6))
    rows = torch.take_along_dim(dense, index.unsqueeze(-1), dim=-2)
    pairs = {
        "dense": (dense, dense.expand(*batch, m, n)),
        "mv": (op.mv(x), x @ dense.mT),
        "T": (op.T.dense(), dense.mT),
        "T.mv": (op.T.mv(z), z @ dense),
        "T.T.mv": (op.T.T.mv(x), x @ dense.mT),
        "rows": (op.rows(index), rows),
    }
    pair = op.lower()
    if pair is not None:
        pairs["lower"] = (pair.left @ pair.right, dense)
    return max(_compare("operator law", f"{name}.{k}", *v, TOLERANCE) for k, v in pairs.items())
