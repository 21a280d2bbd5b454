"""The algebra of linear operators: the bottom of the library, over torch alone."""

from rankwise.ops.atoms import BlockDiagonal, Circuit, Dense, Diagonal, Hadamard, Kronecker, Product, Scaled, Sum
from rankwise.ops.entries import Placed, Sine
from rankwise.ops.operator import LinearOperator, LowRank
from rankwise.ops.patterned import Patterned
from rankwise.ops.sparse import Butterfly, Pairs

__all__ = [
    "BlockDiagonal", "Butterfly", "Circuit", "Dense", "Diagonal", "Hadamard", "Kronecker", "LinearOperator",
    "LowRank", "Pairs", "Patterned", "Product", "Scaled", "Sine", "Placed", "Sum",
]  # fmt: skip
