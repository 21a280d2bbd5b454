"""Write docs/methods.md from the catalogue; ``--check`` only says whether the file is current."""

import sys
from pathlib import Path

import rankwise as rw

PAGE = Path(__file__).parent / "methods.md"
HEAD = """# Methods

<!-- made by docs/gen_methods.py from rw.catalogue(); edit the recipes, not this page -->

A method is a point: one value on each axis. `rw.recipe("{example}")` builds one by name, and
`rankwise methods NAME` prints its manual. The [reference](api/recipes.md) has every argument.

"""
COLUMNS = ["structure", "init", "solver", "ranks"]


def page() -> str:
    entries = rw.catalogue()
    rows = [
        ["method", *COLUMNS, "paper"],
        ["---"] * (len(COLUMNS) + 2),
        *([f"`{e.name}`", *(e.axes[axis] for axis in COLUMNS), e.paper] for e in entries),
    ]
    return HEAD.format(example=entries[0].name) + "".join(f"| {' | '.join(r)} |\n" for r in rows)


if __name__ == "__main__":
    text = page()
    if "--check" not in sys.argv[1:]:
        PAGE.write_text(text)
    elif not PAGE.exists() or PAGE.read_text() != text:
        sys.exit("docs/methods.md is stale: run python docs/gen_methods.py")
