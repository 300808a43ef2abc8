"""Requests of the OpenAI API, as far as they can be honoured; what cannot is refused by name instead of being ignored.

A field is one of four: honoured (a field of the models below), without an effect here (UNUSED), refused unless it says
what holds anyway (REFUSED), or unknown, which is refused, too. null is the same as an absent field.
"""

from __future__ import annotations

import json
import math
from typing import Annotated, Any, ClassVar, Literal

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, model_validator

from hybrimoe.errors import ConfigError, did_you_mean
from hybrimoe.generation import SamplingOptions
from hybrimoe.generation.sampling import (
    MAX_FREQUENCY_PENALTY,
    MAX_LOGIT_BIAS,
    MAX_TEMPERATURE,
    MAX_TOP_LOGPROBS,
    PENALTY_RANGE,
)
from hybrimoe.server.errors import RequestError

MAX_TOKENS = 2**31 - 1
"""Longest reply that may be asked for; the model's context ends it before."""
MAX_SEED = 2**63 - 1
MAX_STOPS, MAX_STOP_LENGTH = 16, 256
"""Stop texts, and characters of each. OpenAI takes 4."""
MAX_BIASED_TOKENS = 1024
MAX_MESSAGES = 10_000
MAX_SHOWN = 60
"""Characters of what was found that an error message shows."""
LONGEST_NAME = 64
"""A longer name of a field is no misspelt one."""

UNUSED = {
    "user": "who asks",
    "safety_identifier": "who asks",
    "metadata": "for the client's own use",
    "prompt_cache_key": "every prompt's beginning is looked up in the cache",
    "prompt_cache_retention": "every prompt's beginning is looked up in the cache",
    "parallel_tool_calls": "there are no tool calls",
}
"""Fields that change nothing about a reply, and why."""

REFUSED: dict[str, tuple[str, tuple[Any, ...]]] = {
    "tools": ("tool calls", ([],)),
    "tool_choice": ("tool calls", ("none", "auto")),
    "functions": ("function calls", ([],)),
    "function_call": ("function calls", ("none", "auto")),
    "best_of": ("several candidates", (1,)),
    "n": ("several replies to one request", (1,)),
    "echo": ("repeating the prompt", (False,)),
    "suffix": ("text insertion", ("",)),
    "response_format": ("replies of a given structure", ({"type": "text"},)),
    "json_schema": ("replies of a given structure", ({},)),
    "grammar": ("replies of a given structure", ("",)),
    "guided_json": ("replies of a given structure", ()),
    "guided_regex": ("replies of a given structure", ()),
    "guided_choice": ("replies of a given structure", ()),
    "guided_grammar": ("replies of a given structure", ()),
    "structured_outputs": ("replies of a given structure", ()),
    "modalities": ("replies that are no text", (["text"],)),
    "audio": ("audio", ()),
    "prediction": ("predicted replies", ()),
    "web_search_options": ("web search", ()),
    "verbosity": ("a verbosity", ("medium",)),
    "store": ("storing replies", (False,)),
    "service_tier": ("service tiers", ("auto", "default")),
}
"""Fields without support: what for, and the values that ask for nothing which does not hold anyway."""

REFUSED_OF_MESSAGES: dict[str, tuple[str, tuple[Any, ...]]] = {
    "function_call": ("function calls", ()),
    "audio": ("audio", ()),
    "annotations": ("annotations", ([],)),
}


def _number(value: object) -> object:
    """JSON's numbers; not true, not "1", not NaN."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise ValueError(f"expected a number, found {_shown(value)}")
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
        raise ValueError(f"expected true or false, found {_shown(value)}")
    return value


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise ValueError(f"expected a text, found {_shown(value)}")
    return _unicode(value)


def _unicode(value: str) -> str:
    """Raises ValueError for half of a surrogate pair, which JSON can write and no text has."""
    at = next((index for index, character in enumerate(value) if "\ud800" <= character <= "\udfff"), None)
    if at is not None:
        raise ValueError(f"character {at} is half of a surrogate pair (\\u{ord(value[at]):x}); send valid Unicode")
    return value


def _unicode_throughout(value: Any) -> Any:
    """The same for all texts within free-form data."""
    if isinstance(value, str):
        _unicode(value)
    elif isinstance(value, dict):
        for key, item in value.items():
            _unicode_throughout(key)
            _unicode_throughout(item)
    elif isinstance(value, list):
        for item in value:
            _unicode_throughout(item)
    return value


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= MAX_SHOWN else f"{text[: MAX_SHOWN - 3]}..."


WholeNumber, AnyNumber = BeforeValidator(_whole_number), BeforeValidator(_number)
Integer = Annotated[int, WholeNumber]
Boolean = Annotated[bool, BeforeValidator(_boolean)]
Text = Annotated[str, BeforeValidator(_text)]
Free = Annotated[dict[str, Any], AfterValidator(_unicode_throughout)]

Tokens = Annotated[int, Field(ge=1, le=MAX_TOKENS), WholeNumber]
TopK = Annotated[int, Field(ge=0, le=MAX_TOKENS), WholeNumber]
Seed = Annotated[int, Field(ge=0, le=MAX_SEED), WholeNumber]
TopLogprobs = Annotated[int, Field(ge=0, le=MAX_TOP_LOGPROBS), WholeNumber]
Temperature = Annotated[float, Field(ge=0.0, le=MAX_TEMPERATURE), AnyNumber]
Share = Annotated[float, Field(ge=0.0, le=1.0), AnyNumber]
Repetition = Annotated[float, Field(ge=PENALTY_RANGE[0], le=PENALTY_RANGE[1]), AnyNumber]
Penalty = Annotated[float, Field(ge=-MAX_FREQUENCY_PENALTY, le=MAX_FREQUENCY_PENALTY), AnyNumber]
Bias = Annotated[float, Field(ge=-MAX_LOGIT_BIAS, le=MAX_LOGIT_BIAS), AnyNumber]
Biases = Annotated[dict[Annotated[str, Field(pattern=r"^[0-9]{1,9}$")], Bias], Field(max_length=MAX_BIASED_TOKENS)]
StopText = Annotated[str, Field(min_length=1, max_length=MAX_STOP_LENGTH), BeforeValidator(_text)]
StopTexts = Annotated[list[StopText], Field(max_length=MAX_STOPS)]


class Strict(BaseModel):
    """An object whose fields are all known."""

    model_config = ConfigDict(extra="forbid")

    refused: ClassVar[dict[str, tuple[str, tuple[Any, ...]]]] = {}

    @model_validator(mode="before")
    @classmethod
    def _only_known_fields(cls, data: Any) -> Any:
        if not isinstance(data, dict):
            return data
        known: dict[str, Any] = {}
        for name, value in data.items():
            if name in cls.model_fields:
                known[name] = value
            elif name in cls.refused:
                what, neutral = cls.refused[name]
                if value is not None and not any(type(value) is type(one) and value == one for one in neutral):
                    raise ValueError(f"{name}: this server has no support for {what}, found {_shown(value)}")
            else:
                names = [*cls.model_fields, *cls.refused]
                near = did_you_mean(name, names) if len(name) <= LONGEST_NAME else ""
                raise ValueError(f"unknown field {_shown(name)}{near}")
        return known


class StreamOptions(Strict):
    """What a stream holds beside the text."""

    refused: ClassVar[dict[str, tuple[str, tuple[Any, ...]]]] = {"include_obfuscation": ("obfuscation", (False,))}

    include_usage: Boolean | None = Field(default=None, description="End with a piece that holds the token counts.")


class Sampling(Strict):
    """What completions and chat share. null means: as the model's generation_config.json says."""

    refused: ClassVar[dict[str, tuple[str, tuple[Any, ...]]]] = REFUSED

    model: Text | None = None
    max_tokens: Tokens | None = Field(default=None, description="null: until the end of the text or of the context.")
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    min_p: Share | None = None
    repetition_penalty: Repetition | None = None
    frequency_penalty: Penalty | None = None
    presence_penalty: Penalty | None = None
    logit_bias: Biases | None = Field(default=None, description="Token id to what is added to its logit.")
    seed: Seed | None = None
    stop: StopText | StopTexts | None = None
    ignore_eos: Boolean | None = None
    stream: Boolean | None = None
    stream_options: StreamOptions | None = None
    user: Text | None = Field(default=None, description=UNUSED["user"])
    safety_identifier: Text | None = Field(default=None, description=UNUSED["safety_identifier"])
    metadata: Free | None = Field(default=None, description=UNUSED["metadata"])
    prompt_cache_key: Text | None = Field(default=None, description=UNUSED["prompt_cache_key"])
    prompt_cache_retention: Text | None = Field(default=None, description=UNUSED["prompt_cache_retention"])
    parallel_tool_calls: Boolean | None = Field(default=None, description=UNUSED["parallel_tool_calls"])

    @property
    def include_usage(self) -> bool:
        """Whether a stream ends with a piece that holds the token counts."""
        return self.stream_options is not None and bool(self.stream_options.include_usage)

    @property
    def longest_reply(self) -> int | None:
        """Tokens of the reply at most."""
        return self.max_tokens

    @property
    def n_top_logprobs(self) -> int | None:
        """Alternatives whose log probability is told; None where none is recorded."""
        return None

    def options(self) -> SamplingOptions:
        """As the generator takes them. Raises RequestError for values that do not go together."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        try:
            return SamplingOptions(
                temperature=self.temperature,
                top_p=self.top_p,
                top_k=self.top_k,
                min_p=self.min_p,
                repetition_penalty=self.repetition_penalty,
                frequency_penalty=self.frequency_penalty or 0.0,
                presence_penalty=self.presence_penalty or 0.0,
                logit_bias=tuple((int(token), bias) for token, bias in (self.logit_bias or {}).items()),
                seed=self.seed,
                stop=stop,
                max_new_tokens=self.longest_reply,
                ignore_eos=bool(self.ignore_eos),
                top_logprobs=self.n_top_logprobs,
            )
        except ConfigError as error:
            raise RequestError(str(error)) from error


class CompletionRequest(Sampling):
    """POST /v1/completions."""

    prompt: Text | list[Text] | list[Integer] | list[list[Integer]]
    logprobs: TopLogprobs | None = Field(
        default=None, description="Log probabilities of each token and of so many best ones."
    )

    @property
    def n_top_logprobs(self) -> int | None:
        """See `Sampling`."""
        return self.logprobs

    def single_prompt(self) -> str | list[int]:
        """The one prompt. Raises RequestError for several, and for none."""
        if isinstance(self.prompt, str):
            return self.prompt
        if self.prompt and isinstance(self.prompt[0], int):
            return [token for token in self.prompt if isinstance(token, int)]
        if len(self.prompt) != 1:
            raise RequestError(
                f"prompt: expected one prompt, found {len(self.prompt)}; send a request for each", "prompt"
            )
        only = self.prompt[0]
        return only if isinstance(only, (str, list)) else [only]


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


def _no_other_parts(value: object) -> object:
    """A clearer message than that of the union: which kind of part this server has no support for."""
    if isinstance(value, list):
        kinds = {str(part.get("type")) for part in value if isinstance(part, dict)} - {"text"}
        if kinds:
            raise ValueError(f"expected text content, found {', '.join(sorted(kinds))[:MAX_SHOWN]}")
    return value


class CalledFunction(Strict):
    """What a tool call asked for; arguments are JSON, as text."""

    name: Text
    arguments: Text


class ToolCall(Strict):
    """A tool call of an earlier reply."""

    refused: ClassVar[dict[str, tuple[str, tuple[Any, ...]]]] = {"index": ("pieces of tool calls", (0, 1, 2, 3))}

    id: Text | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Strict):
    """One message of a chat. Only an assistant's may have no content."""

    refused: ClassVar[dict[str, tuple[str, tuple[Any, ...]]]] = REFUSED_OF_MESSAGES

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Text | list[TextPart] | None, BeforeValidator(_no_other_parts)] = None
    name: Text | None = None
    refusal: Text | None = None
    reasoning_content: Text | None = None
    tool_calls: list[ToolCall] | None = None
    tool_call_id: Text | None = None

    @model_validator(mode="after")
    def _has_content(self) -> Message:
        if self.content is None and self.role != "assistant":
            raise ValueError(f"content: a message of the {self.role} needs some, found null or none")
        return self

    def as_template_takes_it(self) -> dict[str, Any]:
        """The message as chat templates read it: content as text, arguments of tool calls as data."""
        parts = self.content if isinstance(self.content, list) else [self.content or self.refusal or ""]
        content = "".join(part if isinstance(part, str) else part.text for part in parts)
        given = {"name": self.name, "reasoning_content": self.reasoning_content, "tool_call_id": self.tool_call_id}
        message: dict[str, Any] = {"role": self.role, "content": content}
        message |= {name: value for name, value in given.items() if value is not None}
        if self.tool_calls:
            message["tool_calls"] = [_as_template_takes_it(call) for call in self.tool_calls]
        return message


def _as_template_takes_it(call: ToolCall) -> dict[str, Any]:
    try:
        arguments = json.loads(call.function.arguments)
    except ValueError:
        arguments = call.function.arguments
    return {"id": call.id, "type": "function", "function": {"name": call.function.name, "arguments": arguments}}


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: Tokens | None = Field(default=None, description="As max_tokens.")
    logprobs: Boolean | None = None
    top_logprobs: TopLogprobs | None = Field(default=None, description="Needs logprobs.")
    reasoning_effort: Text | None = Field(default=None, description="Handed to the model's chat template.")
    chat_template_kwargs: Free | None = Field(default=None, description="Variables of the model's chat template.")

    @model_validator(mode="after")
    def _top_logprobs_need_logprobs(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs: true")
        return self

    @property
    def longest_reply(self) -> int | None:
        """See `Sampling`."""
        return self.max_completion_tokens or self.max_tokens

    @property
    def n_top_logprobs(self) -> int | None:
        """See `Sampling`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def template_messages(self) -> list[dict[str, Any]]:
        """Messages as chat templates take them."""
        return [message.as_template_takes_it() for message in self.messages]

    def template_variables(self) -> dict[str, Any]:
        """Variables for the chat template."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return effort | (self.chat_template_kwargs or {})
