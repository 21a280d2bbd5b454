"""A LoRA training step, rankwise against PEFT, on a small Llama: time of forward and backward.

All variants adapt the seven linear layers of every block at the same rank with the same factors;
that their losses and gradients agree is checked before anything is timed. The floor is the frozen
model alone, with a gradient to its input.
"""

import copy
import statistics
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import peft
import torch
from torch import Tensor, nn
from transformers import LlamaConfig, LlamaForCausalLM

import rankwise as rw
from benchmarks.paired import conditions, measure, overhead, ratio, write

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


@dataclass(frozen=True)
class Case:
    """One row of the result."""

    hidden: int
    dtype: str
    layers: int = 4
    batch: int = 4
    tokens: int = 128
    rank: int = 16
    vocabulary: int = 1024


CASES = [Case(256, "float32"), Case(256, "bfloat16"), Case(512, "float32"), Case(512, "bfloat16")]


def llama(case: Case) -> LlamaForCausalLM:
    config = LlamaConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        intermediate_size=case.hidden * 11 // 4,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 64,
        num_key_value_heads=case.hidden // 64,
    )
    return LlamaForCausalLM(config).to(getattr(torch, case.dtype)).requires_grad_(False)


def with_peft(base: LlamaForCausalLM, rank: int) -> nn.Module:
    config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=TARGETS)
    model = peft.get_peft_model(copy.deepcopy(base), config)
    for name, factor in model.named_parameters():
        if "lora_B" in name:
            nn.init.normal_(factor, std=0.02)
    return model


def with_rankwise(base: LlamaForCausalLM, rank: int, twin: nn.Module) -> nn.Module:
    """Attach LoRA with the factors of the PEFT model, so that both compute one function."""
    model = copy.deepcopy(base)
    adapter = rw.attach(model, rw.recipe("lora", rank=rank, sites=rw.Sites(TARGETS)))
    theirs = twin.state_dict()
    with torch.no_grad():
        for site, factors in adapter.items():
            factors["a"].copy_(theirs[f"base_model.model.{site}.lora_A.default.weight"])
            factors["b"].copy_(theirs[f"base_model.model.{site}.lora_B.default.weight"])
    return model


def stepper(model: nn.Module, embeds: Tensor, labels: Tensor) -> Callable[[], Tensor]:
    def step() -> Tensor:
        model.zero_grad(set_to_none=True)
        leaf = embeds.clone().requires_grad_()
        loss = model(inputs_embeds=leaf, labels=labels).loss
        loss.backward()
        assert leaf.grad is not None
        return torch.stack([loss.detach(), leaf.grad.norm()])

    return step


def compare(case: Case, rounds: int) -> dict[str, Any]:
    """Measure one case."""
    torch.manual_seed(0)
    base = llama(case).train()
    shape = case.batch, case.tokens
    embeds = torch.randn(*shape, case.hidden, dtype=getattr(torch, case.dtype)) * 0.02
    labels = torch.randint(case.vocabulary, shape)
    twin = with_peft(base, case.rank)
    models = {"floor": base, "rankwise": with_rankwise(base, case.rank, twin), "peft": twin}
    steps = {name: stepper(model, embeds, labels) for name, model in models.items()}
    tolerance = 1e-5 if case.dtype == "float32" else 2e-2
    torch.testing.assert_close(steps["rankwise"](), steps["peft"](), rtol=tolerance, atol=0)

    seen = measure(steps, rounds)
    return {
        "case": asdict(case),
        "rounds": rounds,
        "cpu_ms": {name: 1e3 * statistics.median(times) for name, times in seen.cpu.items()},
        "wall_ms": {name: 1e3 * statistics.median(times) for name, times in seen.wall.items()},
        "minor_faults": {name: statistics.median(n) for name, n in seen.faults.items()},
        "adapter_dtype": {
            name: sorted({str(p.dtype) for p in model.parameters() if p.requires_grad})
            for name, model in models.items()
        },
        "rankwise_over_peft": ratio(seen.cpu, "rankwise", "peft"),
        "overhead_share": overhead(seen.cpu, "rankwise", "peft", "floor"),
    }


def run(*, quick: bool = False) -> None:
    """Measure all cases, print a line for each and write benchmarks/results/step_time.json."""
    torch.set_num_threads(1)
    rounds = 5 if quick else 41
    cases = []
    for case in CASES[:1] if quick else CASES:
        row = compare(case, rounds)
        cases.append(row)
        r, o = row["rankwise_over_peft"], row["overhead_share"]
        print(
            f"LoRA r={case.rank}, width {case.hidden}, {case.dtype}: step of rankwise / PEFT "
            f"{r['value']:.3f} [{r['low']:.3f}, {r['high']:.3f}], "
            f"overhead / PEFT's {o['value']:.2f} [{o['low']:.2f}, {o['high']:.2f}]"
        )
    name = "step_time_quick" if quick else "step_time"
    versions = conditions("torch", "transformers", "peft", "rankwise")
    path = write(name, {"benchmark": "step_time", **versions, "cases": cases})
    print(f"written to {path}")
