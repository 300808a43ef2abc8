"""Copies that are unfolded on the device: the bytes that cross the link are not those that the slot holds."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from gpu_kernels import EmulatedAccelerator, LaneError, SlotError
from gpu_kernels.torch_accelerator import TorchAccelerator


def doubled(source: torch.Tensor, slot: torch.Tensor) -> None:
    """Writes each byte twice."""
    slot[: 2 * source.numel()] = source.repeat_interleave(2)


def added(source: torch.Tensor, slot: torch.Tensor) -> None:
    """Adds the bytes to what the slot holds."""
    slot[: source.numel()] += source


def contents(accelerator: object, slot: int) -> list[int]:
    accelerator.synchronize()  # type: ignore[attr-defined]
    memory = getattr(accelerator, "_arena", None)
    held = accelerator._slots[slot] if memory is None else memory[slot]  # type: ignore[attr-defined]
    return [int(value) for value in held[:8]]


@pytest.fixture(params=["emulated", "torch"])
def accelerator(request: pytest.FixtureRequest) -> object:
    made = EmulatedAccelerator() if request.param == "emulated" else TorchAccelerator("cpu")
    made.allocate(2, 64)
    yield made
    made.close()


def test_a_slot_is_written_by_the_unfolding_and_later_ones_see_it(accelerator: object) -> None:
    first, second = np.arange(4, dtype=np.uint8), np.full(3, 10, np.uint8)
    accelerator.copy_to_slot(1, first, doubled)  # type: ignore[attr-defined]
    accelerator.copy_to_slot(1, second, added)  # type: ignore[attr-defined]
    assert contents(accelerator, 1) == [10, 10, 11, 1, 2, 2, 3, 3]
    assert first.tolist() == [0, 1, 2, 3], "the host's bytes stay"


def test_more_bytes_than_a_slot_has_are_refused(accelerator: object) -> None:
    with pytest.raises(SlotError, match="does not fit"):
        accelerator.copy_to_slot(0, np.zeros(65, np.uint8), doubled)  # type: ignore[attr-defined]


def test_an_unfolding_that_fails_fails_its_copy() -> None:
    accelerator = EmulatedAccelerator()
    accelerator.allocate(1, 64)
    event = accelerator.copy_to_slot(0, np.zeros(40, np.uint8), doubled)  # 80 bytes into 64
    with pytest.raises(LaneError):
        event.wait()
    accelerator.close()
