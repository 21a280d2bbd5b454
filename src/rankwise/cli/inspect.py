"""``rankwise inspect``."""

from collections import Counter

from rankwise.cli import common


def inspect(adapter: common.AdapterArg, as_json: common.Json = False) -> None:
    """Say what an adapter file holds, without its model."""
    from rankwise import io
    from rankwise.registry import encode

    saved, run = io.read(adapter), common.told(adapter)
    tensors = [tensor for values in saved.tensors.values() for tensor in values.values()]
    numbers = [tensor for tensor in tensors if tensor.is_floating_point()]  # the others are places
    found = {
        "method": saved.recipe.name,
        "recipe": encode(saved.recipe),
        "version": saved.version,
        "sites": {p.site.name: list(p.site.shape) for p in saved.placements},
        "parameters": sum(t.numel() for t in numbers),
        "bytes": sum(t.numel() * t.element_size() for t in tensors),
        "largest_value": max((float(t.abs().max()) for t in numbers if t.numel()), default=0.0),
        "run": run,
    }
    kinds = Counter((p.site.name.split(".")[-1], str(p.site.shape), str(p.structure)) for p in saved.placements)
    rows = [(name, count, shape, structure) for (name, shape, structure), count in kinds.items()]
    trained = f", trained on {run['data']}" if run else ""
    common.show(
        as_json,
        found,
        common.table(("layer", "sites", "shape", "structure"), rows),
        f"{saved.recipe.name} {saved.recipe.paper}, by rankwise {saved.version}{trained}",
        f"{len(saved.placements)} sites, {found['parameters']:,} parameters, {common.size(found['bytes'])}, "
        f"largest value {found['largest_value']:.3g}",
    )
