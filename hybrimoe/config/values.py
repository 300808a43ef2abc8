"""What the sections of a configuration share, and parsers of single values: accelerators, threads, rules."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Annotated, Any

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    PlainSerializer,
    ValidationInfo,
    WithJsonSchema,
    field_validator,
)

from hybrimoe.errors import ConfigError, did_you_mean


class Section(BaseModel):
    """A section of a deployment file: unknown keys are mistakes, and `true` is no number."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @field_validator("*", mode="before")
    @classmethod
    def _true_is_no_number(cls, value: object, info: ValidationInfo) -> object:
        """pydantic would read `port: true` as 1."""
        wanted = cls.model_fields[str(info.field_name)].annotation
        if isinstance(value, bool) and wanted in (int, float):
            raise ConfigError(f"expected a number, found {value}")
        return value


_WORDS = ("auto", "none", "emulated")
_DEVICE_TYPES = ("cuda", "xpu", "npu", "mps", "hpu", "mtia")
_DEVICE = re.compile(rf"(?:{'|'.join(_DEVICE_TYPES)})(?::\d+)?")


def parse_accelerators(value: object) -> tuple[str, ...]:
    """One accelerator name, or a list of those to use together, as a tuple.

    In a list `auto` may stand first: what follows is for a machine where torch finds no accelerator. Raises ConfigError
    for what is no name of a device, for a device that stands twice, and for words that cannot stand in this place;
    whether a device is here is checked when it is opened.
    """
    if value is None:
        return ("none",)
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list | tuple) or not names:
        raise ConfigError(f"expected a device such as cuda:0, {', '.join(_WORDS)}, or a list of them; found {value!r}")
    for name in names:
        if not isinstance(name, str) or not (name in _WORDS or _DEVICE.fullmatch(name)):
            near = did_you_mean(str(name), [*_WORDS, *(f"{device}:0" for device in _DEVICE_TYPES)])
            raise ConfigError(f"{name!r} is no accelerator; expected cuda:0, xpu:0, {', '.join(_WORDS)}{near}")
    _check_together(tuple(names[1:] if names[0] == "auto" else names))
    return tuple(names)


def _check_together(names: tuple[str, ...]) -> None:
    """Raises ConfigError for names that cannot be used together. (Emulated ones may: each is a device of its own.)"""
    devices = [name if ":" in name else f"{name}:0" for name in names if name != "emulated"]
    twice = next((name for name in devices if devices.count(name) > 1), None)
    if twice is not None and twice not in ("auto:0", "none:0"):
        raise ConfigError(f"{twice} stands twice in the list; a list uses all of its devices, each once")
    if "auto" in names:
        raise ConfigError(
            "auto can only stand first in a list: what follows it is for machines without an accelerator, as in"
            " [auto, emulated]. To use several devices, name them: [cuda:0, cuda:1]"
        )
    if "none" in names and len(names) > 1:
        raise ConfigError("none cannot stand beside other accelerators: a list uses all of its devices")


def _parse_threads(value: object) -> object:
    if value is None or value == "auto":
        return "auto"
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"expected a number of threads of at least 1, or auto; found {value!r}")
    return value


def check_rules(value: object) -> Any:
    """Rules are a shipped name or a file (text), or inline: a list of rules or a mapping with `rules:`."""
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, str) and value.strip():
        return value
    if isinstance(value, list | Mapping) and value:
        return value
    raise ConfigError(f"expected a shipped rule set, a file, or a list of rules; found {value!r}")


def _path_as_text(value: object) -> object:
    return str(value) if isinstance(value, Path) else value


ModelName = Annotated[str, BeforeValidator(_path_as_text), Field(min_length=1)]
Accelerators = Annotated[
    tuple[str, ...],
    BeforeValidator(parse_accelerators),
    PlainSerializer(lambda names: names[0] if len(names) == 1 else list(names)),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}, "minItems": 1}]}),
]
Threads = Annotated[
    int | str,
    BeforeValidator(_parse_threads),
    WithJsonSchema({"anyOf": [{"type": "integer", "minimum": 1}, {"const": "auto"}]}),
]
