"""The one thread that generates: requests wait in a bounded queue, pieces travel back to the event loop."""

from __future__ import annotations

import asyncio
import queue
import threading
from collections.abc import AsyncIterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hybrimoe.errors import HybriMoEError, ModelError
from hybrimoe.generation import PrefixCaches, SamplingOptions
from hybrimoe.runtime.startup.budget import KV_TOKENS

if TYPE_CHECKING:
    from hybrimoe.generation import Reply, TextGenerator

QUEUE_LENGTH = 32
"""Requests that may wait; one more is refused with 503 instead of being answered much later."""


class QueueFullError(HybriMoEError):
    """More requests wait than the server is willing to keep."""


@dataclass(slots=True)
class Job:
    """One generation. `pieces` gets text, then None at the end, or the exception that ended it."""

    prompt_ids: list[int]
    options: SamplingOptions
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[str | Exception | None] = field(default_factory=asyncio.Queue)
    cancelled: threading.Event = field(default_factory=threading.Event)
    reply: Reply | None = None

    def send(self, item: str | Exception | None) -> None:
        """Called by the worker; a loop that has gone no longer listens."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, item)

    async def stream(self) -> AsyncIterator[str]:
        """Text as it comes. Leaving early, as when the client has gone, stops the generation."""
        try:
            while (item := await self.pieces.get()) is not None:
                if isinstance(item, Exception):
                    raise item
                yield item
        finally:
            self.cancelled.set()


class Worker:
    """Owns the generator and the KV caches of `conversations`: a prompt that continues one is not computed again."""

    def __init__(self, generator: TextGenerator, conversations: int = 1, queue_length: int = QUEUE_LENGTH) -> None:
        self.generator = generator
        max_tokens = generator.context_tokens or KV_TOKENS
        self._caches = PrefixCaches(generator.model, conversations, min(max_tokens, KV_TOKENS))
        self._jobs: queue.Queue[Job | None] = queue.Queue(maxsize=queue_length)
        self._thread: threading.Thread | None = None

    def start(self) -> None:
        """Begin to take work; after `close` it can start again."""
        self._thread = threading.Thread(target=self._run, name="hybrimoe-generate", daemon=True)
        self._thread.start()

    @property
    def n_waiting(self) -> int:
        """Requests in the queue."""
        return self._jobs.qsize()

    @property
    def alive(self) -> bool:
        """Whether the thread can take work."""
        return self._thread is not None and self._thread.is_alive()

    def submit(self, prompt_ids: list[int], options: SamplingOptions) -> Job:
        """Queue a generation. Raises PromptError at once for a bad prompt, QueueFullError when too many wait.

        Raises ModelError where nothing would answer, because the worker has ended.
        """
        if not self.alive:
            raise ModelError("the generating thread has ended; restart the server")
        self.generator.check_prompt(len(prompt_ids))
        job = Job(prompt_ids, options, asyncio.get_running_loop())
        try:
            self._jobs.put_nowait(job)
        except queue.Full:
            raise QueueFullError(f"{self._jobs.maxsize} requests are waiting already; try again later") from None
        return job

    def close(self) -> None:
        """Let the running generation end, then stop."""
        if self._thread is not None:
            self._jobs.put(None)
            self._thread.join()

    def _run(self) -> None:
        while (job := self._jobs.get()) is not None:
            if not job.cancelled.is_set():
                self._generate(job)

    def _generate(self, job: Job) -> None:
        try:
            cache = self._caches.for_prompt(job.prompt_ids)
            job.reply = self.generator.reply(job.prompt_ids, job.options, cache=cache, should_stop=job.cancelled.is_set)
            for piece in job.reply:
                job.send(piece)
        except Exception as error:  # noqa: BLE001  # it belongs to the request; the worker serves the next one
            job.send(error)
        else:
            job.send(None)
