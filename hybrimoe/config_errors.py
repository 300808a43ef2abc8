"""Turns pydantic's findings into one message per mistake: `file:line: key: expected ..., found ...`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from hybrimoe.errors import ConfigError, did_you_mean
from yaml_rules.located import KeyPath, Located

_PYDANTIC_MAPPING = "a valid dictionary or instance of"


def config_error(
    error: ValidationError, model: type[BaseModel], located: Located, given: Mapping[str, Any]
) -> ConfigError:
    """One ConfigError that lists all mistakes of `error`; `given` are the keyword overrides, which have no line."""
    details = sorted(error.errors(), key=lambda detail: located.line(_data_path(detail["loc"], model)) or 0)
    return ConfigError("\n".join(_message(detail, model, located, given) for detail in details))


def locate(path: KeyPath, located: Located, given: Mapping[str, Any]) -> str:
    """`file:line` of a key path, or "<option>" where a keyword override gave the value."""
    level: Any = given
    for key in path:
        if not isinstance(level, Mapping) or key not in level:
            return located.where(path)
        level = level[key]
    return "<option>"


def _message(detail: ErrorDetails, model: type[BaseModel], located: Located, given: Mapping[str, Any]) -> str:
    path = _data_path(detail["loc"], model)
    where, key = locate(path, located, given), ".".join(map(str, path))
    if detail["type"] == "extra_forbidden":
        fields = sorted(_model_at(model, path[:-1]).model_fields)
        name = str(path[-1])
        return f"{where}: unknown key {key!r}{did_you_mean(name, fields)} (known here: {', '.join(fields)})"
    if detail["type"] == "value_error":  # raised by a parser of ours, which names what it found
        return f"{where}: {key}: {detail['ctx']['error']}"
    expected = detail["msg"].removeprefix("Input ").replace(_PYDANTIC_MAPPING, "a mapping of keys for")
    return f"{where}: {key}: {expected}, found {detail['input']!r}"


def _data_path(loc: tuple[int | str, ...], model: type[BaseModel]) -> KeyPath:
    """pydantic's location without the union tags that it appends behind fields that are no section."""
    path: list[str | int] = []
    for key in loc:
        path.append(key)
        if _section(model, tuple(path)) is None:
            break
    return tuple(path)


def _section(model: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    current = model
    for key in path:
        field = current.model_fields.get(str(key))
        annotation = field.annotation if field is not None else None
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        current = annotation
    return current


def _model_at(model: type[BaseModel], path: KeyPath) -> type[BaseModel]:
    return _section(model, path) or model
