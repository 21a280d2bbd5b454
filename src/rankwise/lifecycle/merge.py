"""Merging: the adapters become the weights. Computed in float32 (at least), written once."""

import warnings
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rankwise.activity import Routing, normalise
from rankwise.adapter import SiteFactors
from rankwise.attachment import adapters, registry_of
from rankwise.errors import ActivityError, NotMergeable, UnknownName
from rankwise.graft import Grafted
from rankwise.host import Stored, host_of
from rankwise.ops.linalg import widened


@dataclass(frozen=True)
class SiteReport:
    """What merging did at one site.

    Attributes:
        site: its name.
        change: Frobenius norm of the update over that of W.
        kept: share of the update that survives storage, <stored - W, dW> / |dW|^2; 1 where dW = 0.
        error: largest absolute difference between the stored and the exact weight.
    """

    site: str
    change: float
    kept: float
    error: float


@dataclass(frozen=True)
class MergeReport:
    """What merging did, site by site."""

    sites: tuple[SiteReport, ...]

    @property
    def worst(self) -> SiteReport:
        """The site that kept least of its update."""
        return min(self.sites, key=lambda s: s.kept)

    def __str__(self) -> str:
        lost = sum(s.kept < 0.99 for s in self.sites)
        w = self.worst
        return (
            f"merged {len(self.sites)} sites; {lost} lost more than 1 % of the update to rounding; "
            f"worst {w.site}: kept {w.kept:.1%} of an update of {w.change:.2%} of W"
        )


@dataclass(frozen=True)
class _Job:
    """One weight to write."""

    site: str
    host: Stored
    levels: tuple[SiteFactors, ...]

    def merged(self) -> tuple[Tensor, Tensor]:
        """W and the adapted W, at least in float32."""
        w = self.host.weight().detach()
        w = widened(w)
        new = w
        for level in self.levels:
            new = level.structure.weight(level.factors(), new)
        # through the layout and back: what never changes (a padding row) is no loss either
        return w, self.host.matrix(self.host.tensor(new))

    @torch.no_grad()
    def write(self) -> None:
        """Store the adapted W."""
        self.host.write(self.merged()[1])

    def report(self) -> SiteReport:
        """What storing would keep."""
        w, new = self.merged()
        stored = self.host.stored(new).to(w.dtype)
        if not torch.isfinite(stored).all():
            raise NotMergeable(
                f"Only finite weights are written; merging would leave NaN or infinity at "
                f"{self.site}. Nothing was changed: look at the adapter's values there, or merge "
                f"into a float32 copy of the base if it is in float16."
            )
        # against what is read back today: an unchanged weight must not count as lost
        delta, kept = new - w, stored - w
        size = delta.square().sum()
        share = float((kept * delta).sum() / size) if size > 0 else 1.0
        norm = torch.linalg.vector_norm
        change = float(norm(delta) / norm(w).clamp_min(1e-30))
        return SiteReport(self.site, change, share, float((stored - new).abs().max()))


def _jobs(model: nn.Module, names: Sequence[str]) -> list[_Job]:
    """One job a stored weight: shared weights once, an untransposed carrier first."""
    found: dict[int, _Job] = {}
    for module in model.modules():
        if not isinstance(module, Grafted) or module.__dict__.get("grafted_transposed"):
            continue
        children = [c for c in module.adapters._modules.values() if c is not None]
        for slot in dict.fromkeys(slot for child in children for slot in child._modules):
            levels = module.adapters.active(tuple(names), slot)
            if not levels:
                continue
            host = host_of(module, slot)
            found.setdefault(id(host.parameter()), _Job(levels[0].site.name, host, tuple(levels)))
    return list(found.values())


@torch.no_grad()
def _planned(model: nn.Module, names: str | Sequence[str] | None) -> tuple[list[_Job], MergeReport]:
    """What to write for these adapters (the active ones by default), and what would be kept of it."""
    registry = registry_of(model)
    chosen = registry.activity.choice if names is None else normalise(names)
    if isinstance(chosen, Routing):
        raise ActivityError("A routing has no single weight to merge; leave route() first, or name adapters.")
    if unknown := [n for n in chosen if n not in registry.adapters]:
        raise UnknownName(f"Only attached adapters can be merged; found {unknown}, attached: {[*registry.adapters]}.")
    jobs = _jobs(model, chosen)
    if fixed := [j.site for j in jobs if any("not_mergeable" in level.structure.traits for level in j.levels)]:
        raise NotMergeable(f"Merging writes weights, and the structures at {fixed[:4]} have none. Serve them unmerged.")
    return jobs, MergeReport(tuple(job.report() for job in jobs))


@torch.no_grad()
def merge(model: nn.Module, names: str | Sequence[str] | None = None, *, max_loss: float = 0.1) -> MergeReport:
    """Write the adapters into the weights and take the graft off.

    The sum is formed in float32 and rounded (or quantised) once. Before anything is written, every
    site is checked: where storage would lose more than ``max_loss`` of the update, a warning says
    so.

    Args:
        model: the adapted model.
        names: which adapters, in order; None for the active ones. All others are detached too.
        max_loss: share of an update whose loss is worth a warning.

    Returns:
        What was kept, site by site.

    Raises:
        UnknownName: a name that is not attached.
        ActivityError: rows are being routed.
        NotMergeable: a structure with that trait, or the merged weights would hold NaN or infinity.
    """
    jobs, report = _planned(model, names)
    lossy = [s for s in report.sites if s.kept < 1 - max_loss]
    if lossy:
        warnings.warn(
            f"Merging loses more than {max_loss:.0%} of the update at {len(lossy)} of {len(jobs)} sites (worst "
            f"{report.worst.site}: {report.worst.kept:.1%} kept), because the stored format is too coarse for it. "
            f"Merge into a float32 copy of the base, or serve the adapter unmerged.",
            stacklevel=2,
        )
    for job in jobs:
        job.write()
    for adapter in adapters(model).values():
        adapter.detach()
    return report


@contextmanager
def merged(model: nn.Module, names: str | Sequence[str] | None = None) -> Iterator[MergeReport]:
    """The model with its adapters merged, for a while; the original bits come back at the end.

    Args:
        model: the adapted model.
        names: which adapters, in order; None for the active ones.

    Yields:
        What was kept, site by site.

    Raises:
        UnknownName: a name that is not attached.
        ActivityError: rows are being routed.
        NotMergeable: a structure with that trait, or the merged weights would hold NaN or infinity.
    """
    jobs, report = _planned(model, names)
    activity = registry_of(model).activity
    with ExitStack() as undo:
        for job in jobs:
            undo.callback(job.host.storage.put, job.host.storage.snapshot())
            job.write()
        undo.callback(setattr, activity, "choice", activity.choice)
        activity.choice = ()
        yield report
