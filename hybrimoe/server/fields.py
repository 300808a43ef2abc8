"""Checked fields of requests, and objects whose fields are all known.

A field is one of four: honoured (a field of a model), without an effect here (described so), refused unless it says
what holds anyway (`refused`), or unknown. An unknown one is refused where the server is strict; else it is left out,
and the answer's header says so. null is the same as an absent field.
"""

from __future__ import annotations

import math
from contextvars import ContextVar
from typing import Annotated, Any, ClassVar, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidatorFunctionWrapHandler,
    WrapValidator,
    model_validator,
)

from hybrimoe.errors import did_you_mean
from hybrimoe.generation.sampling import (
    MAX_FREQUENCY_PENALTY,
    MAX_LOGIT_BIAS,
    MAX_TEMPERATURE,
    MAX_TOP_LOGPROBS,
    PENALTY_RANGE,
)

MAX_TOKENS = 2**31 - 1
"""Longest reply that may be asked for; the model's context ends it before."""
MAX_PRIORITY = 1_000
MAX_REPLY_SECONDS = 86_400.0
MAX_SEED = 2**63 - 1
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
"""Stop texts, and characters of each. OpenAI takes 4."""
MAX_BIASED_TOKENS = 1024
MAX_SHOWN = 60
"""Characters of what was found that an error message shows."""
LONGEST_NAME = 64
"""A longer name of a field is no misspelt one."""
MOST_TOLD = 32
"""Unknown fields of one request that are told of; a body of 8 MiB has room for a million."""
LARGEST = 2.0**64
"""Of any whole number: no field has a use for a larger one, and a float holds none beyond 10**308."""
DEEPEST = 100
"""Levels of free-form data. What handles it goes down them by recursion."""

Refused = dict[str, tuple[str, tuple[Any, ...]]]
"""Fields without support: what for, and the values that ask for nothing which does not hold anyway."""

left_out: ContextVar[list[str] | None] = ContextVar("left_out", default=None)
"""Where the unknown fields of the request at hand are told; None where they are refused."""


def _number(value: object) -> object:
    """JSON's numbers; not true, not "1", not NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"expected a number, found {shown(value)}")
    if isinstance(value, int) and abs(value) > LARGEST:
        raise ValueError(f"expected a number, found one of {value.bit_length()} bits")
    if not math.isfinite(value):
        raise ValueError(f"expected a number, found {shown(value)}")
    return value


def _whole_number(value: object) -> object:
    """JSON's whole numbers, which may be written 2.0."""
    number = _number(value)
    if isinstance(number, float):
        if not number.is_integer():
            raise ValueError(f"expected a whole number, found {number}")
        return int(number)
    return number


def _boolean(value: object) -> object:
    if not isinstance(value, bool):
        raise ValueError(f"expected true or false, found {shown(value)}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a text, found {shown(value)}")
    return _unicode(value)


def _unicode(value: str) -> str:
    """Raises ValueError for half of a surrogate pair, which JSON can write and no text has."""
    try:
        value.encode()
    except UnicodeEncodeError as error:
        half = f"\\u{ord(value[error.start]):x}"
        raise ValueError(
            f"character {error.start} is half of a surrogate pair ({half}); send valid Unicode"
        ) from None  # fmt: skip
    return value


def json_throughout(value: Any) -> Any:
    """Free-form data, which may stand in an answer. Raises ValueError for halves of surrogate pairs, for numbers that
    Python reads and JSON does not have, and below `DEEPEST` levels."""
    _check_json(value, DEEPEST)
    return value


def _check_json(value: Any, levels: int) -> None:
    """As `json_throughout`, with so many levels below."""
    if isinstance(value, str):
        _unicode(value)
    elif isinstance(value, float):
        _number(value)
    elif isinstance(value, dict | list):
        if levels == 0:
            raise ValueError(f"it is nested more than {DEEPEST} levels deep")
        if isinstance(value, dict):
            for key in value:
                _unicode(key)
            value = value.values()
        for item in value:
            _check_json(item, levels - 1)


def shown(value: object) -> str:
    """The beginning of a value, as Python writes it."""
    text = repr(value[:MAX_SHOWN] if isinstance(value, str | list) else value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


def _token_ids(value: Any, check_each: ValidatorFunctionWrapHandler) -> Any:
    """Plain whole numbers pass at once."""
    return value if isinstance(value, list) and set(map(type, value)) <= {int} else check_each(value)


def _few_biases(value: Any) -> Any:
    """Before each is looked at."""
    if isinstance(value, dict) and len(value) > MAX_BIASED_TOKENS:
        raise ValueError(f"expected at most {MAX_BIASED_TOKENS} tokens, found {len(value)}")
    return value


WholeNumber, AnyNumber = BeforeValidator(_whole_number), BeforeValidator(_number)
Integer = Annotated[int, WholeNumber]
Number = Annotated[float, AnyNumber]
Boolean = Annotated[bool, BeforeValidator(_boolean)]
Text = Annotated[str, BeforeValidator(_text)]
Texts = Annotated[list[Text], Field(fail_fast=True)]
TokenIds = Annotated[list[Integer], Field(fail_fast=True), WrapValidator(_token_ids)]
"""A prompt. Millions fit a body, and a list of something else must not be looked through to its end."""
Free = Annotated[dict[str, Any], AfterValidator(json_throughout)]

Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS), WholeNumber]
TokensOrNoLimit = Annotated[int, Field(ge=-MAX_TOKENS, le=MAX_TOKENS), WholeNumber]
NoLimit = Annotated[Literal[-1], WholeNumber]
"""A length that LM Studio's and llama-server's clients send for none."""
TopK = Annotated[int, Field(ge=-1, le=MAX_TOKENS), WholeNumber, AfterValidator(lambda k: max(k, 0))]
"""-1 is 0, as vLLM and llama-server have it: all tokens."""
Seed = Annotated[int, Field(ge=-MAX_SEED - 1, le=MAX_SEED), WholeNumber]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), WholeNumber]
Temperature = Annotated[float, Field(ge=0.0, le=MAX_TEMPERATURE), AnyNumber]
Share = Annotated[float, Field(ge=0.0, le=1.0), AnyNumber]
Repetition = Annotated[float, Field(ge=PENALTY_RANGE[0], le=PENALTY_RANGE[1]), AnyNumber]
Penalty = Annotated[float, Field(ge=-MAX_FREQUENCY_PENALTY, le=MAX_FREQUENCY_PENALTY), AnyNumber]
Bias = Annotated[float, Field(ge=-MAX_LOGIT_BIAS, le=MAX_LOGIT_BIAS), AnyNumber]
Priority = Annotated[int, Field(ge=-MAX_PRIORITY, le=MAX_PRIORITY), WholeNumber]
Seconds = Annotated[float, Field(ge=0.001, le=MAX_REPLY_SECONDS), AnyNumber]
Biases = Annotated[
    dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Bias],
    Field(max_length=MAX_BIASED_TOKENS),
    BeforeValidator(_few_biases),
]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH), BeforeValidator(_text)]
StopTexts = Annotated[list[StopText], Field(max_length=MAX_STOPS)]


def seed_of(value: int | None) -> int | None:
    """The generator's seed; None, a new one, for -1, as llama-server and Ollama have it."""
    return None if value is None or value == -1 else value % (MAX_SEED + 1)


def length_of(value: int | None) -> int | None:
    """Tokens of a reply; None, no limit, for -1."""
    return None if value == -1 else value


class Strict(BaseModel):
    """An object whose fields are all known."""

    model_config = ConfigDict(extra="forbid")

    refused: ClassVar[Refused] = {}

    @model_validator(mode="before")
    @classmethod
    def _only_known_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        names = {field.alias or name: field for name, field in cls.model_fields.items()}
        candidates = [*names, *cls.refused]
        known: dict[str, Any] = {}
        for name, value in data.items():
            if name in names:
                if value is not None or names[name].is_required():
                    known[name] = value
            elif name in cls.refused:
                what, neutral = cls.refused[name]
                if value is not None and not any(type(value) is type(one) and value == one for one in neutral):
                    raise ValueError(f"{name}: this server has no support for {what}, found {shown(value)}")
            else:
                cls._leave_out(name, candidates)
        return known

    @staticmethod
    def _leave_out(name: str, names: list[str]) -> None:
        """Raises ValueError for an unknown field, or tells it to the client."""
        if len(left_out.get() or ()) >= MOST_TOLD:
            return
        near = did_you_mean(name, names) if len(name) <= LONGEST_NAME else ""
        message, told = f"unknown field {shown(name)}{near}", left_out.get()
        if told is None:
            raise ValueError(message)
        if message not in told:
            told.append(message)
