"""The HTTP API: /v1/completions, /v1/chat/completions (both with streaming), /v1/models, /health, /metrics."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from typing import TYPE_CHECKING, Any, Literal

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import JSONResponse, Response
from starlette.exceptions import HTTPException
from typing_extensions import TypedDict

from hybrimoe.errors import ModelError, PromptError
from hybrimoe.generation import SamplingOptions, chat_options, encode_chat
from hybrimoe.generation.vocabulary import check_token_ids
from hybrimoe.server.answers import ChatCompletion, ChatForm, Completion, CompletionForm, Form
from hybrimoe.server.boundary import MAX_BODY_BYTES, Boundary, error_response
from hybrimoe.server.delivery import stream, unless_left, whole
from hybrimoe.server.errors import ErrorBody, RequestError, UnknownModelError
from hybrimoe.server.metrics import Metrics
from hybrimoe.server.schema import ChatRequest, CompletionRequest, Sampling
from hybrimoe.server.served import Served, State

if TYPE_CHECKING:
    from hybrimoe.generation import TextGenerator
    from hybrimoe.server.worker import Worker

ERROR_RESPONSES: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorBody, "description": "The request cannot be honoured; the message says why."},
    401: {"model": ErrorBody, "description": "No API key, or an unknown one."},
    404: {"model": ErrorBody, "description": "No such model."},
    413: {"model": ErrorBody, "description": "The body is larger than this server reads."},
    429: {"model": ErrorBody, "description": "Too many wait; Retry-After says when to come again."},
    500: {"model": ErrorBody, "description": "A failure of the server."},
    503: {"model": ErrorBody, "description": "The model is being loaded, or the server ends."},
}
ASSUMED_STATUS = "422"
"""FastAPI documents it for every route that takes data; here such requests are answered with 400."""
ASSUMED_SCHEMAS = ("HTTPValidationError", "ValidationError")
EVENTS = {
    "text/event-stream": {
        "schema": {
            "type": "string",
            "description": "With stream: true. Events `data: {...}` in the form of pieces, `data: [DONE]` at the end; "
            "a failure is an event with an error object, and no [DONE] follows.",
        }
    }
}


class Health(TypedDict):
    """Whether the server can answer, how many requests wait and are being answered, and the model."""

    status: State
    waiting: int
    running: int
    model: str


class ModelCard(TypedDict):
    """A model as OpenAI's API lists it."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str


class ModelList(TypedDict):
    """All models of this server."""

    object: Literal["list"]
    data: list[ModelCard]


def create_app(
    served: Served, *, api_keys: Sequence[str] = (), cors_origins: Sequence[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES,
) -> FastAPI:  # fmt: skip
    """The application for one model, which may still be loading.

    api_keys: any of them opens /v1 and /metrics; none at all leaves them open. cors_origins: web pages that may call
    this server, "*" for all; none sends no CORS headers. max_body_bytes: a larger request is refused with 413.
    """
    metrics = Metrics(
        lambda: served.experts(), lambda: served.n_waiting, lambda: served.n_running, lambda: served.engine
    )
    served.on_reply = metrics.observe

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        served.close()

    app = FastAPI(title="HybriMoE", lifespan=lifespan)
    app.add_middleware(Boundary, metrics=metrics, api_keys=api_keys, max_body_bytes=max_body_bytes)
    if cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    _add_error_handlers(app)
    _add_service_routes(app, served, metrics)
    _add_text_routes(app, served)
    _describe(app)
    return app


def _add_text_routes(app: FastAPI, served: Served) -> None:
    @app.post("/v1/completions", responses=_documented(Completion))
    async def completions(body: CompletionRequest, request: Request) -> Response:
        worker = _worker(served, body)
        generator, prompt = worker.generator, body.single_prompt()
        if isinstance(prompt, str):
            ids = await unless_left(request, served.encode(lambda: generator.encode(prompt)))
        else:
            ids = prompt
            _check_token_ids("prompt", ids, generator)
        form = CompletionForm(served.name, generator.tokenizer, body.n_top_logprobs is not None)
        return await _answer(worker, ids, body.options(), body, form, request)

    @app.post("/v1/chat/completions", responses=_documented(ChatCompletion))
    async def chat(body: ChatRequest, request: Request) -> Response:
        worker = _worker(served, body)
        tokenizer = worker.generator.tokenizer
        ids = await unless_left(request, served.encode(lambda: _encode_chat(tokenizer, body)))
        options = chat_options(tokenizer, body.options())
        form = ChatForm(served.name, tokenizer, body.n_top_logprobs is not None)
        return await _answer(worker, ids, options, body, form, request)


def _add_service_routes(app: FastAPI, served: Served, metrics: Metrics) -> None:
    def card() -> ModelCard:
        return {"id": served.name, "object": "model", "created": served.created, "owned_by": "hybrimoe"}

    errors: dict[int | str, dict[str, Any]] = {status: ERROR_RESPONSES[status] for status in (401, 413, 500)}

    @app.get("/v1/models", responses=errors)
    async def models() -> ModelList:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{model_id:path}", responses=errors | {404: ERROR_RESPONSES[404]})
    async def model(model_id: str) -> ModelCard:
        _check_model(model_id, served)
        return card()

    @app.get("/health", responses={503: {"model": Health}, 413: ERROR_RESPONSES[413]}, response_model=Health)
    async def health() -> JSONResponse:
        state = served.state
        body: Health = {
            "status": state, "waiting": served.n_waiting, "running": served.n_running, "model": served.name
        }  # fmt: skip
        return JSONResponse(body, status_code=200 if state == "ok" else 503)

    @app.get("/metrics", responses=errors | {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
             response_class=Response)  # fmt: skip
    async def scrape() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")


def _documented(answer: Any) -> dict[int | str, dict[str, Any]]:
    return {200: {"model": answer, "content": EVENTS, "description": "The reply."}, **ERROR_RESPONSES}


def _worker(served: Served, body: Sampling) -> Worker:
    """The worker for a request. Raises UnknownModelError, and UnavailableError before and after its time."""
    _check_model(body.model or served.name, served)
    return served.worker()


def _check_model(name: str, served: Served) -> None:
    if name != served.name:
        raise UnknownModelError(f"this server has the model {served.name!r}, not {name!r}", "model")


def _check_token_ids(where: str, ids: Sequence[int], generator: TextGenerator) -> None:
    try:
        check_token_ids(generator.model, ids, what=where)
    except PromptError as error:
        raise RequestError(str(error), where) from error


def _encode_chat(tokenizer: Any, body: ChatRequest) -> list[int]:
    try:
        return encode_chat(tokenizer, body.template_messages(), body.template_variables())
    except ModelError as error:  # the template's own words about a conversation that it cannot render
        raise RequestError(str(error), "messages") from error


async def _answer(
    worker: Worker, ids: list[int], options: SamplingOptions, body: Sampling, form: Form, request: Request
) -> Response:
    """A whole answer or a stream of server-sent events."""
    _check_token_ids("logit_bias", [token for token, _ in options.logit_bias], worker.generator)
    job = worker.submit(ids, options)
    if body.stream:
        return await stream(job, form, request, body.include_usage)
    return await whole(job, form, request)


def _add_error_handlers(app: FastAPI) -> None:
    """Errors that FastAPI raises itself, in the API's form; all others are answered where they leave the routes."""

    @app.exception_handler(RequestValidationError)
    async def invalid(_: Request, error: RequestValidationError) -> Response:
        return error_response(error)

    @app.exception_handler(HTTPException)
    async def no_such_page(_: Request, error: HTTPException) -> Response:
        return error_response(error)


def _describe(app: FastAPI) -> None:
    """Make the OpenAPI document tell the answers of this server, not those that FastAPI assumes."""
    assumed = app.openapi

    def openapi() -> dict[str, Any]:
        document = assumed()
        for path in document["paths"].values():
            for operation in path.values():
                operation["responses"].pop(ASSUMED_STATUS, None)
        for name in ASSUMED_SCHEMAS:
            document["components"]["schemas"].pop(name, None)
        return document

    app.openapi = openapi  # type: ignore[method-assign] # FastAPI's documented way to change the document
