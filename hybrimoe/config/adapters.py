"""Adapters as people name them: `DIR` or `DIR:SCALE`, one or a list."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from hybrimoe.errors import ConfigError


@dataclass(frozen=True, slots=True)
class AdapterName:
    """The folder (or hub id) of an adapter, and what its change of the weights is multiplied by."""

    path: str
    scale: float = 1.0

    def __str__(self) -> str:
        return self.path if self.scale == 1.0 else f"{self.path}:{self.scale:g}"


def parse_adapter(text: str) -> AdapterName:
    """`DIR` or `DIR:SCALE`; a folder that is called so goes before a scale.

    Raises ConfigError for no folder, and for a scale that is 0 or no finite number.
    """
    path, colon, end = text.rpartition(":")
    if not colon or Path(text).expanduser().exists() or not _is_number(end):
        if not text.strip():
            raise ConfigError("expected the folder of an adapter, as DIR or DIR:SCALE, found none")
        return AdapterName(text)
    scale = float(end)
    if not path or not math.isfinite(scale) or scale == 0.0:
        raise ConfigError(f"expected an adapter as DIR or DIR:SCALE with a scale like 0.5, found {text!r}")
    return AdapterName(path, scale)


def resolved_adapters(names: tuple[str, ...], resolve: Callable[[str], str]) -> tuple[str, ...]:
    """The adapters with each folder replaced by what `resolve` makes of it."""
    parsed = [parse_adapter(name) for name in names]
    return tuple(str(AdapterName(resolve(one.path), one.scale)) for one in parsed)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


def _parse_adapters(value: object) -> tuple[str, ...]:
    entries = [value] if isinstance(value, str | Path) else value
    if not isinstance(entries, list | tuple) or not all(isinstance(entry, str | Path) for entry in entries):
        raise ConfigError(f"expected the folder of an adapter, or a list of them; found {value!r}")
    for entry in entries:
        parse_adapter(str(entry))
    return tuple(str(entry) for entry in entries)


Adapters = Annotated[
    tuple[str, ...],
    BeforeValidator(_parse_adapters),
    PlainSerializer(list),
    WithJsonSchema({"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}),
]
