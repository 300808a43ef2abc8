"""A device's driver by address: what is called, in which order, and what happens where it cannot be."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from cpu_kernels.jit.compiled import kernel
from cpu_kernels.jit.primitives import int64s_at
from gpu_kernels import TorchAccelerator
from gpu_kernels.driver import functions
from gpu_kernels.driver.functions import (
    AWAIT,
    COPY,
    ELAPSED,
    LAUNCH,
    NAMES,
    NOT_READY,
    QUERY,
    QUERY_STREAM,
    RECORD,
    SWITCH,
    CudaDriver,
    driver_of,
    try_out,
)
from gpu_kernels.driver.queue import (
    CAPACITY,
    COUNT,
    FAILED,
    MOST_WRITTEN,
    N_WORDS,
    Queue,
    await_slot,
    drop_oldest,
    entry_of,
    has_ended,
    has_room,
    launch,
    oldest_has_ended,
    submit_copy,
)
from gpu_kernels.driver.queue import SLOT as ENTRY_SLOT
from gpu_kernels.errors import DriverError, LostError
from gpu_kernels.graphs import UNCACHED
from gpu_kernels.slot_events import SlotEvents
from tests.fake_device import DEVICE_TYPE, ManualClock, fake_cards
from tests.fake_device.driver import FakeDriver
from tests.fake_device.graphs import CardGraphs

CUDA = torch.device("cuda", 0)


class Library:
    """Stands for libcuda: C functions that note their arguments. codes: what a function returns, by name."""

    def __init__(self) -> None:
        self.calls: list[tuple[str, tuple[int, ...]]] = []
        self.codes: dict[str, int] = {}
        for name, n in {
            "cuGraphLaunch": 2, "cuStreamQuery": 1, "cuEventQuery": 1, "cuEventRecord": 2, "cuStreamWaitEvent": 3,
            "cuMemcpyHtoDAsync_v2": 4, "cuEventElapsedTime": 3, "cuEventDestroy_v2": 1,
        }.items():  # fmt: skip
            made = ctypes.CFUNCTYPE(ctypes.c_int32, *[ctypes.c_int64] * n)(self._noted(name))
            setattr(self, name, self._as_in_a_library(made))

    @staticmethod
    def _as_in_a_library(function: Any) -> Any:
        """Without the types of its arguments, as ctypes finds functions."""
        return ctypes.cast(function, ctypes.CFUNCTYPE(ctypes.c_int32))

    def _noted(self, name: str) -> Callable[..., int]:
        def called(*arguments: int) -> int:
            self.calls.append((name, arguments))
            return self.codes.get(name, 0)

        self.__dict__.setdefault("_kept", []).append(called)
        return called

    def cuEventCreate(self, event: Any, flags: int) -> int:
        event._obj.value = 0x1000 + len(self.calls)
        self.calls.append(("cuEventCreate", (flags,)))
        return self.codes.get("cuEventCreate", 0)

    def cuGetErrorString(self, code: int, text: Any) -> int:
        text._obj.value = b"an illegal memory access was encountered"
        return 0 if code == 700 else 1


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Library:
    made = Library()
    monkeypatch.setattr(functions.ctypes, "CDLL", lambda name: made)
    return made


@kernel
def _call_all(addresses: np.ndarray) -> int:
    from_words = int64s_at(addresses.ctypes.data, addresses.size)
    queue = np.zeros(N_WORDS, np.int64)
    queue[: from_words.size] = from_words
    return 1 if launch(queue, 1 << 40) and has_ended(queue) else queue[FAILED]


def test_functions_are_found_by_name_and_called_by_address(library: Library) -> None:
    driver = CudaDriver(CUDA)
    assert (driver.addresses != 0).all()
    assert len(set(driver.addresses.tolist())) == len(NAMES)
    assert _call_all(driver.addresses) == 1
    assert library.calls == [("cuGraphLaunch", (1 << 40, 0)), ("cuStreamQuery", (0,))]
    library.calls.clear()
    assert driver.call(COPY, 1 << 47, 3, 1 << 33, 5) == 0
    assert driver.call(AWAIT, 7, 8, 0) == 0
    assert library.calls == [("cuMemcpyHtoDAsync_v2", (1 << 47, 3, 1 << 33, 5)), ("cuStreamWaitEvent", (7, 8, 0))]


def test_what_a_function_refuses_is_kept_and_told(library: Library) -> None:
    driver = CudaDriver(CUDA)
    library.codes["cuGraphLaunch"] = 700
    assert _call_all(driver.addresses) == 700
    assert driver.told(700) == "an illegal memory access was encountered (error 700 of the driver)"
    assert driver.told(3) == "error 3 of the driver"
    library.codes["cuEventCreate"] = 700
    with pytest.raises(DriverError, match="illegal memory access"):
        driver.new_event()


def test_events_are_the_drivers(library: Library) -> None:
    driver = CudaDriver(CUDA)
    event = driver.new_event()
    driver.free_event(event)
    assert library.calls[-2:] == [("cuEventCreate", (0,)), ("cuEventDestroy_v2", (event,))]


def test_a_graph_is_named_as_torch_says(library: Library) -> None:
    driver = CudaDriver(CUDA)
    assert driver.graph(SimpleNamespace(raw_cuda_graph_exec=lambda: 1234)) == 1234  # type: ignore[arg-type]
    with pytest.raises(DriverError, match="does not tell how the driver names a graph"):
        driver.graph(SimpleNamespace(replay=None))  # type: ignore[arg-type]


def test_a_missing_library_is_a_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> None:
        raise OSError(f"{name}: cannot open shared object file")

    monkeypatch.setattr(functions.ctypes, "CDLL", missing)
    with pytest.raises(DriverError, match=r"were not found: .*cannot open"):
        CudaDriver(CUDA)


@pytest.mark.parametrize(
    ("device", "value", "reason"),
    [
        ("cpu", "1", "only NVIDIA's driver"),
        ("xpu:0", "1", "only NVIDIA's driver"),
        ("cuda:0", "off", "switches it off"),
    ],
)
def test_why_a_device_has_none(monkeypatch: pytest.MonkeyPatch, device: str, value: str, reason: str) -> None:
    monkeypatch.setenv(SWITCH, value)
    with pytest.raises(DriverError, match=reason):
        driver_of(torch.device(device))


def test_the_driver_is_tried_out() -> None:
    with fake_cards(1) as cards:
        driver, device = FakeDriver(cards), cards.device(0)
        try_out(driver, device, CardGraphs(cards))
        assert {LAUNCH, COPY, RECORD, AWAIT, QUERY, QUERY_STREAM, ELAPSED} <= set(driver.calls)
        assert driver.error is None


@pytest.mark.parametrize("function", ["_launch", "_copy", "_record", "_await", "_query", "_elapsed"])
def test_a_driver_that_refuses_is_not_used(monkeypatch: pytest.MonkeyPatch, function: str) -> None:
    def refuse(driver: FakeDriver, *arguments: int) -> None:
        raise RuntimeError("not permitted")

    monkeypatch.setattr(FakeDriver, function, refuse)
    with fake_cards(1) as cards, pytest.raises(DriverError, match="not permitted \\(error 999 of the driver\\)"):
        try_out(FakeDriver(cards), cards.device(0), CardGraphs(cards))


def test_a_driver_that_copies_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeDriver, "_copy", lambda driver, *arguments: 0)
    with fake_cards(1) as cards, pytest.raises(DriverError, match="gave other bytes than were sent"):
        try_out(FakeDriver(cards), cards.device(0), CardGraphs(cards))


def test_a_driver_that_launches_something_else_is_not_used(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FakeDriver, "_launch", lambda driver, *arguments: 0)
    with fake_cards(1) as cards, pytest.raises(DriverError, match="computed something else than was recorded"):
        try_out(FakeDriver(cards), cards.device(0), CardGraphs(cards))


def test_without_graphs_there_is_no_driver(library: Library, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(UNCACHED, "1")
    with pytest.raises(DriverError, match="torch records no graphs on cuda:0"):
        driver_of(CUDA)


class Rig:
    """Slots on a fake card, a queue of its driver, and records in page-locked memory."""

    def __init__(self, cards: Any, n_slots: int = 4, n_bytes: int = 512) -> None:
        self.driver = FakeDriver(cards)
        self.accelerator = TorchAccelerator(f"{DEVICE_TYPE}:0")
        self.accelerator.allocate(n_slots, n_bytes)
        self.queue: Queue = self.accelerator.driver_queue(self.driver)
        self.accelerator.hand_to(self.queue)
        self.records = torch.empty((n_slots, n_bytes), dtype=torch.uint8, pin_memory=True)
        self.records.copy_(torch.arange(n_slots * n_bytes).view(n_slots, n_bytes) % 251)

    def copy(self, key: int, slot: int) -> bool:
        record = self.records[key % len(self.records)]
        return bool(_submit(self.queue.address, key, slot, record.data_ptr(), record.nbytes))


@kernel
def _submit(address: int, key: int, slot: int, source: int, n_bytes: int) -> int:
    return submit_copy(int64s_at(address, N_WORDS), key, slot, source, n_bytes, 1)


@kernel
def _land_all(address: int) -> int:
    """How many copies have ended, which are dropped."""
    queue, n = int64s_at(address, N_WORDS), 0
    while oldest_has_ended(queue):
        drop_oldest(queue)
        n += 1
    return n


@kernel
def _await(address: int, slot: int) -> int:
    return await_slot(int64s_at(address, N_WORDS), slot)


@kernel
def _has_room(address: int, n: int) -> int:
    return has_room(int64s_at(address, N_WORDS), n)


@kernel
def _oldest_slot(address: int) -> int:
    return entry_of(int64s_at(address, N_WORDS), 0)[ENTRY_SLOT]


def test_copies_end_in_order_and_make_room() -> None:
    with fake_cards(1, clock=ManualClock(), link_gbps=1e-3) as cards:
        rig = Rig(cards)
        assert rig.copy(0, 2)
        assert rig.copy(1, 3)
        assert _land_all(rig.queue.address) == 0
        cards.clock.us += 600.0  # the first takes 514
        assert _land_all(rig.queue.address) == 1
        assert _oldest_slot(rig.queue.address) == 3
        cards.clock.us += 600.0
        assert _land_all(rig.queue.address) == 1
        assert rig.queue.words[COUNT] == 0
        assert rig.queue.take_written() == [2, 3]
        assert rig.queue.take_written() == []
        assert torch.equal(rig.accelerator._slots.cpu()[2, :512], rig.records[0])


def test_the_ring_goes_round_and_is_never_overfull() -> None:
    with fake_cards(1, clock=ManualClock(), link_gbps=1e6) as cards:
        rig = Rig(cards)
        for number in range(3 * CAPACITY):
            assert rig.copy(number, number % 4)
            cards.clock.us += 10.0
            if number % 8 == 7:
                assert _land_all(rig.queue.address) == 8
        assert not _has_room(rig.queue.address, CAPACITY + 1)
        assert _has_room(rig.queue.address, CAPACITY)
        for number in range(CAPACITY):
            assert rig.copy(number, number % 4)
        assert not _has_room(rig.queue.address, 1)
        cards.clock.us += 1e6
        assert _land_all(rig.queue.address) == CAPACITY


def test_slots_that_were_written_are_noted_up_to_a_limit() -> None:
    with fake_cards(1, clock=ManualClock(), link_gbps=1e6) as cards:
        rig = Rig(cards)
        for number in range(MOST_WRITTEN):
            assert _has_room(rig.queue.address, 1)
            assert rig.copy(number, number % 4)
            cards.clock.us += 10.0
            _land_all(rig.queue.address)
        assert not _has_room(rig.queue.address, 1), "Python is to look at them first"
        assert len(rig.queue.take_written()) == MOST_WRITTEN
        assert _has_room(rig.queue.address, 1)


def test_only_a_slot_that_is_being_written_is_waited_for() -> None:
    with fake_cards(1, clock=ManualClock(), link_gbps=1e-3) as cards:
        rig = Rig(cards)
        rig.copy(0, 1)
        assert _await(rig.queue.address, 0)
        assert rig.driver.calls[AWAIT] == 0
        assert _await(rig.queue.address, 1)
        assert rig.driver.calls[AWAIT] == 1
        cards.clock.us += 1e6


def test_a_copy_of_the_queue_as_python_sees_it() -> None:
    with fake_cards(1, clock=ManualClock(), link_gbps=1e-3) as cards:
        rig = Rig(cards)
        rig.copy(0, 1)
        event = rig.accelerator.queued_copy(rig.queue, 0)
        assert not event.ended
        assert event.span_us[1] == 0.0
        rig.accelerator.take_from(rig.queue, {1: event})
        assert rig.accelerator._events.write_of(1) is event
        event.wait()
        assert event.ended
        start_us, end_us = event.span_us
        assert end_us - start_us == pytest.approx(514.0, abs=1.0), "the copy's own time, by the card's clock"
        assert torch.equal(torch.from_numpy(rig.accelerator.read_slot(1, 512)), rig.records[0])


def test_copies_of_others_are_taken_over_without_a_time() -> None:
    with fake_cards(1, clock=ManualClock(), link_gbps=1e-3) as cards:
        rig = Rig(cards)
        rig.accelerator.copy_to_slot(2, rig.records[0].numpy())
        rig.queue.take_over(0, 2)
        rig.copy(1, 3)
        assert [int(entry[ENTRY_SLOT]) for entry in rig.queue.under_way()] == [2, 3]
        taken = rig.accelerator.queued_copy(rig.queue, 0)
        taken.wait()
        assert taken.span_us[0] == taken.span_us[1]
        rig.queue.keep(1)
        assert [int(entry[ENTRY_SLOT]) for entry in rig.queue.under_way()] == [3]
        cards.clock.us += 1e6


def test_a_copy_of_a_card_that_is_lost_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cards(1, clock=ManualClock(), link_gbps=1e-3) as cards:
        rig = Rig(cards)
        rig.copy(0, 1)
        event = rig.accelerator.queued_copy(rig.queue, 0)
        cards.lose(0)
        with pytest.raises(LostError, match="unspecified launch failure \\(error 719 of the driver\\)"):
            _ = event.ended
        assert rig.driver.call(QUERY, int(rig.queue.entries[0, 2])) not in (0, NOT_READY)


def test_events_are_freed_with_their_queue() -> None:
    with fake_cards(1) as cards:
        rig = Rig(cards)
        named = len(rig.driver._named)
        rig.queue.new_event()
        assert len(rig.driver._named) == named + 1
        del rig.queue
        assert len(rig.driver._named) <= named - 2 * CAPACITY


def test_reads_that_were_taken_are_no_more_waited_for() -> None:
    events: SlotEvents[str] = SlotEvents(3)
    for slot in range(3):
        events.on_write(slot, f"write {slot}")
    events.on_read([0, 1], "one read")
    assert events.take_reads() == {"one read"}
    assert events.take_reads() == set()
    assert events.on_write(0, "again") is None
    events.on_read([1], "another")
    assert events.on_write(1, "again") == "another"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available() or torch.version.hip is not None, reason="no NVIDIA card here")
def test_the_driver_of_a_real_card() -> None:
    driver = driver_of(torch.device("cuda", torch.cuda.current_device()))
    assert driver.call(QUERY_STREAM, driver.stream(None)) in (0, NOT_READY)
    graph = torch.cuda.CUDAGraph()
    number = torch.zeros(1, device="cuda")
    torch.cuda.synchronize()
    with torch.cuda.graph(graph):
        number += 1
    for _ in range(3):
        assert driver.call(LAUNCH, driver.graph(graph), driver.stream(None)) == 0
    assert number.item() == 3.0
