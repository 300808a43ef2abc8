"""HybriMoE's own endpoints: the state of the running model, its experts, a step in detail, and what can be changed."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import FastAPI, Request
from pydantic import Field, model_validator
from starlette.concurrency import run_in_threadpool

from hybrimoe.server.apis.documented import errors, service_errors
from hybrimoe.server.fields import Integer, Strict, Text
from hybrimoe.server.live.changes import change
from hybrimoe.server.live.experts import ExpertMap, read_experts
from hybrimoe.server.live.state import State, read_state, session_of
from hybrimoe.server.live.step import RecordedStep, record_step
from hybrimoe.server.models import Models


class Changes(Strict):
    """POST /hybrimoe/settings: what is to be changed."""

    policy: Text | None = Field(default=None, description="A policy's name, or balance/prefetch/cache.")
    slots: Annotated[Integer, Field(ge=0)] | None = Field(default=None, description="Expert slots of all accelerators.")
    host_memory: Text | None = Field(
        default=None, description="Host memory for experts that are read from disk: a size, a share, a number of them."
    )

    kv: Text | None = Field(
        default=None, description="Memory for keys and values of all replies: a size, a share of the device's, or auto."
    )

    parallel: Annotated[Integer, Field(ge=1, le=64)] | None = Field(default=None, description="Replies at once.")

    @model_validator(mode="after")
    def _something(self) -> Changes:
        if all(value is None for value in (self.policy, self.slots, self.host_memory, self.kv, self.parallel)):
            raise ValueError("expected policy, slots, host_memory, kv, parallel, or several of them")
        return self


def add_routes(app: FastAPI, models: Models) -> None:
    """Adds the endpoints. Those that only look run beside the event loop, and load no model."""
    recording = asyncio.Lock()

    @app.get("/hybrimoe/state", responses=service_errors())
    def state() -> State:
        return read_state(models)

    @app.get("/hybrimoe/experts", responses=service_errors())
    def experts() -> ExpertMap:
        return read_experts(session_of(models.engine))

    @app.post("/hybrimoe/settings", responses=errors())
    async def settings(body: Changes, request: Request) -> State:
        models.in_memory()
        async with models.using(None, request) as served:
            await change(served, body.policy, body.slots, body.host_memory, body.kv, body.parallel)
        return await run_in_threadpool(read_state, models)

    @app.post("/hybrimoe/step", responses=errors())
    async def step(request: Request) -> RecordedStep:
        models.in_memory()
        async with models.using(None, request) as served, recording:
            return await record_step(served)
