"""Structures: how trainable factors become an update, and how it meets the frozen weight."""

from rankwise.structures.bounded import Bat, BlockLoRA, DeLoRA, MiSS
from rankwise.structures.chains import Chain, Delta
from rankwise.structures.convolutions import CrossGroup, PatchOFT
from rankwise.structures.gates import IA3, RoAd
from rankwise.structures.lowrank import Core, Gated, InputSide, LoRA, LoRAFA, SVDForm, Switched
from rankwise.structures.products import HiRA, LoHa, LoKr
from rankwise.structures.rotations import BOFT, HRA, OFT, PSOFT
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
)
from rankwise.structures.whole import Replace, TokenRows
from rankwise.structures.wrappers import Anchored, Magnitude, Rows, Stack

__all__ = [
    "BOFT", "HRA", "IA3", "OFT", "PSOFT", "Added", "Additive", "Anchored", "Bat", "Begun", "BlockLoRA", "Chain",
    "Core", "CrossGroup", "DeLoRA", "Delta", "Factor", "Factors", "Gate", "Gated", "HiRA", "InputSide", "LoHa",
    "LoKr", "LoRA", "LoRAFA", "Magnitude", "MiSS", "PatchOFT", "Replace", "RoAd", "Rotation", "Rows", "SVDForm",
    "Sided", "Stack", "Start", "Structure", "Switched", "TokenRows",
]  # fmt: skip
