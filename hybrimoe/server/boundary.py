"""What every request passes on its way in and out: key, body limit, error answers, counts and access log."""

from __future__ import annotations

import asyncio
import hmac
import json
import logging
import re
import time
from collections.abc import Sequence
from dataclasses import dataclass

from starlette.datastructures import Headers, MutableHeaders
from starlette.responses import Response
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from hybrimoe.server.errors import (
    BodyTooLargeError,
    ClientLeftError,
    KeyRefusedError,
    SlowBodyError,
    error_answer,
    worded,
)
from hybrimoe.server.fields import left_out
from hybrimoe.server.metrics import Metrics

MAX_BODY_BYTES = 8 << 20
"""Bytes of a request: a prompt of about two million tokens of English, or half a million where all is escaped."""
MAX_DISCARDED_BYTES = 64 << 20
"""So much of a body that is too large is read and thrown away: many clients only look for an answer after they have
sent everything. A longer one is cut off."""
MAX_BODY_SECONDS = 60.0
"""A request that takes longer to send is refused: connections are not held by those who send nothing."""
OPEN = ("/health", "/openapi.json", "/docs", "/page/")
"""Paths that need no key where there are keys: for supervisors, for whoever wants to know what there is, and the files
of the page, which hold no data."""
PAGE = "/"
ORIGIN = re.compile(r"^https?://[^/]*", re.IGNORECASE)
"""Scheme and host before the path of a request."""
SENT_BY_PAGES = ("origin", "sec-fetch-site")
"""Headers by which a browser tells that a page sends the request."""
OFTEN = ("/page/", "/hybrimoe/state", "/hybrimoe/experts")
"""Paths that an open page asks for each second, which would bury the rest of the access log."""
MOST_WARNINGS, MOST_WARNING_CHARACTERS = 8, 200
"""Unknown fields that an answer's header tells of, and characters of each warning."""

access = logging.getLogger("hybrimoe.server.access")
log = logging.getLogger("hybrimoe.server")


@dataclass(slots=True)
class _Sent:
    """The status of the answer that has begun; 0 before."""

    status: int = 0


def _as_routed(scope: Scope) -> Scope:
    """The request as the routes take it.

    HEAD is GET, whose body the connection leaves out. An address with scheme and host, as proxies are sent, is one of
    this server (RFC 9112, 3.2.2). A body that does not say that it is JSON (`curl -d`) is read as
    such, as llama-server and Ollama do, unless a web page sends it: pages of other places may send any other kind
    without asking, and must not get at a server on their reader's own machine. That is then plain bytes, which no route
    takes: of one without a kind FastAPI 0.115 would think that it is JSON.
    """
    scope = dict(scope)
    if scope["method"] == "HEAD":
        scope["method"] = "GET"
    scope["path"] = ORIGIN.sub("", scope["path"], count=1) or "/"
    headers = Headers(scope=scope)
    kind = headers.get("content-type", "").partition(";")[0].strip().lower()
    if scope["method"] == "POST" and not kind.endswith("json"):
        by_page = any(name in headers for name in SENT_BY_PAGES)
        kept = [(name, value) for name, value in scope["headers"] if name != b"content-type"]
        scope["headers"] = [*kept, (b"content-type", b"application/octet-stream" if by_page else b"application/json")]
    return scope


class Boundary:
    """ASGI middleware around all routes. Whatever a route raises becomes an answer, and the connection is kept.

    strict: unknown fields are refused; else they are left out, and a Warning header tells so.
    """

    def __init__(
        self, app: ASGIApp, metrics: Metrics, api_keys: Sequence[str] = (), max_body_bytes: int = MAX_BODY_BYTES,
        strict: bool = False, max_body_s: float = MAX_BODY_SECONDS,
    ) -> None:  # fmt: skip
        self._app, self._metrics, self._strict = app, metrics, strict
        self._api_keys = [key.encode() for key in api_keys]
        self._max_body_bytes, self._max_body_s = max_body_bytes, max_body_s

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One request, or an event of the server's life."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        started, sent = time.perf_counter(), _Sent()
        scope = _as_routed(scope)
        unknown: list[str] = []
        left_out.set(None if self._strict else unknown)

        async def watched(message: Message) -> None:
            if message["type"] == "http.response.start":
                sent.status = message["status"]
                _warn(MutableHeaders(scope=message), unknown)
            await send(message)

        try:
            await self._answer(scope, receive, watched, sent)
        finally:
            self._record(scope, sent.status, time.perf_counter() - started)

    async def _answer(self, scope: Scope, receive: Receive, send: Send, sent: _Sent) -> None:
        try:
            body = await self._read(scope, receive)
            self._check_key(scope)
            await self._app(scope, _replayed(body, receive), send)
        except Exception as error:
            if sent.status:  # an answer has begun, and only ending it badly can say that it is not complete
                raise
            answer = error_answer(error)
            if answer.status == 500:
                log.error("%s %s failed", scope["method"], scope["path"], exc_info=error)
            await error_response(error, scope["path"])(scope, receive, send)

    async def _read(self, scope: Scope, receive: Receive) -> bytes:
        """The body of a request. Raises SlowBodyError, and as `_body`."""
        try:
            return await asyncio.wait_for(_body(Headers(scope=scope), receive, self._max_body_bytes), self._max_body_s)
        except TimeoutError as error:
            raise SlowBodyError(f"the request was not complete after {self._max_body_s:g} seconds") from error

    def _check_key(self, scope: Scope) -> None:
        """Raises KeyRefusedError. The comparison takes the same time for every wrong key."""
        if not self._api_keys or scope["path"] == PAGE or scope["path"].startswith(OPEN):
            return
        headers = Headers(scope=scope)
        scheme, _, key = headers.get("authorization", "").partition(" ")
        given = key if scheme.lower() == "bearer" else headers.get("x-api-key", "")
        known = [hmac.compare_digest(given.strip().encode("utf-8", "replace"), own) for own in self._api_keys]
        if not any(known):
            raise KeyRefusedError(
                "this server needs an API key: send the header Authorization: Bearer KEY, or x-api-key: KEY"
            )

    def _record(self, scope: Scope, status: int, seconds: float) -> None:
        """Count it, and log who asked what, never the contents. A status of 0 is an answer that never began."""
        path = getattr(scope.get("route"), "path", "other")
        self._metrics.requests.labels(path, status).inc()
        client = scope["client"][0] if scope.get("client") else "-"
        level = logging.DEBUG if scope["path"].startswith(OFTEN) else logging.INFO
        access.log(level, "%s %s %s %d %.3f s", client, scope["method"], scope["path"], status, seconds)


def error_response(error: BaseException, path: str) -> Response:
    """The answer to a request that failed. Texts of the client's come back in it: half surrogates stay escapes."""
    answer = error_answer(error)
    content = json.dumps(worded(answer, path), ensure_ascii=False).encode("utf-8", "backslashreplace")
    return Response(content, answer.status, answer.headers, "application/json")


def _warn(headers: MutableHeaders, unknown: Sequence[str]) -> None:
    """Tell of fields that were left out, in the form of RFC 7234: code, agent, text."""
    for message in unknown[:MOST_WARNINGS]:
        text = message.encode("ascii", "backslashreplace").decode()[:MOST_WARNING_CHARACTERS]
        quoted = (
            "".join(character for character in text if character.isprintable()).replace("\\", "/").replace('"', "'")
        )
        headers.append("Warning", f'299 hybrimoe "{quoted}; it was left out"')


async def _body(headers: Headers, receive: Receive, limit: int) -> bytes:
    """The body of a request. Raises BodyTooLargeError, ClientLeftError."""
    said = headers.get("content-length", "")
    if said.isdigit() and int(said) > limit + MAX_DISCARDED_BYTES:
        raise _too_large(int(said), limit)
    chunks, n_bytes, more = [], 0, True
    while more:
        message = await receive()
        if message["type"] == "http.disconnect":
            raise ClientLeftError("the client has closed the connection")
        chunk, more = message.get("body", b""), message.get("more_body", False)
        n_bytes += len(chunk)
        if n_bytes <= limit:
            chunks.append(chunk)
        elif n_bytes > limit + MAX_DISCARDED_BYTES:
            break
    if n_bytes > limit:
        raise _too_large(n_bytes, limit)
    return b"".join(chunks)


def _too_large(n_bytes: int, limit: int) -> BodyTooLargeError:
    return BodyTooLargeError(f"the request has {n_bytes} bytes or more; this server reads at most {limit} of one")


def _replayed(body: bytes, receive: Receive) -> Receive:
    """A source of messages that begins with the body; then those of `receive`, which tell when the client leaves."""
    first: list[Message] = [{"type": "http.request", "body": body, "more_body": False}]

    async def next_message() -> Message:
        return first.pop() if first else await receive()

    return next_message
