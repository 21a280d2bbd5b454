"""What an export did."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ExportReport:
    """What was written: the same map, up to rounding.

    Attributes:
        path: the folder.
        method: the method's name in the other tool.
        sites: number of adapted sites.
        notes: what the format cannot say, a setting of training for example.
    """

    path: Path
    method: str
    sites: int
    notes: tuple[str, ...] = ()

    def __str__(self) -> str:
        return "\n  note: ".join([f"exported {self.sites} sites as {self.method} to {self.path}, exact", *self.notes])
