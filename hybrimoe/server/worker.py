"""The one thread that generates: requests wait in a bounded queue, join the running batch, their pieces travel back."""

from __future__ import annotations

import math
import threading
import time
from collections import Counter, deque
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import Future
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

from hybrimoe.errors import ModelError, PromptError
from hybrimoe.generation import SamplingOptions
from hybrimoe.generation.continuous_batching import BatchEngine, Progress
from hybrimoe.generation.vocabulary import check_token_ids
from hybrimoe.server.errors import DrainingError, LateError, QueueFullError
from hybrimoe.server.inbox import Inbox
from hybrimoe.server.urgency import Urgency

if TYPE_CHECKING:
    from hybrimoe.generation import Reply, TextGenerator, TokenLogprob

QUEUE_LENGTH = 32
"""Requests that may wait; one more is refused with 429 instead of being answered much later."""
JOIN_SECONDS = 5.0
"""Time for the computation under way (a token, a part of a prompt) to end when the server does."""
REMEMBERED_REPLIES = 16
"""Latest replies whose mean duration says when a refused request may come again."""
MOST_RETRY_SECONDS = 60
"""What a refused request is told at most: clients give up rather than wait longer."""
GIVE_WAY_S = 0.0015
"""Seconds that the generating thread leaves to the event loop after a reply's first text: the loop takes Python's lock
several times until that is sent, and each time would wait for what the next step computes in Python. Measured with the
demo model: first byte after 5.3 ms instead of 7 to 9."""
HELD_WAIT_S = 0.02
"""Where requests wait for a place that is saved or restored, and nothing else runs: until one looks again."""

Result = TypeVar("Result")


@dataclass(frozen=True, slots=True)
class Piece:
    """Text that may be shown, and the log probabilities of the tokens since the last piece where they are recorded.

    text_offsets: where the text of each of those tokens begins in the reply, in characters. prompt_logprobs: of the
    prompt's tokens, in the first piece, where they are recorded.
    """

    text: str
    logprobs: tuple[TokenLogprob, ...] = ()
    text_offsets: tuple[int, ...] = ()
    prompt_logprobs: tuple[TokenLogprob | None, ...] = ()


Said = tuple[int, Piece | Exception | None]
"""Which of a request's generations says something, and what: see `Job`."""


@dataclass(slots=True, eq=False)
class Job:
    """One generation. `inbox` gets its pieces, then None at the end, or the exception that ended it.

    choice: which one of the request's, whose inbox they share; it stands beside each item. `reply` is there once the
    generation has begun, after `waited_s` seconds in the queue. Any thread may call `cancel`, `send` and `cut`.
    """

    prompt_ids: list[int]
    options: SamplingOptions
    inbox: Inbox[Said]
    choice: int = 0
    urgency: Urgency = field(default_factory=Urgency)
    stopped: threading.Event = field(default_factory=threading.Event)
    submitted_s: float = field(default_factory=time.monotonic)
    waited_s: float = 0.0
    reply: Reply | None = None
    has_told: bool = False
    """Whether some of its text was sent."""
    _n_told: int = 0

    def cancel(self) -> None:
        """The client has gone: the generation ends within one token or part of a prompt, a waiting one never begins."""
        self.stopped.set()

    def cut(self, reason: Exception) -> None:
        """End the generation as `cancel` does, and tell the client why now."""
        self.stopped.set()
        self.send(reason)

    def send(self, item: Piece | Exception | None) -> None:
        """Hand an item to the event loop."""
        self.inbox.put((self.choice, item))

    def tell(self, text: str, *, all_of_it: bool = False) -> None:
        """Send text with what belongs to it. all_of_it: also log probabilities for which there is no text."""
        reply = self.reply
        assert reply is not None
        n_logprobs = len(reply.logprobs)
        if text or (all_of_it and self._n_told < n_logprobs):
            since = slice(self._n_told, n_logprobs)  # a reply has offsets of all tokens, recorded or not
            of_prompt = () if self.has_told else tuple(reply.prompt_logprobs)
            self.send(Piece(text, tuple(reply.logprobs[since]), tuple(reply.text_offsets[since]), of_prompt))
            self._n_told, self.has_told = n_logprobs, True


class Turns:
    """Whose turn it is: the lowest priority; of these the client with the fewest replies under way, of equals the one
    whose last turn is the longest ago; of its requests the oldest."""

    def __init__(self) -> None:
        self._number = 0
        self._last_turn: dict[str, int] = {}

    def next(self, waiting: Sequence[Job], running: Iterable[Job]) -> Job:
        """One of those that wait, in the order in which they came."""
        n_running = Counter(job.urgency.client for job in running)

        def place(job: Job) -> tuple[int, int, int]:
            client = job.urgency.client
            return job.urgency.priority, n_running[client], self._last_turn.get(client, 0)

        there = {job.urgency.client for job in waiting} | set(n_running)
        self._last_turn = {client: turn for client, turn in self._last_turn.items() if client in there}
        return min(waiting, key=place)

    def begun(self, job: Job) -> None:
        """It was this one's turn."""
        self._number += 1
        self._last_turn[job.urgency.client] = self._number


class Worker:
    """Owns the engine that generates: up to `engine.parallel` requests run at once, the others wait for their turn.

    max_wait_s: one that has waited so long is refused; None waits for any time. on_reply: called with each reply that
    has ended, and the seconds that it waited before it began. on_idle: called by the generating thread when the last
    one has; it must not wait. max_reply_s: from a request's arrival to the end of its reply; None: any time.
    """

    def __init__(
        self, engine: BatchEngine, queue_length: int = QUEUE_LENGTH, max_wait_s: float | None = None,
        on_reply: Callable[[Reply, float], None] = lambda reply, waited_s: None,
        on_idle: Callable[[], None] = lambda: None, *, max_reply_s: float | None = None,
    ) -> None:  # fmt: skip
        self.engine = engine
        self.generator: TextGenerator = engine.generator
        self._on_reply, self._on_idle = on_reply, on_idle
        self._queue_length, self._max_wait_s, self._max_reply_s = queue_length, max_wait_s, max_reply_s
        self._turns = Turns()
        self._changed = threading.Condition()
        self._waiting: deque[Job] = deque()
        self._running: dict[Reply, Job] = {}
        self._beginning: Job | None = None
        self._durations_s: deque[float] = deque(maxlen=REMEMBERED_REPLIES)
        self._draining = False
        self._errands: deque[tuple[Callable[[], Any], Future[Any]]] = deque()
        self._tokens_of_ended = 0
        self._thread = threading.Thread(target=self._run, name="hybrimoe-generate", daemon=True)

    def start(self) -> None:
        """Begin to take work."""
        self._thread.start()

    @property
    def n_waiting(self) -> int:
        """Requests in the queue."""
        return sum(not job.stopped.is_set() for job in list(self._waiting))

    @property
    def n_running(self) -> int:
        """Requests that are being answered."""
        return len(self._under_way())

    @property
    def n_generated(self) -> int:
        """Tokens of all replies so far, those under way included."""
        with self._changed:
            return self._tokens_of_ended + sum(len(reply.token_ids) for reply in self._running)

    @property
    def queue_length(self) -> int:
        """Requests that may wait."""
        return self._queue_length

    @property
    def alive(self) -> bool:
        """Whether the thread can take work."""
        return self._thread.is_alive()

    def submit(
        self, prompt_ids: list[int], options: SamplingOptions, urgency: Urgency | None = None, *,
        inbox: Inbox[Said] | None = None, choice: int = 0,
    ) -> Job:  # fmt: skip
        """Queue a generation. Called by the event loop. inbox: of a request with several; else it gets one of its own.

        Raises:
            PromptError: no token, one that the model does not have, no room for a reply, or no such slot.
            QueueFullError: too many wait.
            DrainingError: the server is about to end.
            ModelError: nothing would answer, because the thread has ended.
        """
        self.generator.check_prompt(len(prompt_ids))
        check_token_ids(self.generator.model, prompt_ids, self.generator.tokenizer)
        job = Job(prompt_ids, options, inbox or Inbox(), choice, urgency or Urgency())
        self._check_slot(job.urgency.slot)
        with self._changed:
            if self._draining:
                raise DrainingError("this server is about to end; ask another one, or again in a moment")
            if not self.alive:
                raise ModelError("the generating thread has ended; restart the server")
            self._waiting = deque(waiting for waiting in self._waiting if not waiting.stopped.is_set())
            if len(self._waiting) >= self._queue_length:
                raise QueueFullError(
                    f"{self._queue_length} requests are waiting already; try again later", self._retry_seconds()
                )
            self._waiting.append(job)
            self._changed.notify()
        return job

    def between_steps(self, errand: Callable[[], Result]) -> Future[Result]:
        """Have the generating thread do something between two steps, when no layer runs; its result or what it raises.

        Any thread may ask. Raises DrainingError where the server is about to end.
        """
        done: Future[Result] = Future()
        with self._changed:
            if self._draining or not self.alive:
                raise DrainingError("this server is about to end; ask another one")
            self._errands.append((errand, done))
            self._changed.notify()
        return done

    def drain(self) -> None:
        """Refuse what waits and what comes; the generations under way go on."""
        with self._changed:
            self._draining = True
            refused, self._waiting = self._waiting, deque()
            self._changed.notify()
        for job in refused:
            job.cut(DrainingError("this server ends before it gets to this request; ask another one"))

    def cut_running(self) -> None:
        """End the generations under way; their clients are told."""
        for job in self._under_way():
            job.cut(DrainingError("this server ended before the reply was complete"))

    def close(self) -> None:
        """Drain, end the generations under way, and wait a moment for the thread."""
        self.drain()
        self.cut_running()
        if self.alive:
            self._thread.join(JOIN_SECONDS)

    def _check_slot(self, slot: int | None) -> None:
        places = self.engine.places
        if slot is not None and slot not in places:
            raise PromptError(f"id_slot: there is no slot {slot}: this server has {', '.join(map(str, places))}, or -1")

    def _under_way(self) -> list[Job]:
        with self._changed:
            beginning = [] if self._beginning is None else [self._beginning]
            return [*self._running.values(), *beginning]

    def _retry_seconds(self) -> int:
        """When a place in the queue should be free, by the latest replies."""
        if not self._durations_s:
            return 1
        mean_s = sum(self._durations_s) / len(self._durations_s)
        return max(1, min(MOST_RETRY_SECONDS, math.ceil(mean_s / self.engine.parallel)))

    # The generating thread --------------------------------------------------------------------------------------

    def _run(self) -> None:
        try:
            while self._has_work():
                self._do_errands()
                while (job := self._next()) is not None:
                    self._begin(job)
                self._end_those_out_of_time()
                for progress in self.engine.step():
                    if self._deliver(progress):
                        self._give_way()
        except BaseException:
            self.drain()
            ended = ModelError("the generating thread has ended with an error; restart the server")
            for job in self._under_way():
                job.cut(ended)
            for _, done in self._errands:
                done.cancel()
            raise

    def _give_way(self) -> None:
        time.sleep(GIVE_WAY_S)

    def _has_work(self) -> bool:
        """Waits for work; False once the worker drains and nothing is under way."""
        with self._changed:
            while not self._running and not self._waiting and not self._errands:
                self._on_idle()
                if self._draining:
                    return False
                self._changed.wait()
            if not self._running and not self._errands and self.engine.n_held:
                self._changed.wait(HELD_WAIT_S)
        return True

    def _do_errands(self) -> None:
        while self._errands:
            errand, done = self._errands.popleft()
            if not done.set_running_or_notify_cancel():
                continue
            try:
                done.set_result(errand())
            except Exception as error:  # noqa: BLE001  # it belongs to whoever asked
                done.set_exception(error)

    def _next(self) -> Job | None:
        """The job whose turn it is, where the engine has room for it; others do not overtake it, unless it waits for a
        slot of its own."""
        with self._changed:
            self._drop_those_that_end_waiting()
            if not self._waiting:
                return None
            waiting = [job for job in self._waiting if not self.engine.is_taken(job.urgency.slot)]
            if not waiting:
                return None
            job = self._turns.next(waiting, self._running.values())
            if not self.engine.has_room(job.prompt_ids, job.options):
                return None
            self._waiting.remove(job)
            self._turns.begun(job)
            self._beginning = job
            return job

    def _drop_those_that_end_waiting(self) -> None:
        """Clients that have gone, and requests that waited too long."""
        for job in self._waiting:
            limit = self._wait_limit(job)
            if limit is not None and not job.stopped.is_set() and time.monotonic() - job.submitted_s > limit:
                job.cut(LateError(f"the request has waited for more than {limit:g} seconds", self._retry_seconds()))
        self._waiting = deque(job for job in self._waiting if not job.stopped.is_set())

    def _wait_limit(self, job: Job) -> float | None:
        """Seconds that a job may wait: none of its reply is left after that."""
        limits = [limit for limit in (self._max_wait_s, self._reply_limit(job)) if limit is not None]
        return min(limits, default=None)

    def _reply_limit(self, job: Job) -> float | None:
        """Seconds from the arrival of a job to the end of its reply."""
        limits = [limit for limit in (self._max_reply_s, job.urgency.max_s) if limit is not None]
        return min(limits, default=None)

    def _end_those_out_of_time(self) -> None:
        """Replies that have had their time end with what there is."""
        now_s = time.monotonic()
        for reply, job in self._running.items():
            limit = self._reply_limit(job)
            if limit is not None and now_s - job.submitted_s > limit and reply.finish_reason is None:
                reply.finish("deadline")

    def _begin(self, job: Job) -> None:
        job.waited_s = time.monotonic() - job.submitted_s
        try:
            job.reply = self.engine.admit(job.prompt_ids, job.options, job.stopped.is_set, job.urgency.slot)
        except Exception as error:  # noqa: BLE001  # it belongs to the request; the worker serves the others
            job.send(error)
        with self._changed:
            self._beginning = None
            if job.reply is not None:
                self._running[job.reply] = job

    def _deliver(self, progress: Progress) -> bool:
        """Whether that was the first text of a reply that goes on."""
        job = self._running[progress.reply]
        had_told = job.has_told
        job.tell(progress.text, all_of_it=progress.ended and progress.error is None)
        if not progress.ended:
            return job.has_told and not had_told and not progress.reply.has_ended()
        with self._changed:
            del self._running[progress.reply]
            self._tokens_of_ended += len(progress.reply.token_ids)
            self._durations_s.append(time.monotonic() - job.submitted_s - job.waited_s)
        if progress.error is None:
            self._on_reply(progress.reply, job.waited_s)
        job.send(progress.error)
        return False
