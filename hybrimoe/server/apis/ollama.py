"""Ollama's API: /api/chat, /api/generate, /api/tags, /api/ps, /api/show, /api/version. Streams are lines of JSON."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime
from typing import Any, ClassVar, Literal, NotRequired

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import Field
from typing_extensions import TypedDict

from hybrimoe.errors import ConfigError
from hybrimoe.generation import SamplingOptions
from hybrimoe.generation.constraint import Structure
from hybrimoe.server.apis.chat import Tools
from hybrimoe.server.apis.documented import errors, service_errors, text_answers
from hybrimoe.server.apis.openai import json_schema_answer
from hybrimoe.server.apis.tools import new_tool, tool_use
from hybrimoe.server.asking import ChatAsked, Preparation, Prepared, TextAsked
from hybrimoe.server.delivery import deliver, unless_left
from hybrimoe.server.errors import OllamaErrorBody, RequestError
from hybrimoe.server.fields import (
    Boolean,
    Free,
    Integer,
    Number,
    Penalty,
    Refused,
    Repetition,
    Seed,
    Share,
    StopText,
    StopTexts,
    Strict,
    Temperature,
    Text,
    TopK,
)
from hybrimoe.server.forms import NDJSON, Ended, Form, Update, WholeReply, line
from hybrimoe.server.infill import can_infill
from hybrimoe.server.replies.events import Call, Reasoning, parsed_json
from hybrimoe.server.served import DEFAULT_TAG, Served

OLLAMA_VERSION = "0.12.6"
"""Of the Ollama whose API this is: clients ask, and refuse older ones."""
STREAM = "Unless stream is false: lines of JSON, the last one with done: true; a failure is a line with error."
NS_PER_US = 1000
IMAGES: Refused = {"images": ("images", ([],))}


class Options(Strict):
    """Sampling; what says how Ollama should load its model has no effect here."""

    refused: ClassVar[Refused] = {
        "typical_p": ("typical sampling", (1, 1.0, 0, 0.0)),
        "tfs_z": ("tail-free sampling", (1, 1.0)),
        "mirostat": ("Mirostat", (0,)),
    }

    num_predict: Integer | None = Field(default=None, description="Tokens of the reply; below 1: no limit.")
    temperature: Temperature | None = None
    top_k: TopK | None = None
    top_p: Share | None = None
    min_p: Share | None = None
    repeat_penalty: Repetition | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Seed | None = None
    stop: StopText | StopTexts | None = None
    num_ctx: Integer | None = Field(default=None, description="The context is as long as the memory holds.")
    num_keep: Integer | None = Field(default=None, description="A conversation is not shortened.")
    repeat_last_n: Integer | None = Field(default=None, description="Penalties are of the whole text.")
    penalize_newline: Boolean | None = Field(default=None, description="As any token.")
    mirostat_eta: Number | None = None
    mirostat_tau: Number | None = None
    num_batch: Integer | None = None
    num_gpu: Integer | None = None
    main_gpu: Integer | None = None
    num_thread: Integer | None = None
    numa: Boolean | None = None
    low_vram: Boolean | None = None
    use_mmap: Boolean | None = None
    use_mlock: Boolean | None = None
    vocab_only: Boolean | None = None

    def sampling(self) -> SamplingOptions:
        """As the generator takes them. Raises RequestError."""
        stop = (self.stop,) if isinstance(self.stop, str) else tuple(self.stop or ())
        try:
            return SamplingOptions(
                temperature=self.temperature, top_p=self.top_p, top_k=self.top_k, min_p=self.min_p,
                repetition_penalty=self.repeat_penalty, presence_penalty=self.presence_penalty or 0.0,
                frequency_penalty=self.frequency_penalty or 0.0, seed=self.seed, stop=stop,
                max_new_tokens=self.num_predict if self.num_predict and self.num_predict > 0 else None,
            )  # fmt: skip
        except ConfigError as error:
            raise RequestError(str(error), "options") from error


class OllamaFunction(Strict):
    """What a call asked for."""

    name: Text
    arguments: Free
    index: Integer | None = None


class OllamaCall(Strict):
    """A call of an earlier reply."""

    id: Text | None = None
    type: Text | None = None
    function: OllamaFunction


class OllamaMessage(Strict):
    """One message of a chat."""

    refused: ClassVar[Refused] = IMAGES

    role: Literal["system", "user", "assistant", "tool"]
    content: Text | None = None
    thinking: Text | None = None
    tool_calls: list[OllamaCall] | None = None
    tool_name: Text | None = None
    tool_call_id: Text | None = None

    def as_template_takes_it(self) -> dict[str, Any]:
        """The message as chat templates read it."""
        given = {"name": self.tool_name, "reasoning_content": self.thinking, "tool_call_id": self.tool_call_id}
        message: dict[str, Any] = {"role": self.role, "content": self.content or ""}
        message |= {name: value for name, value in given.items() if value is not None}
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function",
                 "function": {"name": call.function.name, "arguments": call.function.arguments}}
                for call in self.tool_calls
            ]  # fmt: skip
        return message


class OllamaRequest(Strict):
    """What both endpoints share."""

    model: Text
    stream: Boolean | None = None
    format: Literal["", "json"] | Free | None = None
    options: Options | None = None
    keep_alive: Text | Integer | None = Field(default=None, description="The model stays loaded.")
    think: Boolean | Literal["low", "medium", "high", "max"] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None

    def sampling(self) -> SamplingOptions:
        """See `Options`."""
        return (self.options or Options()).sampling()

    def answer(self) -> Structure | None:
        """What the answer must be."""
        if not self.format:
            return None
        return json_schema_answer(None if isinstance(self.format, str) else self.format)

    def variables(self, preparation: Preparation) -> dict[str, Any]:
        """Of the chat template. Raises RequestError where the model is to think and cannot."""
        if self.think is None:
            return {}
        if self.think and not preparation.syntax.can_think:
            raise RequestError(f"{self.model!r} does not support thinking", "think")
        if isinstance(self.think, str) and preparation.takes("reasoning_effort"):
            return {"reasoning_effort": self.think}
        return {"enable_thinking": bool(self.think)} if preparation.takes("enable_thinking") else {}


class OllamaChatRequest(OllamaRequest):
    """POST /api/chat."""

    messages: list[OllamaMessage] = Field(default_factory=list)
    tools: Tools | None = None

    def asked(self, preparation: Preparation) -> ChatAsked:
        """In the server's own form. Raises RequestError."""
        tools = [
            new_tool(one.function.name, one.function.description, one.function.parameters) for one in self.tools or []
        ]
        return ChatAsked(
            [message.as_template_takes_it() for message in self.messages], self.sampling(),
            tool_use(tools, "auto", None, many=True), self.answer(), "format", self.variables(preparation),
        )  # fmt: skip


class OllamaGenerateRequest(OllamaRequest):
    """POST /api/generate."""

    refused: ClassVar[Refused] = {
        **IMAGES, "template": ("other templates than the model's; send raw: true", ("",)),
        "context": ("contexts as tokens; use /api/chat", ([],)),
    }  # fmt: skip

    prompt: Text | None = None
    suffix: Text | None = None
    system: Text | None = None
    raw: Boolean | None = None

    def asked(self, preparation: Preparation) -> ChatAsked | TextAsked:
        """In the server's own form: a chat, unless the text is to be continued as it is. Raises RequestError."""
        if self.raw or self.suffix:
            return TextAsked(self.prompt or "", self.sampling(), self.suffix or "", self.answer(), "format")
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages = [*system, {"role": "user", "content": self.prompt or ""}]
        return ChatAsked(
            messages, self.sampling(), answer=self.answer(), answer_field="format",
            variables=self.variables(preparation),
        )  # fmt: skip


class ModelName(Strict):
    """The model that is asked about."""

    model: Text | None = None
    name: Text | None = Field(default=None, description="As model.")
    verbose: Boolean | None = None


class OllamaAnsweredMessage(TypedDict):
    """A reply of a chat."""

    role: Literal["assistant"]
    content: str
    thinking: NotRequired[str]
    tool_calls: NotRequired[list[dict[str, Any]]]


class OllamaHead(TypedDict):
    """What all answers have. Durations are in ns."""

    model: str
    created_at: str
    done: bool
    done_reason: NotRequired[str]
    total_duration: NotRequired[int]
    load_duration: NotRequired[int]
    prompt_eval_count: NotRequired[int]
    prompt_eval_duration: NotRequired[int]
    eval_count: NotRequired[int]
    eval_duration: NotRequired[int]


class OllamaChatAnswer(OllamaHead):
    """The whole answer of /api/chat."""

    message: OllamaAnsweredMessage


class OllamaGenerateAnswer(OllamaHead):
    """The whole answer of /api/generate."""

    response: str
    thinking: NotRequired[str]


class OllamaForm(Form):
    """See `Form`. chat: the form of /api/chat, else that of /api/generate. thinks: whether reasoning is told."""

    media_type: ClassVar[str] = NDJSON
    ping: ClassVar[str] = ""

    def __init__(self, model: str, *, chat: bool, thinks: bool) -> None:
        self._model, self._chat, self._thinks = model, chat, thinks
        self._started = time.monotonic_ns()

    def update(self, update: Update) -> Iterable[str]:
        """See `Form`."""
        for event in update.events:
            if isinstance(event, Call):
                yield line(self._answer("", calls=[event]))
            elif isinstance(event, Reasoning):
                if self._thinks:
                    yield line(self._answer("", event.text))
            else:
                yield line(self._answer(event.text))

    def closing(self, replies: Sequence[Ended]) -> Iterable[str]:
        """See `Form`."""
        yield line(self._answer("") | self._end(replies[0]))

    def failure(self, answer: Any, body: Any) -> str:
        """See `Form`."""
        return line(body)

    def whole(self, replies: Sequence[WholeReply]) -> dict[str, Any]:
        """See `Form`."""
        reply = replies[0]
        thought = reply.reasoning if self._thinks else ""
        return self._answer(reply.text, thought, reply.calls) | self._end(reply.ended)

    def loaded(self) -> dict[str, Any]:
        """The answer to a request without a prompt, which only loads the model."""
        return self._answer("") | {"done": True, "done_reason": "load"}

    def _answer(self, text: str, thought: str = "", calls: Sequence[Call] = ()) -> dict[str, Any]:
        head = {"model": self._model, "created_at": _now(), "done": False}
        said: dict[str, Any] = {"thinking": thought} if thought else {}
        if not self._chat:
            return head | {"response": text, **said}
        if calls:
            said["tool_calls"] = [
                {"function": {"name": one.name, "arguments": parsed_json(one.arguments)}} for one in calls
            ]
        return head | {"message": {"role": "assistant", "content": text, **said}}

    def _end(self, ended: Ended) -> dict[str, Any]:
        times = ended.reply.times
        return {
            "done": True,
            "done_reason": "length" if ended.reason == "length" else "stop",
            "total_duration": time.monotonic_ns() - self._started,
            "load_duration": 0,
            "prompt_eval_count": ended.n_prompt,
            "prompt_eval_duration": int(times.prefill_us * NS_PER_US),
            "eval_count": ended.n_new,
            "eval_duration": int(times.decode_us * NS_PER_US),
        }


def _now() -> str:
    return datetime.now(UTC).isoformat().replace("+00:00", "Z")


def add_routes(app: FastAPI, served: Served) -> None:
    """Adds the endpoints."""

    def documented(answer: Any) -> Any:
        return text_answers(answer, STREAM, media_type=NDJSON, error=OllamaErrorBody)

    @app.post("/api/chat", responses=documented(OllamaChatAnswer))
    async def chat(body: OllamaChatRequest, request: Request) -> Response:
        preparation = _checked(served, body)
        form = OllamaForm(body.model, chat=True, thinks=body.think is not False)
        if not body.messages:
            return JSONResponse(form.loaded())
        asked = body.asked(preparation)
        prepared = await unless_left(request, served.encode(lambda: preparation.chat(asked)))
        return await deliver(served.worker(), [prepared], form, request, streamed=body.stream is not False)

    @app.post("/api/generate", responses=documented(OllamaGenerateAnswer))
    async def generate(body: OllamaGenerateRequest, request: Request) -> Response:
        preparation = _checked(served, body)
        form = OllamaForm(body.model, chat=False, thinks=body.think is not False)
        if not body.prompt and not body.suffix:
            return JSONResponse(form.loaded())
        asked = body.asked(preparation)

        def prepare() -> Prepared:
            return preparation.chat(asked) if isinstance(asked, ChatAsked) else preparation.text(asked)

        prepared = await unless_left(request, served.encode(prepare))
        return await deliver(served.worker(), [prepared], form, request, streamed=body.stream is not False)

    _add_service_routes(app, served)


def _add_service_routes(app: FastAPI, served: Served) -> None:
    @app.get("/api/version", responses=service_errors(OllamaErrorBody))
    async def version() -> dict[str, str]:
        return {"version": OLLAMA_VERSION}

    @app.get("/api/tags", responses=service_errors(OllamaErrorBody))
    async def tags() -> dict[str, list[dict[str, Any]]]:
        return {"models": [_card(served)]}

    @app.get("/api/ps", responses=service_errors(OllamaErrorBody))
    async def running() -> dict[str, list[dict[str, Any]]]:
        never = datetime(9999, 12, 31, tzinfo=UTC).isoformat()
        loaded = served.engine is not None
        return {"models": [_card(served) | {"expires_at": never, "size_vram": 0}] if loaded else []}

    @app.post("/api/show", responses=errors(OllamaErrorBody), response_model=dict[str, Any])
    async def show(body: ModelName) -> Response:
        name = body.model or body.name
        if name is None:
            raise RequestError("model: expected the name of a model, found none", "model")
        served.check_name(name)
        return JSONResponse(_shown(served))


def _checked(served: Served, body: OllamaRequest) -> Preparation:
    served.check_name(body.model)
    return served.preparation


def _card(served: Served) -> dict[str, Any]:
    name = served.name if ":" in served.name else served.name + DEFAULT_TAG
    return {
        "name": name,
        "model": name,
        "modified_at": datetime.fromtimestamp(served.created, UTC).isoformat(),
        "size": 0,
        "digest": hashlib.sha256(served.name.encode()).hexdigest(),
        "details": _details(served),
    }


def _details(served: Served) -> dict[str, Any]:
    family = _family(served)
    return {
        "parent_model": "", "format": "safetensors", "family": family, "families": [family], "parameter_size": "",
        "quantization_level": "",
    }  # fmt: skip


def _family(served: Served) -> str:
    engine = served.engine
    return "" if engine is None else str(getattr(engine.generator.model.config, "model_type", ""))


def _shown(served: Served) -> dict[str, Any]:
    generator, preparation = served.worker().generator, served.preparation
    config, tokenizer = generator.model.config, generator.tokenizer
    family = _family(served)
    capabilities = ["completion", "tools"]
    if preparation.syntax.can_think:
        capabilities.append("thinking")
    if can_infill(tokenizer):
        capabilities.append("insert")
    info: dict[str, Any] = {"general.architecture": family, f"{family}.context_length": generator.context_tokens or 0}
    for ours, theirs in (("hidden_size", "embedding_length"), ("num_hidden_layers", "block_count")):
        value = getattr(config.get_text_config(decoder=True), ours, None)
        if value is not None:
            info[f"{family}.{theirs}"] = int(value)
    return {
        "modelfile": "", "parameters": "", "license": "",
        "template": str(getattr(tokenizer, "chat_template", None) or ""),
        "modified_at": datetime.fromtimestamp(served.created, UTC).isoformat(),
        "details": _details(served), "model_info": info, "capabilities": capabilities,
    }  # fmt: skip
