"""Which adapters are active: one choice a model, captured by every forward it governs.

The choice is a tuple of adapter names, in order of application, or a :class:`Routing` of batch
rows. A forward that autograd runs again inside ``backward()`` (activation checkpointing) must use
the choice of the first run, though the user may have left ``set_active`` since. Non-reentrant
checkpointing keeps the first run's graph alive, so each adapted output ties its choice to its
graph node; reentrant checkpointing keeps none, so choices made without gradient are remembered
until a re-run resolves them. Where two choices are possible, the re-run raises.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor

from rankwise.errors import ActivityError


@dataclass(frozen=True)
class Routing:
    """An adapter for each row of the batch; None is the base model.

    Attributes:
        rows: adapter name or None, one a row of the batch (dim 0 of every adapted layer's input).
    """

    rows: tuple[str | None, ...]


Choice: TypeAlias = tuple[str, ...] | Routing


class _Token:
    """Lives as long as the graph node of an adapted output, and remembers its choice."""

    def __init__(self, choice: Choice) -> None:
        self.choice = choice


class Activity:
    """The model's current choice, and who may change it."""

    def __init__(self) -> None:
        self.choice: Choice = ()
        self.tokens_a_row = 0  # of a routed batch, by the last layer that saw rows
        self.may_checkpoint = True  # False where gradients were off when the context was opened
        self.depth = 0
        self.thread: int | None = None

    def __deepcopy__(self, memo: dict[int, Any]) -> Activity:
        copy = Activity()
        copy.choice = self.choice
        return copy

    def check_thread(self) -> None:
        """Refuse a second thread while a context is open.

        Raises:
            ActivityError: another thread holds the choice.
        """
        if self.depth and self.thread != threading.get_ident():
            raise ActivityError(
                "The choice of active adapters belongs to one thread at a time; another is inside set_active, disabled "
                "or route on this model. Leave that context first, or give each thread a copy.deepcopy of the model."
            )


class Record:
    """The choices one site's forwards were run with, for the re-runs inside backward."""

    def __init__(self) -> None:
        self.tokens: weakref.WeakSet[_Token] = weakref.WeakSet()
        self.without_graph: set[Choice] = set()

    def __reduce__(self) -> tuple[type[Record], tuple[()]]:
        return Record, ()

    def choose(self, activity: Activity) -> Choice:
        """The choice for the forward that is about to run.

        Raises:
            ActivityError: a re-run inside backward whose first run cannot be told apart.
        """
        if torch.compiler.is_compiling():
            return activity.choice
        if torch._C._current_graph_task_id() == -1:
            activity.check_thread()
            return activity.choice
        node = torch._C._current_autograd_node()
        reentrant = node is not None and "CheckpointFunction" in node.name()
        found = self.without_graph if reentrant else {t.choice for t in self.tokens}
        if len(found) > 1:
            raise ActivityError(
                f"Activation checkpointing runs a layer again inside backward(), with the adapters of its first run; "
                f"here these may have been {sorted(map(str, found))}. Pass use_reentrant=False to checkpoint; call "
                f"backward() before the next forward with other adapters, and drop the other loss first (del loss); "
                f"and where there is no backward, open torch.no_grad() outside of disabled() or set_active()."
            )
        choice = next(iter(found), activity.choice)
        if reentrant:
            self.without_graph = {choice}
        return choice

    def note(self, choice: Choice, activity: Activity, y: Tensor) -> None:
        """Remember the choice that gave y."""
        if torch.compiler.is_compiling() or torch._C._current_graph_task_id() != -1:
            return
        if y.grad_fn is not None:
            metadata: Any = y.grad_fn.metadata  # a dict that lives as long as the node
            token = _Token(choice)
            metadata.setdefault("rankwise", []).append(token)  # of several layers, where a loss ends them all
            self.tokens.add(token)
        elif not torch.is_grad_enabled() and activity.may_checkpoint:
            self.without_graph.add(choice)


class Chosen:
    """Make a choice now; as a context manager, restore the former one at the end.

    Like ``torch.set_grad_enabled``: the call alone already sets it.
    """

    def __init__(self, activity: Activity, choice: Choice) -> None:
        activity.check_thread()
        self._activity = activity
        self._former = (activity.choice, activity.may_checkpoint)
        activity.choice = choice

    def __enter__(self) -> None:
        self._activity.depth += 1
        self._activity.thread = threading.get_ident()
        self._activity.may_checkpoint = torch.is_grad_enabled()

    def __exit__(self, *error: object) -> None:
        activity = self._activity
        activity.choice, activity.may_checkpoint = self._former
        activity.depth -= 1


def normalise(names: str | Sequence[str] | None) -> tuple[str, ...]:
    """Names as a tuple: None is no adapter, a string one."""
    return (names,) if isinstance(names, str) else tuple(names or ())
