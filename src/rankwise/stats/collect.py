"""``collect``: one pass over batches gathers what an init, a rank plan or the advice reads."""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from typing import Any, Protocol, final

import torch
import torch.distributed as dist
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor, nn

from rankwise.adapter import Placement
from rankwise.candidates import base_modules
from rankwise.errors import FileFormatError, SaveError, StatisticsError
from rankwise.host import Site
from rankwise.placement import resolve
from rankwise.sites import Sites
from rankwise.stats.collector import Batches, Collector, Layers, Probe, Seen, State, Watched
from rankwise.stats.collectors import STATISTICS
from rankwise.stats.watch import Watch
from rankwise.structures import Replace, Structure, TokenRows
from rankwise.weights import prepare


class Method(Protocol):
    """What of a recipe says what is gathered, and where."""

    @property
    def structure(self) -> Structure: ...  # noqa: D102
    @property
    def sites(self) -> Sites: ...  # noqa: D102
    @property
    def init(self) -> Any: ...  # noqa: D102


@final
class Stats(Mapping[str, dict[str, Any]]):
    """Site name -> statistic name -> value: what ``attach(model, recipe, stats=...)`` reads.

    Attributes:
        sites: the facts of each site.
        ranks: the rank of the structure that was meant for each site, None where it has none.
        batches: how many batches were seen, over all processes.
    """

    def __init__(
        self, values: Mapping[str, dict[str, Any]], sites: Mapping[str, Site], ranks: Mapping[str, Any], batches: int
    ) -> None:
        self._values, self.sites, self.ranks, self.batches = dict(values), dict(sites), dict(ranks), batches

    def __getitem__(self, site: str) -> dict[str, Any]:
        return self._values[site]

    def __iter__(self) -> Iterator[str]:
        return iter(self._values)

    def __len__(self) -> int:
        return len(self._values)

    def __repr__(self) -> str:
        names = sorted({name for found in self._values.values() for name in found})
        return f"Stats: {', '.join(names) or 'nothing'} of {len(self)} sites, over {self.batches} batches"


# -- what is asked for ------------------------------------------------------------------------


def _chosen(needs: Iterable[str | Collector]) -> list[Collector]:
    """The statistics by name.

    Raises:
        StatisticsError: a name that none answers to, or two statistics of one name.
    """
    found: dict[str, Collector] = {}
    for need in needs:
        collector = STATISTICS.get(need) if isinstance(need, str) else need
        if collector is None or collector.name in found:
            raise StatisticsError(
                f"needs= names statistics once each, of {', '.join(sorted(STATISTICS))}, or holds Collectors; found "
                f"{need!r}."
            )
        found[collector.name] = collector
    return [found[name] for name in sorted(found)]


def _rank(placement: Placement) -> int | None:
    ranks = [f.dims["rank"] for f in placement.structure.factors(placement.site).values() if "rank" in f.dims]
    return max(ranks, default=None)


# -- running the model ------------------------------------------------------------------------


@contextmanager
def _quiet(model: nn.Module) -> Iterator[None]:
    """Evaluation mode, and the generators as they were, afterwards as before."""
    modes = [(m, m.training) for m in model.modules()]
    cuda = sorted({p.device.index for p in model.parameters() if p.device.type == "cuda"})
    with torch.random.fork_rng(devices=cuda):
        try:
            model.eval()
            yield
        finally:
            for module, training in modes:
                module.training = training


def _moved(batch: Any, device: torch.device) -> Any:
    if isinstance(batch, Tensor):
        return batch.to(device)
    if isinstance(batch, Mapping):
        return {k: _moved(v, device) for k, v in batch.items()}
    return type(batch)(_moved(v, device) for v in batch) if type(batch) in (tuple, list) else batch


def _loss(model: nn.Module, batch: Any, loss: Callable[..., Any] | None, gradients: bool) -> Any:
    """Run the model on a batch; the loss, where gradients are asked for.

    Raises:
        StatisticsError: there is no loss in what the model gives.
    """
    if loss is not None:
        value = loss(model, batch)
    elif isinstance(batch, Mapping):
        value = model(**batch)
        if gradients:
            value = value.get("loss") if isinstance(value, Mapping) else getattr(value, "loss", None)
    else:
        value = model(batch)
    if gradients and not (isinstance(value, Tensor) and value.numel() == 1):
        found = type(value).__name__ if not isinstance(value, Tensor) else f"a tensor of shape {tuple(value.shape)}"
        raise StatisticsError(
            f"Gradients are those of one number: a model of transformers gives its loss where the batch has labels, "
            f"for any other pass loss=, a function of (model, batch); found {found}."
        )
    return value


def _bar(batches: Iterable[Any]) -> Iterable[Any]:
    """The batches, with a progress bar where a person looks on."""
    if sys.stderr.isatty():
        with suppress(ImportError):
            from tqdm import tqdm

            return tqdm(batches, desc="statistics", unit=" batches")
    return batches


# -- the pass ---------------------------------------------------------------------------------


@final
class _Pass:
    """The states of all statistics at all sites, and how far the pass is."""

    def __init__(self, placements: Sequence[Placement], collectors: Sequence[Collector], share: bool) -> None:
        self.sites = {p.site.name: p.site for p in placements}
        self.ranks = {p.site.name: _rank(p) for p in placements}
        self.collectors = {c.name: c for c in collectors}
        self.states: dict[str, dict[str, State]] = {name: {} for name in self.sites}
        self.leaders: dict[str, str] = {}
        self.counts = [0, 0]
        asked = [sorted(map(repr, collectors)), list(self.sites), list(self.ranks.values()), share]
        self.request = json.dumps(asked)

    @property
    def done(self) -> int:
        return sum(self.counts)

    def see(self, site: str, seen: Seen) -> None:
        for name, collector in self.collectors.items():
            if isinstance(collector, Watched) and collector.gradients == (seen.dy is not None):
                states = self.states[site]
                if name not in states:
                    states[name] = collector.start(self.sites[site], self.ranks[site], seen.x)
                collector.add(states[name], seen)

    def probe(self, layers: Layers, loss: Callable[[], Tensor]) -> None:
        for name, collector in self.collectors.items():
            if isinstance(collector, Probe):
                for site, host in layers:
                    if name not in self.states[site]:
                        like = host.parameter().new_zeros((), dtype=torch.promote_types(host.dtype, torch.float32))
                        self.states[site][name] = collector.start(self.sites[site], self.ranks[site], like)
                collector.run({site: states[name] for site, states in self.states.items()}, layers, loss)

    def _is_shared(self, name: str) -> bool:
        collector = self.collectors[name]
        return isinstance(collector, Watched) and not collector.gradients

    # -- a file, to go on from --------------------------------------------------------------

    def save(self, file: Path) -> None:
        flat = {
            f"{site}|{name}|{part}": value.detach().cpu().contiguous()
            for site, states in self.states.items()
            for name, state in states.items()
            for part, value in state.items()
        }
        header = {"request": self.request, "leaders": json.dumps(self.leaders), "counts": json.dumps(self.counts)}
        temporary = file.with_name(f".{file.name}.{os.getpid()}.tmp")
        try:
            file.parent.mkdir(parents=True, exist_ok=True)
            save_file(flat, temporary, header)
            temporary.replace(file)
        except (OSError, SafetensorError) as error:
            temporary.unlink(missing_ok=True)
            raise SaveError(
                f"The state of a collection is written beside {file} and moved there; that failed ({error}). Free some "
                f"space or choose another place, and collect again."
            ) from error

    def load(self, file: Path, devices: Mapping[str, torch.device]) -> None:
        try:
            with safe_open(file, framework="pt") as archive:
                header = archive.metadata() or {}
                # cloned: BLAS rounds differently at an unaligned address, where the file has them
                flat = {key: archive.get_tensor(key).clone() for key in archive.keys()}  # noqa: SIM118
            fits = header["request"] == self.request
            leaders, counts = json.loads(header["leaders"]), json.loads(header["counts"])
        except (SafetensorError, OSError, KeyError, json.JSONDecodeError) as error:
            raise FileFormatError(
                f"resume= names the state of a collection; {file} cannot be read ({error}). Delete it to begin anew."
            ) from error
        if not fits:
            raise FileFormatError(
                f"resume= goes on with the statistics, sites and ranks that it was begun with; {file} is of another "
                f"collection. Choose another file, or delete it to begin anew."
            )
        self.leaders.update(leaders)
        self.counts = counts
        for key, value in flat.items():
            site, name, part = key.rsplit("|", 2)
            self.states[site].setdefault(name, {})[part] = value.to(devices[site])

    # -- the end ----------------------------------------------------------------------------

    def problem(self) -> str | None:
        """Why there is no result, None where there is."""
        if not self.done:
            return (
                "Statistics need a batch at least; found none. An iterator that is used up gives no more: make it anew"
            )
        for site, states in self.states.items():
            if (self.states[self.leaders.get(site, site)] | states).keys() != self.collectors.keys():
                return f"Every site must be run by a batch and matter to the loss; {site} was not. Leave it out"
        return None

    def results(self) -> Stats:
        """The statistics, over all processes.

        Raises:
            StatisticsError: no batch, or a site that no batch has run.
        """
        several = dist.is_available() and dist.is_initialized()
        problems: list[str | None] = [self.problem()]
        if several:
            problems *= dist.get_world_size()
            dist.all_gather_object(problems, self.problem())
        if any(problems):
            raise StatisticsError(f"{next(filter(None, problems))}.")
        counts = self.counts
        if several:
            each: list[Any] = [None] * dist.get_world_size()
            dist.all_gather_object(each, counts)
            counts = [sum(column) for column in zip(*each, strict=True)]
        batches = Batches(*counts)
        own: dict[str, dict[str, Any]] = {site: {} for site in self.sites}
        for site, states in self.states.items():
            for name in sorted(states):
                collector, state = self.collectors[name], states.pop(name)
                state = _over_processes(collector, state) if several else state
                own[site][name] = collector.result(state, batches)
        led = {site: own[self.leaders.get(site, site)] for site in self.sites}
        found = {site: {k: v for k, v in led[site].items() if self._is_shared(k)} | own[site] for site in own}
        return Stats(found, self.sites, self.ranks, batches.total)


def _over_processes(collector: Collector, state: State) -> State:
    """The states of all processes, merged one by one in the same order everywhere."""
    merged: State | None = None
    for source in range(dist.get_world_size()):
        other = {part: value.clone() for part, value in sorted(state.items())}
        for value in other.values():
            dist.broadcast(value, source)
        merged = other if merged is None else collector.merge(merged, other)
    assert merged is not None
    return merged


def collect(
    model: nn.Module,
    batches: Iterable[Any],
    recipe: Method,
    loss: Callable[[nn.Module, Any], Tensor] | None = None,
    *,
    needs: Iterable[str | Collector] | None = None,
    resume: str | Path | None = None,
    every: int = 16,
    share: bool = True,
    progress: Callable[[Iterable[Any]], Iterable[Any]] = _bar,
) -> Stats:
    """Gather, in one pass over batches, what a recipe's init reads of data.

    The model is run in evaluation mode and left as it was: no parameter is changed, asked for a gradient or given a
    ``.grad``; modes and random generators are restored. Gradients are formed layer by layer, from what a layer reads
    and the gradient of what it gives, and added up at once. Padding (a two-dimensional ``attention_mask``) does not
    count among the inputs. Where torch.distributed is initialised, every process passes its own batches, as many as the
    others, and all get the statistics of all.

    Memory: what each statistic says, for every site (n inputs, m outputs): ``input_covariance`` n^2 and
    ``input_subspace`` 2 r n once for sites that read one tensor; ``gradient`` and ``noise_scale`` m n,
    ``gradient_halves`` 2 m n; ``curvature`` r (m + n); a ``GradientSketch`` (2 r + 16) m + (4 r + 33) n.

    Args:
        model: before an adapter is attached; it may be quantised, or sharded by ``fully_shard``.
        batches: what the model reads: mappings for ``model(**batch)``, or anything that ``loss`` takes.
        recipe: says where (structure and sites) and, by ``recipe.init.needs``, what.
        loss: ``(model, batch) -> scalar``; by default ``model(**batch).loss``.
        needs: names of statistics, or Collectors, instead of the init's.
        resume: a file that the state is written to every few batches, and that a call with the same batches goes on
            from.
        every: how many batches lie between two writings.
        share: compute inputs that sites share once; they must then share them in every batch.
        progress: wraps the batches; a bar on stderr by default, where that is a terminal.

    Returns:
        The statistics by site.

    Raises:
        StatisticsError: no batch, a value that is not finite, a site whose kind has no such statistic, no loss.
        TargetError: a pattern that matches nothing.
        FileFormatError: a state of another collection.

    Examples:
        >>> import torch, rankwise as rw
        >>> model, recipe = torch.nn.Sequential(torch.nn.Linear(8, 6)), rw.recipe("eva", rank=2)
        >>> stats = rw.collect(model, [torch.randn(16, 8)], recipe)
        >>> stats
        Stats: input_subspace of 1 sites, over 1 batches
        >>> rw.attach(model, recipe, stats=stats)["0"]["a"].shape
        torch.Size([2, 8])
    """
    collectors = _chosen(recipe.init.needs if needs is None else needs)
    if not collectors:
        return Stats({}, {}, {}, 0)
    found = resolve(model, recipe.structure, recipe.sites)
    placements = [p for p in found if not isinstance(p.structure, Replace | TokenRows)]
    run = _Pass(placements, collectors, share)
    watched = {c.gradients for c in collectors if isinstance(c, Watched)}
    watch = Watch(model, placements, run.see, False in watched, True in watched, run.leaders, share)
    probes = any(isinstance(c, Probe) for c in collectors)
    file = None if resume is None else Path(resume)
    if file is not None and dist.is_available() and dist.is_initialized():
        file = file.with_name(f"{file.name}.{dist.get_rank()}")
    devices = {name: host.parameter().device for name, host in watch.layers}
    if file is not None and file.exists():
        run.load(file, devices)
    begun, device = run.done, next(iter(devices.values()))
    prepare(base_modules(model).values())  # before any of it runs in evaluation mode
    with _quiet(model):
        for i, batch in enumerate(progress(batches)):
            if i < begun:
                continue
            batch = _moved(batch, device)
            mask = batch.get("attention_mask") if isinstance(batch, Mapping) else None
            mask = mask if isinstance(mask, Tensor) and mask.dim() == 2 else None

            def of_batch(scalar: bool, batch: Any = batch) -> Any:
                return _loss(model, batch, loss, scalar)

            if watched:
                with watch.hooked():
                    watch.run(i, mask, partial(of_batch, watch.gradients))
            if probes:
                run.probe(watch.layers, partial(of_batch, True))
            run.counts[i % 2] += 1
            if file is not None and run.done % every == 0:
                run.save(file)
    if file is not None and run.done > begun:
        run.save(file)
    return run.results()
