"""Facts of a method, computed from its recipe at its defaults on one square linear layer."""

import functools
import json
import tempfile
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import rankwise as rw
from rankwise import io
from rankwise.errors import ConversionError, RankwiseError
from rankwise.host import host_of
from rankwise.ops import Dense, Hadamard, LinearOperator
from rankwise.structures import Gate, Rotation, Structure

SIZES = 256, 1024  # the second where a default does not fit the first
EXACT = 1e-4  # relative, of products in float32
WHAT = {
    "input_covariance": "the covariance of the layer's inputs",
    "input_subspace": "the leading directions of the layer's inputs",
    "gradient": "the gradient of the loss with respect to W",
}


class Subject(NamedTuple):
    """A recipe on its layer, its trained factors moved away from their start."""

    model: nn.Sequential
    adapter: Any

    @property
    def structure(self) -> Structure:
        return io.served(self.adapter.placements)[0].structure

    @property
    def site(self) -> Any:
        return self.adapter.placements[0].site

    @property
    def host(self) -> Any:
        return host_of(self.model[0], "layer")

    @property
    def factors(self) -> dict[str, Tensor]:
        """Those that are saved, in the structure's order."""
        return {name: self.adapter[self.site.name][name] for name in self.structure.factors(self.site)}


def put(recipe: Any, size: int) -> Subject:
    torch.manual_seed(0)
    model, stats = nn.Sequential(nn.Linear(size, size, bias=False)).eval(), None
    if recipe.init.needs:
        batches = [torch.randn(2 * size, size)]
        stats = rw.collect(model, batches, recipe, lambda m, x: m(x).square().mean(), progress=lambda b: b)
    adapter = rw.attach(model, recipe, stats=stats)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    return Subject(model, adapter)


def on_a_layer(recipe: Any) -> Subject:
    try:
        return put(recipe, SIZES[0])
    except RankwiseError:
        return put(recipe, SIZES[1])


def update(s: Subject) -> LinearOperator | None:
    """The operator that a forward applies, None where the structure names none."""
    if isinstance(s.structure, Rotation):
        return s.structure.operator(s.factors)
    if isinstance(s.structure, Gate):
        return Hadamard(Dense(s.host.weight()), s.structure.operator(s.factors))
    correction = s.structure.correction(s.factors, s.host)
    return correction and correction.op


@functools.cache
def lora(size: int) -> tuple[int, int]:
    """Trained numbers and multiply-adds a token of LoRA at r = 16."""
    s = put(rw.recipe("lora", rank=16), size)
    op = update(s)
    assert op is not None
    return sum(p.numel() for p in s.adapter.parameters()), op.cost.apply


def merges(s: Subject) -> str:
    if "not_mergeable" in s.structure.traits:
        return "no: it has no dense form"
    x = torch.randn(8, s.site.cols)
    with torch.no_grad():
        y, merged = s.model(x), x @ s.structure.weight(s.factors, s.host.weight()).T
    exact = (y - merged).norm() < EXACT * y.norm()
    return "yes, exactly: the merged layer is the adapted one, to rounding" if exact else "yes, not exactly"


def plain_rank(s: Subject) -> str:
    structure: Any = s.structure
    if "not_mergeable" in structure.traits:
        return "none"
    rank = structure.delta(s.factors).rank if hasattr(structure, "delta") else None
    full = ", as large as the layer" if rank == s.site.cols else ""
    return f"exactly, of rank {rank}{full}" if rank else "none: truncated SVD"


def peft(s: Subject) -> str:
    """What an export writes; ``rankwise.formats.peft`` reads all that it writes."""
    with tempfile.TemporaryDirectory() as folder:
        try:
            report = rw.export(s.adapter, folder)
        except ConversionError:
            return "no" if "not_mergeable" in s.structure.traits else "no: merge it"
        config = json.loads((Path(folder) / "adapter_config.json").read_text())
    if "whole" in s.structure.traits:
        return "written and read, as a module saved whole"
    rank, dora = config.get("r"), ", with DoRA's magnitude" if config.get("use_dora") else ""
    return f"written and read, as {report.method}{f', r = {rank}' if rank else ''}{dora}"


def gauge(recipe: Any) -> str:
    name, damping = f"`{type(recipe.solver).__name__}`", getattr(recipe.solver, "damping", 0)
    if "whole" in recipe.structure.traits:
        return f"{name}: W itself is trained and has no gauge"
    if "gauge_invariant" in recipe.solver.traits:
        return f"{name}: yes"
    if damping and "gauge_invariant" in replace(recipe.solver, damping=0.0).traits:
        return f"{name}: up to its damping, {damping:g}"
    return f"{name}: no"


def start(recipe: Any) -> str:
    traits = recipe.structure.traits | recipe.init.traits
    if "moves_at_start" in traits:
        return "moves: the adapted map is not the base's"
    return "the base's map, to rounding" if "identity_to_rounding" in traits else "the base's map, exactly"


def cost(s: Subject) -> str:
    op = update(s)
    if op is None:
        return "not told by its structure"
    apply, form = op.cost
    return f"{apply:,} a token ({apply / lora(s.site.cols)[1]:.3g} of LoRA's at r = 16), {form:,} to form it"


@functools.cache
def of_the_map(recipe: Any) -> dict[str, str]:
    """Facts that no solver and no plan changes, so that methods of one map share them."""
    s = on_a_layer(recipe)
    trained, stored = sum(p.numel() for p in s.adapter.parameters()), list(s.factors.values())
    shared = [f"`{name}`" for name, factor in s.structure.factors(s.site).items() if factor.shared]
    needs = [WHAT.get(name, f"`{name}`") for name in sorted(recipe.init.needs)]
    return {
        "Layer": f"{s.site.rows} x {s.site.cols}, alone",
        "Trained numbers": f"{trained:,} ({trained / lora(s.site.cols)[0]:.3g} of LoRA's at r = 16)",
        "Stored numbers": f"{sum(f.numel() for f in stored):,} ({sum(f.nbytes for f in stored):,} bytes of the file)",
        "Shared between layers": ", ".join(shared) or "nothing",
        "At the start": start(recipe),
        "The init reads": f"{', '.join(needs)} (`rw.collect`)" if needs else "no data",
        "Merges": merges(s),
        "As a plain LoRA": plain_rank(s),
        "PEFT": peft(s),
        "Multiply-adds of the update": cost(s),
    }


def facts(recipe: Any) -> dict[str, str]:
    """What there is to know of a recipe, by name."""
    penalties = tuple(p for p in recipe.penalties if type(p).__name__ == "Ascent")  # it trains factors of its own
    same = rw.Recipe(recipe.structure, recipe.init, penalties=penalties)
    return {**of_the_map(same), "Step the same in every gauge": gauge(recipe)}
