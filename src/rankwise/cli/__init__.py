"""The command line: one thin command a file; nothing here imports torch before a command runs.

Results go to stdout, progress to stderr. Exit codes: 0 done, 2 the user's input, 3 does not fit in
memory, 4 a verification failed, 130 interrupted.
"""

from __future__ import annotations

import importlib
import sys
import warnings
from importlib.util import find_spec
from typing import Any

from rankwise.errors import RankwiseError

COMMANDS = ("demo", "finetune", "evaluate", "generate", "data", "methods", "targets", "merge", "convert", "inspect")


def app() -> Any:
    """The typer application with every command that is there."""
    import typer

    made = typer.Typer(
        name="rankwise",
        help="Low-rank adaptation of language models, from data to adapter.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        rich_markup_mode="rich",
        context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 100},
    )

    @made.callback(invoke_without_command=True)
    def root(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
        if version:
            from rankwise.version import __version__

            print(__version__)
            raise typer.Exit

    for name in COMMANDS:
        if find_spec(f"rankwise.cli.{name}") is not None:
            module = importlib.import_module(f"rankwise.cli.{name}")
            made.command(name)(getattr(module, name))
    return made


def main() -> None:
    """Run the command line; every foreseen failure is one sentence on stderr and an exit code."""
    try:
        import typer  # noqa: F401
    except ImportError:
        _fail("The command line needs typer and rich: pip install 'rankwise[cli]'.", 2)
    warnings.showwarning = _warned
    try:
        app()()
    except RankwiseError as error:
        _fail(str(error), 2)
    except KeyboardInterrupt:
        _fail("Interrupted; finetune --resume goes on from the last checkpoint.", 130)
    except (MemoryError, RuntimeError) as error:
        if not (isinstance(error, MemoryError) or _out_of_memory(error)):
            raise
        _fail(
            f"This does not fit in memory ({str(error).splitlines()[0][:120]}). Try --base nf4, a "
            f"smaller --batch, or a smaller --max-length.",
            3,
        )


def _out_of_memory(error: RuntimeError) -> bool:
    text = str(error)
    return type(error).__name__ == "OutOfMemoryError" or "allocate memory" in text


def _warned(message: Any, category: Any, *rest: Any, **more: Any) -> None:
    if issubclass(category, UserWarning):
        print(f"warning: {message}", file=sys.stderr)


def _fail(text: str, code: int) -> None:
    print(f"rankwise: {text}", file=sys.stderr)
    raise SystemExit(code)
