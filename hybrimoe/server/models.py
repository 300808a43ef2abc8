"""The models of a server, of which one is in memory at a time: loaded when it is asked for, unloaded for another one.

A request names its model. Where that is in memory it goes on at once; else it waits until the replies of the other one
have ended, that one is unloaded, and its own is loaded. Requests for a model that is about to leave wait their turn, so
that none starves. One thread loads and unloads.
"""

from __future__ import annotations

import asyncio
import gc
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable, Mapping
from contextlib import AbstractContextManager, ExitStack, asynccontextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal, Protocol

from fastapi import Request

from hybrimoe.errors import HybriMoEError, ModelError
from hybrimoe.server.delivery import unless_left
from hybrimoe.server.errors import DrainingError, LateError, LoadingError, QueueFullError, UnknownModelError
from hybrimoe.server.served import DEFAULT_TAG, Served, State

if TYPE_CHECKING:
    from hybrimoe.generation import Reply, TextGenerator
    from hybrimoe.generation.continuous_batching import BatchEngine

__all__ = ["Loadable", "ModelState", "Models", "Progress"]

MOST_NAMES = 20
"""Names that the answer to an unknown one lists."""
LONGEST_KEEP_S = 366 * 86_400.0
"""Seconds; a model that may stay for longer stays. Clocks and waits have no room for the largest durations."""
END_SECONDS = 30.0
"""Time for a load that is under way to end when the server does."""

ModelState = Literal["unloaded", "loading", "loaded", "unloading", "failed"]
log = logging.getLogger("hybrimoe.server")


class Opened(Protocol):
    """A model in memory: what computes replies, and the session's counters."""

    generator: TextGenerator

    def stats(self) -> dict[str, Any] | None:
        """Counters for /metrics; None without a session."""


@dataclass(slots=True)
class Progress:
    """How far a model is that is being loaded: so much is done, of how much (0: not known), of what."""

    done: int = 0
    total: int = 0
    what: str = ""

    def tell(self, done: int, total: int, what: str) -> None:
        """Called by what loads it."""
        self.done, self.total, self.what = done, total, what


@dataclass(frozen=True, slots=True)
class Loadable:
    """How a model comes into memory. open: loads it; it leaves when the block ends. serving: what answers with it, not
    opened yet. source: where it comes from, for lists. progress: of a load that is under way."""

    open: Callable[[], AbstractContextManager[Opened]]
    serving: Callable[[], Served]
    source: str = ""
    progress: Progress = field(default_factory=Progress)


@dataclass(slots=True, eq=False)
class _Entry:
    """A model and what is known of it. keep_s: seconds without a request until it is unloaded, None for ever."""

    name: str
    loadable: Loadable | None
    keep_s: float | None
    state: ModelState = "unloaded"
    n_using: int = 0
    """Requests between the choice of the model and their place in its queue."""
    last_used_s: float = field(default_factory=time.monotonic)
    error: str | None = None


@dataclass(slots=True, eq=False)
class _Waiting:
    """A request for a model that is not in memory."""

    entry: _Entry
    loop: asyncio.AbstractEventLoop
    granted: asyncio.Future[Served]
    since_s: float = field(default_factory=time.monotonic)


class Models:
    """loadable: by the name in the API, in the order of lists; the first is meant where a request names none.

    idle_unload_s: seconds without a request after which a model leaves memory; None: never. max_wait_s, max_waiting: a
    request that has waited so long for its model is refused, and one more than so many. on_reply: as `Served` has it.
    """

    def __init__(
        self, loadable: Mapping[str, Loadable | None], *, idle_unload_s: float | None = None,
        max_wait_s: float | None = None, max_waiting: int = 1_000,
    ) -> None:  # fmt: skip
        self.created = int(time.time())
        self.on_reply: Callable[[Reply, float], None] = lambda reply, waited_s: None
        self.n_loads = 0
        self._idle_unload_s, self._max_wait_s, self._max_waiting = idle_unload_s, max_wait_s, max_waiting
        self._entries = {name: _Entry(name, one, idle_unload_s) for name, one in loadable.items()}
        self._current: _Entry | None = None
        self._served: Served | None = None
        self._in_memory = ExitStack()
        self._waiting: list[_Waiting] = []
        self._lock = threading.RLock()
        self._wake = threading.Event()
        self._starting = self._draining = self._closed = False
        self._keeper: threading.Thread | None = None

    @classmethod
    def of_one(cls, served: Served) -> Models:
        """A server of a single model, which somebody else opens."""
        models = cls({served.name: None})
        models._current, models._served = models._entries[served.name], served
        served.on_reply = lambda reply, waited_s: models.on_reply(reply, waited_s)
        return models

    # What is told ----------------------------------------------------------------------------------------------

    @property
    def states(self) -> dict[str, ModelState]:
        """Of each model, by name."""
        with self._lock:
            return {name: self._told_state(entry) for name, entry in self._entries.items()}

    @property
    def name(self) -> str:
        """The model that is meant where none is named: the one in memory, else the first."""
        return (self._current or next(iter(self._entries.values()))).name

    @property
    def served(self) -> Served | None:
        """What answers with the model in memory; None where there is none."""
        return self._served

    def in_memory(self) -> Served:
        """What answers with the model in memory. Raises LoadingError where there is none: questions load none."""
        served = self._served
        if served is None or served.engine is None:
            if self._starting or "loading" in self.states.values():
                raise LoadingError(f"the model {self.name!r} is being loaded; try again in a moment")
            raise LoadingError("no model is in memory; a request that names one loads it")
        return served

    @property
    def engine(self) -> BatchEngine | None:
        """What computes the replies of the model in memory."""
        served = self._served
        return None if served is None else served.engine

    @property
    def n_waiting(self) -> int:
        """Requests that wait for their model or in the queue of the one in memory."""
        served = self._served
        return self.n_waiting_for_model + (0 if served is None else served.n_waiting)

    @property
    def n_waiting_for_model(self) -> int:
        """Requests whose model is not in memory yet."""
        with self._lock:
            return sum(not one.granted.done() for one in self._waiting)

    @property
    def n_running(self) -> int:
        """Requests that are being answered."""
        served = self._served
        return 0 if served is None else served.n_running

    @property
    def state(self) -> State:
        """What /health says: loading only at the start, because a server that changes its model takes requests."""
        served = self._served
        if self._draining:
            return "draining"
        if self._starting:
            return "loading"
        return "ok" if served is None else served.state

    def experts(self) -> dict[str, Any] | None:
        """The counters of the model in memory."""
        served = self._served
        return None if served is None else served.experts()

    def source(self, name: str) -> str:
        """Where a model comes from."""
        loadable = self._named(name).loadable
        return "" if loadable is None else loadable.source

    @property
    def loading(self) -> Progress | None:
        """Of the model that is being loaded; None where none is."""
        for entry in self._entries.values():
            if entry.state == "loading" and entry.loadable is not None:
                return entry.loadable.progress
        return None

    def leaves_in_s(self, name: str) -> float | None:
        """Seconds until a loaded model is unloaded if nobody asks for it; None: it stays."""
        entry = self._named(name)
        if entry.keep_s is None or entry.loadable is None:
            return None
        return max(0.0, entry.last_used_s + entry.keep_s - time.monotonic())

    def full_name(self, name: str | None) -> str:
        """The name under which a model is listed. Raises UnknownModelError for one that this server does not have."""
        return self._named(name).name

    def _told_state(self, entry: _Entry) -> ModelState:
        if entry.loadable is not None:
            return entry.state
        served = self._served
        return "loading" if served is None or served.state == "loading" else "loaded"

    def _named(self, name: str | None) -> _Entry:
        if name is None:
            return self._entries[self.name]
        entry = self._entries.get(name) or self._entries.get(name.removesuffix(DEFAULT_TAG))
        if entry is None:
            known = list(self._entries)
            listed = ", ".join(repr(one) for one in known[:MOST_NAMES]) + (", ..." if len(known) > MOST_NAMES else "")
            has = f"the model {listed}" if len(known) == 1 else f"the models {listed}"
            raise UnknownModelError(f"this server has {has}, not {name!r}", "model")
        return entry

    # What requests do ------------------------------------------------------------------------------------------

    @asynccontextmanager
    async def using(self, name: str | None, request: Request) -> AsyncIterator[Served]:
        """What answers with the model of this name, which stays in memory until the block and its replies have ended.
        The request's state then has the name in full, as `model`.

        Raises UnknownModelError, LoadingError at the server's start, DrainingError at its end, QueueFullError and
        LateError for a model that too many wait for, or for too long; and what loading it raises.
        """
        entry = self._named(name)
        served = await self._granted(entry, request)
        request.state.model = served.name
        try:
            yield served
        finally:
            self._let_go(entry)

    def _let_go(self, entry: _Entry) -> None:
        with self._lock:
            entry.n_using -= 1
            entry.last_used_s = time.monotonic()
        self._wake.set()

    def keep(self, name: str | None, seconds: float | None) -> None:
        """A model leaves memory so many seconds after its last request; None, or more than LONGEST_KEEP_S: it stays.
        Until it has left."""
        self._named(name).keep_s = None if seconds is not None and seconds > LONGEST_KEEP_S else seconds
        self._wake.set()

    async def _granted(self, entry: _Entry, request: Request) -> Served:
        with self._lock:
            if self._draining:
                raise DrainingError("this server is about to end; ask another one, or again in a moment")
            served = self._at_once(entry)
            if served is not None:
                return served
            if self.n_waiting_for_model >= self._max_waiting:
                raise QueueFullError(f"{self._max_waiting} requests wait for their model already; try again later")
            loop = asyncio.get_running_loop()
            waiting = _Waiting(entry, loop, loop.create_future())
            self._waiting.append(waiting)
        self._wake.set()
        try:
            return await unless_left(request, self._in_time(waiting))
        except BaseException:
            if not waiting.granted.cancel() and not waiting.granted.cancelled() and not waiting.granted.exception():
                self._let_go(entry)  # it was granted in the moment in which its client left
            raise

    def _at_once(self, entry: _Entry) -> Served | None:
        """The server of a model in memory that nobody wants to leave; counted as used. Raises LoadingError."""
        served = self._served
        if self._starting or (entry.loadable is None and (served is None or served.state == "loading")):
            raise LoadingError(f"the model {entry.name!r} is being loaded; try again in a moment")
        if entry is not self._current or served is None or entry.state == "unloading":
            return None
        if any(not one.granted.done() and one.entry is not entry for one in self._waiting):
            return None
        entry.n_using += 1
        return served

    async def _in_time(self, waiting: _Waiting) -> Served:
        try:
            return await asyncio.wait_for(asyncio.shield(waiting.granted), self._max_wait_s)
        except TimeoutError as error:
            raise LateError(
                f"the model {waiting.entry.name!r} was not in memory after {self._max_wait_s:g} seconds"
            ) from error

    def _settle(self, one: _Waiting, served: Served | None, error: Exception | None = None) -> None:
        """Tell a request, in its event loop, what has come of its model."""

        def tell() -> None:
            if one.granted.done():  # its client has gone
                if served is not None:
                    self._let_go(one.entry)
            elif served is not None:
                one.granted.set_result(served)
            elif error is not None:
                one.granted.set_exception(error)

        if not one.loop.is_closed():
            one.loop.call_soon_threadsafe(tell)

    def _went_idle(self) -> None:
        """The model in memory has nothing to do. Called by its thread, which must not wait here."""
        current = self._current
        if current is not None:
            current.last_used_s = time.monotonic()
        self._wake.set()

    # What the keeper does --------------------------------------------------------------------------------------

    def start(self, name: str | None) -> None:
        """Load a model now (None: none) and take requests. Raises what loading raises."""
        if name is not None:
            self._starting = True
            try:
                self._load(self._named(name))
            finally:
                self._starting = False
        self._keeper = threading.Thread(target=self._keep, name="hybrimoe-models", daemon=True)
        self._keeper.start()

    def _keep(self) -> None:
        while not self._closed:
            self._wake.wait(self._turn())
            self._wake.clear()

    def _turn(self) -> float | None:
        """Do what can be done now; returns after how many seconds there may be more, None: when something happens."""
        while not self._closed:
            with self._lock:
                self._waiting = [one for one in self._waiting if not one.granted.done()]
                wanted = self._waiting[0].entry if self._waiting else None
                if wanted is not None and wanted is self._current:
                    self._grant(wanted)
                    continue
                leaving = self._leaving(wanted)
                if leaving is not None and not self._is_idle(leaving):
                    return None
                if leaving is not None:
                    leaving.state = "unloading"
            if leaving is not None:
                self._unload(leaving)
            elif wanted is not None:
                self._load_for_those_who_wait(wanted)
            else:
                return None if self._current is None else self.leaves_in_s(self._current.name)
        return None

    def _leaving(self, wanted: _Entry | None) -> _Entry | None:
        """The model in memory, where it must make room or nobody has asked for it for long enough."""
        current = self._current
        if current is None or current.loadable is None:
            return None
        if wanted is not None:
            return current
        left_s = self.leaves_in_s(current.name)
        return current if left_s is not None and left_s <= 0.0 and self._is_idle(current) else None

    def _is_idle(self, entry: _Entry) -> bool:
        served = self._served
        return entry.n_using == 0 and (served is None or served.n_running + served.n_waiting == 0)

    def _grant(self, entry: _Entry) -> None:
        """Those who wait for the model in memory go on, whoever else waits behind them."""
        for one in self._waiting:
            if one.entry is entry and not one.granted.done():
                entry.n_using += 1
                self._settle(one, self._served)
        self._waiting = [one for one in self._waiting if one.entry is not entry]

    def _load_for_those_who_wait(self, entry: _Entry) -> None:
        try:
            self._load(entry)
        except Exception as error:  # it is the answer to the requests that wait for this model
            log.error("the model %r cannot be loaded", entry.name, exc_info=error)
            told = error if isinstance(error, HybriMoEError) else ModelError(f"{type(error).__name__}: {error}")
            with self._lock:
                waiting, self._waiting = self._waiting, [one for one in self._waiting if one.entry is not entry]
            for one in waiting:
                if one.entry is entry:
                    self._settle(one, None, ModelError(f"the model {entry.name!r} cannot be loaded: {told}"))

    def _load(self, entry: _Entry) -> None:
        """Raises what opening it raises; nothing is in memory then."""
        assert entry.loadable is not None
        entry.loadable.progress.tell(0, 0, "")
        entry.state, began_s = "loading", time.monotonic()
        try:
            opened = self._in_memory.enter_context(entry.loadable.open())
            served = entry.loadable.serving()
            served.on_reply = lambda reply, waited_s: self.on_reply(reply, waited_s)
            served.on_idle = self._went_idle
            self._in_memory.callback(served.close)
            served.open(opened.generator, opened.stats)
        except BaseException as error:
            entry.state, entry.error = "failed", str(error)
            self._in_memory.close()
            raise
        with self._lock:
            entry.state, entry.error, entry.last_used_s = "loaded", None, time.monotonic()
            self._current, self._served = entry, served
            self.n_loads += 1
            if self._draining:
                served.drain(0.0)
        log.info("%s is in memory after %.1f s", entry.name, time.monotonic() - began_s)

    def _unload(self, entry: _Entry) -> None:
        with self._lock:
            self._served, self._current = None, None
        try:
            self._in_memory.close()
        except Exception as error:  # the next model must not wait for one that does not end well
            log.error("%s did not leave memory as it should", entry.name, exc_info=error)
        gc.collect()  # models hold themselves by their hooks; the next one needs their memory now
        _empty_accelerators()
        entry.state, entry.keep_s = "unloaded", self._idle_unload_s
        log.info("%s is no longer in memory", entry.name)

    # The end ---------------------------------------------------------------------------------------------------

    def drain(self, seconds: float) -> None:
        """Refuse what waits and what comes; replies under way have `seconds` left to end."""
        with self._lock:
            self._draining = True
            waiting, self._waiting, served = self._waiting, [], self._served
        for one in waiting:
            self._settle(one, None, DrainingError("this server ends before it gets to this request; ask another one"))
        if served is not None:
            served.drain(seconds)

    def close(self) -> None:
        """End what still runs, and let the model go."""
        self.drain(0.0)
        self._closed = True
        self._wake.set()
        if self._keeper is not None:
            self._keeper.join(END_SECONDS)
        if self._served is not None:
            self._served.close()
        self._in_memory.close()


def _empty_accelerators() -> None:
    """Give back what torch's allocator keeps of an accelerator for later."""
    import torch

    if torch.accelerator.is_available():
        torch.get_device_module(torch.accelerator.current_accelerator()).empty_cache()
