"""The HTTP API: /v1/completions, /v1/chat/completions (both with streaming), /v1/models, /health, /metrics."""

from __future__ import annotations

import json
import time
import uuid
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse, Response, StreamingResponse
from starlette.exceptions import HTTPException

from hybrimoe.errors import HybriMoEError, ModelError
from hybrimoe.generation import chat_options, encode_chat
from hybrimoe.server.metrics import Metrics
from hybrimoe.server.schema import ChatRequest, CompletionRequest, Sampling
from hybrimoe.server.worker import Job, QueueFullError, Worker

if TYPE_CHECKING:
    from hybrimoe.generation import Reply, TextGenerator

FINISH = {"eos": "stop", "stop": "stop", "length": "length", "context": "length", "interrupted": "stop"}
INVALID_REQUEST, SERVER_ERROR = "invalid_request_error", "server_error"


@dataclass(frozen=True, slots=True)
class Form:
    """How one of the two text endpoints words its answers."""

    prefix: str
    whole: str
    piece: str
    chat: bool

    def choice(self, text: str, finish: str | None) -> dict[str, Any]:
        """The choice of a whole answer."""
        body: dict[str, Any] = {"message": {"role": "assistant", "content": text}} if self.chat else {"text": text}
        return {"index": 0, **body, "logprobs": None, "finish_reason": finish}

    def delta(self, text: str | None, finish: str | None) -> dict[str, Any]:
        """The choice of one streamed piece; text None is the last one."""
        if self.chat:
            return {"index": 0, "delta": {} if text is None else {"content": text}, "finish_reason": finish}
        return {"index": 0, "text": text or "", "logprobs": None, "finish_reason": finish}


COMPLETION = Form("cmpl", "text_completion", "text_completion", chat=False)
CHAT = Form("chatcmpl", "chat.completion", "chat.completion.chunk", chat=True)


def create_app(
    generator: TextGenerator,
    name: str,
    experts: Callable[[], dict[str, Any] | None] = lambda: None,
    conversations: int = 1,
) -> FastAPI:
    """The application for one model.

    name: what /v1/models lists. experts: the session's counters for /metrics, or None. conversations: how many of them
    keep their KV cache between requests.
    """
    worker = Worker(generator, conversations)
    metrics = Metrics(experts, lambda: worker.n_waiting)

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        worker.start()
        yield
        worker.close()

    app = FastAPI(title="HybriMoE", lifespan=lifespan)
    _add_error_handlers(app)
    _add_service_routes(app, worker, metrics, name)

    @app.middleware("http")
    async def count(request: Request, call_next: Any) -> Any:
        response = await call_next(request)
        route = request.scope.get("route")
        metrics.requests.labels(getattr(route, "path", "other"), response.status_code).inc()
        return response

    @app.post("/v1/completions")
    async def completions(request: CompletionRequest) -> Response:
        _check_model(request, name)
        prompt = request.single_prompt()
        ids = generator.encode(prompt) if isinstance(prompt, str) else prompt
        _check_ids(ids, generator)
        return await _answer(worker.submit(ids, request.options()), request, COMPLETION, name, metrics)

    @app.post("/v1/chat/completions")
    async def chat(request: ChatRequest) -> Response:
        _check_model(request, name)
        ids = encode_chat(generator.tokenizer, request.plain_messages())
        options = chat_options(generator.tokenizer, request.options())
        return await _answer(worker.submit(ids, options), request, CHAT, name, metrics)

    return app


def _add_service_routes(app: FastAPI, worker: Worker, metrics: Metrics, name: str) -> None:
    started = int(time.time())

    @app.get("/v1/models")
    async def models() -> dict[str, Any]:
        return {"object": "list", "data": [_model_card(name, started)]}

    @app.get("/v1/models/{model_id:path}")
    async def model(model_id: str) -> dict[str, Any]:
        if model_id != name:
            raise UnknownModelError(f"this server has the model {name!r}, not {model_id!r}")
        return _model_card(name, started)

    @app.get("/health")
    async def health() -> JSONResponse:
        status = {"status": "ok" if worker.alive else "failed", "waiting": worker.n_waiting, "model": name}
        return JSONResponse(status, status_code=200 if worker.alive else 503)

    @app.get("/metrics")
    async def scrape() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _model_card(name: str, created: int) -> dict[str, Any]:
    return {"id": name, "object": "model", "created": created, "owned_by": "hybrimoe"}


class UnknownModelError(ModelError):
    """A request for a model that this server does not have."""


def _check_model(request: Sampling, name: str) -> None:
    if request.model not in (None, "", name):
        raise UnknownModelError(f"this server has the model {name!r}, not {request.model!r}")


def _check_ids(ids: list[int], generator: TextGenerator) -> None:
    size = int(generator.model.config.get_text_config(decoder=True).vocab_size)
    outside = [token for token in ids if not 0 <= token < size]
    if outside:
        raise ValueError(f"prompt: token {outside[0]} is outside the vocabulary of {size}")


async def _answer(job: Job, request: Sampling, form: Form, name: str, metrics: Metrics) -> Response:
    """A whole answer or a stream of server-sent events. The first piece is awaited before a stream's status is sent."""
    head = {"id": f"{form.prefix}-{uuid.uuid4().hex}", "created": int(time.time()), "model": name}
    pieces = job.stream()
    if not request.stream:
        text = "".join([piece async for piece in pieces])
        reply = _finished(job, metrics)
        choice = form.choice(text, FINISH[str(reply.finish_reason)])
        return JSONResponse({**head, "object": form.whole, "choices": [choice], "usage": _usage(reply)})
    first = await anext(pieces, None)

    async def events() -> AsyncIterator[str]:
        def event(choice: dict[str, Any] | None, **more: Any) -> str:
            body = {**head, "object": form.piece, "choices": [] if choice is None else [choice], **more}
            return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"

        if form.chat:
            yield event({"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None})
        try:
            if first is not None:
                yield event(form.delta(first, None))
            async for piece in pieces:
                yield event(form.delta(piece, None))
        except HybriMoEError as error:
            yield f"data: {json.dumps(_error(str(error), SERVER_ERROR))}\n\n"
            return
        reply = _finished(job, metrics)
        yield event(form.delta(None, FINISH[str(reply.finish_reason)]))
        if request.include_usage:
            yield event(None, usage=_usage(reply))
        yield "data: [DONE]\n\n"

    return StreamingResponse(_closing(events(), job), media_type="text/event-stream")


async def _closing(events: AsyncIterator[str], job: Job) -> AsyncIterator[str]:
    """Events; when the client leaves, the generation stops."""
    try:
        async for event in events:
            yield event
    finally:
        job.cancelled.set()


def _finished(job: Job, metrics: Metrics) -> Reply:
    if job.reply is None:
        raise ModelError("the generation ended without a reply")
    metrics.observe(job.reply)
    return job.reply


def _usage(reply: Reply) -> dict[str, Any]:
    prompt, new = len(reply.prompt_ids), len(reply.token_ids)
    details = {"cached_tokens": reply.n_reused}
    return {
        "prompt_tokens": prompt,
        "completion_tokens": new,
        "total_tokens": prompt + new,
        "prompt_tokens_details": details,
    }


def _error(message: str, kind: str, code: str | None = None, param: str | None = None) -> dict[str, Any]:
    return {"error": {"message": message, "type": kind, "param": param, "code": code}}


def _add_error_handlers(app: FastAPI) -> None:
    """Every failure as the API's error object: the client's with 4xx, a full queue with 503, ours with 500."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> JSONResponse:
        problem = error.errors()[0]
        where = ".".join(str(part) for part in problem["loc"] if part != "body")
        message = f"{where}: {problem['msg']}" if where else str(problem["msg"])
        return JSONResponse(_error(message, INVALID_REQUEST, "invalid_request", where or None), status_code=400)

    @app.exception_handler(HTTPException)
    async def no_such_page(_: Request, error: HTTPException) -> JSONResponse:
        return JSONResponse(_error(str(error.detail), INVALID_REQUEST), status_code=error.status_code)

    @app.exception_handler(ValueError)
    async def refused(_: Request, error: ValueError) -> JSONResponse:
        return JSONResponse(_error(str(error), INVALID_REQUEST, "invalid_request"), status_code=400)

    @app.exception_handler(HybriMoEError)
    async def failed(_: Request, error: HybriMoEError) -> JSONResponse:
        if isinstance(error, QueueFullError):
            return JSONResponse(_error(str(error), SERVER_ERROR, "queue_full"), 503, {"Retry-After": "1"})
        if isinstance(error, UnknownModelError):
            return JSONResponse(_error(str(error), INVALID_REQUEST, "model_not_found", "model"), status_code=404)
        status = 400 if isinstance(error, (ValueError, ModelError)) else 500
        return JSONResponse(_error(str(error), INVALID_REQUEST if status == 400 else SERVER_ERROR), status_code=status)
