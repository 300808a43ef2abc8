"""Ollama's API: /api/chat, /api/generate, /api/tags, /api/ps, /api/show, /api/version. Streams are lines of JSON."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterable, Sequence
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, ClassVar, Literal, NotRequired

from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response
from pydantic import AfterValidator, Field
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
    TokensOrNoLimit,
    TopK,
    seed_of,
    shown,
)
from hybrimoe.server.forms import NDJSON, Ended, Form, Update, WholeReply, line
from hybrimoe.server.images import image_part, text_part
from hybrimoe.server.infill import can_infill
from hybrimoe.server.models import Models
from hybrimoe.server.replies.events import Call, Reasoning, parsed_json
from hybrimoe.server.served import DEFAULT_TAG, Served

OLLAMA_VERSION = "0.12.6"
"""Of the Ollama whose API this is: clients ask, and refuse older ones."""
STREAM = "Unless stream is false: lines of JSON, the last one with done: true; a failure is a line with error."
NS_PER_US = 1000
MAX_IMAGES = 64
"""In one message."""
Images = Annotated[list[Text], Field(max_length=MAX_IMAGES, description="Image files in base64.")]

DURATION = re.compile(r"(\d+(?:\.\d+)?)(ns|us|µs|ms|s|m|h)")
SECONDS_OF = {"ns": 1e-9, "us": 1e-6, "µs": 1e-6, "ms": 1e-3, "s": 1.0, "m": 60.0, "h": 3600.0}


def seconds_of(duration: str | float) -> float:
    """Seconds of a duration as Go writes it (1h30m), or of a number. Raises ValueError."""
    if not isinstance(duration, str):
        return float(duration)
    sign, unsigned = (-1.0, duration[1:]) if duration.startswith("-") else (1.0, duration)
    if re.fullmatch(r"\d+(\.\d+)?", unsigned):
        return sign * float(unsigned)
    parts = DURATION.findall(unsigned)
    if not parts or "".join(number + unit for number, unit in parts) != unsigned:
        raise ValueError(f"expected seconds or a duration like 5m, found {shown(duration)}")
    return sign * sum(float(number) * SECONDS_OF[unit] for number, unit in parts)


def _duration(value: str | float) -> str | float:
    seconds_of(value)
    return value


class Options(Strict):
    """Sampling; what says how Ollama should load its model has no effect here."""

    refused: ClassVar[Refused] = {
        "typical_p": ("typical sampling", (1, 1.0, 0, 0.0)),
        "tfs_z": ("tail-free sampling", (1, 1.0)),
        "mirostat": ("Mirostat", (0,)),
    }

    num_predict: TokensOrNoLimit | None = Field(default=None, description="Tokens of the reply; below 1: no limit.")
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
                frequency_penalty=self.frequency_penalty or 0.0, seed=seed_of(self.seed), stop=stop,
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

    role: Literal["system", "user", "assistant", "tool"]
    content: Text | None = None
    images: Images | None = None
    thinking: Text | None = None
    tool_calls: list[OllamaCall] | None = None
    tool_name: Text | None = None
    tool_call_id: Text | None = None

    def as_template_takes_it(self, where: str = "messages") -> dict[str, Any]:
        """The message as chat templates read it. where: it stands in the request. Raises RequestError."""
        if self.images and self.role not in ("user", "tool"):
            raise RequestError(f"{where}: images are for messages of the user, found one of the {self.role}", where)
        given = {"name": self.tool_name, "reasoning_content": self.thinking, "tool_call_id": self.tool_call_id}
        message: dict[str, Any] = {"role": self.role, "content": _content(self.content, self.images, where)}
        message |= {name: value for name, value in given.items() if value is not None}
        if self.tool_calls:
            message["tool_calls"] = [
                {"id": call.id, "type": "function",
                 "function": {"name": call.function.name, "arguments": call.function.arguments}}
                for call in self.tool_calls
            ]  # fmt: skip
        return message


def _content(text: str | None, images: Sequence[str] | None, where: str) -> str | list[dict[str, Any]]:
    """The content of a message, in which images come before the text."""
    if not images:
        return text or ""
    inside = f"{where}." if where else ""
    shown = [image_part(one, f"{inside}images.{at}", is_url=False) for at, one in enumerate(images)]
    return [*shown, text_part(text or "")]


class OllamaRequest(Strict):
    """What both endpoints share."""

    model: Text
    stream: Boolean | None = None
    format: Literal["", "json"] | Free | None = None
    options: Options | None = None
    keep_alive: Annotated[Text | Number, AfterValidator(_duration)] | None = Field(
        default=None,
        description="Time without a request after which the model leaves memory: seconds, or a text like 5m; below 0:"
        " it stays.",
    )
    think: Boolean | Literal["low", "medium", "high", "max"] | None = None
    logprobs: Literal[False] | None = None
    top_logprobs: Literal[0] | None = None

    @property
    def keep_s(self) -> float | None:
        """Seconds that the model stays in memory without a request; None: for ever, or nothing is said."""
        seconds = None if self.keep_alive is None else seconds_of(self.keep_alive)
        return None if seconds is None or seconds < 0 else seconds

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
            [message.as_template_takes_it(f"messages.{at}") for at, message in enumerate(self.messages)],
            self.sampling(),
            tool_use(tools, "auto", None, many=True), self.answer(), "format", self.variables(preparation),
        )  # fmt: skip


class OllamaGenerateRequest(OllamaRequest):
    """POST /api/generate."""

    refused: ClassVar[Refused] = {
        "template": ("other templates than the model's; send raw: true", ("",)),
        "context": ("contexts as tokens; use /api/chat", ([],)),
    }  # fmt: skip

    prompt: Text | None = None
    images: Images | None = None
    suffix: Text | None = None
    system: Text | None = None
    raw: Boolean | None = None

    def asked(self, preparation: Preparation) -> ChatAsked | TextAsked:
        """In the server's own form: a chat, unless the text is to be continued as it is. Raises RequestError."""
        if self.images and (self.raw or self.suffix):
            raise RequestError("images: need the chat template; leave raw and suffix out", "images")
        if self.raw or self.suffix:
            return TextAsked(self.prompt or "", self.sampling(), self.suffix or "", self.answer(), "format")
        system = [{"role": "system", "content": self.system}] if self.system else []
        messages: list[dict[str, Any]] = [*system, {"role": "user", "content": _content(self.prompt, self.images, "")}]
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

    def without_prompt(self, reason: Literal["load", "unload"]) -> dict[str, Any]:
        """The answer to a request without a prompt, which only loads the model or lets it go."""
        return self._answer("") | {"done": True, "done_reason": reason}

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


def add_routes(app: FastAPI, models: Models) -> None:
    """Adds the endpoints."""

    def documented(answer: Any) -> Any:
        return text_answers(answer, STREAM, media_type=NDJSON, error=OllamaErrorBody)

    @app.post("/api/chat", responses=documented(OllamaChatAnswer))
    async def chat(body: OllamaChatRequest, request: Request) -> Response:
        form = OllamaForm(body.model, chat=True, thinks=body.think is not False)
        if not body.messages:
            return await _only_loaded(models, body, form, request)
        async with models.using(body.model, request) as served:
            _keep(models, body)
            preparation = served.preparation
            asked = body.asked(preparation)
            prepared = await unless_left(
                request, served.encode(lambda: preparation.chat(asked), looks=asked.has_images)
            )
            return await deliver(served.worker(), [prepared], form, request, streamed=body.stream is not False)

    @app.post("/api/generate", responses=documented(OllamaGenerateAnswer))
    async def generate(body: OllamaGenerateRequest, request: Request) -> Response:
        form = OllamaForm(body.model, chat=False, thinks=body.think is not False)
        if not body.prompt and not body.suffix and not body.images:
            return await _only_loaded(models, body, form, request)
        async with models.using(body.model, request) as served:
            _keep(models, body)
            preparation = served.preparation
            asked = body.asked(preparation)

            def prepare() -> Prepared:
                return preparation.chat(asked) if isinstance(asked, ChatAsked) else preparation.text(asked)

            prepared = await unless_left(
                request, served.encode(prepare, looks=isinstance(asked, ChatAsked) and asked.has_images)
            )
            return await deliver(served.worker(), [prepared], form, request, streamed=body.stream is not False)

    _add_service_routes(app, models)


async def _only_loaded(models: Models, body: OllamaRequest, form: OllamaForm, request: Request) -> Response:
    """A request without a prompt: the model is loaded, or with keep_alive: 0 leaves memory."""
    if body.keep_s == 0.0 and models.states[models.full_name(body.model)] != "loaded":
        return JSONResponse(form.without_prompt("unload"))
    async with models.using(body.model, request):
        _keep(models, body)
    return JSONResponse(form.without_prompt("unload" if body.keep_s == 0.0 else "load"))


def _keep(models: Models, body: OllamaRequest) -> None:
    if body.keep_alive is not None:
        models.keep(body.model, body.keep_s)


def _add_service_routes(app: FastAPI, models: Models) -> None:
    @app.get("/api/version", responses=service_errors(OllamaErrorBody))
    async def version() -> dict[str, str]:
        return {"version": OLLAMA_VERSION}

    @app.get("/api/tags", responses=service_errors(OllamaErrorBody))
    async def tags() -> dict[str, list[dict[str, Any]]]:
        return {"models": [_card(models, name) for name in models.states]}

    @app.get("/api/ps", responses=service_errors(OllamaErrorBody))
    async def running() -> dict[str, list[dict[str, Any]]]:
        loaded = [name for name, state in models.states.items() if state == "loaded"]
        told = [{"expires_at": _leaves_at(models, name), "size_vram": 0} for name in loaded]
        return {"models": [_card(models, name) | more for name, more in zip(loaded, told, strict=True)]}

    @app.post("/api/show", responses=errors(OllamaErrorBody), response_model=dict[str, Any])
    async def show(body: ModelName) -> Response:
        name = body.model or body.name
        if name is None:
            raise RequestError("model: expected the name of a model, found none", "model")
        return JSONResponse(_shown(models, models.full_name(name)))


def _leaves_at(models: Models, name: str) -> str:
    left_s = models.leaves_in_s(name)
    if left_s is None:
        return datetime(9999, 12, 31, tzinfo=UTC).isoformat()
    return (datetime.now(UTC) + timedelta(seconds=left_s)).isoformat()


def _card(models: Models, name: str) -> dict[str, Any]:
    tagged = name if ":" in name else name + DEFAULT_TAG
    return {
        "name": tagged,
        "model": tagged,
        "modified_at": datetime.fromtimestamp(models.created, UTC).isoformat(),
        "size": 0,
        "digest": hashlib.sha256(name.encode()).hexdigest(),
        "details": _details(_in_memory(models, name)),
    }


def _in_memory(models: Models, name: str) -> Served | None:
    """What answers with a model, where it is in memory."""
    served = models.served
    return served if served is not None and served.name == name and served.engine is not None else None


def _details(served: Served | None) -> dict[str, Any]:
    family = "" if served is None else _family(served)
    return {
        "parent_model": "", "format": "safetensors", "family": family, "families": [family] if family else [],
        "parameter_size": "", "quantization_level": "",
    }  # fmt: skip


def _family(served: Served) -> str:
    engine = served.engine
    return "" if engine is None else str(getattr(engine.generator.model.config, "model_type", ""))


def _shown(models: Models, name: str) -> dict[str, Any]:
    """What is known of a model; of one that is not in memory only that it completes text."""
    served = _in_memory(models, name)
    about = {"capabilities": ["completion", "tools"], "template": "", "model_info": {}}
    return {
        "modelfile": "", "parameters": "", "license": "",
        "modified_at": datetime.fromtimestamp(models.created, UTC).isoformat(),
        "details": _details(served), **(about if served is None else _about(served)),
    }  # fmt: skip


def _about(served: Served) -> dict[str, Any]:
    generator, preparation = served.worker().generator, served.preparation
    config, tokenizer = generator.model.config, generator.tokenizer
    family = _family(served)
    capabilities = ["completion", "tools"]
    if preparation.syntax.can_think:
        capabilities.append("thinking")
    if preparation.sees:
        capabilities.append("vision")
    if can_infill(tokenizer):
        capabilities.append("insert")
    info: dict[str, Any] = {"general.architecture": family, f"{family}.context_length": generator.context_tokens or 0}
    for ours, theirs in (("hidden_size", "embedding_length"), ("num_hidden_layers", "block_count")):
        value = getattr(config.get_text_config(decoder=True), ours, None)
        if value is not None:
            info[f"{family}.{theirs}"] = int(value)
    template = str(getattr(tokenizer, "chat_template", None) or "")
    return {"capabilities": capabilities, "template": template, "model_info": info}
