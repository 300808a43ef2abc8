"""Amounts of memory as people write them: "6GiB", a share like 0.25 or "25%", a number of experts, "auto", "none"."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, PlainSerializer, WithJsonSchema

from hybrimoe.errors import BudgetError, ConfigError, did_you_mean

AmountKind = Literal["auto", "none", "bytes", "share", "count"]

BYTES_PER_UNIT = {
    "b": 1,
    "kb": 10**3,
    "mb": 10**6,
    "gb": 10**9,
    "tb": 10**12,
    "kib": 2**10,
    "mib": 2**20,
    "gib": 2**30,
    "tib": 2**40,
}
_NUMBER_AND_UNIT = re.compile(
    r"(?P<number>[+-]?(?:\d+(?:\.\d*)?|\.\d+)(?:e[+-]?\d+)?)\s*(?P<unit>[a-z%]*)", re.IGNORECASE
)
_EXPECTED = 'expected a size like "6GiB", a share like 0.25 (above 0, at most 1), a whole number, "auto" or "none"'


@dataclass(frozen=True, slots=True)
class Amount:
    """A parsed amount: `value` is in bytes for kind "bytes", in (0, 1] for "share", whole for "count", else 0."""

    kind: AmountKind
    value: float = 0

    def __str__(self) -> str:
        if self.kind in ("auto", "none"):
            return self.kind
        if self.kind == "bytes":
            return _exact_size_text(int(self.value))
        return str(int(self.value)) if self.kind == "count" else repr(float(self.value))

    def to_experts(self, total_experts: int, expert_bytes: int, auto: int) -> int:
        """Number of experts this amount stands for, of a model with `total_experts` experts of `expert_bytes` each.

        A count above the total and a size below one expert raise BudgetError; a size above the total is the total; a
        share is rounded down, but never to zero. "auto" is the given `auto`, at most the total; "none" is 0.
        """
        if self.kind == "none":
            return 0
        if self.kind == "auto":
            return max(0, min(auto, total_experts))
        if self.kind == "share":
            return min(total_experts, max(1, math.floor(self.value * total_experts + 1e-9)))
        if self.kind == "count":
            if self.value > total_experts:
                raise BudgetError(
                    f"asked for {int(self.value)} expert slots, but the model has {total_experts} experts in all"
                )
            return int(self.value)
        if self.value < expert_bytes:
            raise BudgetError(
                f"{self} holds no expert: one expert takes {size_text(expert_bytes)}; give that or more, or 0"
            )
        return min(total_experts, int(self.value) // expert_bytes)

    def to_bytes(self, total_bytes: int, auto: int) -> int:
        """Bytes this amount stands for, of `total_bytes`; a count has no meaning in bytes and raises BudgetError."""
        if self.kind == "count":
            raise BudgetError(f"{int(self.value)} is no size; write a unit, for example {int(self.value)}GiB")
        if self.kind == "share":
            return int(self.value * total_bytes)
        return auto if self.kind == "auto" else int(self.value)


def parse_amount(value: object) -> Amount:
    """Parse what a person or a caller gives as an amount. A whole number is a count, a float is a share.

    Raises ConfigError that says what was expected and found.
    """
    if isinstance(value, Amount):
        return value
    if value is None:
        return Amount("none")
    if isinstance(value, bool):
        raise ConfigError(f"{_EXPECTED}, found {value!r}")
    if isinstance(value, int):
        return _count(value)
    if isinstance(value, float):
        return _share(value, value)
    if isinstance(value, str):
        return _parse_text(value.strip())
    raise ConfigError(f"{_EXPECTED}, found {type(value).__name__}")


def _parse_text(text: str) -> Amount:
    word = text.lower()
    if word == "auto" or word == "none":
        return Amount("auto" if word == "auto" else "none")
    match = _NUMBER_AND_UNIT.fullmatch(text)
    if match is None:
        raise ConfigError(f"{_EXPECTED}, found {text!r}{did_you_mean(text, ['auto', 'none'])}")
    number, unit = match["number"], match["unit"].lower()
    if unit == "":
        return _count(int(number)) if number.lstrip("+-").isdigit() else _share(float(number), text)
    if unit == "%":
        return _share(float(number) / 100, text)
    if unit not in BYTES_PER_UNIT:
        raise ConfigError(f"unknown unit in {text!r}; expected one of B, KB, MB, GB, TB, KiB, MiB, GiB, TiB or %")
    size = float(number) * BYTES_PER_UNIT[unit]
    if not math.isfinite(size) or size < 0:
        raise ConfigError(f"a size cannot be negative or infinite, found {text!r}")
    return Amount("bytes", int(size)) if size else Amount("none")


def _count(value: int) -> Amount:
    if value < 0:
        raise ConfigError(f"a number of experts cannot be negative, found {value}")
    return Amount("count", value)


def _share(value: float, written: object) -> Amount:
    if value == 0:
        return Amount("none")
    if not (0 < value <= 1):
        raise ConfigError(
            f"a share must be above 0 and at most 1, found {written!r}; write a whole number for a number of experts"
        )
    return Amount("share", value)


def size_text(size: int) -> str:
    """A size as people read it, with four digits."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        scale = BYTES_PER_UNIT[unit.lower()]
        if size >= scale:
            return f"{size / scale:.4g}{unit}"
    return f"{size}B"


def _exact_size_text(size: int) -> str:
    """Text that `parse_amount` reads back as exactly `size` bytes."""
    for unit in ("TiB", "GiB", "MiB", "KiB"):
        scale = BYTES_PER_UNIT[unit.lower()]
        if size >= scale and size % scale == 0:
            return f"{size // scale}{unit}"
    return f"{size}B"


def _amount_of_kinds(*kinds: AmountKind) -> Any:
    """Pydantic hook: parse an amount and accept only these kinds."""

    def check(value: object) -> Amount:
        amount = parse_amount(value)
        if amount.kind not in kinds:
            raise ConfigError(f"{value!r} is a {amount.kind} amount; expected {' or '.join(kinds)} here")
        return amount

    return BeforeValidator(check)


_AS_TEXT = PlainSerializer(str, return_type=str)
_JSON = WithJsonSchema({"type": ["string", "number"], "description": _EXPECTED})

ExpertsAmount = Annotated[Amount, _amount_of_kinds("auto", "none", "bytes", "share", "count"), _AS_TEXT, _JSON]
DiskAmount = Annotated[Amount, _amount_of_kinds("auto", "none", "bytes", "share"), _AS_TEXT, _JSON]
BytesAmount = Annotated[Amount, _amount_of_kinds("auto", "bytes", "share"), _AS_TEXT, _JSON]
SizeAmount = Annotated[Amount, _amount_of_kinds("bytes"), _AS_TEXT, _JSON]
HostAmount = Annotated[Amount, _amount_of_kinds("auto", "bytes", "share", "count"), _AS_TEXT, _JSON]
