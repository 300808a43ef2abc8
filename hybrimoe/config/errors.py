"""Mistakes in a configuration, located in the file or in the keyword that brought them in."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError

from hybrimoe.errors import ConfigError
from yaml_rules.located import KeyPath, Located
from yaml_rules.validation import data_path, messages


def config_error(
    error: ValidationError, model: type[BaseModel], located: Located, given: Mapping[str, Any]
) -> ConfigError:
    """One ConfigError that lists all mistakes of `error` in the order of the file.

    given: keyword overrides; what stands in them has no line.
    """
    texts = messages(error, model, lambda path: locate(path, located, given), lambda path: ".".join(map(str, path)))
    lines = [located.line(data_path(detail["loc"], model)) or 0 for detail in error.errors()]
    ordered = sorted(range(len(texts)), key=lambda index: lines[index])
    return ConfigError("\n".join(texts[index] for index in ordered))


def locate(path: KeyPath, located: Located, given: Mapping[str, Any]) -> str:
    """`file:line` of a key path, or "<option>" where a keyword override gave the value."""
    level: Any = given
    for key in path:
        if not isinstance(level, Mapping) or key not in level:
            return located.where(path)
        level = level[key]
    return "<option>"
