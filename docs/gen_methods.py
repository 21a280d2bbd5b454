"""Write docs/methods.md and docs/methods/*.md from the catalogue; ``--check`` only says whether they are current."""

import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import torch
from method_pages import pages

import rankwise as rw
from rankwise.structures import Structure

DOCS = Path(__file__).parent
HEAD = """# Methods

<!-- made by docs/gen_methods.py from rw.catalogue(); change the recipes, not this page -->

A method is a point: one value on each axis. `rw.recipe("dora", rank=8)` makes one by name, and any
axis can be replaced on the way: `rw.recipe("dora", rank=8, solver=LoRAPlus(ratio=4.0))`. Axes that
clash are refused at once, in a sentence that names the remedy.

Rates are those that the recipe uses where you give none; W is (out, in), A (r, in), B (out, r) and
s the scale. Each name leads to the method's page: arguments, law, facts computed from the recipe,
mechanism, the paper's claim, our measurement, references and deviations from the paper.

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
    return [f"[`{entry.name}`](methods/{entry.name}.md)", summary, *axes, f"{recipe.lr:g}", entry.paper]


def page() -> str:
    entries = rw.catalogue()
    columns = ["name", "method", "structure", "init", "solver", "ranks", "rate", "paper"]
    rows = [columns, ["---"] * len(columns), *(row(entries[name]) for name in rw.recipes.__all__)]
    return HEAD + "".join(f"| {' | '.join(cells)} |\n" for cells in rows)


def files() -> dict[Path, str]:
    own = {DOCS / "methods" / f"{name}.md": text for name, text in pages().items()}
    return {DOCS / "methods.md": page(), **own}


if __name__ == "__main__":
    torch.set_num_threads(1)  # the matrices are small: more threads would wait for each other
    wanted, found = files(), {DOCS / "methods.md", *(DOCS / "methods").glob("*.md")}
    stale = [p for p, text in wanted.items() if p not in found or p.read_text() != text] + [*(found - wanted.keys())]
    if "--check" in sys.argv[1:]:
        names = ", ".join(sorted(p.name for p in stale))
        sys.exit(f"stale: {names}; run python docs/gen_methods.py" if stale else 0)
    (DOCS / "methods").mkdir(exist_ok=True)
    for path in found - wanted.keys():
        path.unlink()
    for path, text in wanted.items():
        path.write_text(text)
