"""bitsandbytes weights: NF4 and FP4 (QLoRA; Dettmers et al. 2023, arXiv 2305.14314) and int8.

The library is imported only where one of its modules is already in the model.
"""

import warnings
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.autograd.graph import increment_version

from rankwise.errors import WeightFormatError
from rankwise.weights.weight import Weight


def _is_a(module: nn.Module, kind: str) -> bool:
    return any(c.__name__ == kind and c.__module__.startswith("bitsandbytes") for c in type(module).__mro__)


def _unquantised(format_: str) -> WeightFormatError:
    return WeightFormatError(
        f"{format_} weight is quantised by moving it to a device; this one is not quantised. Make an int8 layer with "
        f'has_fp16_weights=False, call model.to("cpu") (or "cuda") after loading, then attach.'
    )


@final
class FourBitWeight(Weight):
    """``bitsandbytes.nn.Linear4bit``: NF4 or FP4, with or without double quantisation."""

    @staticmethod
    def claims(module: nn.Module, name: str) -> bool:
        return name == "weight" and _is_a(module, "Linear4bit")

    @property
    def _state(self) -> Any:
        state = getattr(self.module.weight, "quant_state", None)
        if state is None:
            raise _unquantised("A 4-bit")
        return state

    @property
    def dtype(self) -> torch.dtype:
        state = self._state  # asked at attach: what is not quantised is refused there
        return self.module.compute_dtype or state.dtype

    def prepare(self) -> None:
        # bitsandbytes 0.50 repacks the weight in place at the first eval forward on a CPU with AVX512-BF16; from then
        # on there is no gradient and dequantising is wrong, silently.
        self.module.support_avx512bf16_for_cpu = False
        state: Any = getattr(self.module.weight, "quant_state", None)
        if not getattr(state, "packing_format_for_cpu", False):
            return
        from bitsandbytes.functional import _convert_weight_packed_for_cpu_inverse as unpack

        warnings.warn(
            "A 4-bit weight ran in eval mode before the adapter came, and bitsandbytes repacked it for inference, its "
            "scales rounded to bfloat16 for good. It is unpacked now and can be trained on, but is no longer quite the "
            "base that was loaded. Load the base again and attach (or load) before the first forward to have that one.",
            stacklevel=4,
        )
        # the inverse of bitsandbytes 0.50 forgets to turn the scales back, or nests them anew
        scales = state.absmax.T.reshape(-1).float().contiguous()
        state.original_nested = False
        data, state = unpack(self.module.weight.data, state)
        state.absmax = scales
        self.put((data, state))

    def matmul(self, x: Tensor) -> Tensor:
        import bitsandbytes

        compute = self.module.compute_dtype or x.dtype
        return bitsandbytes.matmul_4bit(x.to(compute), self.module.weight, quant_state=self._state).to(x.dtype)

    @property
    def bits(self) -> tuple[Tensor, Any]:
        return self.module.weight.data, self._state

    def put(self, bits: Any) -> None:
        self.module.weight.data, state = bits
        self.module.weight.quant_state = self.module.quant_state = state
        increment_version(self.module.weight)  # new bits may lie where old ones did, and norms of W are remembered

    def encode(self, w: Tensor) -> tuple[Tensor, Any]:
        from bitsandbytes.functional import quantize_4bit

        state, storage = self._state, self.module.weight.dtype
        options = {"compress_statistics": state.nested, "quant_type": state.quant_type, "quant_storage": storage}
        return quantize_4bit(w.to(state.dtype).contiguous(), blocksize=state.blocksize, **options)

    def decode(self, bits: Any) -> Tensor:
        from bitsandbytes.functional import dequantize_4bit

        return dequantize_4bit(*bits)


@final
class Int8Weight(Weight):
    """``bitsandbytes.nn.Linear8bitLt`` with int8 weights: W is ``CB * SCB / 127`` row by row."""

    @staticmethod
    def claims(module: nn.Module, name: str) -> bool:
        return name == "weight" and _is_a(module, "Linear8bitLt")

    @property
    def _holder(self) -> Any:
        holder = self.module.state if self.module.state.CB is not None else self.module.weight
        if holder.CB is None or self.module.state.has_fp16_weights:
            raise _unquantised("An int8")
        return holder

    @property
    def dtype(self) -> torch.dtype:
        _ = self._holder  # asked at attach: what is not quantised is refused there
        return torch.float32 if self.module.bias is None else self.module.bias.dtype

    def matmul(self, x: Tensor) -> Tensor:
        import bitsandbytes

        module = self.module
        module.state.is_training = module.training
        if module.weight.CB is not None:
            module.init_8bit_state()
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", message="MatMul8bitLt: inputs will be cast")
            return bitsandbytes.matmul(x, module.weight, state=module.state).to(x.dtype)

    @property
    def bits(self) -> tuple[Tensor, Tensor]:
        return self._holder.CB, self._holder.SCB

    def put(self, bits: Any) -> None:
        holder = self._holder
        self.module.weight.data, _ = holder.CB, holder.SCB = bits
        increment_version(self.module.weight)

    def encode(self, w: Tensor) -> tuple[Tensor, Tensor]:
        from bitsandbytes.functional import int8_vectorwise_quant

        return int8_vectorwise_quant(w.to(torch.float16).contiguous())[:2]

    def decode(self, bits: Any) -> Tensor:
        codes, scale = bits
        return codes.float() * (scale.float() / 127).unsqueeze(-1)
