"""``rankwise inspect``."""

from __future__ import annotations

from collections import Counter
from typing import Annotated

import typer

from rankwise.cli import common


def inspect(
    adapter: Annotated[str, typer.Argument(metavar="ADAPTER", help="Folder or file.")], as_json: common.JsonFlag = False
) -> None:
    """Say what an adapter file holds, without its model."""
    from rankwise import io
    from rankwise.registry import encode

    saved = io.read(adapter)
    tensors = [t for values in saved.tensors.values() for t in values.values()]
    recipe = saved.recipe
    found = {
        "method": recipe.name,
        "paper": recipe.paper,
        "recipe": encode(recipe),
        "version": saved.version,
        "sites": {p.site.name: list(p.site.shape) for p in saved.placements},
        "parameters": sum(t.numel() for t in tensors),
        "bytes": sum(t.numel() * t.element_size() for t in tensors),
        "dtypes": sorted({str(t.dtype).removeprefix("torch.") for t in tensors}),
        "largest_value": max((float(t.abs().max()) for t in tensors if t.numel()), default=0.0),
        "run": common.run_of(adapter),
    }
    if as_json:
        common.print_json(found)
        return
    console = common.console()
    kinds = Counter(
        (p.site.name.rsplit(".", 1)[-1], "x".join(map(str, p.site.shape)), str(p.structure)) for p in saved.placements
    )
    rows = [(name, f"{n}", shape, kind) for (name, shape, kind), n in kinds.items()]
    console.print(common.table(("layer", "sites", "shape", "structure"), rows))
    facts = {
        "method": f"{recipe.name}  {recipe.paper}",
        "init, solver": f"{recipe.init!r}, {recipe.solver!r}",
        "size": f"{len(saved.placements)} sites, {found['parameters']:,} parameters, "
        f"{common.size(found['bytes'])} ({', '.join(found['dtypes'])})",
        "largest value": f"{found['largest_value']:.3g}",
        "written by": f"rankwise {saved.version}",
    }
    if found["run"]:
        facts["trained on"] = f"{found['run']['data']} ({found['run']['task']})"
    for name, value in facts.items():
        console.print(f"{name:14} {value}", markup=False, soft_wrap=True)
