"""The bridge to transformers, TRL and accelerate; nothing heavy is imported before it is used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.hf import data
    from rankwise.hf.deferred import deferred_logits
    from rankwise.hf.references import reference
    from rankwise.hf.trainer import AdapterMixin, Trainer
    from rankwise.hf.watch import Watch

__all__ = ["AdapterMixin", "Trainer", "Watch", "data", "deferred_logits", "reference"]

# in which module each lies; one of the name "reference" would hide the function
_HOME = {
    "AdapterMixin": "trainer",
    "Trainer": "trainer",
    "Watch": "watch",
    "data": "data",
    "deferred_logits": "deferred",
    "reference": "references",
}


def __getattr__(name: str) -> Any:
    if name not in _HOME:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_HOME[name]}")
    return getattr(module, name, module)  # data is the module itself
