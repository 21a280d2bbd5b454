"""Where the factors start."""

from rankwise.inits.data import EVA, CorDA, LoRAGA, LoRAOne, LoRASB, eva_sites
from rankwise.inits.init import Init, collected
from rankwise.inits.random import Gaussian, Kaiming, NonZero, Orthogonal, Xavier
from rankwise.inits.spectral import QR, Minor, MinorOutput, Nystrom, Principal, PrincipalFrame

__all__ = [
    "EVA", "QR", "CorDA", "Gaussian", "Init", "Kaiming", "LoRAGA", "LoRAOne", "LoRASB", "Minor", "MinorOutput",
    "NonZero", "Nystrom", "Orthogonal", "Principal", "PrincipalFrame", "Xavier", "collected", "eva_sites",
]  # fmt: skip
