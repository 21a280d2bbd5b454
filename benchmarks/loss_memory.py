"""Memory and time of a training step whose logits are never held whole: ``python -m benchmarks.loss_memory``.

One code for both variants: the model's forward, then ``F.cross_entropy`` of its logits. With deferred logits
(rankwise.hf.deferred) it runs in chunks of tokens; without them it is what transformers does. Bytes are those of live
torch storages at the worst moment of the step, above the model's own; that loss and gradients agree is checked in the
same run.
"""

import argparse
import functools
import gc
import weakref
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import Gemma2Config, Gemma2ForCausalLM, LlamaConfig, LlamaForCausalLM

import rankwise as rw
from benchmarks.paired import conditions, measure, ratio, write
from rankwise.hf.deferred import deferred_logits


class Live(TorchDispatchMode):
    """Counts the bytes of storages that are alive, those made before it left out."""

    def __init__(self) -> None:
        super().__init__()
        self.now = self.peak = self.largest = 0
        self.seen: weakref.WeakSet[Any] = weakref.WeakSet()

    def ignore(self, tensors: Any) -> "Live":
        for tensor in tensors:
            self.seen.add(tensor.untyped_storage())
        return self

    def _dead(self, size: int) -> None:
        self.now -= size

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        for tensor in tree_leaves(out):
            if not isinstance(tensor, Tensor) or tensor.device.type == "meta":
                continue
            storage = tensor.untyped_storage()
            if storage not in self.seen:
                self.seen.add(storage)
                size = storage.nbytes()
                weakref.finalize(storage, self._dead, size)
                self.now += size
                self.peak, self.largest = max(self.peak, self.now), max(self.largest, size)
        return out


@dataclass(frozen=True)
class Case:
    """One row of the result."""

    name: str
    method: str = "lora"
    head: str = "adapted"  # "frozen", "adapted" or "tied" (to the embedding, which is adapted)
    softcap: float | None = None
    smoothing: float = 0.0
    vocabulary: int = 128_000
    hidden: int = 512
    batch: int = 4
    tokens: int = 512


CASES = [
    Case("LoRA, frozen head", head="frozen"),
    Case("LoRA on the head too"),
    Case("DoRA on the head too", method="dora"),
    Case("LoRA, tied to the embedding", head="tied"),
    Case("LoRA, soft cap 30", softcap=30.0),
    Case("LoRA, label smoothing 0.1", smoothing=0.1),
]


def adapted(case: Case) -> tuple[Any, Any]:
    shape: dict[str, Any] = {
        "vocab_size": case.vocabulary,
        "hidden_size": case.hidden,
        "intermediate_size": case.hidden * 11 // 4,
        "num_hidden_layers": 2,
        "num_attention_heads": 8,
        "num_key_value_heads": 8,
        "tie_word_embeddings": case.head == "tied",
    }
    torch.manual_seed(0)
    if case.softcap is None:
        model: Any = LlamaForCausalLM(LlamaConfig(**shape))
    else:
        model = Gemma2ForCausalLM(Gemma2Config(**shape, head_dim=64, final_logit_softcapping=case.softcap))
    targets = {"frozen": ["attention"], "adapted": ["attention", "lm_head"], "tied": ["attention", "embed_tokens"]}
    tied = "tie" if case.head == "tied" else "refuse"
    adapter = rw.attach(model, rw.recipe(case.method, rank=16, sites=rw.Sites(targets[case.head], tied=tied)))
    with torch.no_grad():
        for parameter in adapter.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    return model.train(), adapter


def step(case: Case, model: Any, ids: Tensor, labels: Tensor, chunked: bool) -> Tensor:
    model.zero_grad(set_to_none=True)
    with deferred_logits(model) if chunked else nullcontext():
        logits = model(input_ids=ids, use_cache=False).logits.float()
        following = F.pad(labels, (0, 1), value=-100)[..., 1:].flatten()
        loss = F.cross_entropy(logits.view(-1, case.vocabulary), following, label_smoothing=case.smoothing)
    del logits
    loss.backward()
    return loss.detach()


def distance(one: Tensor, two: Tensor) -> float:
    return float((one - two).abs().max() / two.abs().max())


def compare(case: Case, rounds: int) -> dict[str, Any]:
    """Measure one case."""
    model, adapter = adapted(case)
    ids = torch.randint(case.vocabulary, (case.batch, case.tokens))
    run: dict[str, Callable[[], Tensor]] = {
        name: functools.partial(step, case, model, ids, ids, name == "chunked") for name in ("whole", "chunked")
    }
    found: dict[str, dict[str, Tensor]] = {}
    peak, largest = {}, {}
    for name, one in run.items():
        model.zero_grad(set_to_none=True)
        gc.collect()
        with Live().ignore([*model.parameters(), *model.buffers(), ids]) as live:
            loss = one()
        peak[name], largest[name] = live.peak, live.largest
        found[name] = {"loss": loss} | {n: p.grad.clone() for n, p in adapter.named_parameters() if p.grad is not None}
    assert found["whole"].keys() == found["chunked"].keys()
    errors = {n: distance(found["chunked"][n], value) for n, value in found["whole"].items()}
    assert max(errors.values()) <= 1e-5, errors
    assert peak["chunked"] <= 0.25 * peak["whole"], peak
    found.clear()
    seen = measure(run, rounds, warmup=0)
    return {
        "case": asdict(case),
        "model_bytes": sum(p.numel() * p.element_size() for p in model.parameters()),
        "peak_bytes": peak,
        "largest_bytes": largest,
        "peak_ratio": peak["chunked"] / peak["whole"],
        "loss_error": errors.pop("loss"),
        "gradient_error": max(errors.values()),
        "time_ratio": ratio(seen.cpu["chunked"], seen.cpu["whole"]),
    }


def run(*, quick: bool = False) -> None:
    """Measure all cases, print a table and write benchmarks/results/loss_memory.json."""
    torch.set_num_threads(1)
    print("| step | peak whole, MiB | peak in chunks, MiB | ratio | loss error | gradient error | time ratio |")
    print("|---|---|---|---|---|---|---|")
    cases = []
    for case in CASES[1:2] if quick else CASES:
        row = compare(case, 1 if quick else 3)
        cases.append(row)
        whole, chunked = (row["peak_bytes"][name] / 2**20 for name in ("whole", "chunked"))
        print(
            f"| {case.name} | {whole:.0f} | {chunked:.0f} | {row['peak_ratio']:.3f} | {row['loss_error']:.0e} | "
            f"{row['gradient_error']:.0e} | {row['time_ratio']['value']:.2f} |",
            flush=True,
        )
    name = "loss_memory_quick" if quick else "loss_memory"
    versions = conditions("cpu")
    print(f"written to {write(name, {'benchmark': 'loss_memory', **versions, 'cases': cases})}")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(prog="benchmarks.loss_memory", description=__doc__)
    parser.add_argument("--quick", action="store_true", help="one case, one round")
    run(quick=parser.parse_args().quick)
