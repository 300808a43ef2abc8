"""The emulated accelerator: results, order rules, poison, failures."""

from __future__ import annotations

import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from cpu_kernels import get_backend, relative_error, tolerance
from gpu_kernels import ClosedError, EmulatedAccelerator, LaneError, Pacing, SlotError
from gpu_kernels.emulated import POISON_BYTE

from .conftest import Experts


class GatedBackend:
    """A CPU backend that waits for a gate, and may fail."""

    name = "gated"

    def __init__(self) -> None:
        self.inner = get_backend("torch")
        self.gate = threading.Event()
        self.started = threading.Event()
        self.fail = False

    def supports(self, spec: object) -> str | None:
        return None

    def run(self, *args: object) -> None:
        self.started.set()
        self.gate.wait(timeout=600)
        if self.fail:
            raise FloatingPointError("injected")
        self.inner.run(*args)  # type: ignore[arg-type]


def all_on(accelerator: EmulatedAccelerator, experts: Experts, work: object) -> torch.Tensor:
    ids = work.dispatch.expert_ids.tolist()  # type: ignore[attr-defined]
    for expert in ids:
        accelerator.copy_to_slot(expert, experts.records[expert])
    event = accelerator.run_experts(experts.spec, ids, range(len(ids)), work)  # type: ignore[arg-type]
    return accelerator.combine(work, [event])  # type: ignore[arg-type]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("absent", [False, True])
def test_results_are_those_of_the_reference(make_experts: Callable[..., Experts], dtype: str, absent: bool) -> None:
    experts = make_experts(dtype, bias=True)
    accelerator = EmulatedAccelerator()
    accelerator.allocate(6, experts.spec.record_bytes)
    work = experts.work(5, 3, absent=absent)
    out = all_on(accelerator, experts, work)
    accelerator.close()
    assert relative_error(out, experts.expected(work)) <= tolerance(experts.spec)


def test_the_bits_are_those_of_the_cpu_lane(make_experts: Callable[..., Experts]) -> None:
    experts = make_experts("int4")
    accelerator = EmulatedAccelerator()
    accelerator.allocate(6, experts.spec.record_bytes)
    work, host = experts.work(4, 3), experts.work(4, 3)
    all_on(accelerator, experts, work)
    records = experts.records.ctypes.data + work.dispatch.expert_ids.astype(np.uint64) * experts.spec.record_bytes
    positions = np.arange(len(work.dispatch.expert_ids), dtype=np.int32)
    get_backend("auto", 1).run(
        experts.spec, records.astype(np.uint64), positions, host.dispatch, host.host_hidden, host.host_rows
    )
    accelerator.close()
    assert np.array_equal(work.host_rows, host.host_rows)


def test_a_slot_is_not_rewritten_before_its_reader_has_ended(make_experts: Callable[..., Experts]) -> None:
    experts, backend = make_experts(), GatedBackend()
    accelerator = EmulatedAccelerator(backend)
    accelerator.allocate(1, experts.spec.record_bytes)
    work = experts.work(3, 1)
    first = int(work.dispatch.expert_ids[0])
    accelerator.copy_to_slot(0, experts.records[first])
    compute = accelerator.run_experts(experts.spec, [0], [0], work)
    assert backend.started.wait(timeout=600)
    rewrite = accelerator.copy_to_slot(0, experts.records[(first + 1) % 6])
    assert not rewrite.ended
    backend.gate.set()
    compute.wait()
    rewrite.wait()
    assert rewrite.span_us[0] >= compute.span_us[1]
    rows = work.dispatch.rows[: work.dispatch.offsets[1]]
    assert np.isfinite(work.host_rows[rows]).all()
    accelerator.close()


def test_a_read_that_does_not_wait_for_its_copy_gives_nan(make_experts: Callable[..., Experts]) -> None:
    for dtype in ("float32", "bfloat16", "int8", "int4"):
        experts = make_experts(dtype)
        slow = Pacing(link_gbps=1e-4, link_latency_us=0, mem_gbps=1e3, tflops=1e3, launch_us=0)
        accelerator = EmulatedAccelerator(pacing=slow)
        accelerator.allocate(1, experts.spec.record_bytes)
        event = accelerator.copy_to_slot(0, experts.records[0])
        while accelerator._arena[0, 0] != POISON_BYTE:
            assert not event.ended
        work = experts.work(1, 1)
        get_backend("torch").run(
            experts.spec, accelerator._addresses[:1], np.zeros(1, np.int32), work.dispatch, work.host_hidden,
            work.host_rows,
        )  # fmt: skip
        assert np.isnan(work.host_rows).all()
        event.wait()
        assert np.array_equal(accelerator._arena[0], experts.records[0])
        accelerator.close()


def test_a_failed_computation_reaches_the_waiter_and_the_lanes_go_on(make_experts: Callable[..., Experts]) -> None:
    experts, backend = make_experts(), GatedBackend()
    backend.gate.set()
    backend.fail = True
    accelerator = EmulatedAccelerator(backend)
    accelerator.allocate(6, experts.spec.record_bytes)
    with pytest.raises(LaneError, match="injected"):
        all_on(accelerator, experts, experts.work(2, 2))
    accelerator.synchronize()
    backend.fail = False
    work = experts.work(2, 2)
    assert relative_error(all_on(accelerator, experts, work), experts.expected(work)) < 1e-5
    accelerator.close()


def test_a_computation_whose_copy_failed_does_not_run(make_experts: Callable[..., Experts]) -> None:
    experts = make_experts()
    accelerator = EmulatedAccelerator()
    accelerator.allocate(1, experts.spec.record_bytes)

    def broken(*args: object) -> None:
        raise OSError("injected link failure")

    accelerator._transfer = broken  # type: ignore[method-assign]
    accelerator.copy_to_slot(0, experts.records[0])
    work = experts.work(1, 1)
    event = accelerator.run_experts(experts.spec, [0], [0], work)
    with pytest.raises(LaneError, match="injected link failure"):
        event.wait()
    assert np.isnan(work.host_rows).all()
    accelerator.close()


def test_paced_lanes_take_the_time_of_the_imitated_device(make_experts: Callable[..., Experts]) -> None:
    experts = make_experts()
    n_bytes = experts.spec.record_bytes
    pacing = Pacing(
        link_gbps=n_bytes / 4e7, link_latency_us=10_000.0, mem_gbps=n_bytes / 3e7, tflops=1e3, launch_us=20_000.0
    )
    accelerator = EmulatedAccelerator(pacing=pacing)
    accelerator.allocate(1, n_bytes)
    for _ in range(2):  # the first time may compile the kernels
        copy = accelerator.copy_to_slot(0, experts.records[0])
        compute = accelerator.run_experts(experts.spec, [0], [0], experts.work(1, 1))
        compute.wait()
    accelerator.close()
    for event, wanted_us in ((copy, pacing.transfer_us(n_bytes)), (compute, pacing.expert_us(experts.spec, 1))):
        start_us, end_us = event.span_us
        assert wanted_us == pytest.approx(50_000.0, rel=0.01)
        assert 49_900.0 <= end_us - start_us < 95_000.0, "not twice as long, though other programs delay the thread"
    assert compute.span_us[0] >= copy.span_us[1]


def test_misuse_is_named(make_experts: Callable[..., Experts]) -> None:
    experts = make_experts()
    accelerator = EmulatedAccelerator()
    accelerator.allocate(2, experts.spec.record_bytes)
    with pytest.raises(SlotError, match="slot 2 does not exist: 2 slots"):
        accelerator.copy_to_slot(2, experts.records[0])
    with pytest.raises(SlotError, match="never filled"):
        accelerator.run_experts(experts.spec, [1], [0], experts.work(1, 1))
    with pytest.raises(SlotError, match="does not fit"):
        accelerator.copy_to_slot(0, np.zeros(experts.spec.record_bytes + 1, np.uint8))
    with pytest.raises(SlotError, match="cannot allocate -1"):
        accelerator.allocate(-1, 64)
    accelerator.close()
    accelerator.close()
    with pytest.raises(ClosedError):
        accelerator.copy_to_slot(0, experts.records[0])
