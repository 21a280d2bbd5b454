"""Adapter files of other tools, read and written exactly, or refused with the reason."""

from pathlib import Path

from rankwise.attachment import Adapter
from rankwise.errors import UnknownName
from rankwise.formats import peft
from rankwise.formats.report import ExportReport

__all__ = ["ExportReport", "export", "peft"]


def export(adapter: Adapter, path: str | Path, to: str = "peft", *, rank: int | None = None) -> ExportReport:
    """Write an adapter in another tool's format.

    Exact: the other tool computes the same map, or the export is refused with the reason; unless a rank is given.

    Args:
        adapter: the adapter, on its model.
        path: folder to write into.
        to: the tool: "peft".
        rank: write an update that the tool has no method for as the LoRA of this rank that is nearest to it (truncated
            SVD); the report says how far that is.

    Returns:
        What was written, and what the format cannot say.

    Raises:
        ConversionError: the format has no such method.
        SaveError: the disk is full or not writable.
        UnknownName: a tool that nothing answers to.
    """
    if to != "peft":
        raise UnknownName(f'The other tools that adapters are exported to are: "peft"; found "{to}".')
    return peft.write(adapter, path, rank)
