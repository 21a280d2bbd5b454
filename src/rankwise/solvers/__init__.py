"""In which geometry a step is taken."""

from rankwise.solvers.adamw import AdamW, LoRAPlus
from rankwise.solvers.solver import Solver

__all__ = ["AdamW", "LoRAPlus", "Solver"]
