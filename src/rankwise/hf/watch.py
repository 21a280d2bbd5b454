"""Checks while training: every site learns, and nothing that is not a number goes unnoticed."""

from __future__ import annotations

import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, final

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from rankwise.activity import Routing
from rankwise.adapter import Adapters, SiteFactors
from rankwise.attach import Adapter, adapters, registry_of
from rankwise.errors import TrainingError


def active(model: nn.Module) -> list[Adapter]:
    """The active adapters, in order.

    Raises:
        AttachError: nothing is attached.
        TrainingError: rows are routed, or no adapter is active.
    """
    choice = registry_of(model).activity.choice
    if isinstance(choice, Routing) or not choice:
        raise TrainingError(
            f"A trainer trains the active adapters; {'rows are routed' if choice else 'none is'} "
            f"now, attached are {list(adapters(model))}. Call rw.set_active(model, names) first."
        )
    return [adapters(model)[name] for name in choice]


def trained(model: nn.Module) -> list[Adapter]:
    """The active adapters that have something to train.

    Raises:
        AttachError: nothing is attached.
        TrainingError: no adapter is active, or all of them are frozen.
    """
    found = [adapter for adapter in active(model) if any(True for _ in adapter.parameters())]
    if not found:
        raise TrainingError(
            "The active adapters are frozen: rw.load(..., trainable=True), or "
            "adapter.requires_grad_(), makes one trainable."
        )
    return found


def last_good(args: Any) -> str:
    """A sentence about the checkpoint to go back to."""
    folder = str(args.output_dir)
    last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    return f"The last good checkpoint is {last}." if last else "No checkpoint was written yet."


def _finite(value: Any) -> bool:
    if isinstance(value, Tensor):
        return not value.is_floating_point() or bool(torch.isfinite(value).all())
    if isinstance(value, Mapping):
        value = value.values()
    elif not isinstance(value, tuple | list):
        return True
    return all(_finite(v) for v in value)


def first_wrong(among: Sequence[Adapter], again: Callable[[], Any]) -> str:
    """Where the NaN of a loss comes from: a factor, an activation, or the loss alone.

    Args:
        among: the adapters to look at, all on one model.
        again: runs the forward of the batch once more.

    Returns:
        The place, in words.
    """
    for adapter in among:
        for name, parameter in adapter.named_parameters():
            if not _finite(parameter.detach()):
                return f"factor {name} is not finite"
    found: list[str] = []

    def look(name: str) -> Callable[..., None]:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            if not found and not _finite(output):
                found.append(name)

        return hook

    hooks = [
        module.register_forward_hook(look(name))
        for name, module in among[0].model.named_modules()
        if name and not isinstance(module, Adapters | SiteFactors)  # the model's own holds the loss
    ]
    try:
        with torch.no_grad():
            again()
    except Exception as error:  # a diagnosis must not hide what it explains
        found.append(f"(the batch cannot be run again: {error})")
    finally:
        for handle in hooks:
            handle.remove()
    if found:
        return f"the output of {found[0]} is not finite"
    return "every activation is finite, so it is the loss itself (is every label masked?)"


@final
class Watch(TrainerCallback):
    """Stops a run that would silently train nothing, or go on with NaN.

    After the first optimizer step, each site that tokens reached has a factor with a finite,
    non-zero gradient; after ``steps`` of them each trainable factor had one. Sites that no token
    reached (experts that were never routed to) are listed on stderr, not refused. Gradients that
    are not finite stop the run at any step, before they are applied. ``rw.hf.Trainer`` has one
    already; give it to any other trainer as a callback.

    Args:
        steps: after how many optimizer steps every factor must have had a gradient.
        patient: a first step without any gradient is no error: rewards may all have been equal.
    """

    def __init__(self, steps: int = 50, patient: bool = False) -> None:
        self.steps, self.patient = steps, patient
        self.done = 0
        self.started = False
        self.reached: set[str] = set()
        self.untouched: list[str] = []
        self._parameters: list[tuple[str, str, nn.Parameter]] = []
        self._waiting: set[str] = set()
        self._stacked: set[str] = set()
        self._experts: dict[str, Tensor] = {}
        self._hooks: dict[str, list[Any]] = {}

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the adapters that are about to be trained."""
        self._release()
        self.done, self.started, self.reached, self.untouched = 0, False, set(), []
        model, self._parameters, self._experts = kwargs["model"], [], {}
        modules = dict(model.named_modules())
        for adapter in trained(model):
            for name, parameter in adapter.named_parameters(trainable=True):
                self._parameters.append((name.rpartition("/")[0], name, parameter))
            for placement in adapter.placements:
                hook = self._look(placement.site.name)
                self._hooks.setdefault(placement.site.name, []).extend(
                    modules[path].register_forward_pre_hook(hook, with_kwargs=True) for path, _, _ in placement.carriers
                )
                if placement.site.stack:
                    self._stacked.add(placement.site.name)
        self._waiting = {name for _, name, _ in self._parameters}

    def _look(self, site: str) -> Callable[..., None]:
        def hook(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
            if module.training and (not tensors or tensors[0].numel()):
                self.reached.add(site)

        return hook

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the gradients before they are applied."""
        with_gradient = [item for item in self._parameters if item[2].grad is not None]
        sizes: list[float] = []
        if with_gradient:
            norms = torch._foreach_norm([p.grad for _, _, p in with_gradient if p.grad is not None])
            whole = [n.full_tensor() if hasattr(n, "full_tensor") else n for n in norms]  # type: ignore
            sizes = torch.stack([n.float() for n in whole]).tolist()
        looked = list(zip(with_gradient, sizes, strict=True))
        wrong = [item[1] for item, size in looked if not math.isfinite(size)]
        if wrong and getattr(kwargs.get("optimizer"), "scaler", None) is None:  # a scaler skips such steps itself
            self._release()
            raise TrainingError(
                f"The gradient became NaN or infinite at step {state.global_step + 1}, first at "
                f"{wrong[-1]} (of {len(wrong)} factors; gradients flow from the last site to the "
                f"first), and was not applied. {last_good(args)} "
                f"Lower the learning rate, or look at the batch."
            )
        self.done += 1
        if wrong or self.done > self.steps:
            return
        alive = [item for item, size in looked if size > 0]
        self._waiting -= {name for _, name, _ in alive}
        for site, _, parameter in alive:
            if site in self._stacked and parameter.grad is not None:
                routed = parameter.grad.detach().flatten(1).ne(0).any(1)
                self._experts[site] = self._experts.get(site, routed) | routed
        if not self.started and (alive or not self.patient):
            self.started = True
            self._check_sites(state.global_step + 1, {site for site, _, _ in alive})
        if self.done == self.steps:
            self._check_factors(state.global_step + 1)

    def _check_sites(self, step: int, alive: set[str]) -> None:
        sites = dict.fromkeys(site for site, _, _ in self._parameters)
        silent = [site for site in sites if site not in alive and site in self.reached]
        self._release(alive)
        if silent or not alive:
            self._release()
            raise TrainingError(
                f"Every site learns from step one; after step {step} no factor has a gradient at "
                f"{len(silent)} of {len(sites)} sites: {', '.join(silent[:4])}. The usual causes: "
                f"every label is masked (-100), the layer runs under no_grad or is read past its "
                f"forward, or reentrant activation checkpointing with frozen inputs "
                f"(use_reentrant=False)."
            )
        self._list([site for site in sites if site not in alive], step)

    def _check_factors(self, step: int) -> None:
        self._release()
        idle = [s for s in dict.fromkeys(s for s, _, _ in self._parameters) if self._idle(s)]
        missing = [name for site, name, _ in self._parameters if name in self._waiting and site not in idle]
        if missing:
            raise TrainingError(
                f"After {self.steps} steps every trainable factor has had a gradient; "
                f"{len(missing)} had none by step {step}: {', '.join(missing[:4])}. Freeze them "
                f"(parameter.requires_grad_(False)), or leave these sites out."
            )
        experts = [
            f"{site}[{e}]" for site, routed in self._experts.items() for e in (~routed).nonzero().flatten().tolist()
        ]
        self._list(idle + experts, step)

    def _idle(self, site: str) -> bool:
        return site not in self.reached and all(name in self._waiting for s, name, _ in self._parameters if s == site)

    def _list(self, untouched: list[str], step: int) -> None:
        self.untouched = untouched
        if untouched:
            more = f" and {len(untouched) - 8} more" if len(untouched) > 8 else ""
            print(f"rankwise: no token has reached {', '.join(untouched[:8])}{more} by step {step}", file=sys.stderr)

    def _release(self, sites: Iterable[str] | None = None) -> None:
        for site in list(self._hooks) if sites is None else sites:
            for handle in self._hooks.pop(site, ()):
                handle.remove()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the model, and say so where nothing was learnt."""
        self._release()
        if self.done and not self.started:
            print("rankwise: no step gave any gradient, nothing was learnt", file=sys.stderr)
