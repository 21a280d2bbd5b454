"""How a fine-tuning run looks on a terminal."""

import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from rankwise.cli import common
from rankwise.errors import PlanError
from rankwise.hf.finetune import Listener, Result
from rankwise.hf.prepare import Prepared
from rankwise.io import FILE


class Display(Listener):
    """Stages, the plan and a progress bar on stderr; the bar is a line now and then where that is no terminal.

    Args:
        any_size: go on where the plan says that the run does not fit.
    """

    def __init__(self, any_size: bool = False) -> None:
        self.any_size = any_size
        self.first = self.begin = self.tokens = self.said = 0.0
        self.held = ""

    def doing(self, what: str) -> None:
        print(f"{what} ...", file=sys.stderr)

    def read(self, run: Any, train: Any) -> None:
        from rankwise.select import of_run

        self.doing("planning a step")
        try:
            made = of_run(run, train)
            if not self.any_size:
                made.check()
            print(made, file=sys.stderr)
        except PlanError as error:
            print(error, file=sys.stderr)

    def planned(self, prepared: Prepared) -> None:
        print(plan(prepared)[1], file=sys.stderr)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self.first, self.tokens, self.begin = state.global_step, state.num_input_tokens_seen, time.monotonic()
        if self.first:
            self.doing(f"going on from step {self.first}")

    def on_log(self, args: Any, state: Any, control: Any, logs: Any = None, **kwargs: Any) -> None:
        if "eval_loss" in logs:
            self.held = f"  validation {logs['eval_loss']:.3f}"
        now, live, ended = time.monotonic(), sys.stderr.isatty(), state.global_step == state.max_steps
        if "loss" not in logs or not (live or ended or now - self.said > 10):
            return
        self.said, passed = now, now - self.begin
        rate = (state.num_input_tokens_seen - self.tokens) / passed
        left = passed / (state.global_step - self.first) * (state.max_steps - state.global_step)
        bar = "━" * (20 * state.global_step // state.max_steps)
        line = f"{bar:<20} {state.global_step}/{state.max_steps}  loss {logs['loss']:.3f}{self.held}"
        line += f"  {rate:,.0f} tokens/s  {left:.0f} s left  "
        print(line, end="\r" if live and not ended else "\n", file=sys.stderr, flush=True)


def plan(prepared: Prepared) -> tuple[dict[str, Any], str]:
    """What will be trained, as plain values and in words."""
    adapter, report, held = prepared.adapter, prepared.report, prepared.validation
    stored = sum(p.numel() * p.element_size() for _, p in adapter.named_parameters())
    trained = sum(p.numel() * p.element_size() for p in adapter.parameters())
    found = {"method": adapter.recipe.name, "lr": prepared.lr, **asdict(report), "bytes": stored}
    found |= {"examples": len(prepared.train), "validation": 0 if held is None else len(held)}
    return found, (
        f"{report}\n{found['method']}: {common.size(stored)} on disk, {common.size(4 * trained)} with gradients and "
        f"optimizer; learning rate {prepared.lr:g}\n"
        f"{found['examples']:,} examples to learn from, {found['validation']:,} set aside"
    )


def outcome(result: Result) -> tuple[Any, ...]:
    """The end of a run: a table and what lies where."""
    own = ("the base's own text", result.own_before, result.own_after)
    file = Path(result.out) / FILE
    return (
        common.scores(("validation", result.before, result.after), own),
        f"{result.steps} steps in {result.seconds:.0f} s, {result.tokens:,} tokens; training loss {result.loss:.3f}",
        f"{file} ({common.size(file.stat().st_size)}); beside it run.yaml, metrics.jsonl and loss.png",
    )
