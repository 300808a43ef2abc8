"""Whose request comes next, where it runs, and how long it may take."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

from fastapi import Request

from hybrimoe.server.errors import RequestError
from hybrimoe.server.fields import MAX_PRIORITY, MAX_REPLY_SECONDS, MAX_SHOWN

__all__ = ["MAX_SECONDS_HEADER", "PRIORITY_HEADER", "Urgency", "urgency_of"]

PRIORITY_HEADER, MAX_SECONDS_HEADER = "X-HybriMoE-Priority", "X-HybriMoE-Max-Reply-Seconds"
"""For clients that cannot send further fields."""


@dataclass(frozen=True, slots=True)
class Urgency:
    """client: who asks; places are shared fairly among clients. priority: a lower one comes first. max_s: from the
    request's arrival to the end of its reply, None: any time. slot: the place that its reply is to have, None: any."""

    client: str = ""
    priority: int = 0
    max_s: float | None = None
    slot: int | None = None


def urgency_of(
    request: Request, priority: int | None = None, max_s: float | None = None, slot: int | None = None
) -> Urgency:  # fmt: skip
    """By the fields of a request, and its headers where these say nothing. Raises RequestError for a bad header."""
    if priority is None:
        said = _number(request, PRIORITY_HEADER, -MAX_PRIORITY, MAX_PRIORITY)
        priority = 0 if said is None else int(said)
    if max_s is None:
        max_s = _number(request, MAX_SECONDS_HEADER, 0.001, MAX_REPLY_SECONDS)
    return Urgency(_client(request), priority, max_s, None if slot is None or slot < 0 else slot)


def _client(request: Request) -> str:
    """The client by its key (of which a digest is kept), else by its address."""
    key = request.headers.get("authorization") or request.headers.get("x-api-key")
    if key is not None:
        return hashlib.sha256(key.encode("utf-8", "replace")).hexdigest()
    return "" if request.client is None else request.client.host


def _number(request: Request, name: str, low: float, high: float) -> float | None:
    said = request.headers.get(name)
    if said is None:
        return None
    try:
        value = float(said)
    except ValueError:
        value = float("nan")
    if not low <= value <= high:
        raise RequestError(f"{name}: expected a number from {low:g} to {high:g}, found {said[:MAX_SHOWN]!r}", name)
    return value
