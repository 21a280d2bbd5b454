"""Adapter files of other tools, read and written exactly, or refused with the reason."""

from __future__ import annotations

from pathlib import Path

from rankwise.attachment import Adapter
from rankwise.errors import UnknownName
from rankwise.formats import peft
from rankwise.formats.report import ExportReport

__all__ = ["ExportReport", "export", "peft"]


def export(adapter: Adapter, path: str | Path, to: str = "peft", rank: int | None = None) -> ExportReport:
    """Write an adapter in another tool's format.

    Exact wherever that tool has the method. Otherwise it raises, or, where ``rank`` is given, each
    update is cut to that rank by SVD, and the report states the error.

    Args:
        adapter: the adapter, on its model.
        path: folder to write into.
        to: the tool: "peft".
        rank: of the plain LoRA that stands in for a method which the tool does not have.

    Returns:
        What was written, how exact it is, and what the format cannot say.

    Raises:
        ConversionError: the format has no such method and no rank was given.
        SaveError: the disk is full or not writable.
        UnknownName: a tool that nothing answers to.
    """
    if to != "peft":
        raise UnknownName(f'The other tools that adapters are exported to are: "peft"; found "{to}".')
    return peft.write(adapter, path, rank)
