"""The model of a server, from before it is loaded until the server ends."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from hybrimoe.server.errors import DrainingError, LoadingError
from hybrimoe.server.worker import CONVERSATIONS, QUEUE_LENGTH, Worker

if TYPE_CHECKING:
    from hybrimoe.generation import Reply, TextGenerator

ENCODING_THREADS = 4
"""Threads that turn text into tokens, beside the event loop: so many long prompts do not delay a short one."""

State = Literal["loading", "ok", "draining", "failed"]
Result = TypeVar("Result")


class Served:
    """`name` is the model's in the API. Requests before `open` are answered with 503, as those after `drain`.

    on_reply: called with each reply that has ended, by the thread that generates.
    """

    def __init__(self, name: str, *, conversations: int = CONVERSATIONS, queue_length: int = QUEUE_LENGTH) -> None:
        self.name = name
        self.created = int(time.time())
        self.experts: Callable[[], dict[str, Any] | None] = lambda: None
        self.on_reply: Callable[[Reply], None] = lambda reply: None
        self._conversations, self._queue_length = conversations, queue_length
        self._worker: Worker | None = None
        self._draining = False
        self._encoders = ThreadPoolExecutor(ENCODING_THREADS, thread_name_prefix="hybrimoe-encode")

    def open(self, generator: TextGenerator, experts: Callable[[], dict[str, Any] | None] = lambda: None) -> None:
        """The model is there. experts: the session's counters for /metrics, or None."""
        generator.tokenizer("a")  # the first call settles the tokenizer's state; later ones may run side by side
        self.experts = experts
        worker = Worker(generator, self._conversations, self._queue_length, lambda reply: self.on_reply(reply))
        worker.start()
        self._worker = worker

    @property
    def state(self) -> State:
        """What /health says."""
        if self._draining:
            return "draining"
        if self._worker is None:
            return "loading"
        return "ok" if self._worker.alive else "failed"

    @property
    def n_waiting(self) -> int:
        """Requests in the queue."""
        return 0 if self._worker is None else self._worker.n_waiting

    def worker(self) -> Worker:
        """The worker of the model. Raises LoadingError, DrainingError while there is none to ask."""
        if self._draining:
            raise DrainingError("this server is about to end; ask another one, or again in a moment")
        if self._worker is None:
            raise LoadingError(f"the model {self.name!r} is being loaded; try again in a moment")
        return self._worker

    async def encode(self, work: Callable[[], Result]) -> Result:
        """Run `work` (templates, tokenising) beside the event loop."""
        return await asyncio.get_running_loop().run_in_executor(self._encoders, work)

    def drain(self, seconds: float) -> None:
        """Refuse what waits and what comes; the reply under way has `seconds` left to end."""
        self._draining = True
        if self._worker is not None:
            self._worker.drain()
            timer = threading.Timer(seconds, self._worker.cut_running)
            timer.daemon = True
            timer.start()

    def close(self) -> None:
        """End what still runs."""
        self._draining = True
        self._encoders.shutdown(wait=False, cancel_futures=True)
        if self._worker is not None:
            self._worker.close()
