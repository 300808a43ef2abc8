"""Waits of the host for a device that end: with the work, or with an error once it has taken far too long.

A device that hangs says nothing: a thread that waits for it by the driver's own call never comes back. So the host
asks again and again whether the work has ended, and lets other threads run in between. The driver's call asks in a
loop, too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Protocol

import torch

from gpu_kernels.errors import LostError

DeviceFailure: type[Exception] = getattr(torch, "AcceleratorError", LostError)
"""What torch raises where a device has failed; torch 2.8 has no class of its own for it."""
LEAST_WAIT_S = 30.0
"""Any work of a real device has this long, however little it should take: others may use the device, too."""
LEAST_HOST_WAIT_S = 180.0
"""Work of host threads has this long: it may have to compile first, on a machine that is busy."""
BUSY_S = 2e-3
"""A wait begins by asking at once again; after so long it rests in between."""
REST_S = 1e-4
SLICES = 20
"""A wait counts the time in so many parts: that in which the process was stopped, as by a debugger, is one at most."""


class Awaited(Protocol):
    """A stream or event of a device."""

    def query(self) -> bool:
        """Whether all has ended. Raises RuntimeError where the device has failed."""


class WaitLimit:
    """How long the host waits for one piece of work of the accelerator `name`. `lost`: why it is not waited for any
    more, once it was waited for in vain, or has failed as a whole; None as long as it works."""

    def __init__(self, name: str, least_s: float = LEAST_WAIT_S) -> None:
        self.name, self.least_s, self.seconds = name, least_s, least_s
        self.lost: str | None = None

    def allow(self, seconds: float) -> None:
        """Waits from here on take at most so long."""
        if self.lost is None:
            self.seconds = min(max(seconds, 0.0), threading.TIMEOUT_MAX)

    def wait(self, awaited: Awaited, what: str) -> None:
        """Returns once `awaited` has ended. Raises LostError where it does not in time, or its device has failed."""
        try:
            if not awaited.query():
                self._ask(awaited, what)
        except RuntimeError as error:
            raise self.failed(error) from error

    def wait_for_lock(self, lock: threading.Lock, what: str) -> None:
        """Returns once `lock` is had. Raises LostError where it is not in time."""
        for _ in range(SLICES):
            if lock.acquire(timeout=self.seconds / SLICES):
                return
        raise self.expired(what)

    def expired(self, what: str) -> LostError:
        """The error of a wait in vain: from here on nothing is waited for."""
        if self.lost is None:
            self.lost = f"{self.name} hangs: {what} did not end within {self.seconds:g} s"
            self.seconds = 0.0
        return LostError(self.lost)

    def failed(self, error: BaseException) -> LostError:
        """The error of a device that has failed as a whole: from here on nothing is waited for."""
        if self.lost is None:
            reason = str(error).strip().partition("\n")[0] or type(error).__name__
            self.lost, self.seconds = f"{self.name} has failed and cannot go on in this process: {reason}", 0.0
        return LostError(self.lost)

    def require(self) -> None:
        """Raises LostError where the accelerator is lost."""
        if self.lost is not None:
            raise LostError(self.lost)

    def _ask(self, awaited: Awaited, what: str) -> None:
        waited_s, last_s, slice_s = 0.0, time.monotonic(), self.seconds / SLICES
        while not awaited.query():
            pause(awaited, 0.0 if waited_s < BUSY_S else REST_S)
            now_s = time.monotonic()
            waited_s, last_s = waited_s + min(now_s - last_s, max(slice_s, REST_S)), now_s
            if waited_s > self.seconds:
                raise self.expired(what)


def pause(_awaited: Awaited, seconds: float) -> None:
    """Lets other threads run, for `seconds` at least."""
    time.sleep(seconds)


_LIMITS: dict[torch.device, WaitLimit] = {}
"""By device: one that hangs does so for all that this process does with it."""


def limit_of(device: torch.device) -> WaitLimit:
    """What holds for waits for a device, whoever waits."""
    limit = _LIMITS.get(device)
    return new_limit(device, str(device)) if limit is None else limit


def new_limit(device: torch.device, name: str) -> WaitLimit:
    """The limit of a device that is opened, again perhaps."""
    _LIMITS[device] = limit = WaitLimit(name)
    return limit


@contextmanager
def on_device(device: torch.device) -> Iterator[None]:
    """Around work of a device that begins with a copy to it, for which the host would wait without an end: waits for
    what is under way, and tells torch's errors of a device that has failed as LostError."""
    try:
        wait_for_stream(device, "the work before")
        yield
    except DeviceFailure as error:
        raise limit_of(device).failed(error) from error


def wait_for_stream(device: torch.device, what: str) -> None:
    """Waits until the current stream of a device has done everything: before a read by the host, which would wait for
    it without an end. Raises LostError."""
    if device.type != "cpu":
        limit_of(device).wait(torch.accelerator.current_stream(device), what)
