"""``rankwise methods``."""

from typing import Annotated

from typer import Argument

from rankwise.cli import common


def methods(
    method: Annotated[str | None, Argument(help="Show this one's page.")] = None, as_json: common.Json = False
) -> None:
    """List the methods, or show the page of one."""
    from rankwise.methods import catalogue, recipe
    from rankwise.registry import encode

    if method is not None:
        recipe(method)  # an unknown name is told what is near
    chosen = [entry for name, entry in catalogue().items() if method in (None, name)]
    found = [{**vars(entry), "recipe": encode(entry.recipe)} for entry in chosen]
    if method is not None:
        r = chosen[0].recipe
        common.show(as_json, found, f"{r.structure} x {r.init} x {r.solver} x {r.ranks}, lr {r.lr:g}", chosen[0].doc)
        return
    rows = [(e.name, e.summary.replace("``", "").rstrip("."), f"{e.recipe.lr:g}", e.paper) for e in chosen]
    note = "rankwise methods NAME shows a page; any axis can be replaced on its own."
    common.show(as_json, found, common.table(("method", "what it is", "lr", "paper"), rows), note)
