"""Turns pydantic's findings into one message per mistake: `file:line: key: expected ..., found ...`."""

from __future__ import annotations

from collections.abc import Callable
from types import NoneType, UnionType
from typing import Any, get_args

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails

from yaml_rules.located import KeyPath
from yaml_rules.suggest import did_you_mean

_PYDANTIC_MAPPING = "a valid dictionary or instance of"


def messages(
    error: ValidationError, model: type[BaseModel], where: Callable[[KeyPath], str], show: Callable[[KeyPath], str]
) -> list[str]:
    """One message per finding of `error`, in pydantic's order.

    where: `file:line` of a key path inside the validated data; show: how the key path is written in the message.
    """
    return [_message(detail, model, where, show) for detail in error.errors()]


def data_path(loc: tuple[int | str, ...], model: type[BaseModel]) -> KeyPath:
    """pydantic's location without the union tags that it appends behind fields that are no section."""
    path: list[str | int] = []
    for key in loc:
        path.append(key)
        if _section(model, tuple(path)) is None:
            break
    return tuple(path)


def _message(
    detail: ErrorDetails, model: type[BaseModel], where: Callable[[KeyPath], str], show: Callable[[KeyPath], str]
) -> str:
    path = data_path(detail["loc"], model)
    place, key = where(path), show(path)
    if detail["type"] == "extra_forbidden":
        fields = _names(_section(model, path[:-1]) or model)
        near = did_you_mean(str(path[-1]), fields)
        return f"{place}: unknown key {key!r}{near} (known here: {', '.join(fields)})"
    if detail["type"] == "missing":
        return f"{place}: {key}: this key is required"
    if detail["type"] == "value_error":  # raised by a parser of ours, which names what it found
        return f"{place}: {key}: {detail['ctx']['error']}"
    expected = detail["msg"].removeprefix("Input ").replace(_PYDANTIC_MAPPING, "a mapping of keys for")
    return f"{place}: {key}: {expected}, found {_shorten(detail['input'])}{_unquoted(detail)}"


def _unquoted(detail: ErrorDetails) -> str:
    """What to write where YAML's own true, false or number was put in quotes; empty for other mistakes."""
    given = detail["input"]
    if not isinstance(given, str):
        return ""
    if detail["type"] == "bool_type" and given.strip().casefold() in ("true", "false"):
        return f"; write {given.strip().casefold()}, without quotes"
    if detail["type"] == "int_type" and given.strip().isdecimal():
        return f"; write {given.strip()}, without quotes"
    return ""


def _shorten(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."


def _names(model: type[BaseModel]) -> list[str]:
    return sorted(field.alias or name for name, field in model.model_fields.items())


def _section(model: type[BaseModel], path: KeyPath) -> type[BaseModel] | None:
    current = model
    for key in path:
        by_alias = {field.alias or name: field for name, field in current.model_fields.items()}
        field = by_alias.get(str(key))
        annotation = _without_none(field.annotation if field is not None else None)
        if not (isinstance(annotation, type) and issubclass(annotation, BaseModel)):
            return None
        current = annotation
    return current


def _without_none(annotation: Any) -> Any:
    """Of a section that may be left out: the section."""
    kinds = [kind for kind in get_args(annotation) if kind is not NoneType]
    return kinds[0] if isinstance(annotation, UnionType) and len(kinds) == 1 else annotation
