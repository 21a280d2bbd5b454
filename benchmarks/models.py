"""The models that are compared: a small Llama, bare, by rankwise and by PEFT, all computing one function."""

import copy
import tempfile
import warnings
from collections.abc import Callable, Mapping
from contextlib import redirect_stderr
from dataclasses import dataclass, replace
from functools import partial
from io import StringIO
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import rankwise as rw

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """What all variants of one interleaved set share."""

    hidden: int = 256
    dtype: str = "float32"
    rank: int = 16
    dropout: float = 0.0
    threads: int = 1
    layers: int = 4
    batch: int = 4
    tokens: int = 128
    vocabulary: int = 1024
    device: str = "cpu"

    @property
    def torch_dtype(self) -> torch.dtype:
        return getattr(torch, self.dtype)

    def __str__(self) -> str:
        drop = f", dropout {self.dropout:g}" if self.dropout else ""
        layers = f", {self.layers} layers" if self.layers != 4 else ""
        return f"hidden {self.hidden}, {self.dtype}, r {self.rank}{drop}{layers}, threads {self.threads}"


@dataclass(frozen=True)
class Method:
    """One method in both libraries, at one rank. ``drops``: PEFT has dropout for it."""

    recipe: Callable[..., rw.Recipe]
    config: Callable[..., peft.PeftConfig]
    drops: bool = False
    starts: bool = False  # its own start is the comparison: nothing is copied


def _lora(**more: Any) -> Callable[[int, float], peft.PeftConfig]:
    def config(r: int, p: float) -> peft.PeftConfig:
        return peft.LoraConfig(r=r, lora_alpha=r, lora_dropout=p, target_modules=TARGETS, **more)

    return config


def _adalora(r: int, p: float) -> peft.PeftConfig:
    return peft.AdaLoraConfig(
        init_r=r, target_r=r, total_step=10**6, lora_alpha=r, lora_dropout=p, target_modules=TARGETS
    )


def _oft(exact: bool) -> Callable[[int, float], peft.PeftConfig]:
    return lambda r, p: peft.OFTConfig(oft_block_size=32, use_cayley_neumann=not exact, target_modules=TARGETS)


METHODS = {
    "lora": Method(partial(rw.recipe, "lora"), _lora(), drops=True),
    "rslora": Method(lambda rank, **more: rw.recipe("rslora", rank=rank, alpha=rank, **more), _lora(use_rslora=True)),
    "dora": Method(partial(rw.recipe, "dora"), _lora(use_dora=True), drops=True),
    "dora_again": Method(partial(rw.recipe, "dora", recompute=True), _lora(use_dora=True), drops=True),
    "pissa": Method(partial(rw.recipe, "pissa"), _lora(init_lora_weights="pissa"), starts=True),
    "adalora": Method(partial(rw.recipe, "svd"), _adalora, drops=True),
    "loha": Method(
        partial(rw.recipe, "loha"), lambda r, p: peft.LoHaConfig(r=r, alpha=r, target_modules=TARGETS)
    ),
    "lokr": Method(
        partial(rw.recipe, "lokr"), lambda r, p: peft.LoKrConfig(r=r, alpha=r, target_modules=TARGETS)
    ),
    "hira": Method(
        partial(rw.recipe, "hira"), lambda r, p: peft.HiraConfig(r=r, hira_dropout=p, target_modules=TARGETS),
        drops=True,
    ),
    "oft": Method(lambda rank, **more: rw.recipe("oft", terms=5, **more), _oft(exact=False)),
    "oft_exact": Method(lambda rank, **more: rw.recipe("oft", **more), _oft(exact=True)),
}  # fmt: skip


def method(name: str, case: Case) -> tuple[Method, int]:
    """``loha@8`` is the method at rank 8, ``loha`` at the case's."""
    name, _, rank = name.partition("@")
    return METHODS[name], int(rank or case.rank)


def llama(case: Case) -> nn.Module:
    """The frozen base, in training mode."""
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.hidden * 11 // 4,
        num_hidden_layers=case.layers,
        num_attention_heads=max(case.hidden // 64, 1),
        num_key_value_heads=max(case.hidden // 64, 1),
        pad_token_id=None,
    )
    model = nn.Module.to(LlamaForCausalLM(config), case.device, case.torch_dtype)
    return model.requires_grad_(False).train()


def twin(base: nn.Module) -> Any:
    """The same module tree on the same parameters: one copy of the weights in memory for all variants."""
    memo = {id(p): p for p in base.parameters()}
    return copy.deepcopy(base, memo)


def with_peft(base: nn.Module, case: Case, name: str, autocast: bool = True) -> Any:
    """PEFT's model of a method, factors drawn at random so that every product matters."""
    kind, rank = method(name, case)
    model = copy.deepcopy(base) if kind.starts else twin(base)  # PiSSA writes into the base
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        wrapped = peft.get_peft_model(
            model, kind.config(rank, case.dropout if kind.drops else 0.0), autocast_adapter_dtype=autocast
        )
    if not kind.starts:
        generator = torch.Generator().manual_seed(7)
        with torch.no_grad():
            for key, p in wrapped.named_parameters():
                if p.requires_grad and "magnitude" not in key:
                    p.add_((0.02 * torch.randn(p.shape, generator=generator)).to(p))
    return wrapped


def recipe(case: Case, name: str) -> rw.Recipe:
    """Our recipe of a method on the seven linear layers."""
    kind, rank = method(name, case)
    dropout = {"dropout": case.dropout} if case.dropout and kind.drops else {}
    return kind.recipe(rank=rank, sites=rw.Sites(TARGETS), **dropout)


def with_rankwise(base: nn.Module, case: Case, name: str, theirs: Any = None) -> tuple[nn.Module, rw.Adapter]:
    """Our model of a method, with the factors of a PEFT model where one is given."""
    model = twin(base)
    adapter = rw.attach(model, recipe(case, name))
    if theirs is not None and not method(name, case)[0].starts:
        with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings(), redirect_stderr(StringIO()):
            warnings.simplefilter("ignore")
            theirs.save_pretrained(folder)
            read = rw.formats.peft.load(twin(base), folder)
        with torch.no_grad():
            for site, factors in adapter.items():
                for key, tensor in factors.items():
                    tensor.copy_(read[site][key])
    return model, adapter


def full(base: nn.Module) -> nn.Module:
    """Full fine-tuning: every parameter of a copy is trained."""
    return copy.deepcopy(base).requires_grad_(True)


def batch(case: Case) -> dict[str, Tensor]:
    """Embeddings that ask for a gradient, and labels."""
    generator = torch.Generator().manual_seed(1)
    shape = case.batch, case.tokens
    embeds = 0.02 * torch.randn(*shape, case.hidden, generator=generator)
    labels = torch.randint(case.vocabulary, shape, generator=generator)
    return {"inputs_embeds": embeds.to(case.device, case.torch_dtype), "labels": labels.to(case.device)}


def forward(model: Any, given: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The loss, and the input that it is differentiated to.

    A PeftModel is called below its outer wrapper, which adds a little time and, for AdaLoRA, a penalty.
    """
    call = model.get_base_model() if isinstance(model, peft.PeftModel) else model
    leaf = given["inputs_embeds"].detach().requires_grad_()
    return call(inputs_embeds=leaf, labels=given["labels"]).loss, leaf


def stepper(model: Any, given: Mapping[str, Tensor]) -> Callable[[], Tensor]:
    """One forward and backward; returns the loss and the norm of the gradient to the input."""
    parameters = [p for p in model.parameters() if p.requires_grad]

    def step() -> Tensor:
        for p in parameters:
            p.grad = None
        loss, leaf = forward(model, given)
        loss.backward()
        assert leaf.grad is not None
        return torch.stack([loss.detach().float(), leaf.grad.float().norm()])

    return step


def agree(ours: Any, theirs: Any, case: Case) -> None:
    """Both models compute one function, without dropout.

    Raises:
        AssertionError: they do not, so their times must not be compared.
    """
    given = batch(replace(case, batch=1, tokens=32))
    found = [stepper(m.eval(), given)() for m in (ours, theirs)]
    tolerance = 1e-3 if case.dtype == "float32" else 5e-2
    torch.testing.assert_close(found[0], found[1], rtol=tolerance, atol=0)
    for model in (ours, theirs):
        model.train()
        for p in model.parameters():
            p.grad = None
