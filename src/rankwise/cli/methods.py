"""``rankwise methods``."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from rankwise.cli import common
from rankwise.errors import UnknownName


def methods(
    method: Annotated[str | None, typer.Argument(help="Show this one's page.")] = None, as_json: common.JsonFlag = False
) -> None:
    """List the methods, or show the page of one."""
    from rankwise.catalogue import catalogue, recipe

    entries = catalogue()
    if method is not None and method not in entries:
        recipe(method)  # says what is near
        raise UnknownName(method)
    chosen = list(entries.values()) if method is None else [entries[method]]
    if as_json:
        common.print_json([_plain(entry) for entry in chosen])
        return
    console = common.console()
    if method is not None:
        entry = chosen[0]
        console.print(f"[bold]{entry.name}[/]  {_axes(entry.recipe)}", soft_wrap=True)
        console.print(entry.doc, markup=False)
        return
    rows = [(e.name, e.summary.replace("``", "").rstrip("."), f"{e.recipe.lr:g}", e.paper) for e in chosen]
    console.print(common.table(("method", "what it is", "lr", "paper"), rows))
    console.print("rankwise methods NAME shows a page; any axis can be replaced on its own.")


def _axes(recipe: Any) -> str:
    return " x ".join(repr(getattr(recipe, a)) for a in ("structure", "init", "solver", "ranks"))


def _plain(entry: Any) -> dict[str, Any]:
    from rankwise.registry import encode

    axes = {a: encode(getattr(entry.recipe, a)) for a in ("structure", "init", "solver", "ranks")}
    own = {"name": entry.name, "summary": entry.summary, "paper": entry.paper}
    return {**own, "lr": entry.recipe.lr, "options": entry.options, **axes, "doc": entry.doc}
