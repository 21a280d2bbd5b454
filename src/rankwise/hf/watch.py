"""Checks while training: every site learns, and nothing that is not a number goes unnoticed."""

import math
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, final

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook
from torch.utils._pytree import tree_leaves
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from rankwise.activity import Routing
from rankwise.adapter import Adapters, SiteFactors
from rankwise.attachment import Adapter, adapters, registry_of
from rankwise.errors import TrainingError
from rankwise.io import gathered


def active(model: nn.Module) -> list[Adapter]:
    """The active adapters, in order.

    Raises:
        AttachError: nothing is attached.
        TrainingError: rows are routed, or no adapter is active.
    """
    choice = registry_of(model).activity.choice
    if isinstance(choice, Routing) or not choice:
        found = f"{'rows are routed' if choice else 'none is'} now, attached are {list(adapters(model))}"
        raise TrainingError(f"A trainer trains the active adapters; {found}. Call rw.set_active(model, names) first.")
    return [adapters(model)[name] for name in choice]


def trained(model: nn.Module) -> list[Adapter]:
    """The active adapters that have something to train.

    Raises:
        AttachError: nothing is attached.
        TrainingError: no adapter is active, or all of them are frozen.
    """
    found = [adapter for adapter in active(model) if list(adapter.parameters())]
    if not found:
        raise TrainingError("The active adapters are frozen: adapter.requires_grad_() makes one trainable.")
    return found


def last_good(args: Any) -> str:
    """What to do where a number is not finite: the checkpoint to go back to, and a remedy."""
    folder = str(args.output_dir)
    last = get_last_checkpoint(folder) if os.path.isdir(folder) else None
    good = f"The last good checkpoint is {last}." if last else "No checkpoint was written yet."
    return f"{good} Lower the learning rate, or look at the batch."


def _finite(value: Any) -> bool:
    return all(bool(torch.isfinite(leaf).all()) for leaf in tree_leaves(value) if isinstance(leaf, Tensor))


def first_wrong(among: Sequence[Adapter], again: Callable[[], Any]) -> str:
    """Where the NaN of a loss comes from: a factor, an activation, or the loss alone.

    Args:
        among: the adapters to look at, all on one model.
        again: runs the forward of the batch once more.

    Returns:
        The place, in words.
    """
    named = [pair for adapter in among for pair in adapter.named_parameters()]
    found = [f"factor {name} is not finite" for name, parameter in named if not _finite(parameter)]
    inside = {module: name for name, module in among[0].model.named_modules() if name}  # the model's own is the loss

    def look(module: nn.Module, inputs: Any, output: Any) -> None:
        ours = isinstance(module, Adapters | SiteFactors)
        if not found and module in inside and not ours and not _finite(output):
            found.append(f"the output of {inside[module]} is not finite")

    handle = register_module_forward_hook(look)
    try:
        with torch.no_grad():
            again()
    except Exception as error:  # a diagnosis must not hide what it explains
        found.append(f"the batch cannot be run again ({error})")
    finally:
        handle.remove()
    return found[0] if found else "every activation is finite, so it is the loss itself (is every label masked?)"


@dataclass(eq=False)
class _Factor:
    site: str
    name: str
    parameter: nn.Parameter
    users: set[str]  # the sites that have it, more than one of a shared factor
    learnt: bool = False  # whether it ever had a gradient, or need not have one


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
        self._hooks: list[Any] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the adapters that are about to be trained."""
        self._release()
        self.done, self.started = 0, False
        self.reached: set[str] = set()
        self.untouched: list[str] = []
        chosen, modules = trained(kwargs["model"]), dict(kwargs["model"].named_modules())
        self._factors = [
            _Factor(name.rpartition("/")[0], name, parameter, users[parameter], adapter.recipe.ranks.rests)
            for adapter in chosen
            for users in [_users(adapter)]
            for name, parameter in adapter.named_parameters(trainable=True)
        ]
        placements = [placement for adapter in chosen for placement in adapter.placements]
        self._hooks = [
            modules[path].register_forward_pre_hook(partial(self._reach, placement.site.name), with_kwargs=True)
            for placement in placements
            for path, _, _ in placement.carriers
        ]
        stacks = {placement.site.name: placement.site.stack for placement in placements if placement.site.stack}
        self._routed = {site: torch.zeros(stack, dtype=torch.bool) for site, stack in stacks.items()}

    def _reach(self, site: str, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        tensors = [v for v in (*args, *kwargs.values()) if isinstance(v, Tensor)]
        if module.training and (not tensors or tensors[0].numel()):
            self.reached.add(site)

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Look at the gradients before they are applied."""
        step = state.global_step + 1
        sizes = _norms([factor.parameter for factor in self._factors])
        wrong = [f.name for f, size in zip(self._factors, sizes, strict=True) if not math.isfinite(size)]
        if wrong and getattr(kwargs.get("optimizer"), "scaler", None) is None:  # a scaler skips such steps itself
            self._release()
            where = f"at step {step}, first at {wrong[-1]} (the last in the model)"
            raise TrainingError(f"The gradient became NaN or infinite {where}, and was not applied. {last_good(args)}")
        self.done += 1
        if wrong or self.done > self.steps:
            return
        alive = [factor for factor, size in zip(self._factors, sizes, strict=True) if size > 0]
        for factor in alive:
            factor.learnt = True
            self.reached.add(factor.site)
            if factor.site in self._routed:
                gradient: Any = factor.parameter.grad
                self._routed[factor.site] |= gradient.flatten(1).ne(0).any(1).cpu()
        if not self.started and (alive or not self.patient):
            self.started = True
            self._check(step, every=False)
        if self.done == self.steps:
            self._release()
            self._check(step, every=True)

    def _check(self, step: int, every: bool) -> None:
        """Raise where tokens came by and nothing is learnt: at whole sites, or with `every` in any factor."""
        alive = {site for factor in self._factors if factor.learnt for site in factor.users}
        waiting = [factor for factor in self._factors if not factor.learnt and (every or factor.site not in alive)]
        silent = dict.fromkeys(f.name if every else f.site for f in waiting if f.site in self.reached)
        if silent or not alive:
            self._release()
            whole = f"{len(self._factors)} factors" if every else f"{len({f.site for f in self._factors})} sites"
            found = f"after step {step} none came to {len(silent)} of {whole}: {', '.join([*silent][:4])}"
            causes = "masked labels (-100), a weight read past its layer's forward, reentrant checkpointing"
            raise TrainingError(
                f"Where tokens come by, gradients come back; {found}. Leave them out (--target, "
                f"Sites(exclude=...)), or look for {causes}."
            )
        idle = {site: (~routed).nonzero().flatten().tolist() for site, routed in self._routed.items() if every}
        experts = [f"{site}[{e}]" for site, numbers in idle.items() if site in alive for e in numbers]
        self.untouched = [*dict.fromkeys(factor.site for factor in waiting), *experts]
        if self.untouched:
            names = ", ".join(self.untouched[:8]) + " ..." * (len(self.untouched) > 8)
            print(f"rankwise: no token has reached {names} by step {step}", file=sys.stderr)

    def _release(self) -> None:
        for handle in self._hooks:
            handle.remove()
        self._hooks = []

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Let go of the model, and say so where nothing was learnt."""
        self._release()
        if self.done and not self.started:
            print("rankwise: no step gave any gradient, nothing was learnt", file=sys.stderr)


def _users(adapter: Adapter) -> dict[Tensor, set[str]]:
    """The sites that have each factor."""
    found: dict[Tensor, set[str]] = {}
    for site, factors in adapter.sites.items():
        for parameter in factors.factors().values():
            found.setdefault(parameter, set()).add(site)
    return found


def _norms(parameters: Sequence[nn.Parameter]) -> list[float]:
    """The norm of each gradient, 0 where there is none; sharded ones are gathered."""
    learning = [p for p in parameters if p.grad is not None]
    norms: Any = torch._foreach_norm([p.grad for p in learning if p.grad is not None])
    whole = [gathered(n).float() for n in norms]
    found = dict(zip(learning, torch.stack(whole).tolist() if whole else [], strict=True))
    return [found.get(p, 0.0) for p in parameters]
