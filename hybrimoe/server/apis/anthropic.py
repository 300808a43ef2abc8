"""Anthropic's /v1/messages and /v1/messages/count_tokens."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import AfterValidator, BeforeValidator, Field, ValidationError
from typing_extensions import TypedDict

from hybrimoe.errors import ConfigError
from hybrimoe.generation import SamplingOptions
from hybrimoe.server.apis.documented import errors, text_answers
from hybrimoe.server.apis.openai import json_schema_answer
from hybrimoe.server.apis.tools import MAX_TOOLS, TOOL_NAME, new_tool, tool_use
from hybrimoe.server.asking import ChatAsked, Preparation
from hybrimoe.server.delivery import deliver, unless_left
from hybrimoe.server.errors import AnthropicErrorBody, ErrorAnswer, RequestError
from hybrimoe.server.fields import (
    Boolean,
    Free,
    Integer,
    Refused,
    Share,
    StopTexts,
    Strict,
    Temperature,
    Text,
    Tokens,
    TopK,
    json_throughout,
    shown,
)
from hybrimoe.server.forms import Ended, Form, Frame, Update, WholeReply, sse
from hybrimoe.server.images import image_part, text_part
from hybrimoe.server.models import Models
from hybrimoe.server.replies.events import Call, Event, Reasoning, parsed_json
from hybrimoe.server.replies.events import Text as TextEvent
from hybrimoe.server.replies.syntax import ToolUse

MAX_MESSAGES = 100_000
SIGNATURE = "hybrimoe"
"""Clients send reasoning back with its signature; there is nothing to prove here."""
STREAM = "With stream: true. Events `event: TYPE` and `data: {...}` as Anthropic has them, from message_start to \
message_stop; a failure is an event error, and nothing follows."
REFUSED: Refused = {
    "container": ("containers", ()),
    "mcp_servers": ("servers of tools; the client calls them", ([],)),
    "inference_geo": ("places", ()),
    "speed": ("speeds", ("standard",)),
}
STOP_REASONS = {"stop": "end_turn", "length": "max_tokens", "tool_calls": "tool_use"}

CacheControl = Annotated[Free | None, Field(description="Every prompt's beginning is looked up in the cache.")]


KNOWN_BLOCKS = ("text", "image", "thinking", "redacted_thinking", "tool_use", "tool_result")


class ImageSource(Strict):
    """The image itself, in base64; nothing is fetched from elsewhere."""

    refused: ClassVar[Refused] = {
        "url": ("images that it would have to fetch; send base64", ()), "file_id": ("stored files; send base64", ()),
    }  # fmt: skip

    type: Literal["base64"]
    media_type: Text | None = Field(default=None, description="The file itself says what it is.")
    data: Text


class Block(Strict):
    """A part of a message: text, an image, reasoning, a call of a tool, or its result."""

    type: Literal["text", "image", "thinking", "redacted_thinking", "tool_use", "tool_result"]
    text: Text | None = None
    source: ImageSource | None = None
    thinking: Text | None = None
    signature: Text | None = None
    data: Text | None = None
    id: Text | None = None
    name: Text | None = None
    input: Free | None = None
    tool_use_id: Text | None = None
    content: Annotated[Any, AfterValidator(json_throughout)] = Field(
        default=None, description="Of a result: a text, or a list of text and image blocks."
    )
    is_error: Boolean | None = None
    citations: list[Any] | None = None
    caller: Free | None = None
    cache_control: CacheControl = None


def _known_blocks(value: object) -> object:
    """A clearer message than that of the union: which kind of block this server has no support for."""
    if isinstance(value, list):
        for block in value:
            if isinstance(block, dict) and block.get("type") not in KNOWN_BLOCKS:
                raise ValueError(f"this server has no support for blocks of the type {shown(block.get('type'))}")
    return value


Blocks = Annotated[Text | list[Block], BeforeValidator(_known_blocks)]


class AnthropicMessage(Strict):
    """One message of a conversation."""

    role: Literal["user", "assistant", "system"]
    content: Blocks


class AnthropicTool(Strict):
    """A function that the model may call."""

    type: Literal["custom"] | None = None
    name: Annotated[str, Field(pattern=TOOL_NAME)]
    description: Text | None = None
    input_schema: Free
    strict: Boolean | None = None
    cache_control: CacheControl = None
    input_examples: list[Any] | None = None
    eager_input_streaming: Boolean | None = None
    defer_loading: Boolean | None = None
    allowed_callers: list[Any] | None = None


def _only_custom(value: object) -> object:
    kind = value.get("type") if isinstance(value, dict) else None
    if kind not in (None, "custom"):
        raise ValueError(f"type: this server has no support for tools of the type {shown(kind)}; expected custom")
    return value


class ToolChoice(Strict):
    """Which tools may or must be called."""

    type: Literal["auto", "any", "tool", "none"]
    name: Text | None = None
    disable_parallel_tool_use: Boolean | None = None


class Thinking(Strict):
    """Whether the model thinks before it answers, where its template can say so."""

    type: Literal["enabled", "disabled", "adaptive"]
    budget_tokens: Integer | None = Field(default=None, description="Reasoning counts among max_tokens.")
    display: Text | None = None


class OutputFormat(Strict):
    """The schema of the answer."""

    type: Literal["json_schema"]
    schema_: Free = Field(alias="schema")


class OutputConfig(Strict):
    """About the answer. effort is handed to the model's template where it has such a variable."""

    effort: Text | None = None
    format: OutputFormat | None = None


class MessagesRequest(Strict):
    """POST /v1/messages."""

    refused: ClassVar[Refused] = REFUSED

    model: Text | None = None
    messages: list[AnthropicMessage] = Field(min_length=1, max_length=MAX_MESSAGES)
    system: Blocks | None = None
    max_tokens: Tokens | None = Field(default=None, description="null: until the end of the text or of the context.")
    temperature: Temperature | None = None
    top_p: Share | None = None
    top_k: TopK | None = None
    stop_sequences: StopTexts | None = None
    stream: Boolean | None = None
    tools: (
        Annotated[list[Annotated[AnthropicTool, BeforeValidator(_only_custom)]], Field(max_length=MAX_TOOLS)] | None
    ) = None
    tool_choice: ToolChoice | None = None
    thinking: Thinking | None = None
    output_config: OutputConfig | None = None
    output_format: OutputFormat | None = None
    metadata: Free | None = Field(default=None, description="Who asks.")
    service_tier: Text | None = Field(default=None, description="There is one.")
    cache_control: CacheControl = None
    context_management: Free | None = Field(default=None, description="The conversation is taken as it is.")

    def asked(self, preparation: Preparation) -> ChatAsked:
        """In the server's own form. Raises RequestError."""
        form = self.output_format or (self.output_config.format if self.output_config else None)
        messages, beginning = self.conversation()
        try:
            options = SamplingOptions(
                temperature=self.temperature, top_p=self.top_p, top_k=self.top_k,
                stop=tuple(self.stop_sequences or ()), max_new_tokens=self.max_tokens,
            )  # fmt: skip
        except ConfigError as error:
            raise RequestError(str(error)) from error
        answer = None if form is None else json_schema_answer(form.schema_)
        return ChatAsked(
            messages, options, self.tool_use(), answer, "output_config.format", self._variables(preparation),
            beginning=beginning,
        )  # fmt: skip

    def tool_use(self) -> ToolUse:
        """Tools in the server's own form. Raises RequestError."""
        tools = [
            new_tool(one.name, one.description, one.input_schema, strict=bool(one.strict)) for one in self.tools or []
        ]
        choice = self.tool_choice
        if choice is None:
            return tool_use(tools, "auto", None, many=True)
        if choice.type == "tool" and choice.name is None:
            raise RequestError("tool_choice: the type tool needs a name", "tool_choice")
        named = choice.name if choice.type == "tool" else None
        kind: Literal["auto", "none", "required"] = "required" if choice.type in ("any", "tool") else "auto"
        kind = "none" if choice.type == "none" else kind
        return tool_use(tools, kind, named, many=not choice.disable_parallel_tool_use)

    def conversation(self) -> tuple[list[dict[str, Any]], str]:
        """Messages as chat templates take them, and the beginning of the reply, where the last one is that."""
        told = [
            one for number, message in enumerate(self.messages)
            for one in _template_messages(message, f"messages.{number}")
        ]  # fmt: skip
        system = "" if self.system is None else _texts(self.system)
        first = [{"role": "system", "content": system}] if system else []
        if self.messages[-1].role == "assistant" and not told[-1].get("tool_calls"):
            if len(told) == 1:
                raise RequestError("messages: expected a message of the user before the reply's beginning", "messages")
            return [*first, *told[:-1]], str(told[-1]["content"])
        return [*first, *told], ""

    def _variables(self, preparation: Preparation) -> dict[str, Any]:
        variables: dict[str, Any] = {}
        if self.thinking is not None and preparation.takes("enable_thinking"):
            variables["enable_thinking"] = self.thinking.type != "disabled"
        effort = None if self.output_config is None else self.output_config.effort
        if effort is not None and preparation.takes("reasoning_effort"):
            variables["reasoning_effort"] = effort
        return variables


def _template_messages(message: AnthropicMessage, where: str) -> list[dict[str, Any]]:
    """A message as chat templates take it; each result of a tool is a message of its own. where: it stands in the
    request. Raises RequestError."""
    if isinstance(message.content, str):
        return [{"role": message.role, "content": message.content}]
    told: list[dict[str, Any]] = []
    own: dict[str, Any] = {"role": message.role, "content": ""}
    calls = []
    parts: list[dict[str, Any]] = []
    for number, block in enumerate(message.content):
        place = f"{where}.content.{number}"
        if block.type == "text":
            parts.append(text_part(block.text or ""))
        elif block.type == "image":
            if message.role != "user":
                raise RequestError(f"{place}: images are for messages of the user", place)
            parts.append(_image(block, place))
        elif block.type == "thinking":
            own["reasoning_content"] = own.get("reasoning_content", "") + (block.thinking or "")
        elif block.type == "tool_use":
            if block.name is None:
                raise RequestError("messages: a block tool_use needs a name", "messages")
            function = {"name": block.name, "arguments": block.input or {}}
            calls.append({"id": block.id, "type": "function", "function": function})
        elif block.type == "tool_result":
            told.append({"role": "tool", "content": _result(block, place), "tool_call_id": block.tool_use_id or ""})
    own["content"] = _joined(parts)
    if calls:
        own["tool_calls"] = calls
    if own["content"] or calls or not told:
        told.append(own)
    return told


def _joined(parts: list[dict[str, Any]]) -> str | list[dict[str, Any]]:
    """Parts as the content of a message: one text where there are no images."""
    if any(part["type"] == "image" for part in parts):
        return parts
    return "".join(part["text"] for part in parts)


def _image(block: Block, where: str) -> dict[str, Any]:
    if block.source is None:
        raise RequestError(f"{where}: an image needs a source with its data in base64", where)
    return image_part(block.source.data, where, is_url=False)


def _result(block: Block, where: str) -> str | list[dict[str, Any]]:
    """The content of a tool's result: text, and images where there are some. Raises RequestError for other things."""
    content = block.content
    if content is None or isinstance(content, str):
        given: list[Any] = [{"type": "text", "text": content or ""}]
    else:
        given = content if isinstance(content, list) else [content]
    parts = [text_part("Error: ")] if block.is_error else []
    for number, part in enumerate(given):
        place = f"{where}.content.{number}"
        kind = part.get("type") if isinstance(part, dict) else None
        if kind == "text":
            parts.append(text_part(str(part.get("text", ""))))
        elif kind == "image":
            try:
                parts.append(_image(Block.model_validate(part), place))
            except ValidationError as error:
                raise RequestError(f"{place}: {error.errors()[0]['msg']}", place) from error
        else:
            raise RequestError("messages: expected text as the content of a tool_result", "messages")
    return _joined(parts)


def _texts(blocks: str | list[Block]) -> str:
    return blocks if isinstance(blocks, str) else "\n".join(block.text or "" for block in blocks)


class AnthropicUsage(TypedDict):
    """Token counts. input_tokens: those that did not come from the cache."""

    input_tokens: int
    cache_creation_input_tokens: int
    cache_read_input_tokens: int
    output_tokens: int


class AnthropicAnswer(TypedDict):
    """The whole answer of /v1/messages."""

    id: str
    type: Literal["message"]
    role: Literal["assistant"]
    model: str
    content: list[dict[str, Any]]
    stop_reason: str | None
    stop_sequence: str | None
    usage: AnthropicUsage


class TokenCount(TypedDict):
    """The answer of /v1/messages/count_tokens."""

    input_tokens: int


class AnthropicForm(Form):
    """See `Form`. n_prompt: tokens of the prompt. new_id: makes ids of calls. thinks: whether reasoning is told."""

    ping: ClassVar[str] = sse({"type": "ping"}, "ping")

    def __init__(self, model: str, n_prompt: int, new_id: Callable[[], str], *, thinks: bool) -> None:
        self._n_prompt, self._new_id, self._thinks = n_prompt, new_id, thinks
        self._head = {"id": f"msg_{uuid.uuid4().hex}", "type": "message", "role": "assistant", "model": model}
        self._open: Literal["thinking", "text"] | None = None
        self._n_blocks = 0
        self._frame = Frame("")
        """Of the texts of the block that is open."""

    def opening(self) -> Iterable[str]:
        """See `Form`."""
        message: dict[str, Any] = self._head | {
            "content": [], "stop_reason": None, "stop_sequence": None, "usage": _usage(self._n_prompt, 0, 0),
        }  # fmt: skip
        yield _event({"type": "message_start", "message": message})

    def update(self, update: Update) -> Iterable[str]:
        """See `Form`."""
        for event in update.events:
            if self._thinks or not isinstance(event, Reasoning):
                yield from self._told(event)

    def closing(self, replies: Sequence[Ended]) -> Iterable[str]:
        """See `Form`."""
        yield from self._close()
        ended = replies[0]
        yield _event({"type": "message_delta", "delta": _stop(ended), "usage": _counts(ended)})
        yield _event({"type": "message_stop"})

    def failure(self, answer: ErrorAnswer, body: Any) -> str:
        """See `Form`."""
        return sse(body, "error")

    def whole(self, replies: Sequence[WholeReply]) -> dict[str, Any]:
        """See `Form`."""
        told = [event for event in replies[0].events if self._thinks or not isinstance(event, Reasoning)]
        ended = replies[0].ended
        content = [self._block(event) for event in told]
        return self._head | {"content": content, **_stop(ended), "usage": _counts(ended)}

    def _block(self, event: Event) -> dict[str, Any]:
        if isinstance(event, TextEvent):
            return {"type": "text", "text": event.text}
        if isinstance(event, Reasoning):
            return {"type": "thinking", "thinking": event.text, "signature": SIGNATURE}
        return {"type": "tool_use", "id": self._new_id(), "name": event.name, "input": parsed_json(event.arguments)}

    def _told(self, event: Event) -> Iterator[str]:
        if isinstance(event, Call):
            yield from self._close()
            yield self._begin({**self._block(event), "input": {}})
            yield self._delta({"type": "input_json_delta", "partial_json": event.arguments})
            yield self._end()
            return
        kind: Literal["thinking", "text"] = "thinking" if isinstance(event, Reasoning) else "text"
        if self._open != kind:
            yield from self._close()
            empty = {"type": kind, kind: ""}
            yield self._begin({**empty, "signature": ""} if kind == "thinking" else empty)
            self._open = kind
            self._frame = Frame(self._delta({"type": f"{kind}_delta", kind: Frame.TEXT}))
        yield self._frame.of(event.text)

    def _close(self) -> Iterator[str]:
        if self._open == "thinking":
            yield self._delta({"type": "signature_delta", "signature": SIGNATURE})
        if self._open is not None:
            self._open = None
            yield self._end()

    def _begin(self, block: dict[str, Any]) -> str:
        return _event({"type": "content_block_start", "index": self._n_blocks, "content_block": block})

    def _delta(self, delta: dict[str, Any]) -> str:
        return _event({"type": "content_block_delta", "index": self._n_blocks, "delta": delta})

    def _end(self) -> str:
        self._n_blocks += 1
        return _event({"type": "content_block_stop", "index": self._n_blocks - 1})


def _event(data: dict[str, Any]) -> str:
    return sse(data, data["type"])


def _stop(ended: Ended) -> dict[str, Any]:
    stop = ended.reply.stop_text if ended.reason == "stop" else None
    return {"stop_reason": "stop_sequence" if stop else STOP_REASONS[ended.reason], "stop_sequence": stop}


def _counts(ended: Ended) -> AnthropicUsage:
    return _usage(ended.n_prompt, ended.reply.n_reused, ended.n_new)


def _usage(n_prompt: int, n_reused: int, n_new: int) -> AnthropicUsage:
    return {
        "input_tokens": n_prompt - n_reused, "cache_creation_input_tokens": 0, "cache_read_input_tokens": n_reused,
        "output_tokens": n_new,
    }  # fmt: skip


def add_routes(app: FastAPI, models: Models) -> None:
    """Adds the endpoints."""

    @app.post("/v1/messages", responses=text_answers(AnthropicAnswer, STREAM, error=AnthropicErrorBody))
    async def messages(body: MessagesRequest, request: Request) -> Response:
        async with models.using(body.model, request) as served:
            worker, preparation = served.worker(), served.preparation
            asked = body.asked(preparation)
            prepared = await unless_left(
                request, served.encode(lambda: preparation.chat(asked), looks=asked.has_images)
            )
            thinks = body.thinking is None or body.thinking.type != "disabled"
            form = AnthropicForm(served.name, len(prepared.prompt_ids), preparation.syntax.new_id, thinks=thinks)
            return await deliver(worker, [prepared], form, request, streamed=bool(body.stream))

    @app.post("/v1/messages/count_tokens", responses=errors(AnthropicErrorBody), response_model=TokenCount)
    async def count_tokens(body: MessagesRequest, request: Request) -> Response:
        async with models.using(body.model, request) as served:
            preparation = served.preparation
            asked = body.asked(preparation)
            _, ids = await unless_left(
                request, served.encode(lambda: preparation.prompt(asked), looks=asked.has_images)
            )
            return JSONResponse({"input_tokens": len(ids)})
