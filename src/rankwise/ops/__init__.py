"""The algebra of linear operators: the bottom of the library, over torch alone."""

from rankwise.ops.atoms import BlockDiagonal, Circuit, Dense, Diagonal, Hadamard, Kronecker, Product, Scaled, Sum
from rankwise.ops.entries import Placed, Repeated, Sine
from rankwise.ops.operator import LinearOperator, LowRank
from rankwise.ops.patterned import Patterned
from rankwise.ops.scattered import Scattered
from rankwise.ops.sparse import Butterfly, Pairs, Swap
from rankwise.ops.spectral import Circulant, Fourier, Haar, Sparse

__all__ = [
    "BlockDiagonal", "Butterfly", "Circuit", "Circulant", "Dense", "Diagonal", "Fourier", "Haar", "Hadamard",
    "Kronecker", "LinearOperator", "LowRank", "Pairs", "Patterned", "Placed", "Product", "Repeated", "Scaled",
    "Scattered", "Sine", "Sparse", "Sum", "Swap",
]  # fmt: skip
