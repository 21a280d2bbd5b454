"""How rank changes in time."""

from rankwise.ranks.ranks import Constant, Plan, Ranks, carry_out, scores

__all__ = ["Constant", "Plan", "Ranks", "carry_out", "scores"]
