"""TorchAccelerator on fake cards: the order of streams, what the host waits for, clocks, memory, several cards."""

from __future__ import annotations

from collections.abc import Callable, Iterator

import numpy as np
import pytest
import torch

from cpu_kernels import get_backend, relative_error, tolerance
from gpu_kernels import LaneError, SlotError, TorchAccelerator, open_accelerator, torch_events
from gpu_kernels.devices import memory_info
from gpu_kernels.downloads import Downloads
from gpu_kernels.page_locked import page_locked
from gpu_kernels.uploads import LARGEST_BYTES, Uploads
from gpu_kernels.waiting import WaitLimit
from tests.fake_device import DEVICE_TYPE, Cards, ManualClock, fake_cards
from tests.fake_device.streams import FakeEvent, FakeStream

from .conftest import Experts

FIRST, SECOND = torch.device(DEVICE_TYPE, 0), torch.device(DEVICE_TYPE, 1)
SLOW_LINK_GBPS = 1e-3


@pytest.fixture
def cards() -> Iterator[Cards]:
    with fake_cards(2) as found:
        yield found


def run_call(accelerator: TorchAccelerator, experts: Experts, n_tokens: int = 7) -> None:
    """Every second expert on the card, the others on the host: the call's output is the reference's."""
    accelerator.allocate(3, experts.spec.record_bytes)
    work = experts.work(n_tokens, 3, absent=True)
    work.hidden = work.hidden.to(accelerator.device)
    ids = work.dispatch.expert_ids.tolist()
    on_card, on_host = list(range(0, len(ids), 2)), np.arange(1, len(ids), 2, dtype=np.int32)
    for slot, position in enumerate(on_card):
        accelerator.copy_to_slot(slot, experts.records[ids[position]])
    event = accelerator.run_experts(experts.spec, range(len(on_card)), on_card, work)
    addresses = np.array([experts.records[ids[p]].ctypes.data for p in on_host], np.uint64)
    get_backend("reference").run(experts.spec, addresses, on_host, work.dispatch, work.host_hidden, work.host_rows)
    work.host_positions = on_host
    out = accelerator.combine(work, [event])
    assert out.device == accelerator.device
    assert relative_error(out.cpu(), experts.expected(work)) <= tolerance(experts.spec)


def rewrite_one_slot(accelerator: TorchAccelerator, experts: Experts) -> None:
    """Every expert of a call through one slot, one after the other."""
    accelerator.allocate(1, experts.spec.record_bytes)
    work = experts.work(4, 2)
    work.hidden = work.hidden.to(accelerator.device)
    for position, expert in enumerate(work.dispatch.expert_ids.tolist()):
        accelerator.copy_to_slot(0, experts.records[expert])
        accelerator.run_experts(experts.spec, [0], [position], work)


@pytest.mark.parametrize("device", [FIRST, SECOND], ids=str)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("n_tokens", [1, 7, 60])
def test_a_call_is_right_on_every_card(
    cards: Cards, make_experts: Callable[..., Experts], device: torch.device, dtype: str, n_tokens: int
) -> None:
    accelerator = TorchAccelerator(device)
    run_call(accelerator, make_experts(dtype, bias=True), n_tokens)
    rewrite_one_slot(accelerator, make_experts(dtype))
    accelerator.close()


@pytest.mark.parametrize("pinned", [True, False])
def test_without_the_waits_between_streams_there_are_races(
    make_experts: Callable[..., Experts], monkeypatch: pytest.MonkeyPatch, pinned: bool
) -> None:
    """The fake sees what it is for: copy and computation of a slot are ordered by events alone."""
    monkeypatch.setattr(FakeStream, "wait_event", lambda self, event: None)
    experts = make_experts()
    with fake_cards(1, clock=ManualClock(), link_gbps=SLOW_LINK_GBPS) as cards:
        if pinned:
            locked = page_locked(experts.records.nbytes).reshape(experts.records.shape)
            locked[...] = experts.records
            experts.records = locked
        rewrite_one_slot(TorchAccelerator(FIRST), experts)
        assert any("reads what may not have been written yet" in finding for finding in cards.findings)
        assert any("writes over what may still be read" in finding for finding in cards.findings)
        cards.findings.clear()


def test_a_host_buffer_that_changes_under_its_copy_is_found() -> None:
    with fake_cards(1, clock=ManualClock()) as cards:
        buffer = torch.ones(8, pin_memory=True)
        buffer.to(FIRST, non_blocking=True)
        buffer.zero_()
        cards.synchronize()
        assert cards.findings == ["page-locked memory was changed while a copy might still read it"]
        cards.findings.clear()


def test_staging_buffers_are_used_again_only_after_their_copy(make_experts: Callable[..., Experts]) -> None:
    experts = make_experts()
    with fake_cards(1, clock=ManualClock(), link_gbps=SLOW_LINK_GBPS):
        accelerator = TorchAccelerator(FIRST)
        accelerator.allocate(6, experts.spec.record_bytes)
        for turn in range(12):
            accelerator.copy_to_slot(turn % 6, experts.records[turn % 6])
        accelerator.close()


def test_the_cpu_lane_begins_while_the_link_is_busy(make_experts: Callable[..., Experts]) -> None:
    """Two groups, each behind a transfer: nothing that is submitted makes the host wait."""
    experts = make_experts()
    with fake_cards(1, clock=ManualClock(), link_gbps=SLOW_LINK_GBPS) as cards:
        accelerator = TorchAccelerator(FIRST)
        accelerator.allocate(2, experts.spec.record_bytes)
        records = page_locked(experts.records.nbytes).reshape(experts.records.shape)
        records[...] = experts.records
        for _ in range(2):  # in the first turn the fused kernels are compared with torch, which takes waiting
            work = experts.work(4, 2)
            work.hidden = work.hidden.to(accelerator.device)
            ids = work.dispatch.expert_ids.tolist()
            cards.counts.clear()
            events = []
            for slot in range(2):
                copy = accelerator.copy_to_slot(slot, records[ids[slot]])
                events.append(accelerator.run_experts(experts.spec, [slot], [slot], work))
            waits, busy = cards.counts["waits"] + cards.counts["host waits"], not copy.ended
            accelerator.synchronize()
        assert busy
        assert waits == 0
        accelerator.close()


def test_durations_do_not_depend_on_the_age_of_the_session(
    make_experts: Callable[..., Experts], monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, clock = make_experts(), ManualClock()
    monkeypatch.setattr(torch_events, "clock_us", clock.now_us)
    with fake_cards(1, clock=clock):
        accelerator = TorchAccelerator(FIRST)
        accelerator.allocate(1, experts.spec.record_bytes)
        spans = []
        for pause_us in (3600e6, 1.9e6, 1.9e6, 3600e6):
            event = accelerator.copy_to_slot(0, experts.records[0])
            event.wait()
            spans.append((clock.us, *event.span_us))
            clock.us += pause_us
        accelerator.close()
    durations = [end - start for _, start, end in spans]
    assert durations == pytest.approx([durations[0]] * 4, abs=0.002)
    assert durations[0] > 1.0
    assert all(end == pytest.approx(now, abs=1.0) for now, _, end in spans), "on the host's clock"


def test_the_start_of_work_under_way_is_known(
    make_experts: Callable[..., Experts], monkeypatch: pytest.MonkeyPatch
) -> None:
    experts, clock = make_experts(), ManualClock()
    monkeypatch.setattr(torch_events, "clock_us", clock.now_us)
    with fake_cards(1, clock=clock, link_gbps=SLOW_LINK_GBPS):
        accelerator = TorchAccelerator(FIRST)
        accelerator.allocate(2, experts.spec.record_bytes)
        began_us = clock.us
        first, second = (accelerator.copy_to_slot(slot, experts.records[slot]) for slot in range(2))
        clock.us += 100.0
        assert first.span_us == (pytest.approx(began_us, abs=1.0), 0.0)
        assert second.span_us == (0.0, 0.0)
        accelerator.close()


def test_memory_is_known_before_torch_2_10(cards: Cards, monkeypatch: pytest.MonkeyPatch) -> None:
    """`torch.accelerator.get_memory_info` is not in torch 2.8 and 2.9; the device's module has `mem_get_info`."""
    expected = memory_info(SECOND)
    monkeypatch.delattr(torch.accelerator, "get_memory_info")
    assert memory_info(SECOND) == expected == (cards.card_bytes, cards.card_bytes)
    accelerator = TorchAccelerator(SECOND)
    accelerator.allocate(4, 1000)
    assert accelerator.free_bytes() == cards.card_bytes
    accelerator.close()


def test_slots_that_do_not_fit_leave_those_that_are_there(make_experts: Callable[..., Experts]) -> None:
    experts = make_experts()
    with fake_cards(1, card_bytes=1 << 20):
        accelerator = TorchAccelerator(FIRST)
        accelerator.allocate(6, experts.spec.record_bytes)
        for slot, record in enumerate(experts.records):
            accelerator.copy_to_slot(slot, record)
        with pytest.raises(SlotError, match=r"do not fit.*ask for fewer"):
            accelerator.allocate(100, experts.spec.record_bytes)
        assert accelerator.n_slots == 6
        work = experts.work(4, 2)
        ids = work.dispatch.expert_ids.tolist()
        out = accelerator.combine(work, [accelerator.run_experts(experts.spec, ids, range(len(ids)), work)])
        assert relative_error(out.cpu(), experts.expected(work)) < 1e-5
        accelerator.close()


def test_memory_that_turns_out_to_be_taken_leaves_as_many_slots(monkeypatch: pytest.MonkeyPatch) -> None:
    """Free memory in pieces: each is too small, and only the allocation tells."""
    with fake_cards(1, card_bytes=1 << 20), monkeypatch.context() as patched:
        accelerator = TorchAccelerator(FIRST)
        accelerator.allocate(4, 1000)
        patched.setattr(torch.accelerator, "get_memory_info", lambda device: (1 << 40, 1 << 40))
        with pytest.raises(SlotError, match="do not fit"):
            accelerator.allocate(2000, 1000)
        assert (accelerator.n_slots, accelerator.slot_bytes) == (4, 1000)
        accelerator.close()


def test_locked_memory_takes_what_it_holds(cards: Cards) -> None:
    memory = page_locked(5 << 20)
    assert memory.nbytes == 5 << 20
    assert not memory.any()
    assert list(cards.locked.values()) == [5 << 20], "not rounded up to 8 MiB"
    assert torch.from_numpy(memory[4096:]).is_pinned()
    part = memory[:64]
    del memory
    assert cards.locked, "a view of it is still there"
    del part
    assert not cards.locked


def test_memory_that_cannot_be_locked_is_told_and_staged(make_experts: Callable[..., Experts]) -> None:
    experts = make_experts()
    with fake_cards(1, refuses_locking=True):
        with pytest.warns(RuntimeWarning, match=r"could not be page-locked.*ulimit -l"):
            records = page_locked(experts.records.nbytes).reshape(experts.records.shape)
        records[...] = experts.records
        experts.records = records
        accelerator = TorchAccelerator(FIRST)
        run_call(accelerator, experts)
        accelerator.close()


def test_a_mapped_record_is_staged_without_a_warning(cards: Cards, make_experts: Callable[..., Experts]) -> None:
    experts = make_experts()
    experts.records.flags.writeable = False
    accelerator = TorchAccelerator(FIRST)
    run_call(accelerator, experts)
    accelerator.close()


def test_auto_is_the_current_card_everywhere(cards: Cards) -> None:
    torch.accelerator.set_device_index(1)
    for name in ("auto", DEVICE_TYPE):
        accelerator = open_accelerator(name)
        assert accelerator is not None
        assert accelerator.device == SECOND
        accelerator.close()


@pytest.mark.parametrize("n_values", [3, LARGEST_BYTES // 4 + 1])
def test_uploads_keep_shape_dtype_and_values(cards: Cards, n_values: int) -> None:
    uploads = Uploads(FIRST)
    for turn in range(20):
        arrays = (
            np.arange(n_values, dtype=np.int32) + turn,
            np.full((2, 5), turn, np.float32),
            np.empty((0, 4), np.int64),
        )
        sent = uploads.send(*arrays)
        assert [tensor.device for tensor in sent] == [FIRST] * 3
        for tensor, array in zip(sent, arrays, strict=True):
            assert torch.equal(tensor.cpu(), torch.from_numpy(array))


def test_a_buffer_of_uploads_waits_for_its_copy(cards: Cards, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake sees what the ring is for: without the look at the event, a buffer changes under its copy."""
    monkeypatch.setattr(FakeEvent, "query", lambda self: True)
    cards.clock, cards.link_gbps = ManualClock(), SLOW_LINK_GBPS
    uploads = Uploads(FIRST)
    for turn in range(2):
        uploads.send(np.full(100, turn, np.float32))
    cards.synchronize()
    assert cards.findings == ["page-locked memory was changed while a copy might still read it"]
    cards.findings.clear()


def test_downloads_take_one_wait(cards: Cards) -> None:
    downloads = Downloads(FIRST)
    for n in (3, 40, 3, 50_000):
        tensors = (
            torch.arange(n, device=FIRST), torch.rand(2, n, device=FIRST).T, torch.ones(n, 2, device=FIRST).bfloat16(),
        )  # fmt: skip
        cards.counts.clear()
        found = downloads.fetch(*tensors)
        assert cards.counts["waits"] == 0
        assert cards.counts["host waits"] == 1
        for one, other in zip(found, tensors, strict=True):
            assert one.device.type == "cpu"
            assert torch.equal(one, other.cpu())


def test_downloads_without_their_wait_are_garbage(cards: Cards, monkeypatch: pytest.MonkeyPatch) -> None:
    """The fake sees what the wait is for."""
    cards.clock = ManualClock()
    ones = torch.ones(5, device=FIRST)
    monkeypatch.setattr(WaitLimit, "wait", lambda *_: None)
    (found,) = Downloads(FIRST).fetch(ones)
    assert found.isnan().all()


def test_a_failed_card_is_told_by_its_name_and_can_be_closed(cards: Cards, monkeypatch: pytest.MonkeyPatch) -> None:
    accelerator = TorchAccelerator(FIRST)

    def failed(device: torch.device) -> None:
        raise RuntimeError("CUDA error: an illegal memory access was encountered")

    with monkeypatch.context() as patched:
        patched.setattr(torch.accelerator, "synchronize", failed)
        with pytest.raises(LaneError, match=r"fake card.*cannot go on.*illegal memory access"):
            accelerator.synchronize()
        accelerator.close()
        accelerator.close()
