"""k adapters trained together, each on b rows of one batch, against one adapter on all k b rows."""

from collections.abc import Callable, Sequence
from dataclasses import asdict, replace
from typing import Any

import torch

import rankwise as rw
from benchmarks import models
from benchmarks.life import rows
from benchmarks.models import Case
from benchmarks.paired import measure


def together_cell(case: Case, k: int, rounds: int) -> dict[str, Any]:
    """Forward, backward and optimiser; ``case.batch`` is k b."""
    torch.set_num_threads(case.threads)
    b = case.batch // k
    base = models.llama(case)
    whole, part = models.batch(case), models.batch(replace(case, batch=b))
    recipe = models.recipe(case, "lora")

    one = models.twin(base)
    alone = rw.attach(one, recipe).optimizer()
    step_one = models.stepper(one, whole)

    def single() -> None:
        step_one()
        alone.step()

    def routed(shared: bool) -> Callable[[], object]:
        model = models.twin(base)
        adapters = [rw.attach(model, recipe, f"a{i}") for i in range(k)]
        names = [a.name for a in adapters for _ in range(b)]
        if shared:
            made = [recipe.solver([site for a in adapters for site in a.sites.values()], recipe.lr)]
        else:
            made = [a.optimizer() for a in adapters]
        step = models.stepper(model, whole)

        def run() -> None:
            with rw.route(model, names):
                step()
            for optimizer in made:
                optimizer.step()

        return run

    def apart() -> Callable[[], object]:
        found = []
        for _ in range(k):
            model = models.twin(base)
            adapter = rw.attach(model, recipe)
            found.append((models.stepper(model, part), adapter.optimizer()))

        def run() -> None:
            for step, optimizer in found:
                step()
                optimizer.step()

        return run

    found = {"one": single, "together": routed(False), "together, one optimizer": routed(True), "apart": apart()}
    seen = measure(found, rounds)
    return {"case": asdict(case), "k": k, "b": b, **rows(seen, {name: "one" for name in found if name != "one"})}


def run(quick: bool, device: str, threads: list[int], dtypes: Sequence[str]) -> list[dict[str, Any]]:
    """All cells."""
    if quick:
        return [together_cell(Case(128, layers=2, batch=4, tokens=32, device=device), 4, 5)]
    cases = [
        Case(hidden, dtype, batch=8 * b, tokens=64 // b, threads=n, device=device)
        for n in threads
        for hidden, dtype, b in ((256, "float32", 1), (256, "float32", 2), (512, "float32", 1), (256, "bfloat16", 1))
        if dtype in dtypes
    ]
    return [together_cell(case, 8, 31) for case in cases]
