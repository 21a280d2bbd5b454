"""The algebra of linear operators: the bottom of the library, over torch alone."""

from rankwise.ops.atoms import Dense, Diagonal, Product, Scaled, Sum
from rankwise.ops.blocks import BlockDiagonal, Butterfly, Circuit, Pairs
from rankwise.ops.entrywise import Hadamard, Sine
from rankwise.ops.kronecker import Kronecker
from rankwise.ops.moving import Exchange, Fold, Tile
from rankwise.ops.operator import LinearOperator, LowRank
from rankwise.ops.sparse import Patterned, Scattered, Sparse
from rankwise.ops.spectral import Circulant, Fourier, Haar

__all__ = [
    "BlockDiagonal", "Butterfly", "Circuit", "Circulant", "Dense", "Diagonal", "Exchange", "Fold", "Fourier",
    "Haar", "Hadamard", "Kronecker", "LinearOperator", "LowRank", "Pairs", "Patterned", "Product", "Scaled",
    "Scattered", "Sine", "Sparse", "Sum", "Tile",
]  # fmt: skip
