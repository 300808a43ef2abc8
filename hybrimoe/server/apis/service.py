"""What is told of the server and its model: /v1/models, /health, /metrics."""

from __future__ import annotations

from typing import Literal, NotRequired

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from typing_extensions import TypedDict

from hybrimoe.server.apis.documented import Responses, errors, service_errors
from hybrimoe.server.metrics import Metrics
from hybrimoe.server.models import Models, ModelState
from hybrimoe.server.selfcheck import Finding
from hybrimoe.server.served import State


class Health(TypedDict):
    """Whether the server can answer, how many requests wait and are being answered, the model in memory (or the one
    that is meant where a request names none), the state of each, and what the self-check of the one in memory found."""

    status: State
    waiting: int
    running: int
    model: str
    models: dict[str, ModelState]
    findings: list[Finding]


class ModelCard(TypedDict):
    """A model as OpenAI's API lists it, whether it is in memory, and what it takes where that is known."""

    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    state: ModelState
    input_modalities: NotRequired[list[str]]


class ModelList(TypedDict):
    """All models of this server."""

    object: Literal["list"]
    data: list[ModelCard]


def add_routes(app: FastAPI, models: Models, metrics: Metrics) -> None:
    """Adds the endpoints."""

    def card(name: str, state: ModelState) -> ModelCard:
        told: ModelCard = {
            "id": name, "object": "model", "created": models.created, "owned_by": "hybrimoe", "state": state,
        }  # fmt: skip
        served = models.served
        if served is not None and served.name == name and served.engine is not None:
            told["input_modalities"] = ["text", "image"] if served.sees else ["text"]
        return told

    @app.get("/v1/models", responses=service_errors())
    async def listed() -> ModelList:
        return {"object": "list", "data": [card(name, state) for name, state in models.states.items()]}

    @app.get("/v1/models/{model_id:path}", responses=service_errors() | {404: errors()[404]})
    async def model(model_id: str) -> ModelCard:
        name = models.full_name(model_id)
        return card(name, models.states[name])

    @app.get(
        "/health", responses={503: {"model": Health}, 408: errors()[408], 413: errors()[413]}, response_model=Health
    )
    async def health() -> JSONResponse:
        state = models.state
        body: Health = {
            "status": state, "waiting": models.n_waiting, "running": models.n_running, "model": models.name,
            "models": models.states, "findings": [] if models.served is None else models.served.findings,
        }  # fmt: skip
        return JSONResponse(body, status_code=200 if state == "ok" else 503)

    text: Responses = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @app.get("/metrics", responses={**service_errors(), **text}, response_class=Response)
    def scrape() -> Response:  # in a thread: it waits for the session's lock
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
