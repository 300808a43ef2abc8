"""The sampling options that `/set` shows and changes."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from hybrimoe.errors import ConfigError, unknown

if TYPE_CHECKING:
    from hybrimoe.generation import SamplingOptions

DEFAULT = "default"
"""The value that takes a setting back."""


@dataclass(frozen=True, slots=True)
class Setting:
    """A sampling option that is a number. unset: what is shown where it is None."""

    kind: type[int] | type[float]
    meaning: str
    unset: str = "the model's"


SETTINGS: dict[str, Setting] = {
    "temperature": Setting(float, "0 is greedy, more is freer"),
    "top_p": Setting(float, "this share of chances kept"),
    "top_k": Setting(int, "so many tokens kept; 0: all"),
    "min_p": Setting(float, "kept from this share of best"),
    "repetition_penalty": Setting(float, "1 is none"),
    "frequency_penalty": Setting(float, "0 is none"),
    "presence_penalty": Setting(float, "0 is none"),
    "seed": Setting(int, "the same seed, the same text", "drawn anew"),
    "max_new_tokens": Setting(int, "longest reply, in tokens"),
}


def with_setting(options: SamplingOptions, name: str, value: str) -> SamplingOptions:
    """`options` with one of SETTINGS as `value` says: a number, or DEFAULT. Raises ConfigError for what is neither."""
    name = checked_name(name)
    setting = SETTINGS[name]
    changed: dict[str, Any] = {}
    try:
        changed[name] = getattr(type(options)(), name) if value == DEFAULT else setting.kind(value)
    except ValueError:
        kind = "a whole number" if setting.kind is int else "a number"
        raise ConfigError(f"{name} takes {kind}, or {DEFAULT}; found {value!r}") from None
    return replace(options, **changed)


def checked_name(name: str) -> str:
    """The name as options have it: a line in its middle may be a hyphen, as on the command line.

    Raises ConfigError where there is no such setting.
    """
    plain = name.replace("-", "_")
    if plain not in SETTINGS:
        raise ConfigError(unknown("setting", name, SETTINGS))
    return plain


def setting_lines(options: SamplingOptions, names: Iterable[str] = SETTINGS) -> list[str]:
    """A line for each setting: name, value, meaning; in 60 columns."""
    return [f"{name:<18} {_value(options, name):<12} {SETTINGS[name].meaning}" for name in names]


def _value(options: SamplingOptions, name: str) -> str:
    value = getattr(options, name)
    return SETTINGS[name].unset if value is None else f"{value:g}" if isinstance(value, float) else str(value)
