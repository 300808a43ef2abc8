"""Layer sets as rules write them: "0-29", "0,2,5-9", 7, [0, 1]."""

from __future__ import annotations

import re

_RANGE = re.compile(r"\s*(\d+)\s*(?:-\s*(\d+)\s*)?")


def parse_layers(value: object) -> tuple[tuple[int, int], ...]:
    """Inclusive (first, last) ranges of a layer set; raises ValueError that says what was expected and found."""
    if isinstance(value, bool):
        raise ValueError(_expected(value))
    if isinstance(value, int):
        return parse_layers(str(value))
    if isinstance(value, list) and value:
        return tuple(part for item in value for part in parse_layers(item))
    if not isinstance(value, str):
        raise ValueError(_expected(value))
    return tuple(_parse_range(part, value) for part in value.split(","))


def _parse_range(part: str, whole: str) -> tuple[int, int]:
    match = _RANGE.fullmatch(part)
    if match is None:
        raise ValueError(_expected(whole))
    first, last = int(match[1]), int(match[2] or match[1])
    if last < first:
        raise ValueError(f"the range {part.strip()!r} runs backwards; write {last}-{first}")
    return first, last


def _expected(value: object) -> str:
    return f'expected layers such as "0-29" or "0,2,5-9", found {value!r}'


def layer_of(path: str) -> int | None:
    """Layer index in a module path (its first number: 7 in `model.layers.7.mlp.experts`); None outside the layers."""
    for part in path.split("."):
        if part.isdigit():
            return int(part)
    return None
