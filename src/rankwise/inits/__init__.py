"""Where the factors start."""

from rankwise.inits.init import Init
from rankwise.inits.random import Gaussian, Kaiming, Orthogonal
from rankwise.inits.spectral import Principal

__all__ = ["Gaussian", "Init", "Kaiming", "Orthogonal", "Principal"]
