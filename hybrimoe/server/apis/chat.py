"""OpenAI's /v1/chat/completions: conversations, with tools, reasoning and answers of a given structure."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Literal, NotRequired

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BeforeValidator, Field, model_validator
from typing_extensions import TypedDict

from hybrimoe.server.apis.documented import text_answers
from hybrimoe.server.apis.openai import Sampling, Usage, choice_options, usage
from hybrimoe.server.apis.tools import MAX_TOOLS, TOOL_NAME, called, new_tool, only_functions, tool_use
from hybrimoe.server.asking import ChatAsked
from hybrimoe.server.delivery import deliver, unless_left
from hybrimoe.server.errors import RequestError
from hybrimoe.server.fields import (
    MAX_SHOWN,
    Boolean,
    Free,
    NoLimit,
    Refused,
    Strict,
    Text,
    Tokens,
    TopLogprobs,
    json_throughout,
    length_of,
)
from hybrimoe.server.forms import Ended, FinishReason, Form, Frame, StopReason, Update, WholeReply, sse
from hybrimoe.server.images import image_part, text_part
from hybrimoe.server.models import Models
from hybrimoe.server.replies import events
from hybrimoe.server.replies.events import Call, Reasoning, Tool
from hybrimoe.server.replies.syntax import ToolUse
from hybrimoe.server.urgency import urgency_of
from hybrimoe.server.worker import Piece

if TYPE_CHECKING:
    from hybrimoe.generation import TokenLogprob

MAX_MESSAGES, MAX_PARTS = 10_000, 10_000
"""Of a conversation, and of one message's content."""
REFUSED_OF_MESSAGES: Refused = {
    "function_call": ("functions; send tool_calls", ()),
    "audio": ("audio", ()),
    "annotations": ("annotations", ([],)),
}
STREAM = "With stream: true. Events `data: {...}` in the form of chunks, `data: [DONE]` at the end; a failure is an \
event with an error object, and no [DONE] follows."


class TextPart(Strict):
    """A part of a message's content."""

    type: Literal["text"]
    text: Text


class ImageUrl(Strict):
    """The image itself, as data:image/png;base64,... ; nothing is fetched from elsewhere."""

    url: Text
    detail: Text | None = Field(default=None, description="An image is seen as the model's processor prepares it.")


class ImagePart(Strict):
    """An image within a message's content, for models that see."""

    type: Literal["image_url"]
    image_url: ImageUrl | Text


def _no_other_parts(value: object) -> object:
    """A clearer message than that of the union: which kind of part this server has no support for."""
    if isinstance(value, list):
        kinds = {str(part.get("type")) for part in value if isinstance(part, dict)} - {"text", "image_url"}
        if kinds:
            found = ", ".join(sorted(kinds))[:MAX_SHOWN]
            json_throughout(found)
            raise ValueError(f"expected text content, found {found}")
    return value


ContentPart = Annotated[TextPart | ImagePart, Field(discriminator="type")]
ContentParts = Annotated[list[ContentPart], Field(max_length=MAX_PARTS, fail_fast=True)]


class CalledFunction(Strict):
    """What a tool call asked for; arguments are JSON, as text."""

    name: Text
    arguments: Text


class ToolCall(Strict):
    """A tool call of an earlier reply."""

    refused: ClassVar[Refused] = {"index": ("pieces of tool calls", tuple(range(MAX_TOOLS)))}

    id: Text | None = None
    type: Literal["function"] = "function"
    function: CalledFunction


class Message(Strict):
    """One message of a chat. Only an assistant's may have no content."""

    refused: ClassVar[Refused] = REFUSED_OF_MESSAGES

    role: Literal["system", "developer", "user", "assistant", "tool"]
    content: Annotated[Text | ContentParts | None, BeforeValidator(_no_other_parts)] = None
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

    def as_template_takes_it(self, where: str = "messages") -> dict[str, Any]:
        """The message as chat templates read it: content as text, or as parts where it shows images; arguments of tool
        calls as data. where: it stands in the request. Raises RequestError."""
        content = self._content(where)
        given = {"name": self.name, "reasoning_content": self.reasoning_content, "tool_call_id": self.tool_call_id}
        message: dict[str, Any] = {"role": self.role, "content": content}
        message |= {name: value for name, value in given.items() if value is not None}
        if self.tool_calls:
            message["tool_calls"] = [
                called(call.id, call.function.name, call.function.arguments) for call in self.tool_calls
            ]
        return message

    def _content(self, where: str) -> str | list[dict[str, Any]]:
        if not isinstance(self.content, list):
            return self.content or self.refusal or ""
        if all(isinstance(part, TextPart) for part in self.content):
            return "".join(part.text for part in self.content if isinstance(part, TextPart))
        if self.role not in ("user", "tool"):
            raise RequestError(f"{where}: images are for messages of the user, found one of the {self.role}", where)
        parts = []
        for number, part in enumerate(self.content):
            if isinstance(part, TextPart):
                parts.append(text_part(part.text))
            else:
                url = part.image_url if isinstance(part.image_url, str) else part.image_url.url
                parts.append(image_part(url, f"{where}.content.{number}", is_url=True))
        return parts


class FunctionDefinition(Strict):
    """A function that the model may call. parameters: JSON schema of its arguments."""

    name: Annotated[str, Field(pattern=TOOL_NAME)]
    description: Text | None = None
    parameters: Free | None = None
    strict: Boolean | None = Field(default=None, description="Calls that the model decides on follow the schema.")

    def tool(self) -> Tool:
        """In the server's own form."""
        return new_tool(self.name, self.description, self.parameters, strict=bool(self.strict))


class ToolDefinition(Strict):
    """A tool; all are functions of the client's."""

    type: Literal["function"]
    function: FunctionDefinition


class NamedFunction(Strict):
    """The name of a function."""

    name: Text


class NamedTool(Strict):
    """The tool that must be called."""

    type: Literal["function"]
    function: NamedFunction


Tools = Annotated[list[Annotated[ToolDefinition, BeforeValidator(only_functions)]], Field(max_length=MAX_TOOLS)]


class ChatRequest(Sampling):
    """POST /v1/chat/completions."""

    messages: list[Message] = Field(min_length=1, max_length=MAX_MESSAGES)
    max_completion_tokens: Tokens | NoLimit | None = Field(default=None, description="As max_tokens.")
    logprobs: Boolean | None = None
    top_logprobs: TopLogprobs | None = Field(default=None, description="Needs logprobs.")
    tools: Tools | None = None
    tool_choice: Literal["auto", "none", "required"] | NamedTool | None = None
    parallel_tool_calls: Boolean | None = Field(default=None, description="false: at most one call in a reply.")
    reasoning_effort: Text | None = Field(default=None, description="Handed to the model's chat template.")
    reasoning_format: Literal["auto", "deepseek", "none"] | None = Field(
        default=None, description="none: reasoning stays within the content; else it is reasoning_content."
    )
    chat_template_kwargs: Free | None = Field(default=None, description="Variables of the model's chat template.")

    refused: ClassVar[Refused] = {
        **Sampling.refused, "best_of": ("choosing among replies", (1,)), "echo": ("repeating the prompt", (False,)),
        "suffix": ("text insertion", ("",)),
    }  # fmt: skip

    @model_validator(mode="after")
    def _goes_together(self) -> ChatRequest:
        if self.top_logprobs is not None and not self.logprobs:
            raise ValueError("top_logprobs: needs logprobs: true")
        return self

    @property
    def longest_reply(self) -> int | None:
        """See `Sampling`."""
        return length_of(self.max_completion_tokens or self.max_tokens)

    @property
    def n_top_logprobs(self) -> int | None:
        """See `Sampling`."""
        return (self.top_logprobs or 0) if self.logprobs else None

    def template_messages(self) -> list[dict[str, Any]]:
        """Messages as chat templates take them."""
        return [message.as_template_takes_it(f"messages.{at}") for at, message in enumerate(self.messages)]

    def template_variables(self) -> dict[str, Any]:
        """Variables for the chat template."""
        effort = {} if self.reasoning_effort is None else {"reasoning_effort": self.reasoning_effort}
        return effort | (self.chat_template_kwargs or {})

    def tool_use(self) -> ToolUse:
        """Tools in the server's own form. Raises RequestError."""
        tools = [tool.function.tool() for tool in self.tools or []]
        named = self.tool_choice.function.name if isinstance(self.tool_choice, NamedTool) else None
        choice = "required" if isinstance(self.tool_choice, NamedTool) else self.tool_choice or "auto"
        return tool_use(tools, choice, named, many=self.parallel_tool_calls is not False)

    def asked(self) -> ChatAsked:
        """In the server's own form. Raises RequestError."""
        structure, field = self.answer()
        return ChatAsked(
            self.template_messages(), self.options(), self.tool_use(), structure, field, self.template_variables(),
            separate_reasoning=self.reasoning_format != "none",
        )  # fmt: skip


class TopLogprob(TypedDict):
    """One of the best tokens at a place. bytes: null for a token that is part of a character."""

    token: str
    logprob: float
    bytes: list[int] | None


class ChatLogprob(TopLogprob):
    """A token of the reply, and the best ones in its place."""

    top_logprobs: list[TopLogprob]


class ChatLogprobs(TypedDict):
    """Log probabilities of a chat reply or of one piece of it."""

    content: list[ChatLogprob]


class AnsweredFunction(TypedDict):
    """What a call asks for; arguments are JSON, as text."""

    name: str
    arguments: str


class AnsweredCall(TypedDict):
    """A call of a tool."""

    id: str
    type: Literal["function"]
    function: AnsweredFunction


class AssistantMessage(TypedDict):
    """A whole reply of a chat. content: null where it is nothing but calls."""

    role: Literal["assistant"]
    content: str | None
    reasoning_content: NotRequired[str]
    tool_calls: NotRequired[list[AnsweredCall]]


class ChatChoice(StopReason):
    """A whole reply of a chat, why it ended, and its log probabilities."""

    index: int
    message: AssistantMessage
    logprobs: ChatLogprobs | None
    finish_reason: FinishReason


class ChatCompletion(TypedDict):
    """The whole answer of /v1/chat/completions."""

    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage


class ChatForm(Form):
    """See `Form`. new_id: makes ids of calls."""

    def __init__(self, model: str, tokenizer: Any, body: ChatRequest, new_id: Callable[[], str]) -> None:
        self._tokenizer, self._body, self._new_id = tokenizer, body, new_id
        self._n = body.n or 1
        self._n_calls = [0] * self._n
        self._frames: dict[tuple[int, str], Frame] = {}
        self._head = {"id": f"chatcmpl-{uuid.uuid4().hex}", "created": int(time.time()), "model": model}

    def opening(self) -> Iterable[str]:
        """The role, as OpenAI's first event has it."""
        for index in range(self._n):
            yield self._chunk(index, {"role": "assistant", "content": ""}, None, None)

    def update(self, update: Update) -> Iterable[str]:
        """See `Form`."""
        logprobs = self._logprobs(update.piece)
        for event in update.events:
            if logprobs is None and not isinstance(event, Call):
                yield self._frame(update.choice, _field(event)).of(event.text)
                continue
            for delta in self._deltas(update.choice, event):
                yield self._chunk(update.choice, delta, logprobs, None)
                logprobs = None
        if logprobs is not None and logprobs["content"]:
            yield self._chunk(update.choice, {"content": ""}, logprobs, None)
        if update.ended is not None:
            yield self._chunk(update.choice, {}, None, update.ended)

    def closing(self, replies: Sequence[Ended]) -> Iterable[str]:
        """See `Form`."""
        if self._body.include_usage:
            yield sse(self._head | {"object": "chat.completion.chunk", "choices": [], "usage": usage(replies, self._n)})
        yield "data: [DONE]\n\n"

    def whole(self, replies: Sequence[WholeReply]) -> dict[str, Any]:
        """See `Form`."""
        choices: list[ChatChoice] = [
            {
                "index": index, "message": self._message(reply), "logprobs": self._logprobs(reply.piece),
                "finish_reason": reply.ended.reason,
            }
            for index, reply in enumerate(replies)
        ]  # fmt: skip
        for choice, reply in zip(choices, replies, strict=True):
            if reply.ended.stop_reason is not None:
                choice["stop_reason"] = reply.ended.stop_reason
        counts = usage([reply.ended for reply in replies], self._n)
        return self._head | {"object": "chat.completion", "choices": choices, "usage": counts}

    def _message(self, reply: WholeReply) -> AssistantMessage:
        calls = [self._call(call) for call in reply.calls]
        message: AssistantMessage = {"role": "assistant", "content": reply.text or (None if calls else "")}
        if reply.reasoning:
            message["reasoning_content"] = reply.reasoning
        if calls:
            message["tool_calls"] = calls
        return message

    def _call(self, call: Call) -> AnsweredCall:
        return {
            "id": self._new_id(), "type": "function", "function": {"name": call.name, "arguments": call.arguments},
        }  # fmt: skip

    def _deltas(self, choice: int, event: events.Event) -> Iterable[dict[str, Any]]:
        if not isinstance(event, Call):
            yield {_field(event): event.text}
            return
        index = self._n_calls[choice]
        self._n_calls[choice] += 1
        begun = self._call(replace(event, arguments=""))
        yield {"tool_calls": [{"index": index, **begun}]}
        yield {"tool_calls": [{"index": index, "function": {"arguments": event.arguments}}]}

    def _frame(self, index: int, field: str) -> Frame:
        """Chunks that bring nothing but text."""
        if (index, field) not in self._frames:
            self._frames[index, field] = Frame(self._chunk(index, {field: Frame.TEXT}, None, None))
        return self._frames[index, field]

    def _chunk(self, index: int, delta: Any, logprobs: ChatLogprobs | None, ended: Ended | None) -> str:
        finish = None if ended is None else ended.reason
        choice: dict[str, Any] = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": finish}
        if ended is not None and ended.stop_reason is not None:
            choice["stop_reason"] = ended.stop_reason
        return sse(self._head | {"object": "chat.completion.chunk", "choices": [choice]})

    def _logprobs(self, piece: Piece) -> ChatLogprobs | None:
        if not self._body.logprobs:
            return None
        return {"content": [self._logprob(one) for one in piece.logprobs]}

    def _logprob(self, one: TokenLogprob) -> ChatLogprob:
        best = [self._top(token, logprob) for token, logprob in one.top]
        return {**self._top(one.token_id, one.logprob), "top_logprobs": best}

    def _top(self, token: int, logprob: float) -> TopLogprob:
        text = str(self._tokenizer.decode([token]))
        return {"token": text, "logprob": logprob, "bytes": None if "\ufffd" in text else list(text.encode())}


def _field(event: events.Text | Reasoning) -> str:
    """Where the text of an event stands in a message."""
    return "reasoning_content" if isinstance(event, Reasoning) else "content"


def add_routes(app: FastAPI, models: Models) -> None:
    """Adds the endpoint."""

    @app.post("/v1/chat/completions", responses=text_answers(ChatCompletion, STREAM))
    async def chat(body: ChatRequest, request: Request) -> Response:
        async with models.using(body.model, request) as served:
            worker, preparation = served.worker(), served.preparation
            asked = body.asked()
            prepared = await unless_left(
                request, served.encode(lambda: preparation.chat(asked), looks=asked.has_images)
            )
            each = [replace(prepared, options=options) for options in choice_options(prepared.options, body.n or 1)]
            form = ChatForm(served.name, worker.generator.tokenizer, body, preparation.syntax.new_id)
            urgency = urgency_of(request, body.priority, body.max_reply_seconds, body.id_slot)
            return await deliver(worker, each, form, request, streamed=bool(body.stream), urgency=urgency)
