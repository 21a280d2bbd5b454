"""In which geometry a step is taken."""

from rankwise.solvers.adamw import AdamW, LoRAPlus
from rankwise.solvers.alternating import ALS, AltLoRA, AltLoRAPlus, LoFT, RoLoRA
from rankwise.solvers.chain import Chained, Transform
from rankwise.solvers.gauge import LoRARITE, RefLoRA, RefLoRAS, ScaledAdamW, ScaledGD
from rankwise.solvers.muon import Muon
from rankwise.solvers.projected import Apollo, ApolloMini, Fira, Flora, GaLore
from rankwise.solvers.sgd import SGD
from rankwise.solvers.solver import Solver
from rankwise.solvers.stiefel import Landing, StelLA
from rankwise.solvers.tangent import LORO, LoRAPro, Riemannion

__all__ = [
    "ALS", "LORO", "SGD", "AdamW", "AltLoRA", "AltLoRAPlus", "Apollo", "ApolloMini", "Chained", "Fira", "Flora",
    "GaLore", "Landing", "LoFT", "LoRAPlus", "LoRAPro", "LoRARITE", "Muon", "RefLoRA", "RefLoRAS", "Riemannion",
    "RoLoRA", "ScaledAdamW", "ScaledGD", "Solver", "StelLA", "Transform",
]  # fmt: skip
