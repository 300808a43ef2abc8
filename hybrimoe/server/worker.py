"""The one thread that generates: requests wait in a bounded queue, pieces travel back to the event loop."""

from __future__ import annotations

import asyncio
import threading
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from hybrimoe.errors import ModelError
from hybrimoe.generation import PrefixCaches, SamplingOptions
from hybrimoe.generation.vocabulary import check_token_ids
from hybrimoe.server.errors import DrainingError, QueueFullError

if TYPE_CHECKING:
    from hybrimoe.generation import Reply, TextGenerator, TokenLogprob

CONVERSATIONS = 16
"""Conversations whose caches are kept where nothing else is said; the memory for them has a limit of its own."""
QUEUE_LENGTH = 32
"""Requests that may wait; one more is refused with 503 instead of being answered much later."""
JOIN_SECONDS = 5.0
"""Time for the computation under way (a token, a part of a prompt) to end when the server does."""


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that may be shown, and the log probabilities of the tokens since the last piece where they are recorded.

    text_offsets: where the text of each of those tokens begins in the reply, in characters.
    """

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    text_offsets: tuple[int, ...] = ()


@dataclass(slots=True, eq=False)
class Job:
    """One generation. `pieces` gets pieces, then None at the end, or the exception that ended it.

    `reply` is there once the generation has begun. Methods of the event loop: `cancel`; of any thread: `send`, `cut`.
    """

    prompt_ids: list[int]
    options: SamplingOptions
    loop: asyncio.AbstractEventLoop
    pieces: asyncio.Queue[Piece | Exception | None] = field(default_factory=asyncio.Queue)
    stopped: threading.Event = field(default_factory=threading.Event)
    reply: Reply | None = None

    def cancel(self) -> None:
        """The client has gone: the generation ends within one token or part of a prompt, a waiting one never begins."""
        self.stopped.set()

    def cut(self, reason: Exception) -> None:
        """End the generation as `cancel` does, and tell the client why now."""
        self.stopped.set()
        self.send(reason)

    def send(self, item: Piece | Exception | None) -> None:
        """Hand an item to the event loop; one that has gone no longer listens."""
        if not self.loop.is_closed():
            self.loop.call_soon_threadsafe(self.pieces.put_nowait, item)


class Worker:
    """Owns the generator and the KV caches of `conversations`: a prompt that continues one is not computed again.

    on_reply: called with each reply that has ended.
    """

    def __init__(
        self, generator: TextGenerator, conversations: int = CONVERSATIONS, queue_length: int = QUEUE_LENGTH,
        on_reply: Callable[[Reply], None] = lambda reply: None,
    ) -> None:  # fmt: skip
        self.generator = generator
        self._on_reply = on_reply
        self._caches = PrefixCaches(generator.model, conversations, generator.kv_bytes, generator.token_bytes)
        self._queue_length = queue_length
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: Job | None = None
        self._draining = False
        self._thread = threading.Thread(target=self._run, name="hybrimoe-generate", daemon=True)

    def start(self) -> None:
        """Begin to take work."""
        self._thread.start()

    @property
    def n_waiting(self) -> int:
        """Requests in the queue."""
        return sum(not job.stopped.is_set() for job in list(self._waiting))

    @property
    def alive(self) -> bool:
        """Whether the thread can take work."""
        return self._thread.is_alive()

    def submit(self, prompt_ids: list[int], options: SamplingOptions) -> Job:
        """Queue a generation. Called by the event loop.

        Raises:
            PromptError: no token, one that the model does not have, or no room for a reply.
            QueueFullError: too many wait.
            DrainingError: the server is about to end.
            ModelError: nothing would answer, because the thread has ended.
        """
        self.generator.check_prompt(len(prompt_ids))
        check_token_ids(self.generator.model, prompt_ids, self.generator.tokenizer)
        job = Job(prompt_ids, options, asyncio.get_running_loop())
        with self._changed:
            if self._draining:
                raise DrainingError("this server is about to end; ask another one, or again in a moment")
            if not self.alive:
                raise ModelError("the generating thread has ended; restart the server")
            self._waiting = deque(waiting for waiting in self._waiting if not waiting.stopped.is_set())
            if len(self._waiting) >= self._queue_length:
                raise QueueFullError(f"{self._queue_length} requests are waiting already; try again later")
            self._waiting.append(job)
            self._changed.notify()
        return job

    def drain(self) -> None:
        """Refuse what waits and what comes; the generation under way goes on."""
        with self._changed:
            self._draining = True
            refused, self._waiting = self._waiting, deque()
            self._changed.notify()
        for job in refused:
            job.cut(DrainingError("this server ends before it gets to this request; ask another one"))

    def cut_running(self) -> None:
        """End the generation under way; its client is told."""
        running = self._running
        if running is not None:
            running.cut(DrainingError("this server ended before the reply was complete"))

    def close(self) -> None:
        """Drain, end the generation under way, and wait a moment for the thread."""
        self.drain()
        self.cut_running()
        if self.alive:
            self._thread.join(JOIN_SECONDS)

    def _run(self) -> None:
        while (job := self._next()) is not None:
            self._generate(job)
            self._running = None

    def _next(self) -> Job | None:
        """The job that has waited longest; None once the worker drains and nothing waits."""
        with self._changed:
            while True:
                while self._waiting:
                    job = self._waiting.popleft()
                    if not job.stopped.is_set():
                        self._running = job
                        return job
                if self._draining:
                    return None
                self._changed.wait()

    def _generate(self, job: Job) -> None:
        try:
            cache = self._caches.for_prompt(job.prompt_ids)
            job.reply = self.generator.reply(job.prompt_ids, job.options, cache=cache, should_stop=job.stopped.is_set)
            told = 0
            for text in job.reply:
                job.send(_piece(job.reply, text, told))
                told = len(job.reply.logprobs)
            if told < len(job.reply.logprobs):
                job.send(_piece(job.reply, "", told))
            self._on_reply(job.reply)
        except Exception as error:  # noqa: BLE001  # it belongs to the request; the worker serves the next one
            job.send(error)
        else:
            job.send(None)


def _piece(reply: Reply, text: str, told: int) -> Piece:
    return Piece(text, tuple(reply.logprobs[told:]), tuple(reply.text_offsets[told:]))
