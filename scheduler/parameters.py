"""What parameters a policy takes: read from the signature of its class or function, and the check of given values."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

from scheduler.errors import PolicyError, did_you_mean

PLAIN_TYPES: tuple[type, ...] = (bool, int, float, str)


@dataclass(frozen=True, slots=True)
class Within:
    """The range of a number, both ends included: ``alpha: Annotated[float, Within(0.0, 1.0)] = 0.1``."""

    low: float = -math.inf
    high: float = math.inf


@dataclass(frozen=True, slots=True)
class Parameter:
    """One keyword of a policy. ``types``: which of PLAIN_TYPES a value may have; ``choices``: which texts, if any."""

    name: str
    types: tuple[type, ...]
    default: Any = None
    within: Within = Within()
    choices: tuple[str, ...] = ()
    optional: bool = False

    def check(self, policy: str, value: Any) -> Any:
        """``value`` where it is one of this parameter, an integer also where a float is. Raises PolicyError."""
        if value is None and self.optional:
            return None
        if type(value) is int and int not in self.types and float in self.types:
            value = float(value)
        fits = type(value) in self.types and (not self.choices or value in self.choices)
        if fits and type(value) in (int, float):
            fits = self.within.low <= value <= self.within.high
        if not fits:
            raise PolicyError(f"{policy}: {self.name} must be {self.expected}, found {value!r}")
        return value

    @property
    def expected(self) -> str:
        """Type and range in words: "a float in [0, 1]"."""
        words = {bool: "true or false", int: "an integer", float: "a float", str: "a text"}
        found = " or ".join(map(repr, self.choices) if self.choices else (words[t] for t in self.types))
        low, high = self.within.low, self.within.high
        if math.isfinite(low) and math.isfinite(high):
            found += f" in [{low:g}, {high:g}]"
        elif math.isfinite(low):
            found += f" of at least {low:g}"
        elif math.isfinite(high):
            found += f" of at most {high:g}"
        return found + (", or null" if self.optional else "")


def read_parameters(policy: str, maker: Callable[..., Any], first: int = 1) -> dict[str, Parameter]:
    """The parameters of a policy's class or function by name: all arguments but the ``first`` ones.

    Raises PolicyError for one without a default or without a type that a command line can give.
    """
    owner = maker.__init__ if isinstance(maker, type) else maker  # type: ignore[misc]
    try:
        hints = get_type_hints(owner, include_extras=True)
    except NameError as error:
        raise PolicyError(f"policy {policy}: its types cannot be read: {error}") from error
    given = list(inspect.signature(maker).parameters.values())[first:]
    return {argument.name: _parameter(policy, argument, hints) for argument in given}


def check_values(policy: str, known: Mapping[str, Parameter], values: Mapping[str, Any]) -> dict[str, Any]:
    """``values`` with numbers as the parameters want them. Raises PolicyError for a wrong or unknown one."""
    for name in values:
        if name not in known:
            raise PolicyError(f"policy {policy}: unknown parameter {name!r}{did_you_mean(name, known)}")
    return {name: known[name].check(policy, value) for name, value in values.items()}


def _parameter(policy: str, argument: inspect.Parameter, hints: Mapping[str, Any]) -> Parameter:
    name, kind = argument.name, argument.kind
    if kind in (argument.VAR_POSITIONAL, argument.VAR_KEYWORD, argument.POSITIONAL_ONLY):
        raise PolicyError(f"policy {policy}: argument {argument} has no name to be set by; give each parameter one")
    if argument.default is argument.empty:
        raise PolicyError(f"policy {policy}: parameter {name} needs a default")
    types, choices, within = _read_type(hints.get(name))
    plain = tuple(t for t in types if t is not NoneType)
    if not plain or any(t not in PLAIN_TYPES for t in plain):
        raise PolicyError(
            f"policy {policy}: parameter {name} must have a type: bool, int, float, str, a Literal of texts, or one of "
            f"these or None; found {hints.get(name, 'none')}"
        )
    found = Parameter(name, plain, argument.default, within, choices, NoneType in types)
    found.check(f"policy {policy}, default", argument.default)
    return found


def _read_type(hint: Any) -> tuple[tuple[Any, ...], tuple[str, ...], Within]:
    """(types, choices, range) of an annotation; no types where there is none that is known."""
    origin = get_origin(hint)
    if origin is Annotated:
        inner, *notes = get_args(hint)
        types, choices, _ = _read_type(inner)
        return types, choices, next((note for note in notes if isinstance(note, Within)), Within())
    if origin is Literal:
        return tuple({type(value) for value in get_args(hint)}), get_args(hint), Within()
    if origin in (Union, UnionType):
        parts = [_read_type(part) for part in get_args(hint)]
        types = tuple(dict.fromkeys(t for part in parts for t in part[0]))
        choices = tuple(choice for part in parts for choice in part[1])
        return types, choices, next((part[2] for part in parts if part[2] != Within()), Within())
    return ((hint,) if isinstance(hint, type) else ()), (), Within()
