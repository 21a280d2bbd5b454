"""What a method of the catalogue is held against: its paper's equation, in NumPy alone."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

Array = np.ndarray
Arrays = Mapping[str, Array]


@dataclass(frozen=True)
class Reference:
    """A method as its paper has it.

    Attributes:
        weight: (W, factors, options) -> the adapted weight, W (out, in) in float64; factors by our names, options those
            of the recipe with its defaults; None for a map that is not linear.
        count: (out, in, options) -> trained numbers of a layer, the documented formula.
        source: authors, year, arXiv id, number of the equation.
        options: of the recipe, small enough for layers of 16 to 32.
        more: further options to try, each as ``options``.
        output: (x, factors, options) -> the output for rows x (tokens, in), of a map that has no weight.
    """

    weight: Callable[[Array, Arrays, Mapping[str, Any]], Array] | None
    count: Callable[[int, int, Mapping[str, Any]], int]
    source: str
    options: Mapping[str, Any] = field(default_factory=dict)
    more: tuple[Mapping[str, Any], ...] = ()
    output: Callable[[Array, Arrays, Mapping[str, Any]], Array] | None = None
