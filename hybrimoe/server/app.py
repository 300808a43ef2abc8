"""The HTTP application: every API of `hybrimoe.server.apis` over the models of a server."""

from __future__ import annotations

from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from functools import cache
from typing import Any

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.middleware.cors import CORSMiddleware
from fastapi.responses import Response
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from starlette.routing import Route

from hybrimoe.errors import did_you_mean
from hybrimoe.server.apis import anthropic, chat, completions, live, llama_server, ollama, responses, service
from hybrimoe.server.boundary import MAX_BODY_BYTES, MAX_BODY_SECONDS, Boundary, error_response
from hybrimoe.server.fields import shown
from hybrimoe.server.metrics import Metrics
from hybrimoe.server.models import Models
from hybrimoe.server.page import files
from hybrimoe.server.served import Served
from hybrimoe.server.tracing import Traces

APIS = (completions, chat, responses, anthropic, ollama, llama_server, live)
NO_ROUTE = "Not Found"
"""What Starlette says of a path that no route has."""
ASSUMED_STATUS = "422"
"""FastAPI documents it for every route that takes data; here such requests are answered with 400."""
ASSUMED_SCHEMAS = ("HTTPValidationError", "ValidationError")


def create_app(
    serving: Served | Models, *, api_keys: Sequence[str] = (), cors_origins: Sequence[str] = (),
    max_body_bytes: int = MAX_BODY_BYTES, strict: bool = False, max_body_s: float = MAX_BODY_SECONDS, page: bool = True,
    traces: Traces | None = None,
) -> FastAPI:  # fmt: skip
    """The application for one model, which may still be loading, or for several.

    api_keys: any of them opens all but /health, the API's description and the page's files; none at all leaves
    everything open.
    cors_origins: web pages that may call this server, "*" for all; none sends no CORS headers. max_body_bytes: a larger
    request is refused with 413; one that takes longer than max_body_s to send, with 408. strict: fields that no API has
    are refused, instead of left out with a warning. page: the page at `/`. traces: where spans of requests go.
    """
    models = Models.of_one(serving) if isinstance(serving, Served) else serving
    metrics = Metrics(models)
    models.on_reply = metrics.observe

    @asynccontextmanager
    async def lifespan(_: FastAPI) -> AsyncIterator[None]:
        yield
        models.close()
        if traces is not None:
            await run_in_threadpool(traces.close)

    app = FastAPI(title="HybriMoE", lifespan=lifespan)
    app.state.traces = traces
    _describe_when_asked(app, strict)
    app.add_middleware(
        Boundary, metrics=metrics, api_keys=api_keys, max_body_bytes=max_body_bytes, strict=strict,
        max_body_s=max_body_s,
    )  # fmt: skip
    if cors_origins:
        app.add_middleware(
            CORSMiddleware, allow_origins=list(cors_origins), allow_methods=["GET", "POST"], allow_headers=["*"]
        )
    _add_error_handlers(app)
    service.add_routes(app, models, metrics)
    for api in APIS:
        api.add_routes(app, models)
    if page:
        files.add_routes(app)
    return app


def _add_error_handlers(app: FastAPI) -> None:
    """Errors that FastAPI raises itself, in the API's form; all others are answered where they leave the routes."""

    @app.exception_handler(RequestValidationError)
    async def invalid(request: Request, error: RequestValidationError) -> Response:
        return error_response(error, request.url.path)

    @app.exception_handler(HTTPException)
    async def no_such_page(request: Request, error: HTTPException) -> Response:
        path = request.url.path
        allowed = (error.headers or {}).get("Allow")
        if error.status_code == 404 and error.detail == NO_ROUTE:
            pages = [route.path for route in app.routes if isinstance(route, Route)]
            said = f"there is no page {shown(path)}{did_you_mean(path, pages)}; GET /openapi.json lists what there is"
            error = HTTPException(404, said)
        elif error.status_code == 405 and allowed:
            error = HTTPException(405, f"{shown(path)} takes {allowed}, not {request.method}", error.headers)
        return error_response(error, path)


def _describe_when_asked(app: FastAPI, strict: bool) -> None:
    """Routes that are added from now on have their answers described when the OpenAPI document is asked for: FastAPI
    makes a validator for each answer, some 200 that no request uses, in a sixth of a second."""
    add_route, added = app.router.add_api_route, list[tuple[tuple[Any, ...], dict[str, Any]]]()

    def add_undescribed(*given: Any, **settings: Any) -> None:
        added.append((given, settings))
        add_route(*given, **{**settings, "responses": None})

    @cache
    def openapi() -> dict[str, Any]:
        described = FastAPI(title=app.title)
        for given, settings in added:
            described.router.add_api_route(*given, **settings)
        return _document(described, strict)

    app.router.add_api_route = add_undescribed  # type: ignore[method-assign] # where all its decorators end
    app.openapi = openapi  # type: ignore[method-assign] # FastAPI's documented way to change the document
    at = next(i for i, route in enumerate(app.routes) if isinstance(route, Route) and route.path == app.openapi_url)
    answer = app.routes[at].endpoint  # type: ignore[attr-defined]

    async def answered(request: Request) -> Response:
        await run_in_threadpool(app.openapi)  # half a second, in which others want their tokens
        response: Response = await answer(request)
        return response

    app.router.routes[at] = Route(app.openapi_url or "", answered, include_in_schema=False)


def _document(app: FastAPI, strict: bool) -> dict[str, Any]:
    """The OpenAPI document, which tells the answers of this server, not those that FastAPI assumes."""
    document = app.openapi()
    for path in document["paths"].values():
        for operation in path.values():
            operation["responses"].pop(ASSUMED_STATUS, None)
    schemas = document["components"]["schemas"]
    for name in ASSUMED_SCHEMAS:
        schemas.pop(name, None)
    if not strict:  # what the schemas do not list is left out, not refused
        for schema in schemas.values():
            if schema.get("additionalProperties") is False:
                del schema["additionalProperties"]
    return document
