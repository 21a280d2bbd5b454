"""A training step on the experts of a small mixture: products on the factors against whole adapted stacks.

The dense way forms W + dW of every expert at every forward, as a bare parameter of any module is adapted and as PEFT's
``target_parameters`` does. Both have the same factors; that their losses and gradients agree is checked before anything
is timed. The floor is the frozen model alone, with a gradient to its input.
"""

import argparse
import copy
import statistics
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM
from transformers.models.qwen3_moe.modeling_qwen3_moe import Qwen3MoeExperts

import rankwise as rw
from benchmarks.models import stepper
from benchmarks.paired import conditions, fixed_allocator, measure, ratio, write

STACKS = ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]


class BareExperts(Qwen3MoeExperts):
    """Experts with a forward of their own, so that their stacks are adapted as bare parameters."""

    def forward(self, *args: Tensor) -> Tensor:
        return super().forward(*args)


@dataclass(frozen=True)
class Case:
    """One row of the result."""

    experts: int
    chosen: int
    width: int
    dtype: str
    method: str = "lora"
    implementation: str = "grouped_mm"
    hidden: int = 256
    layers: int = 2
    batch: int = 4
    tokens: int = 128
    rank: int = 16
    vocabulary: int = 512


CASES = [
    Case(8, 2, 512, "float32"),
    Case(8, 2, 512, "bfloat16"),
    Case(64, 8, 128, "float32"),
    Case(64, 8, 128, "bfloat16"),
    Case(64, 8, 128, "float32", implementation="eager"),
    Case(8, 2, 512, "float32", method="dora"),
    Case(64, 8, 128, "float32", method="dora"),
    Case(64, 8, 128, "float32", method="lokr"),
]


def mixture(case: Case) -> Any:
    config = Qwen3MoeConfig(
        vocab_size=case.vocabulary,
        hidden_size=case.hidden,
        num_hidden_layers=case.layers,
        num_attention_heads=case.hidden // 64,
        num_key_value_heads=case.hidden // 64,
        num_experts=case.experts,
        num_experts_per_tok=case.chosen,
        moe_intermediate_size=case.width,
    )
    model = Qwen3MoeForCausalLM(config).to(getattr(torch, case.dtype)).requires_grad_(False)
    model.set_experts_implementation(case.implementation)
    return model


def with_rankwise(base: Any, case: Case, bare: bool) -> nn.Module:
    model = copy.deepcopy(base)
    for module in model.modules():
        if bare and isinstance(module, Qwen3MoeExperts):
            module.__class__ = BareExperts
    options = {"rank": case.rank, "sites": rw.Sites([f"*{name}" for name in STACKS])}
    torch.manual_seed(1)
    adapter = rw.attach(model, rw.recipe(case.method, **options))
    with torch.no_grad():
        for p in adapter.parameters():
            p.add_(0.02 * torch.randn_like(p))
    return model


def compare(case: Case, rounds: int) -> dict[str, Any]:
    """Measure one case."""
    torch.manual_seed(0)
    base = mixture(case).train()
    shape = case.batch, case.tokens
    embeds = torch.randn(*shape, case.hidden, dtype=getattr(torch, case.dtype)) * 0.02
    labels = torch.randint(case.vocabulary, shape)
    models = {"floor": base, "ours": with_rankwise(base, case, False), "dense": with_rankwise(base, case, True)}
    given = {"inputs_embeds": embeds, "labels": labels}
    steps = {name: stepper(model, given) for name, model in models.items()}
    tolerance = 1e-4 if case.dtype == "float32" else 5e-2
    torch.testing.assert_close(steps["ours"](), steps["dense"](), rtol=tolerance, atol=0)

    seen = measure(steps, rounds)
    return {
        "case": asdict(case),
        "rounds": rounds,
        "cpu_ms": {name: 1e3 * statistics.median(times) for name, times in seen.cpu.items()},
        "wall_ms": {name: 1e3 * statistics.median(times) for name, times in seen.wall.items()},
        "minor_faults": {name: statistics.median(n) for name, n in seen.faults.items()},
        "ours_over_dense": ratio(seen.cpu["ours"], seen.cpu["dense"]),
        "ours_over_floor": ratio(seen.cpu["ours"], seen.cpu["floor"]),
        "dense_over_floor": ratio(seen.cpu["dense"], seen.cpu["floor"]),
    }


def run(*, quick: bool = False) -> None:
    """Measure all cases, print a line for each and write benchmarks/results/moe.json."""
    torch.set_num_threads(1)
    rounds = 5 if quick else 21
    cases = []
    for case in CASES[:1] if quick else CASES:
        row = compare(case, rounds)
        cases.append(row)
        r, ours, dense = row["ours_over_dense"], row["ours_over_floor"], row["dense_over_floor"]
        print(
            f"{case.method} r={case.rank}, {case.chosen} of {case.experts} experts of width {case.width}, "
            f"{case.implementation}, {case.dtype}: step of ours / dense {r['value']:.3f} [{r['low']:.3f}, "
            f"{r['high']:.3f}]; over the frozen model's {ours['value']:.2f} and {dense['value']:.2f}"
        )
    versions = conditions("cpu")
    path = write("moe_quick" if quick else "moe", {"benchmark": "moe", **versions, "cases": cases})
    print(f"written to {path}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="benchmarks.moe", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one case, few rounds")
    fixed_allocator()
    run(quick=parser.parse_args().quick)
