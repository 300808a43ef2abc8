"""How replies travel to their client: whole or piece by piece, and what happens when the client leaves."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator, Coroutine, Sequence
from typing import TYPE_CHECKING, Any, TypeVar

from fastapi import Request
from starlette.responses import JSONResponse, Response, StreamingResponse
from starlette.types import Receive, Scope, Send

from hybrimoe.errors import ModelError
from hybrimoe.server.asking import Prepared
from hybrimoe.server.errors import ClientLeftError, error_answer, worded
from hybrimoe.server.forms import Ended, Form, Update, WholeReply
from hybrimoe.server.inbox import Inbox
from hybrimoe.server.replies.events import Call, ReplyParser, joined
from hybrimoe.server.tracing import RequestTrace, Traces
from hybrimoe.server.urgency import Urgency, urgency_of
from hybrimoe.server.worker import Job, Piece, Said, Worker

if TYPE_CHECKING:
    from hybrimoe.generation import Reply

STATUS_SECONDS = 2.0
"""The status of a stream is sent with its first text, so that a failure before it has a status of its own; or after so
long, so that clients which wait for an answer's beginning see one."""
PING_SECONDS = 10.0
"""A stream without text for so long gets a comment line, which clients skip: nothing between takes it for dead."""

Result = TypeVar("Result")
log = logging.getLogger("hybrimoe.server")


class ReadReply:
    """One reply of a request: its pieces through its parser."""

    def __init__(self, job: Job, parser: ReplyParser) -> None:
        self.job = job
        self.ended: Ended | None = None
        self._parser = parser
        self._has_calls = False

    def read(self, piece: Piece | None) -> Update:
        """What a piece brings, or the end."""
        events = self._parser.finish() if piece is None else self._parser.push(piece.text)
        self._has_calls = self._has_calls or any(isinstance(event, Call) for event in events)
        if piece is None:
            self.ended = Ended(finished(self.job), self._has_calls)
        return Update(self.job.choice, events, piece or Piece(""), self.ended)


class Replies:
    """All replies to one request, which are computed beside each other."""

    def __init__(
        self, worker: Worker, prepared: Sequence[Prepared], urgency: Urgency, trace: RequestTrace | None = None
    ) -> None:
        """Queues them: all or none. Raises as `Worker.submit`. trace: is told how they end."""
        self._trace = trace
        self._inbox: Inbox[Said] = Inbox()
        self._all: list[ReadReply] = []
        self._failure: Exception | None = None
        try:
            for choice, one in enumerate(prepared):
                job = worker.submit(one.prompt_ids, one.options, urgency, inbox=self._inbox, choice=choice)
                self._all.append(ReadReply(job, one.new_parser()))
        except Exception as error:
            self._failure = error
            self.close()
            raise

    async def next(self, seconds: float | None = None) -> list[Update] | None:
        """All that is new, in the order in which it came; nothing after so many seconds; None once all have ended.

        Raises what ended a generation, after all that came before it.
        """
        if self._failure is None and all(one.ended is not None for one in self._all):
            return None
        updates: list[Update] = []
        said = [] if self._failure is not None else await self._inbox.take(seconds)
        for choice, item in said:
            if self._all[choice].ended is not None:
                continue
            if isinstance(item, Exception):
                self._failure = item
                break
            updates.append(self._all[choice].read(item))
        if self._failure is not None and not updates:
            raise self._failure
        return updates

    async def whole(self) -> list[WholeReply]:
        """All of them, complete."""
        updates: list[list[Update]] = [[] for _ in self._all]
        while (new := await self.next()) is not None:
            for update in new:
                updates[update.choice].append(update)
        return [
            WholeReply(
                joined(event for update in of_one for event in update.events),
                _joined_pieces([update.piece for update in of_one]),
                ended,
            )
            for of_one, ended in zip(updates, self.ended(), strict=True)
        ]

    def ended(self) -> list[Ended]:
        """How they ended, once they have."""
        return [one.ended for one in self._all if one.ended is not None]

    def close(self) -> None:
        """Nobody reads on: they stop."""
        for one in self._all:
            one.job.cancel()
        self._inbox.close()
        if self._trace is not None:
            left = None if len(self.ended()) == len(self._all) else ClientLeftError("the client has left")
            self._trace.end([one.job for one in self._all], self._failure or left)


async def deliver(
    worker: Worker, prepared: Sequence[Prepared], form: Form, request: Request, *, streamed: bool,
    urgency: Urgency | None = None,
) -> Response:  # fmt: skip
    """Replies to all of `prepared`, in one answer. urgency: None is that of the request's headers."""
    traces: Traces | None = request.app.state.traces
    trace = None if traces is None else RequestTrace(traces, request, request.state.model)
    replies = Replies(worker, prepared, urgency or urgency_of(request), trace)
    return await (stream if streamed else whole)(replies, form, request)


async def whole(replies: Replies, form: Form, request: Request) -> Response:
    """The complete answer. A client that leaves before ends the generation."""
    try:
        complete = await unless_left(request, replies.whole())
    finally:
        replies.close()
    return JSONResponse(form.whole(complete))


async def stream(replies: Replies, form: Form, request: Request) -> Response:
    """The answer piece by piece. A failure before the first piece is raised; a later one is a message that ends all."""
    try:
        first = await unless_left(request, replies.next(STATUS_SECONDS))
    except BaseException:
        replies.close()
        raise
    return ReplyStream(_messages(replies, first, form, request.url.path), replies, form.media_type)


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


class ReplyStream(StreamingResponse):
    """A stream of messages; however they end, the generation does, too."""

    def __init__(self, messages: AsyncIterator[bytes], replies: Replies, media_type: str) -> None:
        headers = {"Cache-Control": "no-cache", "X-Accel-Buffering": "no"}
        super().__init__(messages, headers=headers, media_type=media_type)
        self._replies = replies

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send them. The client may leave before the first."""
        try:
            await super().__call__(scope, receive, send)
        finally:
            self._replies.close()


async def _messages(replies: Replies, first: list[Update] | None, form: Form, path: str) -> AsyncIterator[bytes]:
    """What is sent at once: all messages that are there."""
    ready = list(form.opening())
    try:
        updates = first
        while updates is not None:
            if not updates:
                ready.append(form.ping)
            for update in updates:
                ready.extend(form.update(update))
            if text := "".join(ready):
                ready.clear()
                yield text.encode()
            updates = await replies.next(PING_SECONDS)
        ready.extend(form.closing(replies.ended()))
    except Exception as error:  # whatever it is, the client must not take the cut text for a success
        answer = error_answer(error)
        if answer.status == 500:
            log.error("a stream failed", exc_info=error)
        ready.append(form.failure(answer, worded(answer, path)))
    yield "".join(ready).encode()


def finished(job: Job) -> Reply:
    """The reply of a job that has ended. Raises ModelError for one that has none."""
    if job.reply is None:
        raise ModelError("the generation ended without a reply")
    return job.reply


def _joined_pieces(pieces: Sequence[Piece]) -> Piece:
    """All pieces as one."""
    return Piece(
        "".join(piece.text for piece in pieces),
        tuple(one for piece in pieces for one in piece.logprobs),
        tuple(offset for piece in pieces for offset in piece.text_offsets),
        tuple(one for piece in pieces for one in piece.prompt_logprobs),
    )
