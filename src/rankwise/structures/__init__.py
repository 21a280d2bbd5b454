"""Structures: how trainable factors become an update, and how it meets the frozen weight."""

from rankwise.structures.augmented import ABBA, GLoRA, MoRA, PRoLoRA, SineLoRA
from rankwise.structures.banks import BSLoRA, RaSA, VBLoRA
from rankwise.structures.bases import NOLA, RandLoRA, UniLoRA
from rankwise.structures.blocks import BoRA, GraLoRA, MELoRA
from rankwise.structures.bounded import Bat, BlockLoRA, DeLoRA, MiSS
from rankwise.structures.chains import Chain, Delta
from rankwise.structures.convolutions import CrossGroup, PatchOFT
from rankwise.structures.gates import IA3, RoAd
from rankwise.structures.lowrank import (
    Core,
    Gated,
    HardConcrete,
    InputSide,
    LoRA,
    LoRAFA,
    Rising,
    Selection,
    SVDForm,
    Switched,
)
from rankwise.structures.products import HiRA, LoHa, LoKr
from rankwise.structures.rotations import BOFT, HRA, OFT, PSOFT
from rankwise.structures.shared import PVeRA, ShareLoRA, TiedLoRA, VeRA
from rankwise.structures.spectral_domain import C3A, FouRA, FourierFT, SHiRA, WaveFT
from rankwise.structures.standalone import LowRankActivation, LowRankWeight, SparseLowRank, Standalone
from rankwise.structures.structure import (
    Added,
    Additive,
    Begun,
    Factor,
    Factors,
    Gate,
    Rotation,
    Sided,
    Start,
    Structure,
    sizes,
    sizes_of,
)
from rankwise.structures.tensors import LoRETTA, QuanTA, TTLoRA
from rankwise.structures.tensors_across import CaRA, FacTTK, FacTTT, LoRTA, LoTR, MetaTT
from rankwise.structures.threefactor import SVFT, ThreeFactor, TinyLoRA, Truncated
from rankwise.structures.whole import Replace, TokenRows
from rankwise.structures.wrappers import Anchored, Magnitude, Rows, Stack

__all__ = [
    "ABBA", "BOFT", "C3A", "HRA", "IA3", "NOLA", "OFT", "PSOFT", "SVFT", "Added", "Additive", "Anchored", "BSLoRA",
    "Bat", "Begun", "BlockLoRA", "BoRA", "CaRA", "Chain", "Core", "CrossGroup", "DeLoRA", "Delta", "FacTTK", "FacTTT",
    "Factor", "Factors", "FouRA", "FourierFT", "GLoRA", "Gate", "Gated", "GraLoRA", "HardConcrete", "HiRA", "InputSide",
    "LoHa", "LoKr", "LoRA", "LoRAFA", "LoRETTA", "LoRTA", "LoTR", "LowRankActivation", "LowRankWeight", "MELoRA",
    "Magnitude", "MetaTT", "MiSS", "MoRA", "PRoLoRA", "PVeRA", "PatchOFT", "QuanTA", "RaSA", "RandLoRA", "Replace",
    "Rising", "RoAd", "Rotation", "Rows", "SHiRA", "SVDForm", "Selection", "ShareLoRA", "Sided", "SineLoRA",
    "SparseLowRank", "Stack", "Standalone", "Start", "Structure", "Switched", "TTLoRA", "ThreeFactor", "TiedLoRA",
    "TinyLoRA", "TokenRows", "Truncated", "UniLoRA", "VBLoRA", "VeRA", "WaveFT", "sizes", "sizes_of",
]  # fmt: skip
