"""bitsandbytes weights: NF4 and FP4 (QLoRA; Dettmers et al. 2023, arXiv 2305.14314) and int8.

The library is imported only where one of its modules is already in the model.
"""

from __future__ import annotations

import copy
import warnings
from typing import Any, final

import torch
from torch import Tensor, nn

from rankwise.errors import WeightFormatError
from rankwise.weights.weight import Weight


def _is_a(module: nn.Module, name: str) -> bool:
    return any(
        c.__name__ == name and c.__module__.startswith("bitsandbytes") for c in type(module).__mro__
    )


@final
class FourBitWeight(Weight):
    """``bitsandbytes.nn.Linear4bit``: NF4 or FP4, with or without double quantisation."""

    format = "bnb-4bit"
    module: Any

    @staticmethod
    def claims(module: nn.Module) -> bool:
        return _is_a(module, "Linear4bit")

    @property
    def _state(self) -> Any:
        state = getattr(self.module.weight, "quant_state", None)
        if state is None:
            raise WeightFormatError(
                "A 4-bit weight is quantised by moving it to a device; this one is not quantised "
                'yet. Call model.to("cpu") (or "cuda") after loading, then attach.'
            )
        return state

    @property
    def shape(self) -> tuple[int, int]:
        return self.module.out_features, self.module.in_features

    @property
    def dtype(self) -> torch.dtype:
        return self.module.compute_dtype or self._state.dtype

    def prepare(self) -> None:
        # bitsandbytes 0.50 repacks the weight in place at the first eval forward on a CPU with
        # AVX512-BF16; from then on there is no gradient and dequantising is wrong, silently.
        self.module.support_avx512bf16_for_cpu = False
        state = getattr(self.module.weight, "quant_state", None)
        if not getattr(state, "packing_format_for_cpu", False):
            return
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpack

        warnings.warn(
            "A 4-bit weight ran in eval mode before the adapter came, and bitsandbytes repacked it "
            "for inference, its scales rounded to bfloat16 for good. It is unpacked now and can be "
            "trained on, but is no longer quite the base that was loaded. Load the base again and "
            "attach (or load) before the first forward to have that one.",
            stacklevel=4,
        )
        # the inverse of bitsandbytes 0.50 forgets to turn the scales back, or nests them anew
        scales = state.absmax.T.reshape(-1).float().contiguous()
        state.original_nested = False
        data, state = unpack(self.module.weight.data, state)
        state.absmax = scales
        self.restore((data, state))

    def matmul(self, x: Tensor) -> Tensor:
        import bitsandbytes

        compute = self.module.compute_dtype or x.dtype
        y = bitsandbytes.matmul_4bit(x.to(compute), self.module.weight, quant_state=self._state)
        return y.to(x.dtype)

    def dense(self) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(self.module.weight.data, self._state)

    def _quantise(self, w: Tensor) -> tuple[Tensor, Any]:
        from bitsandbytes.functional import quantize_4bit

        state = self._state
        return quantize_4bit(
            w.to(state.dtype).contiguous(),
            blocksize=state.blocksize,
            compress_statistics=state.nested,
            quant_type=state.quant_type,
            quant_storage=self.module.weight.dtype,
        )

    def write(self, w: Tensor) -> None:
        self.restore(self._quantise(w))

    def stored(self, w: Tensor) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(*self._quantise(w))

    def snapshot(self) -> object:
        return self.module.weight.data.clone(), copy.deepcopy(self._state)

    def restore(self, bits: Any) -> None:
        data, state = bits
        self.module.weight.data = data
        self.module.weight.quant_state = state
        self.module.quant_state = state


@final
class Int8Weight(Weight):
    """``bitsandbytes.nn.Linear8bitLt`` with int8 weights: W is ``CB * SCB / 127`` row by row."""

    format = "bnb-int8"
    module: Any

    @staticmethod
    def claims(module: nn.Module) -> bool:
        return _is_a(module, "Linear8bitLt")

    @property
    def _parts(self) -> tuple[Tensor, Tensor]:
        state = self.module.state if self.module.state.CB is not None else self.module.weight
        if state.CB is None:
            raise WeightFormatError(
                "An int8 weight is quantised by moving it to a device; this one is not quantised "
                'yet. Call model.to("cpu") (or "cuda") after loading, then attach.'
            )
        return state.CB, state.SCB

    @property
    def shape(self) -> tuple[int, int]:
        return self.module.out_features, self.module.in_features

    @property
    def dtype(self) -> torch.dtype:
        bias = self.module.bias
        return torch.float32 if bias is None else bias.dtype

    def matmul(self, x: Tensor) -> Tensor:
        import bitsandbytes

        module = self.module
        module.state.is_training = module.training
        if module.weight.CB is not None:
            module.init_8bit_state()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
            return bitsandbytes.matmul(x, module.weight, state=module.state).to(x.dtype)

    def dense(self) -> Tensor:
        codes, scale = self._parts
        return codes.float() * (scale.float() / 127).unsqueeze(-1)

    @staticmethod
    def _quantise(w: Tensor) -> tuple[Tensor, Tensor]:
        from bitsandbytes.functional import int8_vectorwise_quant

        codes, scale, _ = int8_vectorwise_quant(w.to(torch.float16).contiguous())
        return codes, scale

    def write(self, w: Tensor) -> None:
        self.restore(self._quantise(w))

    def stored(self, w: Tensor) -> Tensor:
        codes, scale = self._quantise(w)
        return codes.float() * (scale.float() / 127).unsqueeze(-1)

    def snapshot(self) -> object:
        codes, scale = self._parts
        return codes.clone(), scale.clone()

    def restore(self, bits: Any) -> None:
        codes, scale = bits
        weight, state = self.module.weight, self.module.state
        holder = state if state.CB is not None else weight
        weight.data = codes
        holder.CB, holder.SCB = codes, scale
