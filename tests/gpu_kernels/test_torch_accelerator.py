"""TorchAccelerator: its logic on the host device, and real devices where there are any."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from cpu_kernels import get_backend, relative_error, tolerance
from gpu_kernels import (
    Accelerator,
    ClosedError,
    DeviceNotFoundError,
    EmulatedAccelerator,
    SlotError,
    TorchAccelerator,
    open_accelerator,
)
from gpu_kernels.page_locked import page_locked

from .conftest import Experts

HAS_DEVICE = torch.accelerator.is_available()
ON_A_CARD = [pytest.mark.gpu, pytest.mark.skipif(not HAS_DEVICE, reason="no torch accelerator here")]
DEVICES = ["cpu", pytest.param("real", marks=ON_A_CARD)]


def open_torch(name: str) -> TorchAccelerator:
    if name == "cpu":
        return TorchAccelerator("cpu")
    found = open_accelerator("auto")
    assert isinstance(found, TorchAccelerator)
    return found


@pytest.mark.parametrize("device", DEVICES)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_experts_from_slots_and_from_the_host_add_up(
    make_experts: Callable[..., Experts], device: str, dtype: str
) -> None:
    experts = make_experts(dtype, bias=True)
    accelerator = open_torch(device)
    accelerator.allocate(3, experts.spec.record_bytes)
    work = experts.work(7, 3, absent=True)
    ids = work.dispatch.expert_ids.tolist()
    on_device, on_host = list(range(0, len(ids), 2)), np.arange(1, len(ids), 2, dtype=np.int32)
    for slot, position in enumerate(on_device):
        accelerator.copy_to_slot(slot, experts.records[ids[position]])
    event = accelerator.run_experts(experts.spec, range(len(on_device)), on_device, work)
    addresses = np.array([experts.records[ids[p]].ctypes.data for p in on_host], np.uint64)
    get_backend("reference").run(experts.spec, addresses, on_host, work.dispatch, work.host_hidden, work.host_rows)
    work.host_positions = on_host
    out = accelerator.combine(work, [event])
    accelerator.synchronize()
    assert out.device.type == accelerator.device.type
    assert relative_error(out.cpu(), experts.expected(work)) <= tolerance(experts.spec)
    accelerator.close()


@pytest.mark.parametrize("device", DEVICES)
def test_a_slot_may_be_rewritten_within_one_call(make_experts: Callable[..., Experts], device: str) -> None:
    experts = make_experts()
    accelerator = open_torch(device)
    accelerator.allocate(1, experts.spec.record_bytes)
    work = experts.work(4, 2)
    events = []
    for position, expert in enumerate(work.dispatch.expert_ids.tolist()):
        accelerator.copy_to_slot(0, experts.records[expert])
        events.append(accelerator.run_experts(experts.spec, [0], [position], work))
    out = accelerator.combine(work, events)
    assert relative_error(out.cpu(), experts.expected(work)) < 1e-5
    accelerator.close()


def test_rows_are_transformed_before_the_routing_weights(make_experts: Callable[..., Experts]) -> None:
    experts = make_experts()
    outs = []
    for accelerator in (TorchAccelerator("cpu"), EmulatedAccelerator()):
        accelerator.allocate(6, experts.spec.record_bytes)
        work = experts.work(4, 2, absent=True)
        weights = work.dispatch.weights.copy()
        work.dispatch.weights[:] = 1.0
        work.transform, work.weights = (lambda rows: rows.abs() + 1.0), weights
        for expert in range(6):
            accelerator.copy_to_slot(expert, experts.records[expert])
        ids = work.dispatch.expert_ids.tolist()
        event = accelerator.run_experts(experts.spec, ids, range(len(ids)), work)
        outs.append(accelerator.combine(work, [event]))
        accelerator.close()
    assert relative_error(outs[0], outs[1]) < 1e-5
    assert (outs[0] >= 0).all()


def test_closed_and_wrong_use(make_experts: Callable[..., Experts]) -> None:
    experts = make_experts()
    accelerator = TorchAccelerator("cpu")
    accelerator.allocate(1, experts.spec.record_bytes)
    with pytest.raises(SlotError, match="does not exist"):
        accelerator.copy_to_slot(1, experts.records[0])
    with pytest.raises(SlotError, match="does not fit"):
        accelerator.copy_to_slot(0, np.zeros(experts.spec.record_bytes + 1, np.uint8))
    accelerator.close()
    accelerator.close()
    with pytest.raises(ClosedError):
        accelerator.allocate(1, 64)


def test_open_by_name() -> None:
    assert open_accelerator("none") is None
    emulated = open_accelerator("emulated")
    assert isinstance(emulated, EmulatedAccelerator)
    assert isinstance(emulated, Accelerator)
    emulated.close()
    if not HAS_DEVICE:
        assert open_accelerator("auto") is None


@pytest.mark.parametrize("name", ["cuda:99", "xpu:77", "gpu0", "", "cuda:x"])
def test_devices_that_do_not_exist_are_named(name: str) -> None:
    with pytest.raises(DeviceNotFoundError, match=repr(name)):
        open_accelerator(name)


def test_a_torch_that_is_made_for_cards_needs_none(monkeypatch: pytest.MonkeyPatch) -> None:
    """CUDA's wheel names its kind of device where there is no driver, and each use of that device is an error."""
    monkeypatch.setattr(torch.accelerator, "is_available", lambda: False)
    monkeypatch.setattr(torch.accelerator, "current_accelerator", lambda check_available=False: torch.device("cuda"))
    memory = page_locked(5000)
    assert memory.shape == (5000,)
    assert not memory.any()
    assert open_accelerator("auto") is None
