"""The algebra of linear operators: the bottom of the library, over torch alone."""

from rankwise.ops.atoms import BlockDiagonal, Circuit, Dense, Diagonal, Hadamard, Kronecker, Product, Scaled, Sum
from rankwise.ops.operator import LinearOperator, LowRank

__all__ = [
    "BlockDiagonal", "Circuit", "Dense", "Diagonal", "Hadamard", "Kronecker", "LinearOperator", "LowRank", "Product",
    "Scaled", "Sum",
]  # fmt: skip
