"""attach, load, set_active: an adapter's life on a model."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, final

import torch
from torch import Tensor, nn

from rankwise import io
from rankwise._recipe import Recipe
from rankwise.activity import Chosen, Routing, normalise
from rankwise.adapter import Adapters, Placement, Registry, SiteFactors, pooled
from rankwise.candidates import base_modules
from rankwise.errors import AttachError, UnknownName
from rankwise.graft import Grafted, hold, put, remove
from rankwise.host import host_of
from rankwise.model_state import check_model, fast_paths, freeze_base, hide_from_checkpoints, running_statistics, untied
from rankwise.penalties.flatness import opposed
from rankwise.placement import TargetReport, report, resolve
from rankwise.registry import encode
from rankwise.siblings import introduce
from rankwise.starting import start
from rankwise.steps import accompany
from rankwise.version import __version__
from rankwise.weights import prepare


@final
class Adapter(Mapping[str, dict[str, Tensor]]):
    """Site name -> factors by name. Made by ``attach`` and ``load``; lives in the model.

    Attributes:
        name: under which it was attached.
        model: the adapted model.
        recipe: the point of the method space that it was made from.
        placements: where it sits.
        sites: site name -> the module that holds its factors.
    """

    def __init__(
        self,
        name: str,
        model: nn.Module,
        recipe: Recipe,
        placements: Sequence[Placement],
        sites: Mapping[str, SiteFactors],
    ) -> None:
        self.name, self.model, self.recipe = name, model, recipe
        self.placements, self.sites = tuple(placements), dict(sites)

    def __getitem__(self, site: str) -> dict[str, Tensor]:
        return self.sites[site].factors()

    def __iter__(self) -> Iterator[str]:
        return iter(self.sites)

    def __len__(self) -> int:
        return len(self.sites)

    def __hash__(self) -> int:
        return id(self)

    def __eq__(self, other: object) -> bool:
        return self is other

    def named_parameters(self, trainable: bool = False) -> Iterator[tuple[str, nn.Parameter]]:
        """``site/factor`` and parameter, all of them or the trainable ones."""
        for site, module in self.sites.items():
            for name, parameter in module.own().items():
                if parameter.requires_grad or not trainable:
                    yield f"{site}/{name}", parameter

    def parameters(self, trainable: bool = True) -> Iterator[nn.Parameter]:
        """The trainable parameters (or all)."""
        return (p for _, p in self.named_parameters(trainable))

    def groups(self, lr: float | None = None) -> list[dict[str, Any]]:
        """The solver's parameter groups, each with its name and learning rate."""
        return self.recipe.solver.groups(self.sites.values(), self._rate(lr))

    def optimizer(self, lr: float | None = None) -> torch.optim.Optimizer:
        """The recipe's solver over this adapter, at ``lr`` or else its own rate, with its penalties and rank plan."""
        return accompany(self.recipe.solver(self.sites.values(), self._rate(lr)), [self])

    def _rate(self, lr: float | None) -> float:
        return self.recipe.lr if lr is None else lr

    def penalty(self, step: int) -> Tensor | float:
        """What the recipe adds to the loss at this step."""
        return sum((p(self, step) for p in self.recipe.penalties if callable(p)), 0.0)

    def save(self, path: str | Path) -> Path:
        """Write ``path/adapter.safetensors``, whole or not at all; return the file's path.

        Raises:
            SaveError: the disk is full or not writable.
        """
        return io.write(path, self, __version__)

    def detach(self) -> None:
        """Take this adapter off the model; the last one off leaves the model as it was."""
        registry = _find(self.model)
        if registry is None or registry.adapters.get(self.name) is not self:
            return
        modules = dict(self.model.named_modules())
        for path in {path for placement in self.placements for path, _, _ in placement.carriers}:
            remove(modules[path], self.name)
        remove(self.model, self.name)
        introduce(modules, self.placements, registry)
        registry.adapters.pop(self.name, None)
        if isinstance(choice := registry.activity.choice, tuple):
            registry.activity.choice = tuple(n for n in choice if n != self.name)
        hide_from_checkpoints(self.model)
        if not registry.adapters:
            fast_paths(self.model, closed=False)
            running_statistics(self.model, held=False)

    def requires_grad_(self, trainable: bool = True) -> Adapter:
        """Train the factors that the structure calls trainable, or freeze them all."""
        for module in self.sites.values():
            described = module.described
            for name, parameter in module.own().items():
                parameter.requires_grad_(trainable and described[name].trainable)
        return self

    def __repr__(self) -> str:
        parameters = [p for _, p in self.named_parameters()]
        total = sum(p.numel() for p in parameters)
        trained = sum(p.numel() for p in parameters if p.requires_grad)
        dtypes = sorted({str(p.dtype).removeprefix("torch.") for p in parameters})
        kinds = Counter(type(module.structure).__name__ for module in self.sites.values())
        sites = ", ".join(f"{n} x {kind}" for kind, n in kinds.items())
        return (
            f'Adapter "{self.name}" ({self.recipe.name}): {len(self)} sites ({sites}), '
            f"{trained:,} trainable of {total:,} parameters, {'/'.join(dtypes)}"
        )


# -- the model --------------------------------------------------------------------------------


def _find(model: nn.Module) -> Registry | None:
    for module in model.modules():
        if isinstance(module, Grafted):
            return module.adapters.registry
    return None


def registry_of(model: nn.Module) -> Registry:
    """What the grafted modules of the model share.

    Raises:
        AttachError: nothing is attached.
    """
    if (registry := _find(model)) is None:
        raise AttachError("No adapter is attached to this model; call rw.attach or rw.load first.")
    return registry


def adapters(model: nn.Module) -> dict[str, Adapter]:
    """The adapters on a model by name, in the order in which they were attached."""
    return dict(registry.adapters) if (registry := _find(model)) else {}


# -- attach and load --------------------------------------------------------------------------


def install(
    model: nn.Module,
    name: str,
    recipe: Recipe,
    placements: Sequence[Placement],
    values: Sequence[Mapping[str, Tensor]],
    trainable: bool,
) -> Adapter:
    """Hang an adapter's values (one mapping a placement) on the model and make it the active one.

    Whoever calls it has checked the model and the name.
    """
    prepare(base_modules(model).values())
    modules = dict(model.named_modules())
    registry = _find(model) or Registry()
    sites: dict[str, SiteFactors] = {}
    keys, pool = pooled(placements), None
    if keys:  # not in a container, which runs whatever child it has
        inside = isinstance(model, nn.Sequential | nn.ModuleList | nn.ModuleDict)
        pool = hold(modules[placements[0].carriers[0][0]] if inside else model, registry).room(name)
    for placement, tensors in zip(placements, values, strict=True):
        own = pool, keys.get(placement.site.name, {})
        factors = SiteFactors(placement.site, placement.structure, tensors, recipe.dropout, trainable, *own)
        factors.train(model.training)
        sites[placement.site.name] = factors
        for path, slot, transposed in placement.carriers:
            module = modules[path]
            put(module, name, slot, factors, registry)
            if transposed:
                module.__dict__["grafted_transposed"] = True
    introduce(modules, placements, registry)
    adapter = Adapter(name, model, recipe, placements, sites)
    registry.adapters[name] = adapter
    hide_from_checkpoints(model)
    fast_paths(model, closed=True)
    running_statistics(model, held=True)
    registry.activity.choice = (name,)
    return adapter


def check_name(model: nn.Module, name: str) -> None:
    """Refuse a name that is taken or cannot be a module's.

    Raises:
        AttachError: it is.
    """
    if not name.isidentifier() or hasattr(Adapters(Registry()), name):
        raise AttachError(f'An adapter\'s name is a plain identifier that no module uses itself; found "{name}".')
    if name in adapters(model):
        raise AttachError(
            f'An adapter named "{name}" is attached already; give this one another name, or detach the first.'
        )


def attach(
    model: nn.Module,
    recipe: Recipe,
    name: str = "default",
    *,
    stats: Mapping[str, Any] | None = None,
    freeze: bool = True,
) -> Adapter:
    """Put an adapter on a model, in place, and make it the active one.

    The model keeps its class, its parameters' names, its forward and its checkpoints. An error changes nothing.

    Args:
        model: any module, in any dtype, quantised or not; before ``fully_shard``.
        recipe: the method, from ``rw.recipe("dora", rank=16)`` or built from axes.
        name: under which the adapter is known on this model.
        stats: what ``collect`` gathered.
        freeze: stop gradients to the base's parameters; a batch norm so frozen keeps its running statistics.

    Returns:
        The adapter: a mapping from site name to its factors.

    Raises:
        TargetError: a pattern that matches nothing, or a module that cannot carry an adapter.
        TiedWeights: a target shares its weight with the output head and no choice was made.
        RankError: a rank that does not fit a layer.
        AttachError: the name is taken, ``recipe`` is none, or the model is sharded, on meta, or emptied by ZeRO-3.
        ModelTypeError: a PeftModel or a compiled model.
        StatisticsError: ``stats`` lacks what the init reads.
        WeightFormatError: a weight in a format that cannot be read or trained through.

    Examples:
        >>> import torch, rankwise as rw
        >>> model = torch.nn.Sequential(torch.nn.Linear(8, 8), torch.nn.ReLU())
        >>> rw.attach(model, rw.recipe("lora", rank=2))
        Adapter "default" (lora): 1 sites (1 x LoRA), 32 trainable of 32 parameters, float32
    """
    check_model(model)
    check_name(model, name)
    if not isinstance(recipe, Recipe):
        raise AttachError(f'attach takes a recipe, as rw.recipe("lora", rank=16) makes one; found {recipe!r}.')
    missing = recipe.init.needs if stats is None else frozenset()
    if missing:
        raise AttachError(
            f"{type(recipe.init).__name__} reads statistics ({', '.join(sorted(missing))}) that were not collected; "
            f"gather them with stats = rw.collect(model, batches, recipe) and pass stats=stats."
        )
    encode(recipe)  # what cannot be saved must not be trained
    with untied(model, recipe.sites.tied == "untie"):
        placements = opposed(resolve(model, recipe.structure, recipe.sites), recipe.penalties)
        prepare(base_modules(model).values())
        modules = dict(model.named_modules())
        where = [(placement, *placement.carriers[0]) for placement in placements]
        begun: dict[Any, Tensor] = {}
        values = [start(recipe, p, host_of(modules[path], slot), stats, begun) for p, path, slot, _ in where]
    if freeze:
        freeze_base(model)
    return install(model, name, recipe, placements, values, trainable=True)


def load(
    model: nn.Module,
    path: str | Path,
    name: str = "default",
    *,
    trainable: bool = False,
    any_base: bool = False,
    known: Iterable[type] = (),
) -> Adapter:
    """Load a saved adapter onto the base that it was trained on, bit for bit, and activate it.

    Says in one line on stderr what it loaded and whether it trains.

    Args:
        model: the base.
        path: folder with ``adapter.safetensors``, or that file.
        name: under which the adapter is known on this model.
        trainable: go on training it.
        any_base: accept a base whose weights differ from those it was trained on.
        known: classes from outside that the file may name, besides installed plug-ins.

    Returns:
        The adapter.

    Raises:
        FileFormatError: a truncated, foreign or hostile file.
        BaseMismatch: another base.
        AttachError: as in :func:`attach`.
    """
    check_model(model)
    check_name(model, name)
    saved = io.read(path, known)
    values = []
    with untied(model, saved.recipe.sites.tied == "untie"):
        for placement in saved.placements:
            module, slot, _ = io.carried(model, placement)[0]
            device = host_of(module, slot).parameter().device
            values.append({k: v.to(device) for k, v in saved.tensors[placement.site.name].items()})
        prepare(base_modules(model).values())
        io.check_base(model, saved.placements, saved.base, any_base)
    if trainable:
        freeze_base(model)
    adapter = install(model, name, saved.recipe, saved.placements, values, trainable)
    state = "trainable" if trainable else "frozen (trainable=True to go on training)"
    print(f"loaded {adapter!r}, {state}", file=sys.stderr)
    return adapter


def targets(model: nn.Module, recipe: Recipe) -> TargetReport:
    """The dry run: what each pattern of the recipe matches on this model; nothing is changed.

    Raises:
        TargetError: as ``attach`` would.
    """
    return report(model, recipe.structure, recipe.sites)


# -- which are active -------------------------------------------------------------------------


def set_active(model: nn.Module, names: str | Sequence[str] | None) -> Chosen:
    """Choose the active adapters, in order of application; also a context manager.

    Like ``torch.set_grad_enabled``: the call sets the choice, ``with`` restores the former one.

    Raises:
        UnknownName: a name that is not attached.
        ActivityError: another thread is inside such a context.
    """
    registry = registry_of(model)
    chosen = normalise(names)
    _check_known(registry, chosen)
    return Chosen(registry.activity, chosen)


def disabled(model: nn.Module) -> Chosen:
    """The base model: every adapter off (the reference policy of DPO and GRPO).

    Raises:
        ActivityError: another thread is inside such a context.
    """
    return Chosen(registry_of(model).activity, ())


def route(model: nn.Module, rows: Sequence[str | None]) -> Chosen:
    """An adapter for each row of the batch, None for the base model; also a context manager.

    Raises:
        UnknownName: a name that is not attached.
        ActivityError: another thread is inside such a context.
    """
    registry = registry_of(model)
    _check_known(registry, tuple(r for r in rows if r is not None))
    return Chosen(registry.activity, Routing(tuple(rows)))


def _check_known(registry: Registry, names: Sequence[str]) -> None:
    unknown = [n for n in names if n not in registry.adapters]
    if unknown:
        raise UnknownName(
            f"Only attached adapters can be active; found {unknown}, attached: {list(registry.adapters)}."
        )
