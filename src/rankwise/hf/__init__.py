"""The bridge to transformers, TRL and accelerate; nothing heavy is imported before it is used."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from rankwise.hf import data
    from rankwise.hf.references import reference
    from rankwise.hf.trainer import AdapterMixin, Trainer
    from rankwise.hf.watch import Watch

__all__ = ["AdapterMixin", "Trainer", "Watch", "data", "reference"]

_HOME = {
    "AdapterMixin": "trainer",
    "Trainer": "trainer",
    "Watch": "watch",
    "reference": "references",  # a module of that name would hide the function
}


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    module = import_module(f"{__name__}.{_HOME.get(name, name)}")
    value = getattr(module, name) if name in _HOME else module
    globals()[name] = value
    return value
