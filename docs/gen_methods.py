"""Write docs/methods.md from the catalogue; ``--check`` only says whether the file is current."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import rankwise as rw
from rankwise.structures import Structure

PAGE = Path(__file__).parent / "methods.md"
HEAD = """# Methods

<!-- made by docs/gen_methods.py from rw.catalogue(); change the recipes, not this page -->

A method is a point: one value on each axis. `rw.recipe("dora", rank=8)` makes one by name, and any
axis can be replaced on the way: `rw.recipe("dora", rank=8, solver=LoRAPlus(ratio=4.0))`. Axes that
clash are refused at once, in a sentence that names the remedy.

Rates are those that the recipe uses where you give none; W is (out, in), A (r, in), B (out, r) and
s the scale. [The recipes](api/recipes.md) have arguments, parameter counts, laws, references and
deviations from the papers.

"""


def short(value: Any) -> str:
    """An axis value by the names of its classes: Magnitude(LoRA)."""
    inner = [getattr(value, f.name) for f in fields(value)]
    inner = [short(v) for v in inner if isinstance(v, Structure)]
    return type(value).__name__ + (f"({', '.join(inner)})" if inner else "")


def row(entry: Any) -> list[str]:
    recipe = entry.recipe
    summary = entry.summary.rstrip(".").replace("``", "`").replace("|", "\N{DIVIDES}")
    axes = [short(v) for v in (recipe.structure, recipe.init, recipe.solver, recipe.ranks)]
    return [f"`{entry.name}`", summary, *axes, f"{recipe.lr:g}", entry.paper]


def page() -> str:
    entries = rw.catalogue()
    columns = ["name", "method", "structure", "init", "solver", "ranks", "rate", "paper"]
    rows = [columns, ["---"] * len(columns), *(row(entries[name]) for name in rw.recipes.__all__)]
    return HEAD + "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


if __name__ == "__main__":
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        sys.exit("docs/methods.md is stale: run python docs/gen_methods.py")
