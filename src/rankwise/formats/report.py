"""What an export did."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path


@dataclass(frozen=True)
class ExportReport:
    """What was written, and how far it is from the adapter.

    Attributes:
        path: the folder.
        method: the method's name in the other tool.
        sites: number of adapted sites.
        errors: site -> |written update - update| / |update|, for the sites that are not exact.
        notes: what the format cannot say, a setting of training for example.
    """

    path: Path
    method: str
    sites: int
    errors: dict[str, float]
    notes: tuple[str, ...] = ()

    @property
    def exact(self) -> bool:
        """Whether the other tool computes the same map, up to rounding."""
        return not self.errors

    @property
    def error(self) -> float:
        """The largest relative error of a site's update."""
        return max(self.errors.values(), default=0.0)

    def __str__(self) -> str:
        state = "exact" if self.exact else f"largest relative error {self.error:.1e}"
        lines = [f"exported {self.sites} sites as {self.method} to {self.path}, {state}"]
        return "\n".join([*lines, *(f"  note: {n}" for n in self.notes)])
