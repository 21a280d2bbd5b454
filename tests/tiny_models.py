"""Small models for the tests that go through a whole life of an adapter."""

from __future__ import annotations

from typing import Any

import torch
import transformers
from torch import Tensor, nn

import rankwise as rw
from rankwise.methods import catalogue

METHODS: dict[str, dict[str, Any]] = {
    "lora": {"rank": 4},
    "dora": {"rank": 4},
    "pissa": {"rank": 4},
    "lokr": {"rank": 2},
    "loha": {"rank": 2},
    "hira": {"rank": 4},
    "oft": {"block": 8},
    "dora_svd": {"rank": 4},
}

CATALOGUE = catalogue()
# what layers of width 32 ask for beside a rank of 4
SMALL: dict[str, dict[str, Any]] = {
    "adalora": {"budget": 4.0},
    "alora_alloc": {"most": 6},
    "fourierft": {"count": 50},
    "gralora": {"blocks": 2},
    "mora": {"rank": 2},
    "prolora": {"unshared": 1},
    "vblora": {"length": 8, "vectors": 16},
    "waveft": {"count": 50},
}


def small(name: str) -> rw.Recipe:
    """The method at rank 4 where it has one."""
    rank = {"rank": 4} if isinstance(CATALOGUE[name].options.get("rank"), int) else {}
    return rw.recipe(name, **{**rank, **SMALL.get(name, {})})


def llama(**changes: Any) -> transformers.LlamaForCausalLM:
    """Two blocks of width 32, the same weights at every call."""
    state = torch.get_rng_state()
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        **{
            "vocab_size": 64,
            "hidden_size": 32,
            "intermediate_size": 64,
            "num_hidden_layers": 2,
            "num_attention_heads": 4,
            "num_key_value_heads": 2,
            "max_position_embeddings": 64,
            "tie_word_embeddings": False,
            **changes,
        }
    )
    model = transformers.LlamaForCausalLM(config).eval()
    torch.set_rng_state(state)
    return model


def tokens(rows: int = 2, length: int = 8, vocabulary: int = 64) -> Tensor:
    """The same token ids at every call."""
    return torch.randint(0, vocabulary, (rows, length), generator=torch.Generator().manual_seed(2))


def plain(seed: int = 1) -> nn.Sequential:
    """Two linear layers with an activation between."""
    state = torch.get_rng_state()
    torch.manual_seed(seed)
    model = nn.Sequential(nn.Linear(16, 24), nn.Tanh(), nn.Linear(24, 16))
    torch.set_rng_state(state)
    return model


def shake(adapter: rw.Adapter, scale: float = 0.1) -> None:
    """Move every trainable factor off its start."""
    g = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(scale * torch.randn(parameter.shape, generator=g).to(parameter))


def frozen_look(model: nn.Module) -> dict[str, Any]:
    """What must not change where an error is raised: classes, values, what trains, buffers."""
    return {
        "classes": {n: type(m) for n, m in model.named_modules()},
        "values": {n: p.detach().clone() for n, p in model.named_parameters()},
        "trains": {n: p.requires_grad for n, p in model.named_parameters()},
        "shared": [n for n, _ in model.named_parameters(remove_duplicate=False)],
        "ties": len(list(model.parameters())),
    }


def same_look(one: dict[str, Any], two: dict[str, Any]) -> bool:
    """Whether two looks are equal, values bit for bit."""
    values = one["values"].keys() == two["values"].keys() and all(
        torch.equal(v, two["values"][n]) for n, v in one["values"].items()
    )
    return values and all(one[k] == two[k] for k in one if k != "values")
