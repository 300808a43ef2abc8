"""The model of a server, from before it is loaded until the server ends."""

from __future__ import annotations

import asyncio
import logging
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Any, Literal, TypeVar

from hybrimoe.amounts import size_text
from hybrimoe.generation.continuous_batching import BatchEngine, default_parallel
from hybrimoe.generation.prefix.blocks import PrefixTree
from hybrimoe.generation.prefix.budget import PrefixSettings, prefix_tree
from hybrimoe.generation.prompts.parts import PromptPart, TimesFile, measured_part
from hybrimoe.server.asking import Preparation
from hybrimoe.server.errors import DrainingError, LoadingError
from hybrimoe.server.selfcheck import CHECKED_TOKENS, Finding, disk_finding, findings
from hybrimoe.server.slots import SlotFiles, Slots
from hybrimoe.server.worker import QUEUE_LENGTH, Worker

if TYPE_CHECKING:
    from hybrimoe.generation import Reply, TextGenerator

MAX_STALL_MS = 500.0
"""What a part of a prompt may take while others get tokens, where nothing else is said."""
ENCODING_THREADS = 4
"""Threads that turn text into tokens, beside the event loop: so many long prompts do not delay a short one."""
KEEPING_THREADS = 4
"""Threads that save and restore slots: one that waits for the end of a reply does not hold up the others."""
KEEP_SECONDS = 5.0
"""Time for what is not on disk yet to get there when a model leaves memory."""
DEFAULT_TAG = ":latest"
"""What Ollama's clients add to a name."""

log = logging.getLogger("hybrimoe.server")
State = Literal["loading", "ok", "draining", "failed"]
Result = TypeVar("Result")


class Served:
    """`name` is the model's in the API. Requests before `open` are answered with 503, as those after `drain`.

    prefix_cache: where what prompts and replies computed is kept, so that a prompt that begins alike need not; None
    chooses. parallel: replies at once; None chooses by the memory for keys and values.
    max_stall_ms: what a part of a prompt may take while others get tokens. tool_parser: the form of the model's calls
    of tools, where its template does not tell (see `ReplySyntax.of`). special_in_messages: see `Preparation`.
    max_wait_s: a request that has waited so long is refused; None: for any time. max_reply_s: a reply that is not
    complete after so long ends with what there is. slot_files: where slots are saved; None: they are not. times_file:
    where the times of parts of prompts are kept; None: each start measures them.
    on_reply: called with each reply that has ended and the seconds that it waited before it began, by the thread that
    generates. on_idle: called when nothing is left to answer, by the same thread.
    """

    def __init__(
        self, name: str, *, prefix_cache: PrefixSettings | None = None, queue_length: int = QUEUE_LENGTH,
        parallel: int | None = 1, max_stall_ms: float = MAX_STALL_MS, max_wait_s: float | None = None,
        tool_parser: str | None = None, special_in_messages: bool = False,
        max_reply_s: float | None = None, slot_files: SlotFiles | None = None, times_file: TimesFile | None = None,
    ) -> None:  # fmt: skip
        self.name = name
        self.created = int(time.time())
        self.experts: Callable[[], dict[str, Any] | None] = lambda: None
        self.on_reply: Callable[[Reply, float], None] = lambda reply, waited_s: None
        self.on_idle: Callable[[], None] = lambda: None
        self._prefix_cache, self._queue_length = prefix_cache or PrefixSettings(), queue_length
        self._parallel, self._max_stall_ms, self._max_wait_s = parallel, max_stall_ms, max_wait_s
        self._max_reply_s, self._slot_files, self._times_file = max_reply_s, slot_files, times_file
        self._tool_parser, self._special_in_messages = tool_parser, special_in_messages
        self.part: PromptPart | None = None
        self._preparation: Preparation | None = None
        self._worker: Worker | None = None
        self._n_unchecked = CHECKED_TOKENS
        self._findings: list[Finding] = []
        self._draining = False
        self._encoders = ThreadPoolExecutor(ENCODING_THREADS, thread_name_prefix="hybrimoe-encode")
        self._lookers = ThreadPoolExecutor(1, thread_name_prefix="hybrimoe-look")
        self._keepers = ThreadPoolExecutor(KEEPING_THREADS, thread_name_prefix="hybrimoe-slots")

    def open(self, generator: TextGenerator, experts: Callable[[], dict[str, Any] | None] = lambda: None) -> None:
        """The model is there. experts: the session's counters for /metrics, or None.

        Where several replies run at once, some short prompts are computed to see how many tokens of a prompt fit the
        time that the others may wait, unless an earlier start has done so. Raises ConfigError for a `tool_parser` that
        there is not.
        """
        generator.tokenizer("a")  # the first call settles the tokenizer's state; later ones may run side by side
        self.experts = experts
        self._preparation = Preparation(
            generator, self._tool_parser, special_in_messages=self._special_in_messages
        )  # fmt: skip
        parallel = default_parallel(generator) if self._parallel is None else self._parallel
        if parallel > 1:
            self.part = measured_part(generator, 1000 * self._max_stall_ms, kept=self._times_file)
        engine = BatchEngine(
            generator, parallel=parallel,
            prefixes=prefix_tree(generator.model, self._prefix_cache, generator.kv_bytes or 0),
            part_tokens=None if self.part is None else self.part.n_tokens,
            part_slower=0.0 if self.part is None else self.part.slower,
            part_us=None if self.part is None else 1000 * self._max_stall_ms,
        )  # fmt: skip
        worker = Worker(
            engine, self._queue_length, self._max_wait_s, self._ended,
            lambda: self.on_idle(), max_reply_s=self._max_reply_s,
        )  # fmt: skip
        worker.start()
        self._worker = worker

    def _ended(self, reply: Reply, waited_s: float) -> None:
        self.on_reply(reply, waited_s)
        if self._n_unchecked > 0:
            self._n_unchecked -= len(reply.token_ids)
            if self._n_unchecked <= 0:
                self._check()

    def _check(self) -> None:
        self._findings = findings(self.experts())
        for one in self._findings:
            log.log(logging.INFO if one["good"] else logging.WARNING, "%s: %s", self.name, one["text"])

    @property
    def findings(self) -> list[Finding]:
        """What the self-check has found (nothing before it), and whether reads of experts have failed."""
        failed = None if self._worker is None else self._worker.generator.failed_reads
        return self._findings if failed is None else [*self._findings, disk_finding(failed)]

    @property
    def state(self) -> State:
        """What /health says."""
        if self._draining:
            return "draining"
        if self._worker is None:
            return "loading"
        generator = self._worker.generator
        able = self._worker.alive and not (generator.has_lost_experts or generator.has_lost_device)
        return "ok" if able else "failed"

    @property
    def n_waiting(self) -> int:
        """Requests in the queue."""
        return 0 if self._worker is None else self._worker.n_waiting

    @property
    def n_running(self) -> int:
        """Requests that are being answered."""
        return 0 if self._worker is None else self._worker.n_running

    @property
    def engine(self) -> BatchEngine | None:
        """What computes the replies; None before `open`."""
        return None if self._worker is None else self._worker.engine

    @property
    def running_worker(self) -> Worker | None:
        """The worker, whatever its state; None before `open`."""
        return self._worker

    def described(self) -> str:
        """How many replies run at once, and how, and what is kept of them, in a phrase. Called after `open`."""
        engine = self.engine
        if engine is None:
            return "no model yet"
        if engine.parallel == 1:
            return f"one reply at a time, {_kept(engine.prefixes)}"
        how = "in one step" if engine.in_turn is None else f"one after another each token ({engine.in_turn})"
        return f"up to {engine.parallel} replies at once, {how}, {_kept(engine.prefixes)}"

    @property
    def sees(self) -> bool:
        """Whether the model takes images; False before `open`."""
        return self._preparation is not None and self._preparation.sees

    @property
    def preparation(self) -> Preparation:
        """What turns requests into prompts. Raises as `worker`."""
        self.worker()
        assert self._preparation is not None
        return self._preparation

    def worker(self) -> Worker:
        """The worker of the model. Raises LoadingError, DrainingError while there is none to ask."""
        if self._draining:
            raise DrainingError("this server is about to end; ask another one, or again in a moment")
        if self._worker is None:
            raise LoadingError(f"the model {self.name!r} is being loaded; try again in a moment")
        return self._worker

    async def encode(self, work: Callable[[], Result], *, looks: bool = False) -> Result:
        """Run `work` (templates, tokenising) beside the event loop.

        looks: it computes what the model sees of images, one request after another, so that texts do not wait for that.
        """
        return await asyncio.get_running_loop().run_in_executor(self._lookers if looks else self._encoders, work)

    async def keep(self, work: Callable[[Slots], Result]) -> Result:
        """Run what saves or restores slots beside the event loop. Raises as `worker`."""
        slots = Slots(self.worker(), self._slot_files)
        return await asyncio.get_running_loop().run_in_executor(self._keepers, work, slots)

    def drain(self, seconds: float) -> None:
        """Refuse what waits and what comes; replies under way have `seconds` left to end."""
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
        self._lookers.shutdown(wait=False, cancel_futures=True)
        self._keepers.shutdown(wait=False, cancel_futures=True)
        if self._worker is not None:
            self._worker.close()
            prefixes = self._worker.engine.prefixes
            if prefixes is not None and not self._worker.alive:
                prefixes.close(KEEP_SECONDS)


def _kept(prefixes: PrefixTree | None) -> str:
    """What is kept of prompts and replies, in a phrase."""
    if prefixes is None:
        return "no prefix cache"
    if prefixes.reason is not None:
        return f"no prefix cache ({prefixes.reason})"
    on_disk = "" if prefixes.disk is None else f" and {size_text(prefixes.disk.max_bytes)} in {prefixes.disk.path}"
    return f"a prefix cache of {prefixes.max_bytes / 2**30:.2g} GiB{on_disk}"
