"""Structures: how trainable factors become an update, and how it meets the frozen weight."""

from rankwise.structures.banks import BSLoRA, RaSA, VBLoRA
from rankwise.structures.bases import NOLA, RandLoRA, UniLoRA
from rankwise.structures.chains import Chain, Delta
from rankwise.structures.convolutions import CrossGroup, PatchOFT
from rankwise.structures.lowrank import Core, Gated, InputSide, LoRA, LoRAFA, SVDForm, Switched
from rankwise.structures.products import HiRA, LoHa, LoKr
from rankwise.structures.rotations import OFT
from rankwise.structures.shared import PVeRA, ShareLoRA, TiedLoRA, VeRA
from rankwise.structures.structure import Added, Additive, Begun, Factor, Factors, Gate, Rotation, Start, Structure
from rankwise.structures.tensors import LoRETTA, QuanTA, TTLoRA
from rankwise.structures.tensors_across import CaRA, FacTTK, FacTTT, LoRTA, LoTR, MetaTT
from rankwise.structures.whole import Replace, TokenRows
from rankwise.structures.wrappers import Anchored, Magnitude, Rows, Stack

__all__ = [
    "NOLA", "OFT", "Added", "Additive", "Anchored", "BSLoRA", "Begun", "CaRA", "Chain", "Core", "CrossGroup", "Delta",
    "FacTTK", "FacTTT", "Factor", "Factors", "Gate", "Gated", "HiRA", "InputSide", "LoHa", "LoKr", "LoRA", "LoRAFA",
    "LoRETTA", "LoRTA", "LoTR", "Magnitude", "MetaTT", "PVeRA", "PatchOFT", "QuanTA", "RaSA", "RandLoRA", "Replace",
    "Rotation", "Rows", "SVDForm", "ShareLoRA", "Stack", "Start", "Structure", "Switched", "TTLoRA", "TiedLoRA",
    "TokenRows", "UniLoRA", "VBLoRA", "VeRA",
]  # fmt: skip
