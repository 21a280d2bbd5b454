"""How perturbations act: around a forward with its backward."""

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

from torch import Tensor, nn

from rankwise.penalties.penalty import Perturbation, Trained


def perturbed(adapters: Sequence[Trained], run: Callable[[], Tensor], step: int) -> Tensor:
    """Take ``run``, a forward with its backward, where the recipes' perturbations put the weights.

    Args:
        adapters: that are trained.
        run: forward and backward; returns the loss.
        step: optimizer steps done.

    Returns:
        What ``run`` returned there.
    """
    parameters = [p for a in adapters for site in a.sites.values() for p in site.own().values() if p.requires_grad]

    def gradients() -> dict[nn.Parameter, Tensor]:
        kept = [p.grad for p in parameters]
        for p in parameters:
            p.grad = None
        run()
        found = {p: p.grad for p in parameters if p.grad is not None}
        for p, grad in zip(parameters, kept, strict=True):
            p.grad = grad
        return found

    with ExitStack() as undo:
        for adapter in adapters:
            for rule in (p for p in adapter.recipe.penalties if isinstance(p, Perturbation)):
                undo.enter_context(rule.moved(adapter, gradients, step))
        return run()


def backward(adapter: Any, loss: Callable[[], Tensor], step: int) -> Tensor:
    """Gradients of a loss as the adapter's recipe has it: with its penalties, and where these want them taken.

    For a loop of your own, in place of ``loss.backward()``.

    Args:
        adapter: that is trained.
        loss: runs the model and returns the loss.
        step: optimizer steps done.

    Returns:
        The loss with its penalties, detached.
    """

    def run() -> Tensor:
        found = loss()
        found.backward()
        penalty = adapter.penalty(step)  # by itself, when the graph of the loss is gone
        if isinstance(penalty, Tensor):
            penalty.backward()
            found = found + penalty
        return found.detach()

    return perturbed([adapter], run, step)
