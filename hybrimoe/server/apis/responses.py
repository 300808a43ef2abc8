"""OpenAI's /v1/responses, without state: every request brings its whole conversation."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Annotated, Any, ClassVar, Literal

from fastapi import FastAPI, Request
from fastapi.responses import Response
from pydantic import BeforeValidator, Field
from typing_extensions import TypedDict

from hybrimoe.errors import ConfigError
from hybrimoe.generation import SamplingOptions
from hybrimoe.generation.constraint import Structure
from hybrimoe.server.apis.documented import text_answers
from hybrimoe.server.apis.openai import UNUSED, json_schema_answer
from hybrimoe.server.apis.tools import MAX_TOOLS, TOOL_NAME, called, new_tool, only_functions, tool_use
from hybrimoe.server.asking import ChatAsked
from hybrimoe.server.delivery import deliver, unless_left
from hybrimoe.server.errors import ErrorAnswer, RequestError
from hybrimoe.server.fields import (
    Boolean,
    Free,
    Refused,
    Share,
    Strict,
    Temperature,
    Text,
    Tokens,
    shown,
)
from hybrimoe.server.forms import Ended, Form, Update, WholeReply, sse
from hybrimoe.server.images import image_part, text_part
from hybrimoe.server.models import Models
from hybrimoe.server.replies.events import Call, Event, Reasoning

MAX_ITEMS, MAX_PARTS = 10_000, 10_000
STREAM = "With stream: true. Events `event: TYPE` and `data: {...}` as OpenAI has them, from response.created to \
response.completed, response.incomplete or response.failed."
REFUSED: Refused = {
    "previous_response_id": ("stored responses; send the whole conversation as input", ()),
    "conversation": ("stored conversations; send the whole conversation as input", ()),
    "store": ("storing replies", (False,)),
    "background": ("replies in the background", (False,)),
    "prompt": ("stored prompts", ()),
    "max_tool_calls": ("tools that run at a provider's", ()),
    "top_logprobs": ("log probabilities here; see /v1/chat/completions", (0,)),
    "truncation": ("shortening of conversations", ("disabled",)),
    "service_tier": ("service tiers", ("auto", "default")),
    "moderation": ("moderation", ()),
}


class ContentPart(Strict):
    """Text or an image within an item; annotations and log probabilities of earlier replies are left out."""

    refused: ClassVar[Refused] = {"file_id": ("stored files; send the image itself as image_url", ())}

    type: Literal["input_text", "output_text", "refusal", "summary_text", "reasoning_text", "input_image"]
    text: Text | None = None
    image_url: Text | None = Field(default=None, description="Of an input_image: data:image/png;base64,...")
    detail: Text | None = Field(default=None, description="An image is seen as the model's processor prepares it.")
    refusal: Text | None = None
    annotations: list[Any] | None = None
    logprobs: list[Any] | None = None


def _text_parts(value: object) -> object:
    """A clearer message than that of the union: which kind of part this server has no support for."""
    known = ("input_text", "output_text", "refusal", "summary_text", "reasoning_text", "input_image")
    if isinstance(value, list):
        for part in value:
            if isinstance(part, dict) and part.get("type") not in known:
                raise ValueError(f"expected text content, found {shown(part.get('type'))}")
    return value


ContentParts = Annotated[list[ContentPart], Field(max_length=MAX_PARTS, fail_fast=True)]
Content = Annotated[Text | ContentParts, BeforeValidator(_text_parts)]


class InputItem(Strict):
    """One item of a conversation: a message, a call, its result, or reasoning."""

    type: Literal["message", "function_call", "function_call_output", "reasoning"] = "message"
    id: Text | None = None
    status: Text | None = None
    role: Literal["user", "assistant", "system", "developer"] | None = None
    phase: Text | None = None
    content: Content | None = None
    call_id: Text | None = None
    name: Text | None = None
    arguments: Text | None = None
    output: Content | None = None
    summary: ContentParts | None = None
    encrypted_content: Text | None = None


def _known_items(value: object) -> object:
    if isinstance(value, list):
        for item in value:
            kind = item.get("type", "message") if isinstance(item, dict) else "message"
            if kind not in ("message", "function_call", "function_call_output", "reasoning"):
                raise ValueError(f"this server has no support for items of the type {shown(kind)}")
    return value


class ResponseTool(Strict):
    """A function that the model may call."""

    type: Literal["function"]
    name: Annotated[str, Field(pattern=TOOL_NAME)]
    description: Text | None = None
    parameters: Free | None = None
    strict: Boolean | None = None


class ChosenTool(Strict):
    """The function that must be called."""

    type: Literal["function"]
    name: Text


class TextFormat(Strict):
    """The form of the answer."""

    type: Literal["text", "json_object", "json_schema"]
    name: Text | None = None
    description: Text | None = None
    schema_: Free | None = Field(default=None, alias="schema")
    strict: Boolean | None = None


class TextOptions(Strict):
    """About the answer's text."""

    refused: ClassVar[Refused] = {"verbosity": ("a verbosity", ("medium",))}

    format: TextFormat | None = None


class ReasoningOptions(Strict):
    """About what the model thinks before it answers."""

    effort: Text | None = Field(default=None, description="Handed to the model's chat template.")
    summary: Text | None = Field(default=None, description="Reasoning is told in full, never summed up.")
    generate_summary: Text | None = Field(default=None, description="As summary.")
    context: Text | None = Field(default=None, description="Earlier reasoning is in the input.")


Tools = Annotated[list[Annotated[ResponseTool, BeforeValidator(only_functions)]], Field(max_length=MAX_TOOLS)]
Items = Annotated[list[InputItem], Field(max_length=MAX_ITEMS, fail_fast=True), BeforeValidator(_known_items)]


class StreamOptions(Strict):
    """What a stream holds beside its events."""

    include_obfuscation: Boolean | None = Field(default=None, description="Events have no padding either way.")


class ResponseRequest(Strict):
    """POST /v1/responses."""

    refused: ClassVar[Refused] = REFUSED

    model: Text | None = None
    input: Text | Items
    instructions: Text | None = None
    max_output_tokens: Tokens | None = None
    temperature: Temperature | None = None
    top_p: Share | None = None
    stream: Boolean | None = None
    stream_options: StreamOptions | None = None
    tools: Tools | None = None
    tool_choice: Literal["auto", "none", "required"] | ChosenTool | None = None
    parallel_tool_calls: Boolean | None = None
    text: TextOptions | None = None
    reasoning: ReasoningOptions | None = None
    include: list[Text] | None = Field(default=None, description="What there is is told in any case.")
    user: Text | None = Field(default=None, description=UNUSED["user"])
    safety_identifier: Text | None = Field(default=None, description=UNUSED["safety_identifier"])
    metadata: Free | None = Field(default=None, description=UNUSED["metadata"])
    client_metadata: Free | None = Field(default=None, description=UNUSED["metadata"])
    prompt_cache_key: Text | None = Field(default=None, description=UNUSED["prompt_cache_key"])
    prompt_cache_retention: Text | None = Field(default=None, description=UNUSED["prompt_cache_retention"])

    def asked(self) -> ChatAsked:
        """In the server's own form. Raises RequestError."""
        tools = [
            new_tool(one.name, one.description, one.parameters, strict=bool(one.strict)) for one in self.tools or []
        ]
        chosen = self.tool_choice
        named = chosen.name if isinstance(chosen, ChosenTool) else None
        choice = "required" if isinstance(chosen, ChosenTool) else chosen or "auto"
        use = tool_use(tools, choice, named, many=self.parallel_tool_calls is not False)
        effort = None if self.reasoning is None else self.reasoning.effort
        try:
            options = SamplingOptions(
                temperature=self.temperature, top_p=self.top_p, max_new_tokens=self.max_output_tokens
            )
        except ConfigError as error:
            raise RequestError(str(error)) from error
        variables = {} if effort is None else {"reasoning_effort": effort}
        return ChatAsked(self.messages(), options, use, self.answer(), "text.format", variables)

    def answer(self) -> Structure | None:
        """What the answer must be."""
        form = None if self.text is None else self.text.format
        if form is None or form.type == "text":
            return None
        return json_schema_answer(form.schema_ if form.type == "json_schema" else None)

    def messages(self) -> list[dict[str, Any]]:
        """The conversation as chat templates take it. Raises RequestError for an empty one."""
        messages: list[dict[str, Any]] = []
        if self.instructions:
            messages.append({"role": "system", "content": self.instructions})
        if isinstance(self.input, str):
            return [*messages, {"role": "user", "content": self.input}]
        n_before, thought = len(messages), ""
        for number, item in enumerate(self.input):
            if item.type == "reasoning":
                thought = _plain(item.content) or _plain(item.summary)
                continue
            _add(messages, item, f"input.{number}", thought)
            thought = ""
        if len(messages) == n_before:
            raise RequestError("input: expected a message, found none", "input")
        return messages

    def echoed(self) -> dict[str, Any]:
        """What an answer tells of its request."""
        return {
            "instructions": self.instructions,
            "max_output_tokens": self.max_output_tokens,
            "metadata": self.metadata or {},
            "parallel_tool_calls": self.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": None if self.reasoning is None else self.reasoning.effort, "summary": None},
            "store": False,
            "temperature": self.temperature,
            "text": {"format": self._format()},
            "tool_choice": self.tool_choice.model_dump() if isinstance(self.tool_choice, ChosenTool)
            else self.tool_choice or "auto",
            "tools": [one.model_dump() for one in self.tools or []],
            "top_p": self.top_p,
            "truncation": "disabled",
            "user": self.user,
        }  # fmt: skip

    def _format(self) -> dict[str, Any]:
        form = None if self.text is None else self.text.format
        return {"type": "text"} if form is None else form.model_dump(by_alias=True, exclude_none=True)


def _add(messages: list[dict[str, Any]], item: InputItem, where: str, thought: str) -> None:
    """Adds an item to the conversation; calls join the assistant's message before them. Raises RequestError."""
    if item.type == "function_call_output":
        if item.call_id is None or item.output is None:
            raise RequestError(f"{where}: a function_call_output needs call_id and output", where)
        shown = _shown(item.output, f"{where}.output")
        messages.append({"role": "tool", "content": shown, "tool_call_id": item.call_id})
    elif item.type == "function_call":
        if item.name is None or item.arguments is None:
            raise RequestError(f"{where}: a function_call needs name and arguments", where)
        if not messages or messages[-1]["role"] != "assistant":
            messages.append({"role": "assistant", "content": ""} | _reasoning(thought))
        calls = messages[-1].setdefault("tool_calls", [])
        calls.append(called(item.call_id, item.name, item.arguments))
    else:
        if item.role is None or item.content is None:
            raise RequestError(f"{where}: a message needs role and content", where)
        if item.role != "user" and _has_images(item.content):
            raise RequestError(f"{where}: images are for messages of the user, found one of the {item.role}", where)
        message = {"role": item.role, "content": _shown(item.content, f"{where}.content")}
        messages.append(message | (_reasoning(thought) if item.role == "assistant" else {}))


def _reasoning(thought: str) -> dict[str, str]:
    return {"reasoning_content": thought} if thought else {}


def _has_images(content: str | list[ContentPart] | None) -> bool:
    return isinstance(content, list) and any(part.type == "input_image" for part in content)


def _shown(content: str | list[ContentPart] | None, where: str) -> str | list[dict[str, Any]]:
    """A text, or parts where it shows images. Raises RequestError for one without an image."""
    if not isinstance(content, list) or not _has_images(content):
        return _plain(content)
    parts = []
    for number, part in enumerate(content):
        place = f"{where}.{number}"
        if part.type != "input_image":
            parts.append(text_part(part.text or part.refusal or ""))
        elif part.image_url is None:
            raise RequestError(f"{place}: an input_image needs an image_url with a data: URL", place)
        else:
            parts.append(image_part(part.image_url, place, is_url=True))
    return parts


def _plain(content: str | list[ContentPart] | None) -> str:
    if content is None or isinstance(content, str):
        return content or ""
    return "".join(part.text or part.refusal or "" for part in content)


class ResponseAnswer(TypedDict):
    """The whole answer of /v1/responses; further fields repeat the request."""

    id: str
    object: Literal["response"]
    created_at: int
    status: Literal["completed", "incomplete"]
    error: None
    incomplete_details: dict[str, str] | None
    model: str
    output: list[dict[str, Any]]
    usage: dict[str, Any]


class Output:
    """The items of an answer as they grow, and the events that tell of it."""

    def __init__(self, new_id: Callable[[], str]) -> None:
        self.items: list[dict[str, Any]] = []
        self._new_id = new_id
        self._open: Literal["reasoning", "message"] | None = None

    def add(self, event: Event) -> Iterator[dict[str, Any]]:
        """What an event of the reply brings."""
        if isinstance(event, Call):
            yield from self.close()
            yield from self._call(event)
            return
        kind: Literal["reasoning", "message"] = "reasoning" if isinstance(event, Reasoning) else "message"
        if self._open != kind:
            yield from self.close()
            yield from self._begin(kind)
        part = self.items[-1]["content"][0]
        part["text"] += event.text
        yield {"type": f"{self._told_as}.delta", **self._place, "delta": event.text, **self._logprobs}

    def close(self) -> Iterator[dict[str, Any]]:
        """The item that is open is complete."""
        if self._open is None:
            return
        item = self.items[-1]
        part = item["content"][0]
        yield {"type": f"{self._told_as}.done", **self._place, "text": part["text"], **self._logprobs}
        yield {"type": "response.content_part.done", **self._place, "part": dict(part)}
        item["status"] = "completed"
        self._open = None
        yield self._item_event("done")

    def _begin(self, kind: Literal["reasoning", "message"]) -> Iterator[dict[str, Any]]:
        self._open = kind
        if kind == "reasoning":
            part: dict[str, Any] = {"type": "reasoning_text", "text": ""}
            item: dict[str, Any] = {"type": "reasoning", "id": _id("rs"), "summary": [], "content": []}
        else:
            part = {"type": "output_text", "text": "", "annotations": [], "logprobs": []}
            item = {"type": "message", "id": _id("msg"), "role": "assistant", "content": []}
        item["status"] = "in_progress"
        self.items.append(item)
        yield self._item_event("added")
        item["content"] = [part]
        yield {"type": "response.content_part.added", **self._place, "part": dict(part)}

    def _call(self, call: Call) -> Iterator[dict[str, Any]]:
        item = {
            "type": "function_call", "id": _id("fc"), "call_id": self._new_id(), "name": call.name, "arguments": "",
            "status": "in_progress",
        }  # fmt: skip
        self.items.append(item)
        yield self._item_event("added")
        place = {"item_id": item["id"], "output_index": len(self.items) - 1}
        yield {"type": "response.function_call_arguments.delta", **place, "delta": call.arguments}
        yield {
            "type": "response.function_call_arguments.done", **place, "name": call.name, "arguments": call.arguments,
        }  # fmt: skip
        item |= {"arguments": call.arguments, "status": "completed"}
        yield self._item_event("done")

    def _item_event(self, what: str) -> dict[str, Any]:
        item = {**self.items[-1]}
        return {"type": f"response.output_item.{what}", "output_index": len(self.items) - 1, "item": item}

    @property
    def _told_as(self) -> str:
        return "response.reasoning_text" if self._open == "reasoning" else "response.output_text"

    @property
    def _logprobs(self) -> dict[str, Any]:
        return {} if self._open == "reasoning" else {"logprobs": []}

    @property
    def _place(self) -> dict[str, Any]:
        return {"item_id": self.items[-1]["id"], "output_index": len(self.items) - 1, "content_index": 0}


class ResponseForm(Form):
    """See `Form`. count: tokens of a text."""

    def __init__(
        self, model: str, body: ResponseRequest, new_id: Callable[[], str], count: Callable[[str], int]
    ) -> None:
        self._output, self._count = Output(new_id), count
        self._n_events = 0
        self._head = {
            "id": _id("resp"), "object": "response", "created_at": int(time.time()), "model": model,
            "error": None, "incomplete_details": None, **body.echoed(),
        }  # fmt: skip

    def opening(self) -> Iterable[str]:
        """See `Form`."""
        for kind in ("created", "in_progress"):
            yield self._event({"type": f"response.{kind}", "response": self._response("in_progress")})

    def update(self, update: Update) -> Iterable[str]:
        """See `Form`."""
        for event in update.events:
            yield from map(self._event, self._output.add(event))

    def closing(self, replies: Sequence[Ended]) -> Iterable[str]:
        """See `Form`."""
        yield from map(self._event, self._output.close())
        response = self._ended(replies[0])
        yield self._event({"type": f"response.{response['status']}", "response": response})

    def failure(self, answer: ErrorAnswer, body: Any) -> str:
        """See `Form`."""
        said = answer.body["error"]
        error = {"code": said["code"] or "server_error", "message": said["message"]}
        return self._event({"type": "response.failed", "response": self._response("failed") | {"error": error}})

    def whole(self, replies: Sequence[WholeReply]) -> dict[str, Any]:
        """See `Form`."""
        for event in replies[0].events:
            for _ in self._output.add(event):
                pass
        for _ in self._output.close():
            pass
        return self._ended(replies[0].ended)

    def _ended(self, ended: Ended) -> dict[str, Any]:
        cut = ended.reason == "length"
        thought = "".join(item["content"][0]["text"] for item in self._output.items if item["type"] == "reasoning")
        return self._response("incomplete" if cut else "completed") | {
            "incomplete_details": {"reason": "max_output_tokens"} if cut else None,
            "usage": {
                "input_tokens": ended.n_prompt,
                "input_tokens_details": {"cached_tokens": ended.reply.n_reused},
                "output_tokens": ended.n_new,
                "output_tokens_details": {"reasoning_tokens": self._count(thought) if thought else 0},
                "total_tokens": ended.n_prompt + ended.n_new,
            },
        }

    def _response(self, status: str) -> dict[str, Any]:
        return self._head | {"status": status, "output": list(self._output.items), "usage": None}

    def _event(self, data: dict[str, Any]) -> str:
        data = {**data, "sequence_number": self._n_events}
        self._n_events += 1
        return sse(data, data["type"])


def _id(prefix: str) -> str:
    return f"{prefix}_{uuid.uuid4().hex}"


def add_routes(app: FastAPI, models: Models) -> None:
    """Adds the endpoint."""

    @app.post("/v1/responses", responses=text_answers(ResponseAnswer, STREAM))
    async def responses(body: ResponseRequest, request: Request) -> Response:
        async with models.using(body.model, request) as served:
            worker, preparation = served.worker(), served.preparation
            asked = body.asked()
            prepared = await unless_left(
                request, served.encode(lambda: preparation.chat(asked), looks=asked.has_images)
            )
            tokenizer = worker.generator.tokenizer

            def count(text: str) -> int:
                return len(tokenizer(text, add_special_tokens=False)["input_ids"])

            form = ResponseForm(served.name, body, preparation.syntax.new_id, count)
            return await deliver(worker, [prepared], form, request, streamed=bool(body.stream))
