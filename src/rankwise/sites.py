"""The sites axis: where adapters go. Patterns are values; what they match is shown before use."""

from __future__ import annotations

import fnmatch
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias, final, get_args

from torch import nn

from rankwise.errors import IncompatibleAxes
from rankwise.structures import Structure

ROLES = ("all-linear", "all-conv", "attention", "mlp", "head", "embedding")
Pattern: TypeAlias = "str | re.Pattern[str] | type[nn.Module] | Target"
Match: TypeAlias = Literal["suffix", "glob", "regex", "class", "role"]


@final
@dataclass(frozen=True)
class Target:
    """One pattern.

    Attributes:
        pattern: the text.
        match: how it is read. "suffix": the end of the name, at a dot; "glob": the whole name with
            ``*`` and ``?``; "regex": the whole name; "class": a class name of the module;
            "role": one of "all-linear", "all-conv", "attention", "mlp", "head", "embedding".
        optional: whether it may match nothing.
    """

    pattern: str
    match: Match = "suffix"
    optional: bool = False

    def __post_init__(self) -> None:
        if self.match not in get_args(Match):
            raise IncompatibleAxes(f'Target.match is one of {get_args(Match)}; found "{self.match}".')
        if self.match == "role" and self.pattern not in ROLES:
            raise IncompatibleAxes(f'A role is one of {ROLES}; found "{self.pattern}".')
        if self.match == "regex":
            try:
                re.compile(self.pattern)
            except re.error as error:
                raise IncompatibleAxes(
                    f"A regex target is a regular expression; {self.pattern!r} is none ({error})."
                ) from error

    @classmethod
    def of(cls, value: Pattern) -> Target:
        """A pattern from what users write: a role, a name's end, a glob, a compiled regex, a class.

        Examples:
            >>> Target.of("q_proj").match, Target.of("*.mlp.*").match, Target.of("mlp").match
            ('suffix', 'glob', 'role')
        """
        if isinstance(value, Target):
            return value
        if isinstance(value, re.Pattern):
            flags = "".join(c for c in "aimsx" if value.flags & re.RegexFlag[c.upper()])
            return cls(f"(?{flags}){value.pattern}" if flags else value.pattern, "regex")
        if isinstance(value, type):
            return cls(value.__name__, "class")
        if not isinstance(value, str):
            raise IncompatibleAxes(f"A pattern is text, a compiled regex, a module class or a Target; found {value!r}.")
        if value in ROLES:
            return cls(value, "role")
        return cls(value, "glob" if any(c in value for c in "*?[") else "suffix")

    def accepts(self, name: str, classes: Sequence[str], roles: Sequence[str]) -> bool:
        """Whether a candidate of this name, these class names and roles is meant."""
        if self.match == "role":
            return self.pattern in roles
        if self.match == "class":
            return self.pattern in classes
        if self.match == "regex":
            return re.fullmatch(self.pattern, name) is not None
        if self.match == "glob":
            return fnmatch.fnmatchcase(name, self.pattern)
        return name == self.pattern or name.endswith("." + self.pattern)

    def __str__(self) -> str:
        text = self.pattern if self.match in ("suffix", "glob", "role") else (f"{self.match} {self.pattern}")
        return f"{text} (optional)" if self.optional else text


def _targets(values: Pattern | Sequence[Pattern]) -> tuple[Target, ...]:
    if isinstance(values, str | re.Pattern | type | Target):
        values = (values,)
    if not isinstance(values, Iterable):
        raise IncompatibleAxes(f"Targets are a pattern or several; found {values!r}.")
    return tuple(Target.of(v) for v in values)


@final
@dataclass(frozen=True)
class Override:
    """Another structure, or other values of its fields, where a pattern matches.

    Attributes:
        target: where.
        structure: the structure to use there, or None to change fields of the recipe's.
        changes: fields of the innermost structure, for example ``(("rank", 4),)``.
    """

    target: Target
    structure: Structure | None = None
    changes: tuple[tuple[str, Any], ...] = ()

    @classmethod
    def of(cls, pattern: Pattern, value: Structure | Mapping[str, Any]) -> Override:
        """An override as users write it."""
        if isinstance(value, Structure):
            return cls(Target.of(pattern), value)
        return cls(Target.of(pattern), None, tuple(sorted(value.items())))


@final
@dataclass(frozen=True)
class Sites:
    """Where adapters go, and what else is trained with them.

    Attributes:
        targets: patterns (see :class:`Target`); by default every linear layer but the output head.
        exclude: patterns that are left out.
        layers: indices of the blocks to adapt, or None for all; modules outside of blocks are then
            left out.
        overrides: pattern -> structure, or -> fields to change ({"rank": 4}); the first match wins.
        train: patterns of modules and parameters to train whole (a new classification head); they
            become part of the adapter and the base keeps its own. A bias that a layer has not is
            meant by its full name only.
        tokens: embedding pattern -> token ids whose rows are trained as part of the adapter.
        parts: fused projection pattern -> names of its parts to adapt, ("q", "v") of a qkv,
            ("gate",) of a gate_up, or (name, first row, last row + 1).
        tied: what to do at an embedding whose weight the output head shares: "refuse", "tie" (one
            adapter, used transposed by the head) or "untie" (the head gets a copy of its own).
    """

    targets: Any = "all-linear"
    exclude: Any = ()
    layers: tuple[int, ...] | None = None
    overrides: Any = ()
    train: Any = ()
    tokens: Any = ()
    parts: Any = ()
    tied: Literal["refuse", "tie", "untie"] = "refuse"

    def __post_init__(self) -> None:
        put = lambda name, value: object.__setattr__(self, name, value)  # noqa: E731
        for name in ("targets", "exclude", "train"):
            put(name, _targets(getattr(self, name)))
        if self.layers is not None:
            if isinstance(self.layers, int):
                raise IncompatibleAxes(
                    f"Layers are several indices; found one, {self.layers}. Write layers=({self.layers},)."
                )
            put("layers", tuple(self.layers))
        if isinstance(self.overrides, Mapping):
            put("overrides", tuple(Override.of(k, v) for k, v in self.overrides.items()))
        for name in ("tokens", "parts"):
            if isinstance(value := getattr(self, name), Mapping):
                put(name, tuple((Target.of(k), tuple(v)) for k, v in value.items()))
        if self.tied not in ("refuse", "tie", "untie"):
            raise IncompatibleAxes(f'Sites.tied is "refuse", "tie" or "untie"; found "{self.tied}".')
        if not (self.targets or self.train or self.tokens):
            raise IncompatibleAxes("An adapter needs somewhere to go: targets, train or tokens; found none of them.")
