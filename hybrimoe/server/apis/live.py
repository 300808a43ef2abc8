"""HybriMoE's own endpoints: the state of the running model, its experts, a step in detail, and what can be changed."""

from __future__ import annotations

import asyncio
from typing import Annotated

from fastapi import FastAPI
from pydantic import Field, model_validator

from hybrimoe.server.apis.documented import errors, service_errors
from hybrimoe.server.fields import Integer, Strict, Text
from hybrimoe.server.live.changes import change
from hybrimoe.server.live.experts import ExpertMap, read_experts
from hybrimoe.server.live.state import State, read_state, session_of
from hybrimoe.server.live.step import RecordedStep, record_step
from hybrimoe.server.served import Served


class Changes(Strict):
    """POST /hybrimoe/settings: what is to be changed."""

    policy: Text | None = Field(default=None, description="A policy's name, or balance/prefetch/cache.")
    slots: Annotated[Integer, Field(ge=0)] | None = Field(default=None, description="Expert slots of all accelerators.")

    @model_validator(mode="after")
    def _something(self) -> Changes:
        if self.policy is None and self.slots is None:
            raise ValueError("expected policy, slots, or both")
        return self


def add_routes(app: FastAPI, served: Served) -> None:
    """Adds the endpoints."""
    recording = asyncio.Lock()

    @app.get("/hybrimoe/state", responses=service_errors())
    async def state() -> State:
        return await served.encode(lambda: read_state(served))

    @app.get("/hybrimoe/experts", responses=service_errors())
    async def experts() -> ExpertMap:
        return await served.encode(lambda: read_experts(session_of(served.engine)))

    @app.post("/hybrimoe/settings", responses=errors())
    async def settings(body: Changes) -> State:
        await change(served, body.policy, body.slots)
        return await served.encode(lambda: read_state(served))

    @app.post("/hybrimoe/step", responses=errors())
    async def step() -> RecordedStep:
        async with recording:
            return await record_step(served)
