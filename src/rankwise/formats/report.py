"""What an export did."""

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ExportReport:
    """What was written: the same map, up to rounding, or the nearest one of a rank.

    Attributes:
        path: the folder.
        method: the method's name in the other tool.
        sites: number of adapted sites.
        notes: what the format cannot say, a setting of training for example.
        error: largest |written - update| / |update| over the sites (Frobenius); 0 where the map is the same.
    """

    path: Path
    method: str
    sites: int
    notes: tuple[str, ...] = ()
    error: float = 0.0

    def __str__(self) -> str:
        how = f"truncated, up to {self.error:.1%} of an update lost" if self.error else "exact"
        return "\n  note: ".join([f"exported {self.sites} sites as {self.method} to {self.path}, {how}", *self.notes])
