"""The command line: one thin command a file; nothing here imports torch before a command runs.

Results go to stdout, progress to stderr. Exit codes: 0 done, 2 the user's input, 3 does not fit in
memory, 4 a verification failed, 130 interrupted.
"""

import logging
import os
import re
import sys
import warnings
from importlib import import_module
from typing import Any

from rankwise.errors import DoesNotFit, RankwiseError

COMMANDS = (
    *("plan", "advise", "tune", "race", "finetune", "pretrain", "evaluate", "generate"),
    *("data", "methods", "targets", "merge", "convert", "inspect"),
)
QUIET = {"TOKENIZERS_PARALLELISM": "false", "TRANSFORMERS_VERBOSITY": "error", "HF_HUB_DISABLE_PROGRESS_BARS": "1"}


def app() -> Any:
    """The typer application with every command."""
    import typer

    made = typer.Typer(
        name="rankwise",
        help="Low-rank adaptation of language models, from data to adapter.",
        no_args_is_help=True,
        add_completion=False,
        pretty_exceptions_enable=False,
        context_settings={"help_option_names": ["-h", "--help"]},
    )

    @made.callback(invoke_without_command=True)
    def root(version: bool = typer.Option(False, "--version", help="Print the version.")) -> None:
        if version:
            from rankwise.version import __version__

            print(__version__)

    for name in COMMANDS:
        made.command(name)(getattr(import_module(f"rankwise.cli.{name}"), name))
    return made


def main() -> None:
    """Run the command line; every foreseen failure is one sentence on stderr and an exit code."""
    os.environ.update(QUIET | dict(os.environ))
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)
    warnings.showwarning = _warned
    try:
        app()()
    except ModuleNotFoundError as error:
        if error.name not in ("typer", "rich", "yaml", "transformers"):
            raise
        _fail(f"The command line needs {error.name}: pip install 'rankwise[cli]'.", 2)
    except RankwiseError as error:
        _fail(str(error), 3 if isinstance(error, DoesNotFit) else 2)
    except KeyboardInterrupt:
        _fail("Interrupted; finetune --resume goes on from the last checkpoint.", 130)
    except (MemoryError, RuntimeError) as error:
        if not isinstance(error, MemoryError) and not re.search("out of memory|allocate memory", str(error)):
            raise
        remedy = "Try --base nf4, a smaller --batch or --max-length, or checkpointing=true."
        _fail(f"This does not fit in memory ({str(error).splitlines()[0][:120]}). {remedy}", 3)


def _warned(message: Any, category: Any, *rest: Any, **more: Any) -> None:
    if issubclass(category, UserWarning):
        print(f"warning: {message}", file=sys.stderr)


def _fail(text: str, code: int) -> None:
    print(f"rankwise: {text}", file=sys.stderr)
    raise SystemExit(code)
