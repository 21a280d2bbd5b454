"""``rankwise demo``."""

from pathlib import Path
from typing import Annotated

from typer import Option


def demo(
    out: Annotated[str, Option(help="Folder for adapters, a picture and demo.json.")] = "demo",
    method: Annotated[list[str] | None, Option("--method", "-m", help="Only these, in place of five and full.")] = None,
) -> None:
    """Adapt the small model that comes along to Python, and compare methods; about three minutes."""
    from rankwise import demo
    from rankwise.hf.folder import claimed

    with claimed(out, resume=(Path(out) / "demo.json").exists()) as folder:
        demo.run(folder, method or demo.METHODS)
