"""The tiny base models of the PEFT fixtures, and adapters with every factor drawn at random."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from torch import Tensor, nn

SHARED = Path(__file__).parents[2].parent / "shared"
FIXTURES = SHARED / "fixtures" / "peft_checkpoints"


class Emb(nn.Module):
    """An embedding and a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.emb = nn.Embedding(20, 8)
        self.lin = nn.Linear(8, 6)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(self.emb(x))


class Conv(nn.Module):
    """Convolutions of one to three dims, one in groups, one of size 1."""

    def __init__(self) -> None:
        super().__init__()
        self.c1 = nn.Conv1d(4, 8, 3, padding=1)
        self.c2 = nn.Conv2d(4, 8, 3, padding=1)
        self.c2g = nn.Conv2d(4, 8, 3, padding=1, groups=2)
        self.c2p = nn.Conv2d(4, 8, 1)
        self.c3 = nn.Conv3d(4, 8, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.c2(x) + self.c2g(x) + self.c2p(x)
        y = y + self.c1(x.flatten(2)).unflatten(-1, x.shape[2:])
        return y + self.c3(x.unsqueeze(2)).squeeze(2)


class MHA(nn.Module):
    """Attention with packed projections, then a linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.mha = nn.MultiheadAttention(8, 2, batch_first=True)
        self.lin = nn.Linear(8, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.lin(self.mha(x, x, x)[0])


class Experts(nn.Module):
    """Expert stacks as bare parameters."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        if transposed:
            self.is_transposed = True
        up, down = ((4, 8, 16), (4, 8, 8)) if transposed else ((4, 16, 8), (4, 8, 8))
        self.gate_up_proj = nn.Parameter(torch.randn(up) * 0.3)
        self.down_proj = nn.Parameter(torch.randn(down) * 0.3)

    def forward(self, x: Tensor, gate: Tensor) -> Tensor:
        up, down = self.gate_up_proj, self.down_proj
        if getattr(self, "is_transposed", False):
            up, down = up.mT, down.mT
        one, two = torch.einsum("ti,eoi->teo", x, up).chunk(2, -1)
        return torch.einsum("tei,eoi,te->to", one.tanh() * two, down, gate)


class Moe(nn.Module):
    """A router and experts."""

    def __init__(self, transposed: bool = False) -> None:
        super().__init__()
        self.router = nn.Linear(8, 4, bias=False)
        self.experts = Experts(transposed)

    def forward(self, x: Tensor) -> Tensor:
        return self.experts(x, self.router(x).softmax(-1))


class Biases(nn.Sequential):
    """Linear layers with and without a bias."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 8), nn.Linear(8, 8, bias=False), nn.Linear(8, 6, bias=False))


class Odd(nn.Sequential):
    """Linear layers with odd sides."""

    def __init__(self) -> None:
        super().__init__(nn.Linear(8, 7), nn.Linear(7, 9), nn.Linear(9, 6))


class Depthwise(nn.Sequential):
    """A convolution with one group a channel, without a bias."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(4, 8, 3, 2, padding=1, groups=4, bias=False))


class Strided(nn.Sequential):
    """A convolution with holes and steps, without a bias."""

    def __init__(self) -> None:
        super().__init__(nn.Conv2d(4, 8, 3, 2, padding=1, dilation=2, bias=False))


def mixture(kind: str = "glm4_moe") -> nn.Module:
    """A language model of two layers, the first with a dense block, the second with stacked experts."""
    sizes = dict(hidden_size=16, intermediate_size=32, moe_intermediate_size=8, num_hidden_layers=2, head_dim=4)
    heads = dict(num_attention_heads=4, num_key_value_heads=2, vocab_size=48, initializer_range=0.2)
    experts = dict(n_routed_experts=4, num_local_experts=4, first_k_dense_replace=1, pad_token_id=0)
    config = transformers.CONFIG_MAPPING[kind](**sizes, **heads, **experts, num_experts_per_tok=2)
    return transformers.AutoModelForCausalLM.from_config(config)


def llama(**changes: Any) -> nn.Module:
    return transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            **{
                "hidden_size": 16,
                "intermediate_size": 32,
                "num_hidden_layers": 1,
                "num_attention_heads": 4,
                "num_key_value_heads": 2,
                "vocab_size": 48,
                "initializer_range": 0.2,
                "tie_word_embeddings": False,
                **changes,
            }
        )
    )


def gpt2() -> nn.Module:
    config = transformers.GPT2Config(
        n_embd=16,
        n_layer=1,
        n_head=2,
        vocab_size=48,
        n_positions=32,
        initializer_range=0.2,
        resid_pdrop=0.0,
        embd_pdrop=0.0,
        attn_pdrop=0.0,
        bos_token_id=0,
        eos_token_id=0,
    )
    return transformers.GPT2LMHeadModel(config)


def made(build: Callable[[], nn.Module]) -> nn.Module:
    """The model of this kind, the same weights at every call."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return build()


def inputs(model: nn.Module) -> Tensor:
    """An input that the model takes."""
    g = torch.Generator().manual_seed(1)
    name = type(model).__name__
    if name == "Emb":
        return torch.randint(0, 20, (2, 7), generator=g)
    if name in ("Conv", "Depthwise", "Strided"):
        return torch.randn(2, 4, 6, 6, generator=g)
    if name in ("MHA", "Moe", "Biases", "Odd"):
        return torch.randn(*((2, 5, 8) if name == "MHA" else (5, 8)), generator=g)
    return torch.tensor([[1, 2, 3, 4, 5, 6], [3, 9, 30, 47, 1, 0]])


def output(model: nn.Module, x: Tensor) -> Tensor:
    y = model(x)  # with gradients: PEFT's Tucker products fail without them (torch.kron on a view)
    return (y.logits if hasattr(y, "logits") else y).detach()


def randomise(model: nn.Module, marks: tuple[str, ...], scale: float = 0.3) -> None:
    """Draw every parameter whose name holds a mark."""
    g = torch.Generator().manual_seed(7)
    with torch.no_grad():
        for name, p in model.named_parameters():
            if any(m in name for m in marks):
                draw = torch.randn(p.shape, generator=g)
                if "magnitude" in name:
                    p.mul_(1 + 0.3 * draw)
                else:
                    p.add_(scale * draw)


MARKS = ("lora_", "hada_", "lokr_", "hira_", "oft_", "tinylora_", "modules_to_save", "trainable_tokens_delta", "hra_")
MARKS += ("road_", "psoft_", "ia3_", "delora_", "miss_", "boft_")
MARKS += ("fourierft_", "waveft_", "shira_", "c3a_")
MARKS += ("vera_", "unilora_")


def with_peft(build: Callable[[], nn.Module], config: Any, scale: float = 0.3) -> Any:
    """A PeftModel of it with random factors."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model = peft.get_peft_model(made(build), config)
    marks = MARKS + ((".bias",) if getattr(config, "bias", "none") != "none" else ())
    randomise(model, marks, scale)
    return model


def save(model: Any, path: Path) -> Path:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        model.save_pretrained(path)
    return path


def load_peft(build: Callable[[], nn.Module], path: Path) -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return peft.PeftModel.from_pretrained(made(build), path)


def distance(ours: Tensor, theirs: Tensor, base: Tensor) -> float:
    """max|ours - theirs| / max|theirs - base|; the adapter must matter."""
    effect = (theirs - base).abs().max()
    assert (theirs - base).norm() > 0.01 * base.norm(), "the adapter does too little to be tested"
    return ((ours - theirs).abs().max() / effect).item()
