"""A copy that compiled code has submitted, as Python sees it once it has the device again."""

from __future__ import annotations

import numpy as np
import torch

from gpu_kernels.driver.functions import ELAPSED, NOT_READY, QUERY
from gpu_kernels.driver.queue import END, IS_TIMED, START, SUBMITTED_NS, Queue
from gpu_kernels.errors import DriverError
from gpu_kernels.streams import clock_us
from gpu_kernels.torch_events import DeviceEvent
from gpu_kernels.waiting import limit_of


class QueuedCopy(DeviceEvent):
    """The entry of a queue that was under way when Python took over. Valid until its end was seen, here or there.

    Where torch's streams are to wait for it, they wait for all copies that were submitted before they are told so.
    """

    __slots__ = ("_device", "_late", "_span_us", "_stream", "entry", "queue")

    def __init__(self, queue: Queue, number: int, device: torch.device, stream: torch.Stream | None) -> None:
        """number: of the entry, behind the oldest. stream: of copies; None on the host."""
        entry = queue.under_way()[number]
        self.queue, self.entry, self._device, self._stream = queue, entry, device, stream
        self._late: torch.Event | None = None
        self._span_us: tuple[float, float] | None = None

    @property
    def ended(self) -> bool:
        """As `DeviceEvent.ended`. Raises LostError where the device has failed."""
        if self._span_us is not None:
            return True
        if not self._has_passed(END):
            return False
        end_us, milliseconds = clock_us(), np.zeros(1, np.float32)
        if self.entry[IS_TIMED]:
            start, end = int(self.entry[START]), int(self.entry[END])
            self.queue.driver.call(ELAPSED, milliseconds.ctypes.data, start, end)
        self._span_us = end_us - float(milliseconds[0]) * 1e3, end_us
        return True

    @property
    def end(self) -> torch.Event:  # type: ignore[override]
        """What another stream of torch's can wait for."""
        if self._late is None:
            self._late = torch.Event(self._device)
            self._late.record(self._stream)
        return self._late

    def query(self) -> bool:
        """As `ended`."""
        return self.ended

    def wait(self) -> None:
        """As `DeviceEvent.wait`."""
        limit_of(self._device).wait(self, "a copy")

    @property
    def span_us(self) -> tuple[float, float]:
        """As `DeviceEvent.span_us`; its start is that of the submission while it is under way."""
        if self.ended:
            assert self._span_us is not None
            return self._span_us
        return (float(self.entry[SUBMITTED_NS]) * 1e-3 if self._has_passed(START) else 0.0), 0.0

    def _has_passed(self, event: int) -> bool:
        driver = self.queue.driver
        code = driver.call(QUERY, int(self.entry[event]))
        if code not in (0, NOT_READY):
            raise limit_of(self._device).failed(DriverError(driver.told(code)))
        return code == 0
