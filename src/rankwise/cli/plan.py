"""``rankwise plan``."""

from typing import Annotated, Any

import typer
from typer import Argument, Option

from rankwise.cli import common
from rankwise.errors import DataError

DATA = "The training data, whose longest row decides the length; then changes to the run."
DEVICE = 'A name such as l4, a100-80gb or h100; "here" is measured. (default: here)'
OPTIONS = (
    *("method", "structure", "init", "solver", "ranks", "rank", "options", "target", "task", "base"),
    *("batch", "max_length", "accumulate", "checkpointing", "pack", "dtype"),
)


@common.settings(*OPTIONS)
def plan(
    model: common.ModelArg,
    rest: Annotated[list[str] | None, Argument(metavar="[DATA] [NAME=VALUE]...", help=DATA)] = None,
    device: Annotated[str | None, Option(help=DEVICE)] = None,
    device_memory: Annotated[str | None, Option("--device-memory", help="24GiB, in place of the device's own.")] = None,
    probe: Annotated[bool, Option("--probe", help="Load the model and time three steps.")] = False,
    as_json: common.Json = False,
    **given: Any,
) -> None:
    """Say what a training step takes, from the config alone, and what would make it fit.

    rankwise plan embedded -m dora --rank 8 --device l4

    Every option of the run can also be given as NAME=VALUE. The exit code is 3 where it does not fit.
    """
    from rankwise.select import plan as make

    given = common.only(given) | common.pairs(text for text in rest or () if "=" in text)
    given |= {"device": device} if device else {}
    data = [text for text in rest or () if "=" not in text]
    if len(data) > 1:
        raise DataError(f"plan takes MODEL and at most one DATA; found {len(data)} data arguments.")
    made = make(model, *data, memory=device_memory, probe=probe, **given)
    common.show(as_json, made.to_dict(), *tables(made))
    if not made.fits:
        raise typer.Exit(3)


def tables(made: Any) -> tuple[Any, ...]:
    """A plan as a table of bytes and lines about the rest."""
    from rankwise.select.devices import in_words

    found = made.to_dict()
    words = {name: in_words(size) for name, size in found.items() if isinstance(size, int)}
    rows = [(kind, in_words(size)) for kind, size in found["at_peak"].items()]
    probed = f", measured {made.measured:.3g} s" if made.measured else ""
    return (
        common.table(("at the peak of a step", "bytes"), [*rows, ("together", words["peak"])]),
        f"saved for backward {words['saved_for_backward']}, logits {words['logits']}, adapter file "
        f"{words['adapter_file']}",
        f"{found['flops']:.3g} floating-point operations and {words['bytes_moved']} moved a step; roofline of "
        f"{made.device.name}: {made.seconds:.3g} s{probed}",
        str(made),
    )
