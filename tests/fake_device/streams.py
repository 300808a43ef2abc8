"""Streams and events with vector clocks: who is known to run after whom, and when, on a clock of the host."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from gpu_kernels.streams import clock_us

if TYPE_CHECKING:
    from tests.fake_device.cards import Cards

Ticks = dict[int, int]
"""Stream number -> how many of its operations are known to have ended."""


class HostClock:
    """The host's own clock; waiting spins."""

    def now_us(self) -> float:
        """us of `gpu_kernels.streams.clock_us`."""
        return clock_us()

    def wait_until(self, us: float) -> None:
        """Returns once `now_us` has reached `us`."""
        while self.now_us() < us:
            pass


class ManualClock:
    """A clock that only moves when it is told to, or waited for."""

    def __init__(self, us: float = 1e6) -> None:
        self.us = us

    def now_us(self) -> float:
        """The time that was set."""
        return self.us

    def wait_until(self, us: float) -> None:
        """Moves on to `us`."""
        self.us = max(self.us, us)


def join(into: Ticks, other: Ticks) -> None:
    """`into` comes to know what `other` knows."""
    for stream, tick in other.items():
        if into.get(stream, 0) < tick:
            into[stream] = tick


class FakeStream:
    """Stands for torch.Stream. `seen`: what is known to have ended before its next operation begins."""

    cards: Cards

    def __init__(self, device: torch.device | str | int | None = None, cards: Cards | None = None, **_: Any) -> None:
        self._cards = cards = self.cards if cards is None else cards
        self.device = cards.device(device)
        self.number = cards.register(self)
        self.seen: Ticks = {self.number: 0}
        self.end_us = 0.0
        self._before: list[FakeStream] = []

    def operate(self, duration_us: float) -> int:
        """Queues one operation; returns its tick."""
        join(self.seen, self._cards.host)
        self.seen[self.number] += 1
        self._cards.require(self.device)
        self.end_us = max(self.end_us, self._cards.clock.now_us()) + duration_us
        return self.seen[self.number]

    def wait_event(self, event: FakeEvent) -> None:
        """What is queued from now on runs after the event."""
        self._cards.note("stream waits")
        join(self.seen, event.seen)
        self.end_us = max(self.end_us, event.at_us)

    def wait_stream(self, other: FakeStream) -> None:
        """What is queued from now on runs after what the other stream holds now."""
        join(self.seen, other.seen)
        self.end_us = max(self.end_us, other.end_us)

    def query(self) -> bool:
        """True once everything queued has ended."""
        self._cards.require(self.device)
        done = self._cards.clock.now_us() >= self.end_us
        if done:
            self._cards.host_learns(self.seen)
        return done

    def hang(self) -> None:
        """What is queued, and what follows, never ends."""
        self.end_us = math.inf

    def synchronize(self) -> None:
        """The host waits for everything queued."""
        self._cards.note("host waits")
        self.block_host()

    def block_host(self) -> None:
        """The host waits; it then knows what this stream knows."""
        self._cards.wait_until(self.device, self.end_us)
        self._cards.host_learns(self.seen)

    def __enter__(self) -> FakeStream:
        self._before.append(self._cards.set_stream(self))
        return self

    def __exit__(self, *_: object) -> None:
        self._cards.set_stream(self._before.pop())


class FakeEvent:
    """Stands for torch.Event."""

    cards: Cards

    def __init__(
        self, device: torch.device | str | int | None = None, *, enable_timing: bool = False, **_: Any
    ) -> None:
        self._cards, self.device, self._timed = self.cards, self.cards.device(device), enable_timing
        self.seen: Ticks = {}
        self.at_us = 0.0
        self._recorded = False

    def record(self, stream: FakeStream | None = None) -> None:
        """Marks the end of what the stream holds now."""
        stream = self._cards.stream(self.device.index) if stream is None else stream
        if stream.device != self.device:
            raise RuntimeError(f"an event of {self.device} cannot be recorded on a stream of {stream.device}")
        self._cards.note("event records")
        join(stream.seen, self._cards.host)
        self.seen = dict(stream.seen)
        self.at_us = max(stream.end_us, self._cards.clock.now_us())
        self._recorded = True

    def query(self) -> bool:
        """True once the device has passed the event."""
        self._cards.require(self.device)
        if not self._recorded:
            return True
        done = self._cards.clock.now_us() >= self.at_us
        if done:
            self._cards.host_learns(self.seen)
        return done

    def synchronize(self) -> None:
        """The host waits for the event."""
        self._cards.note("host waits")
        self._cards.wait_until(self.device, self.at_us)
        self._cards.host_learns(self.seen)

    def wait(self, stream: FakeStream | None = None) -> None:
        """What the stream is given from now on runs after the event."""
        (self._cards.stream(self.device.index) if stream is None else stream).wait_event(self)

    def elapsed_time(self, end: FakeEvent) -> float:
        """Milliseconds from this event to `end`, in float32 as CUDA gives them."""
        if not (self._timed and end._timed and self._recorded and end._recorded):
            raise RuntimeError("both events must be recorded, and created with enable_timing=True")
        if self.device != end.device:
            raise RuntimeError("events of two devices have no common clock")
        if not (self.query() and end.query()):
            raise RuntimeError("device not ready: an event has not been passed yet")
        return float(np.float32((end.at_us - self.at_us) * 1e-3))
