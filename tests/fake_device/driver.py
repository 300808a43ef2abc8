"""The driver of cards that are not there: its functions by address, judged as torch's own calls are."""

from __future__ import annotations

import ctypes
from collections import Counter
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from gpu_kernels.driver.functions import (
    AWAIT,
    COPY,
    ELAPSED,
    LAUNCH,
    N_FUNCTIONS,
    NOT_READY,
    QUERY,
    QUERY_STREAM,
    RECORD,
)
from gpu_kernels.driver.queue import END
from gpu_kernels.driver.queued import QueuedCopy
from tests.fake_device.streams import FakeEvent, FakeStream, ManualClock
from tests.fake_device.tensors import DEVICE_ADDRESSES, DeviceTensor

FAILED, LOST = 999, 719
"""Error numbers: of what a test's stand-in raised; of a card that has failed as a whole."""


class FakeDriver:
    """As `gpu_kernels.driver.functions.Driver`. error: what a function has raised, which compiled code cannot hand on.
    calls: how often each function was called by compiled code."""

    def __init__(self, cards: Any) -> None:
        self._cards = cards
        self.error: BaseException | None = None
        self.calls: Counter[int] = Counter()
        self._named: dict[int, Any] = {}
        functions: dict[int, tuple[int, Callable[..., int | None]]] = {
            LAUNCH: (2, self._launch), QUERY_STREAM: (1, self._query), QUERY: (1, self._query),
            RECORD: (2, self._record), AWAIT: (3, self._await), COPY: (4, self._copy), ELAPSED: (3, self._elapsed),
        }  # fmt: skip
        self._functions: dict[int, Any] = {}
        self.addresses = np.zeros(N_FUNCTIONS, np.int64)
        for place, (n, function) in functions.items():
            kind = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * n)
            self._functions[place] = made = kind(self._counted(place, function))
            self.addresses[place] = ctypes.cast(made, ctypes.c_void_p).value

    def stream(self, stream: FakeStream | None) -> int:
        """As `Driver.stream`."""
        return self._name(self._cards.stream() if stream is None else stream)

    def graph(self, graph: Any) -> int:
        """As `Driver.graph`."""
        return self._name(graph)

    def new_event(self) -> int:
        """As `Driver.new_event`."""
        return self._name(torch.Event(self._cards.device(None), enable_timing=True))

    def free_event(self, event: int) -> None:
        """As `Driver.free_event`."""
        del self._named[event]

    def call(self, function: int, *arguments: int) -> int:
        """As `Driver.call`."""
        return int(self._functions[function](*arguments))

    def told(self, code: int) -> str:
        """As `Driver.told`."""
        return f"{self.error} (error {code} of the driver)"

    def end_of(self, copied: QueuedCopy) -> FakeEvent:
        """The event behind a copy."""
        event: FakeEvent = self._named[int(copied.entry[END])]
        return event

    def _name(self, what: Any) -> int:
        self._named[id(what)] = what
        return id(what)

    def _counted(self, place: int, function: Callable[..., int | None]) -> Callable[..., int]:
        def called(*arguments: int) -> int:
            self.calls[place] += 1
            try:
                return function(*arguments) or 0
            except torch.AcceleratorError as error:
                self.error = error
                return LOST
            except BaseException as error:  # noqa: BLE001 - told by `told`
                self.error = error
                return FAILED

        return called

    def _launch(self, graph: int, stream: int) -> None:
        before = self._cards.set_stream(self._named[stream])
        try:
            self._named[graph].replay()
        finally:
            self._cards.set_stream(before)

    def _query(self, what: int) -> int:
        asked = self._named[what]
        if isinstance(asked, FakeStream) and isinstance(self._cards.clock, ManualClock):
            self._cards.pause(asked, 0.0)  # who asks again and again lets the time go by
        return 0 if asked.query() else NOT_READY

    def _record(self, event: int, stream: int) -> None:
        self._named[event].record(self._named[stream])

    def _await(self, stream: int, event: int, _flags: int) -> None:
        self._named[stream].wait_event(self._named[event])

    def _copy(self, target: int, source: int, n_bytes: int, stream: int) -> None:
        given = torch.from_numpy(np.ctypeslib.as_array((ctypes.c_uint8 * n_bytes).from_address(source)))
        place = self._tensor_at(target, n_bytes)
        place.inner.copy_(given)
        on: FakeStream = self._named[stream]
        tick = self._cards.transfer(on, "copy to the card", n_bytes, [], [place])
        self._cards.reads_host(on, tick, [given])

    def _tensor_at(self, address: int, n_bytes: int) -> DeviceTensor:
        """uint8 [n_bytes] at an address of a card, within a tensor that was asked for its address."""
        for start, tensor in list(self._cards.addressed.items()):
            if start <= address and address + n_bytes <= start + tensor.inner.nbytes:
                at = address - DEVICE_ADDRESSES - tensor.inner.data_ptr()
                inner = tensor.inner.reshape(-1).view(torch.uint8)[at : at + n_bytes]
                return DeviceTensor(inner, tensor.device, tensor.memory)
        raise AssertionError(f"no tensor of a card is at {address}")

    def _elapsed(self, milliseconds: int, start: int, end: int) -> None:
        first: FakeEvent = self._named[start]
        ctypes.c_float.from_address(milliseconds).value = first.elapsed_time(self._named[end])
