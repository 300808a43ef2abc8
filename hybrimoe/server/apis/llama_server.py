"""The endpoints of llama.cpp's server beside OpenAI's: tokens, properties, slots, completion and infill."""

from __future__ import annotations

import threading
from collections.abc import Iterable, Sequence
from typing import Annotated, Any, ClassVar, Literal

from fastapi import FastAPI, Path, Request
from fastapi.responses import Response
from pydantic import Field
from typing_extensions import TypedDict

from hybrimoe.errors import PromptError
from hybrimoe.generation.vocabulary import check_token_ids
from hybrimoe.server.apis.chat import ChatRequest
from hybrimoe.server.apis.documented import errors, text_answers
from hybrimoe.server.apis.openai import Sampling
from hybrimoe.server.asking import TextAsked
from hybrimoe.server.delivery import deliver, unless_left
from hybrimoe.server.errors import ErrorBody, RequestError
from hybrimoe.server.fields import Boolean, Refused, Strict, Text, TokenIds, TokensOrNoLimit
from hybrimoe.server.forms import Ended, Form, Update, WholeReply, sse
from hybrimoe.server.models import Models
from hybrimoe.server.served import Served
from hybrimoe.server.slots import Slots
from hybrimoe.server.urgency import urgency_of

STREAM = "With stream: true. Events `data: {...}` with content and stop; the last one has stop: true."
NO_SPACE = "The disk does not take the file."
MS_PER_US = 1000.0
SlotNumber = Annotated[int, Path(ge=0, le=1_000)]


class TokenizeRequest(Strict):
    """POST /tokenize."""

    model: Text | None = None
    content: Text
    add_special: Boolean = Field(default=False, description="With the tokens that begin a prompt.")
    parse_special: Literal[True] | None = Field(default=None, description="Special tokens in the text are read.")
    with_pieces: Boolean = Field(default=False, description="With the text of each token.")


class DetokenizeRequest(Strict):
    """POST /detokenize."""

    model: Text | None = None
    tokens: TokenIds


class CompletionRequest(Sampling):
    """POST /completion."""

    refused: ClassVar[Refused] = {
        **Sampling.refused, "n": ("several replies here; see /v1/completions", (1,)),
        "n_probs": ("probabilities here; see /v1/completions", (0,)),
        "image_data": ("images here; send them to /v1/chat/completions", ([],)),
    }  # fmt: skip

    prompt: Text | TokenIds = ""
    n_predict: TokensOrNoLimit | None = Field(default=None, description="Tokens of the reply; below 1: no limit.")

    @property
    def longest_reply(self) -> int | None:
        """See `Sampling`."""
        said = self.n_predict or self.max_tokens
        return said if said is not None and said > 0 else None

    def asked(self) -> TextAsked:
        """In the server's own form. Raises RequestError."""
        structure, field = self.answer()
        return TextAsked(self.prompt, self.options(), "", structure, field)


class SlotRequest(Strict):
    """POST /slots/{id_slot}. filename: of a file in the folder of slots; action=erase needs none."""

    model: Text | None = None
    filename: Text | None = None


class ExtraFile(Strict):
    """Another file that the model should know."""

    text: Text
    filename: Text | None = None


class InfillRequest(CompletionRequest):
    """POST /infill. prompt: what has been typed behind the prefix."""

    input_prefix: Text = ""
    input_suffix: Text = ""
    input_extra: list[ExtraFile] | None = None

    def asked(self) -> TextAsked:
        """See `CompletionRequest`."""
        typed = self.prompt if isinstance(self.prompt, str) else ""
        extra = "".join(f"{one.filename or 'tmp'}\n{one.text}\n\n" for one in self.input_extra or [])
        structure, field = self.answer()
        prefix, suffix = extra + self.input_prefix + typed, self.input_suffix or "\n"
        return TextAsked(prefix, self.options(), suffix, structure, field)


class Timings(TypedDict):
    """Of one reply, in ms and tokens a second."""

    prompt_n: int
    prompt_ms: float
    predicted_n: int
    predicted_ms: float
    predicted_per_second: float


class NativeAnswer(TypedDict):
    """The whole answer of /completion and /infill."""

    content: str
    id_slot: int
    stop: Literal[True]
    stop_type: Literal["eos", "limit", "word"]
    stopping_word: str
    model: str
    tokens_predicted: int
    tokens_evaluated: int
    tokens_cached: int
    truncated: Literal[False]
    timings: Timings


class NativeForm(Form):
    """See `Form`."""

    def __init__(self, model: str) -> None:
        self._model = model

    def update(self, update: Update) -> Iterable[str]:
        """See `Form`."""
        if update.piece.text:
            yield sse({"content": update.piece.text, "stop": False, "model": self._model})

    def closing(self, replies: Sequence[Ended]) -> Iterable[str]:
        """See `Form`."""
        yield sse({"content": "", **self._end(replies[0])})

    def whole(self, replies: Sequence[WholeReply]) -> dict[str, Any]:
        """See `Form`."""
        return {"content": replies[0].text, **self._end(replies[0].ended)}

    def _end(self, ended: Ended) -> dict[str, Any]:
        times, word = ended.reply.times, ended.reply.stop_text
        seconds = times.decode_us / 1e6
        return {
            "id_slot": ended.reply.cache.number,
            "stop": True,
            "stop_type": "limit" if ended.reason == "length" else "word" if word else "eos",
            "stopping_word": word or "",
            "model": self._model,
            "tokens_predicted": ended.n_new,
            "tokens_evaluated": ended.n_prompt,
            "tokens_cached": ended.reply.n_reused,
            "truncated": False,
            "timings": {
                "prompt_n": ended.n_prompt - ended.reply.n_reused,
                "prompt_ms": times.prefill_us / MS_PER_US,
                "predicted_n": ended.n_new,
                "predicted_ms": times.decode_us / MS_PER_US,
                "predicted_per_second": (ended.n_new - 1) / seconds if seconds else 0.0,
            },
        }


class Token(TypedDict):
    """A token and its text."""

    id: int
    piece: str


class Tokens(TypedDict):
    """The answer of /tokenize."""

    tokens: list[int] | list[Token]


class Content(TypedDict):
    """The answer of /detokenize."""

    content: str


class RenderedPrompt(TypedDict):
    """The answer of /apply-template."""

    prompt: str


class Slot(TypedDict):
    """A place for a reply. n_ctx: tokens of prompt and reply together."""

    id: int
    n_ctx: int
    speculative: bool
    is_processing: bool


class SaveTimings(TypedDict):
    """In ms."""

    save_ms: float


class RestoreTimings(TypedDict):
    """In ms."""

    restore_ms: float


class SavedSlot(TypedDict):
    """The answer of action=save: tokens, and bytes of the file."""

    id_slot: int
    filename: str
    n_saved: int
    n_written: int
    timings: SaveTimings


class RestoredSlot(TypedDict):
    """The answer of action=restore: tokens, and bytes of the file."""

    id_slot: int
    filename: str
    n_restored: int
    n_read: int
    timings: RestoreTimings


class ErasedSlot(TypedDict):
    """The answer of action=erase: tokens that were forgotten."""

    id_slot: int
    n_erased: int


class Modalities(TypedDict):
    """What a prompt may hold beside text."""

    vision: bool
    audio: bool


class GenerationSettings(TypedDict):
    """Where a request says nothing."""

    n_ctx: int


class Props(TypedDict):
    """The answer of /props."""

    default_generation_settings: GenerationSettings
    total_slots: int
    model_alias: str
    model_path: str
    modalities: Modalities
    chat_template: str
    bos_token: str
    eos_token: str
    build_info: str


def add_routes(app: FastAPI, models: Models) -> None:
    """Adds the endpoints."""

    @app.post("/tokenize", responses=errors())
    async def tokenize(body: TokenizeRequest, request: Request) -> Tokens:
        async with models.using(body.model, request) as served:
            tokenizer = served.worker().generator.tokenizer

            def encode() -> Tokens:
                ids = list(tokenizer(body.content, add_special_tokens=body.add_special)["input_ids"])
                if not body.with_pieces:
                    return {"tokens": ids}
                pieces: list[Token] = [{"id": one, "piece": str(tokenizer.decode([one]))} for one in ids]
                return {"tokens": pieces}

            return await unless_left(request, served.encode(encode))

    @app.post("/detokenize", responses=errors())
    async def detokenize(body: DetokenizeRequest, request: Request) -> Content:
        async with models.using(body.model, request) as served:
            generator = served.worker().generator

            def decode() -> Content:
                try:
                    check_token_ids(generator.model, body.tokens, what="tokens")
                except PromptError as error:
                    raise RequestError(str(error), "tokens") from error
                return {"content": str(generator.tokenizer.decode(body.tokens))}

            return await unless_left(request, served.encode(decode))

    @app.post("/apply-template", responses=errors())
    async def apply_template(body: ChatRequest, request: Request) -> RenderedPrompt:
        async with models.using(body.model, request) as served:
            preparation, asked = served.preparation, body.asked()
            prompt, _ = await unless_left(
                request, served.encode(lambda: preparation.prompt(asked), looks=asked.has_images)
            )
            return {"prompt": prompt}

    @app.post("/completion", responses=text_answers(NativeAnswer, STREAM))
    async def completion(body: CompletionRequest, request: Request) -> Response:
        return await _answer(models, body, request)

    @app.post("/infill", responses=text_answers(NativeAnswer, STREAM))
    async def infill(body: InfillRequest, request: Request) -> Response:
        return await _answer(models, body, request)

    @app.get("/props", responses=errors())
    async def props() -> Props:
        served = models.in_memory()
        return _props(served, models.source(served.name) or served.name)

    @app.get("/slots", responses=errors())
    async def slots() -> list[Slot]:
        return _slots(models.in_memory())

    @app.post("/slots/{id_slot}", responses={**errors(), 507: {"model": ErrorBody, "description": NO_SPACE}})
    async def slot(
        id_slot: SlotNumber,
        action: Literal["save", "restore", "erase"],
        request: Request,
        body: SlotRequest | None = None,
    ) -> SavedSlot | RestoredSlot | ErasedSlot:
        asked = body or SlotRequest()
        if asked.model is None:
            models.in_memory()
        left = threading.Event()
        async with models.using(asked.model, request) as served:
            try:
                return await unless_left(
                    request, served.keep(lambda slots: _act(slots, action, id_slot, asked.filename, left))
                )
            finally:
                left.set()


def _act(
    slots: Slots, action: str, id_slot: int, name: str | None, left: threading.Event
) -> SavedSlot | RestoredSlot | ErasedSlot:
    if action == "erase":
        return {"id_slot": id_slot, "n_erased": slots.erase(id_slot, left).n_tokens}
    if action == "save":
        done = slots.save(id_slot, name, left)
        return {
            "id_slot": id_slot, "filename": str(name), "n_saved": done.n_tokens, "n_written": done.n_bytes,
            "timings": {"save_ms": done.ms},
        }  # fmt: skip
    done = slots.restore(id_slot, name, left)
    return {
        "id_slot": id_slot, "filename": str(name), "n_restored": done.n_tokens, "n_read": done.n_bytes,
        "timings": {"restore_ms": done.ms},
    }  # fmt: skip


async def _answer(models: Models, body: CompletionRequest, request: Request) -> Response:
    async with models.using(body.model, request) as served:
        preparation, asked = served.preparation, body.asked()
        prepared = await unless_left(request, served.encode(lambda: preparation.text(asked)))
        urgency = urgency_of(request, body.priority, body.max_reply_seconds, body.id_slot)
        form = NativeForm(served.name)
        return await deliver(
            served.worker(), [prepared], form, request, streamed=bool(body.stream), urgency=urgency
        )  # fmt: skip


def _props(served: Served, path: str) -> Props:
    worker = served.worker()
    generator = worker.generator
    tokenizer = generator.tokenizer
    return {
        "default_generation_settings": {"n_ctx": generator.context_tokens or 0},
        "total_slots": worker.engine.parallel,
        "model_alias": served.name,
        "model_path": path,
        "modalities": {"vision": served.preparation.sees, "audio": False},
        "chat_template": str(getattr(tokenizer, "chat_template", None) or ""),
        "bos_token": str(tokenizer.bos_token or ""),
        "eos_token": str(tokenizer.eos_token or ""),
        "build_info": "hybrimoe",
    }


def _slots(served: Served) -> list[Slot]:
    engine = served.worker().engine
    n_ctx, speculative = engine.generator.context_tokens or 0, engine.generator.pace is not None
    return [
        {"id": number, "n_ctx": n_ctx, "speculative": speculative, "is_processing": taken}
        for number, taken in engine.places.items()
    ]
