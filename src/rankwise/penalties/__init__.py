"""What else than the loss shapes training: terms, acts around a step, perturbed weights, dropout on factors."""

from rankwise.adapter import Dropout
from rankwise.penalties.factors import (
    Alternation,
    Balance,
    ExpectedRank,
    MaxNorm,
    Orthogonality,
    OrthonormalPull,
    SingularValues,
)
from rankwise.penalties.flatness import Ascent, Noise, Sharpness
from rankwise.penalties.hidden import HiddenKey
from rankwise.penalties.penalty import AfterStep, BeforeStep, Penalty, Perturbation, Term
from rankwise.penalties.run import backward, perturbed

__all__ = [
    "AfterStep", "Alternation", "Ascent", "Balance", "BeforeStep", "Dropout", "ExpectedRank", "HiddenKey", "MaxNorm",
    "Noise", "Orthogonality", "OrthonormalPull", "Penalty", "Perturbation", "Sharpness", "SingularValues", "Term",
    "backward", "perturbed",
]  # fmt: skip
