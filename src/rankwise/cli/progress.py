"""How a fine-tuning run looks on a terminal."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

from rankwise.cli import common
from rankwise.hf.finetune import Listener, Prepared, Result


class Display(Listener):
    """Stages, the plan, and a progress bar (or a line now and then where there is no terminal)."""

    def __init__(self, as_json: bool = False) -> None:
        self.console = common.console(stderr=True)
        self.as_json = as_json
        self.bar: Any = None
        self.steps = self.first = 0
        self.begin = self.said = 0.0
        self.held = ""

    def doing(self, what: str) -> None:
        self._close()
        self.console.print(f"[dim]{what} ...[/]")

    def planned(self, prepared: Prepared, stdout: bool = False) -> None:
        """Show what will be trained."""
        if self.as_json:
            if stdout:
                common.print_json(plan(prepared))
            return
        console = common.console() if stdout else self.console
        report, facts = prepared.report, plan(prepared)
        rows = [
            (r.pattern, f"{r.count:,}", f"{r.parameters:,}", ", ".join(r.examples[:2]) + " ...") for r in report.rows
        ]
        console.print(common.table(("pattern", "sites", "parameters", "such as"), rows))
        share = facts["parameters"] / max(1, facts["model_parameters"])
        console.print(
            f"[bold]{facts['method']}[/]: {facts['sites']} sites, {facts['parameters']:,} trained "
            f"parameters ({share:.2%} of the model), "
            f"{common.size(facts['bytes'])} on disk, {common.size(facts['training_bytes'])} with "
            f"gradients and optimizer; learning rate {facts['lr']:g}"
        )
        aside = f", {facts['validation']:,} set aside" if facts["validation"] else ""
        console.print(f"{facts['examples']:,} examples to learn from{aside}\n", soft_wrap=True)

    def began(self, step: int, steps: int) -> None:
        from rich import progress as rp

        self._close()
        self.steps, self.first, self.begin, self.said = steps, step, time.monotonic(), 0.0
        if step:
            self.console.print(f"going on from step {step}")
        if not self.console.is_terminal:
            return
        columns = (
            rp.TextColumn("training"),
            rp.BarColumn(bar_width=None),
            rp.MofNCompleteColumn(),
            rp.TextColumn("{task.fields[note]}"),
            rp.TimeRemainingColumn(elapsed_when_finished=True),
        )
        self.bar = rp.Progress(*columns, console=self.console)
        self.bar.start()
        self.bar.add_task("training", total=steps, completed=step, note="")

    def stepped(self, step: int, loss: float | None, rate: float) -> None:
        note = f"loss {loss:.3f}{self.held}  {rate:,.0f} tokens/s"
        if self.bar is not None:
            self.bar.update(0, completed=step, note=note)
            if step == self.steps:
                self._close()
            return
        now = time.monotonic()
        if step in (self.first + 1, self.steps) or now - self.said > 10:
            self.said = now
            left = (now - self.begin) / max(1, step - self.first) * (self.steps - step)
            self.console.print(f"step {step}/{self.steps}  {note}  {left:.0f} s left")

    def validated(self, step: int, loss: float) -> None:
        self.held = f"  validation {loss:.3f}"

    def _close(self) -> None:
        if self.bar is not None:
            self.bar.stop()
            self.bar = None


def plan(prepared: Prepared) -> dict[str, Any]:
    """What will be trained, as plain values."""
    trained = list(prepared.adapter.parameters())
    weights = sum(p.numel() * p.element_size() for p in trained)
    ours = {id(p) for _, p in prepared.adapter.named_parameters()}
    return {
        "method": prepared.adapter.recipe.name,
        "sites": len(prepared.adapter),
        "parameters": sum(p.numel() for p in trained),
        "model_parameters": sum(_count(p) for p in prepared.model.parameters() if id(p) not in ours),
        "bytes": sum(p.numel() * p.element_size() for _, p in prepared.adapter.named_parameters()),
        "training_bytes": 4 * weights,  # weights, gradients, two moments
        "lr": prepared.lr,
        "examples": len(prepared.train),
        "validation": len(prepared.validation) if prepared.validation is not None else 0,
        "patterns": [
            {"pattern": r.pattern, "sites": r.count, "parameters": r.parameters} for r in prepared.report.rows
        ],
    }


def _count(parameter: Any) -> int:
    state = getattr(parameter, "quant_state", None)
    return state.shape.numel() if state is not None else parameter.numel()


def scores_table(rows: list[tuple[str, dict[str, float] | None, dict[str, float] | None]]) -> Any:
    """Scores before and after, a row a measure."""
    cells = []
    for where, before, after in rows:
        for key in (before or {}) if after else ():
            if key in ("tokens", "rows"):
                continue
            one, two = (before or {})[key], (after or {})[key]
            name = f"{where}: {key.replace('_', ' ')}"
            cells.append((name, f"{one:.4f}", f"{two:.4f}", f"{two - one:+.4f}"))
    return common.table(("", "base", "adapted", "change"), cells)


def show_result(result: Result) -> None:
    """The end of a run, on stdout."""
    console = common.console()
    rows = [("validation", result.before, result.after)]
    if result.own_after:
        rows.append(("the base's own text", result.own_before, result.own_after))
    if any(after for _, _, after in rows):
        console.print(scores_table(rows))
    rate = result.tokens / max(result.seconds, 1e-9)
    loss = f"; training loss {result.loss:.3f} at the end" if result.loss is not None else ""
    console.print(f"{result.steps} steps in {result.seconds:.0f} s ({rate:,.0f} tokens/s){loss}", soft_wrap=True)
    files = ", ".join(("run.yaml", "metrics.jsonl", "loss.png"))
    console.print(
        f"[bold]{Path(result.out) / 'adapter.safetensors'}[/] ({common.size(result.file_bytes)}); beside it {files}",
        soft_wrap=True,
    )
