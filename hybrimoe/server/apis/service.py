"""What is told of the server and its model: /v1/models, /health, /metrics."""

from __future__ import annotations

from typing import Literal

from fastapi import FastAPI
from fastapi.responses import JSONResponse, Response
from typing_extensions import TypedDict

from hybrimoe.server.apis.documented import Responses, errors, service_errors
from hybrimoe.server.metrics import Metrics
from hybrimoe.server.served import Served, State


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


def add_routes(app: FastAPI, served: Served, metrics: Metrics) -> None:
    """Adds the endpoints."""

    def card() -> ModelCard:
        return {"id": served.name, "object": "model", "created": served.created, "owned_by": "hybrimoe"}

    @app.get("/v1/models", responses=service_errors())
    async def models() -> ModelList:
        return {"object": "list", "data": [card()]}

    @app.get("/v1/models/{model_id:path}", responses=service_errors() | {404: errors()[404]})
    async def model(model_id: str) -> ModelCard:
        served.check_name(model_id)
        return card()

    @app.get("/health", responses={503: {"model": Health}, 413: errors()[413]}, response_model=Health)
    async def health() -> JSONResponse:
        state = served.state
        body: Health = {
            "status": state, "waiting": served.n_waiting, "running": served.n_running, "model": served.name
        }  # fmt: skip
        return JSONResponse(body, status_code=200 if state == "ok" else 503)

    text: Responses = {200: {"content": {"text/plain": {"schema": {"type": "string"}}}}}

    @app.get("/metrics", responses={**service_errors(), **text}, response_class=Response)
    async def scrape() -> Response:
        return Response(metrics.render(), media_type="text/plain; version=0.0.4; charset=utf-8")
