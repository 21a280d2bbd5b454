"""PEFT's folders: ``adapter_config.json`` and ``adapter_model.safetensors`` (or old ``.bin``).

As PEFT 0.21.2 writes and reads them: the methods of :mod:`rankwise.formats.peft.layout`, both ways.
"""

from rankwise.formats.peft.read import load
from rankwise.formats.peft.write import write

__all__ = ["load", "write"]
