"""Random points of the method space, each through a whole run: ``python -m benchmarks.random_runs 400``.

A method of the catalogue, some of its axes replaced at random, is trained by the Trainer on a tiny language model for
four steps, under settings that are drawn too (activation checkpointing, autocast, accumulation, clipping, a schedule, a
base in half precision). Its factors must move and stay finite; a run resumed after two steps must end in the same bits;
the saved adapter must reload to the same bits, and merge to the same function. What an axis refuses is left out.
"""

import argparse
import contextlib
import io
import random
import warnings
from collections import Counter
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
import transformers
from torch import Tensor

import rankwise as rw
import rankwise.hf
from benchmarks import zoo
from rankwise.errors import RankwiseError
from rankwise.penalties import Ascent, Balance, MaxNorm, Noise, Orthogonality, Sharpness
from rankwise.ranks import Budget, Constant, Following, Pruning, Ranks, Rescaling, Restarts, Sampled, Shrinking
from rankwise.registry import choices

MODELS = {
    "CAUSAL_LM": ("llama", "gpt2", "falcon", "mixtral", "qwen2_moe", "mamba"),
    "MASKED_LM": ("bert", "deberta-v2"),
    "SEQ_TO_SEQ_CAUSAL_LM": ("t5",),
}
RANKS: tuple[Ranks, ...] = (
    *(Constant(), Budget(4, budget=2, warmup=1, final=1), Following(2), Pruning(2), Rescaling(2)),
    *(Restarts(2), Sampled(), Shrinking(0.01)),
)
PENALTIES = (Ascent(), Balance(), MaxNorm(), Noise(0.01), Orthogonality(), Sharpness())
STEPS = 4


def recipe(draw: random.Random) -> rw.Recipe:
    """A method with about half of its axes replaced, where what is drawn fits the rest."""
    name = draw.choice(sorted(rw.catalogue()))
    sized = {"rank": 8} if isinstance(rw.catalogue()[name].options.get("rank"), int) else {}
    axes: dict[str, Any] = {
        "init": draw.choice([*choices("inits").values()]),
        "solver": draw.choice([*choices("solvers").values()]),
        "ranks": lambda: draw.choice(RANKS),
        "penalties": lambda: (draw.choice(PENALTIES),),
        "dropout": lambda: 0.1,
    }
    found = rw.recipe(name, **sized)
    for axis in draw.sample([*axes], draw.randint(0, len(axes))):
        with contextlib.suppress(RankwiseError):
            found = found.with_(**{axis: axes[axis]()})
    return found


def drawn(seed: int) -> tuple[str, str, bool, dict[str, Any], rw.Recipe]:
    """Kind and name of a model, whether its weights are halved, the Trainer's settings, and a legal recipe."""
    draw = random.Random(seed)
    kind = draw.choice([*MODELS])
    settings: dict[str, Any] = {
        "gradient_checkpointing": draw.random() < 0.5,
        "gradient_accumulation_steps": draw.choice([1, 2]),
        "max_grad_norm": draw.choice([0.0, 1.0]),
        "bf16": draw.random() < 0.4,
        "warmup_steps": draw.choice([0, 1]),
        "lr_scheduler_type": draw.choice(["linear", "constant", "cosine"]),
    }
    return kind, draw.choice(MODELS[kind]), draw.random() < 0.3, settings, recipe(draw)


class Run:
    """One drawn point: a fresh base at every call, and adapters on it that start alike."""

    def __init__(self, seed: int) -> None:
        self.kind, self.name, self.halved, self.settings, self.recipe = drawn(seed)
        self.tokens = torch.randint(3, 100, (16, 8), generator=torch.Generator().manual_seed(2))

    def __str__(self) -> str:
        on = [name for name, value in self.settings.items() if value not in (False, 0, 0.0)]
        return f"{self.name}{' in bfloat16' * self.halved}, {', '.join(on)}: {self.recipe!r}"

    def base(self) -> Any:
        model, _ = zoo.built(self.name, zoo.LANGUAGE[self.kind])
        return model.bfloat16() if self.halved else model

    def given(self, tokens: Tensor) -> dict[str, Tensor]:
        names = ("input_ids", "labels", "decoder_input_ids")
        return dict.fromkeys(names if self.kind == "SEQ_TO_SEQ_CAUSAL_LM" else names[:2], tokens)

    def attached(self) -> tuple[Any, Any]:
        model, batches = self.base(), [self.given(rows) for rows in self.tokens[:4].split(2)]
        stats = rw.collect(model, batches, self.recipe) if self.recipe.init.needs else None
        transformers.set_seed(0)
        return model, rw.attach(model, self.recipe, stats=stats)

    def trained(self, folder: Path, since: int | None = None) -> tuple[Any, Any]:
        """After all steps, those until ``since`` read from a checkpoint."""
        model, adapter = self.attached()
        settings = transformers.TrainingArguments(
            str(folder), max_steps=STEPS, save_steps=STEPS // 2, per_device_train_batch_size=2, learning_rate=1e-3,
            save_strategy="steps", report_to="none", disable_tqdm=True, use_cpu=True, seed=0, **self.settings,
        )  # fmt: skip
        trainer = rw.hf.Trainer(model, settings, train_dataset=[self.given(row) for row in self.tokens])
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            trainer.train(resume_from_checkpoint=since and str(folder / f"checkpoint-{since}"))
        trainer.accelerator.unwrap_model(model, keep_fp32_wrapper=False)
        return model, adapter

    @torch.no_grad()
    def output(self, model: Any) -> Tensor:
        return model.eval()(**self.given(self.tokens[:2])).logits.float()


def values(adapter: Any) -> dict[str, Tensor]:
    """A copy of every factor."""
    return {name: p.detach().clone() for name, p in adapter.named_parameters()}


def other(one: dict[str, Tensor], two: dict[str, Tensor]) -> list[str]:
    """The factors that differ by a bit."""
    return sorted(name for name in one.keys() | two.keys() if not torch.equal(one[name], two[name]))


def problems(run: Run) -> list[str]:
    """What does not hold for a run."""
    found = []
    with TemporaryDirectory() as place:
        folder, started = Path(place), values(run.attached()[1])
        model, adapter = run.trained(folder)
        ended = values(adapter)
        if not all(p.isfinite().all() for p in ended.values() if p.is_floating_point()):
            found.append("is not finite")
        if not other(started, ended):
            found.append("does not move")
        if off := other(ended, values(run.trained(folder, STEPS // 2)[1])):
            found.append(f"resumes to another run: {', '.join(off[:3])}")
        after, copied = run.output(model), run.base()
        with contextlib.redirect_stderr(io.StringIO()):
            adapter.save(folder / "adapter")
            loaded = rw.load(copied, folder / "adapter")
    if not torch.equal(run.output(copied), after):
        found.append("reloads to another function")
    if not run.halved and "not_mergeable" not in loaded.recipe.structure.traits:
        before = run.output(run.base())
        rw.merge(copied)
        if (run.output(copied) - after).abs().max() > 1e-4 * before.abs().max() + 1e-3 * (after - before).abs().max():
            found.append("merges to another function")
    return found


def main() -> None:
    """Print what does not hold, and the counts."""
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.random_runs", description=(__doc__ or "").split("\n")[0]
    )
    parser.add_argument("runs", nargs="?", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="seed of the first run")
    given = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    torch.set_num_threads(1)
    counts: Counter[str] = Counter()
    for seed in range(given.first, given.first + given.runs):
        run = Run(seed)
        zoo.tried(f"{seed} {run}", partial(problems, run), counts)
    print(", ".join(f"{what}: {n}" for what, n in counts.items()))


if __name__ == "__main__":
    main()
