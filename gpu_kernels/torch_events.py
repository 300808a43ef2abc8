"""Events and streams of a torch device; on the host ("cpu") they degrade to work that has already ended."""

from __future__ import annotations

import contextlib
from contextlib import AbstractContextManager
from typing import ClassVar

import torch

from gpu_kernels.streams import clock_us
from gpu_kernels.waiting import limit_of


class DoneEvent:
    """Work that ran synchronously."""

    __slots__ = ("span_us",)

    ended: ClassVar[bool] = True

    def __init__(self, start_us: float, end_us: float) -> None:
        self.span_us = start_us, end_us
        """(start, end) in us of `clock_us`."""

    def wait(self) -> None:
        """Returns at once."""


class DeviceEvent:
    """A pair of timing events around work on a device stream; `origin` ties device time to the host clock."""

    __slots__ = ("_origin", "end", "start")

    def __init__(self, origin: TimeOrigin, start: torch.Event, end: torch.Event) -> None:
        self._origin, self.start, self.end = origin, start, end

    @property
    def ended(self) -> bool:
        """True once the device has passed the end."""
        return bool(self.end.query())

    def wait(self) -> None:
        """Blocks the host until the end. Raises LostError for an asynchronous device error, or where it hangs."""
        limit_of(self._origin.device).wait(self.end, "a copy or a computation")

    @property
    def span_us(self) -> tuple[float, float]:
        """(start, end) in us of `clock_us`; (start, 0) while the work is under way, (0, 0) before."""
        if not self.ended:
            return (self._origin.host_us(self.start) if self.start.query() else 0.0), 0.0
        end_us = self._origin.host_us(self.end)
        return end_us - self.start.elapsed_time(self.end) * 1e3, end_us


class TimeOrigin:
    """A device event whose host time is known, made anew every RENEW_US.

    Differences of device times are float32 milliseconds: after an hour they would be 250 us apart. The event is
    recorded on a stream of its own, which is always idle, so that the host does not wait for other work.
    """

    RENEW_US = 2e6
    """float32 tells milliseconds of this size apart to 0.12 us."""

    def __init__(self, device: torch.device) -> None:
        self.device, self._stream = device, torch.Stream(device)
        self._renew()

    def host_us(self, event: torch.Event) -> float:
        """Host time of a device event that has ended."""
        if clock_us() - self._us > self.RENEW_US:
            self._renew()
        return self._us + self._event.elapsed_time(event) * 1e3

    def _renew(self) -> None:
        self._event = torch.Event(self.device, enable_timing=True)
        self._event.record(self._stream)
        limit_of(self.device).wait(self._event, "an event of an idle stream")
        self._us = clock_us()


def on_stream(stream: torch.Stream | None) -> AbstractContextManager[object]:
    """Makes `stream` current; nothing for None (the host)."""
    return contextlib.nullcontext() if stream is None else stream
