"""How rank changes in time."""

from rankwise.ranks.budgets import Budget, Pruning, Sampled, Shrinking, at_rank
from rankwise.ranks.choice import ablations, important, output_shares, reallocated, selected
from rankwise.ranks.ranks import Constant, Plan, Ranks, carry_out, gates, masked, scores
from rankwise.ranks.restarts import Following, Rescaling, Restarts, best_scales, jagged_cosine

__all__ = [
    "Budget", "Constant", "Following", "Plan", "Pruning", "Ranks", "Rescaling", "Restarts", "Sampled", "Shrinking",
    "ablations", "at_rank", "best_scales", "carry_out", "gates", "important", "jagged_cosine", "masked",
    "output_shares", "reallocated", "scores", "selected",
]  # fmt: skip
