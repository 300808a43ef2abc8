"""How a reply travels to its client: whole or as server-sent events, and what happens when the client leaves."""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import AsyncIterator, Coroutine
from enum import Enum
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from hybrimoe.errors import ModelError
from hybrimoe.server.answers import Form, finish_reason
from hybrimoe.server.errors import ClientLeftError, error_answer
from hybrimoe.server.worker import Job, Piece

if TYPE_CHECKING:
    from hybrimoe.generation import Reply

STATUS_SECONDS = 2.0
"""The status of a stream is sent with its first text, so that a failure before it has a status of its own; or after so
long, so that clients which wait for an answer's beginning see one."""
PING_SECONDS = 10.0
"""A stream without text for so long gets a comment line, which clients skip: nothing between takes it for dead."""

Result = TypeVar("Result")
log = logging.getLogger("hybrimoe.server")


class Waiting(Enum):
    """No piece came in the time that was given."""

    WAITING = "waiting"


class PieceReader:
    """Reads the pieces of a job one after another; a wait that ends early loses none."""

    def __init__(self, job: Job) -> None:
        self.job = job
        self._next: asyncio.Task[Piece | Exception | None] | None = None

    async def next(self, seconds: float | None = None) -> Piece | Waiting | None:
        """The next piece; None after the last; WAITING after so many seconds. Raises what ended the generation."""
        if self._next is None:
            self._next = asyncio.ensure_future(self.job.pieces.get())
        await asyncio.wait({self._next}, timeout=seconds)
        if not self._next.done():
            return Waiting.WAITING
        item, self._next = self._next.result(), None
        if isinstance(item, Exception):
            raise item
        return item

    async def rest(self) -> list[Piece]:
        """All pieces until the end."""
        pieces = []
        while isinstance(piece := await self.next(), Piece):
            pieces.append(piece)
        return pieces

    def close(self) -> None:
        """Nobody reads on: the generation stops."""
        self.job.cancel()
        if self._next is not None:
            self._next.cancel()


async def whole(job: Job, form: Form, request: Request) -> JSONResponse:
    """The complete reply. A client that leaves before ends its generation."""
    reader = PieceReader(job)
    try:
        pieces = await unless_left(request, reader.rest())
    finally:
        reader.close()
    return JSONResponse(form.whole(pieces, finished(job)))


async def stream(job: Job, form: Form, request: Request, include_usage: bool) -> Response:
    """The reply piece by piece. A failure before the first piece is raised; a later one is an event that ends all."""
    reader = PieceReader(job)
    try:
        first = await unless_left(request, reader.next(STATUS_SECONDS))
    except BaseException:
        reader.close()
        raise
    return EventStream(_events(reader, first, form, include_usage), reader)


async def unless_left(request: Request, work: Coroutine[Any, Any, Result]) -> Result:
    """The result of `work`, which is cancelled when the client leaves. Raises ClientLeftError then."""
    working, leaving = asyncio.ensure_future(work), asyncio.ensure_future(_left(request))
    try:
        await asyncio.wait({working, leaving}, return_when=asyncio.FIRST_COMPLETED)
        if not working.done():
            raise ClientLeftError("the client has closed the connection")
        return working.result()
    finally:
        working.cancel()
        leaving.cancel()


async def _left(request: Request) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass


class EventStream(StreamingResponse):
    """Server-sent events; however they end, the generation does, too."""

    def __init__(self, events: AsyncIterator[str], reader: PieceReader) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(events, headers=headers, media_type="text/event-stream")
        self._reader = reader

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them. The client may leave before the first."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._reader.close()


async def _events(
    reader: PieceReader, first: Piece | Waiting | None, form: Form, include_usage: bool
) -> AsyncIterator[str]:
    try:
        for opening in form.opening():
            yield _data(opening)
        piece = first
        while piece is not None:
            yield ": still working\n\n" if isinstance(piece, Waiting) else _data(form.event(piece))
            piece = await reader.next(PING_SECONDS)
        reply = finished(reader.job)
    except Exception as error:  # whatever it is, the client must not take the cut text for a success
        answer = error_answer(error)
        if answer.status == 500:
            log.error("a stream failed", exc_info=error)
        yield _data(answer.body)
        return
    yield _data(form.event(Piece(""), finish_reason(reply)))
    if include_usage:
        yield _data(form.counts(reply))
    yield "data: [DONE]\n\n"


def finished(job: Job) -> Reply:
    """The reply of a job that has ended. Raises ModelError for one that has none."""
    if job.reply is None:
        raise ModelError("the generation ended without a reply")
    return job.reply


def _data(body: Any) -> str:
    return f"data: {json.dumps(body, ensure_ascii=False)}\n\n"
