"""The accelerator protocol: slots of expert records, a copy lane and a compute lane, events between them.

Two implementations: `EmulatedAccelerator` (threads on the host) and `TorchAccelerator` (any torch.accelerator
device). Both keep the same order rules, so an executor needs to know only this file:

- copies run one at a time in the order of submission; a copy into a slot starts only after the last computation
  submitted before it that reads the slot has ended;
- computations run one at a time in the order of submission, each not before the last copy submitted before it into
  its slot has ended;
- nothing blocks the submitting thread; `Event.wait` blocks it and raises `LaneError` if that piece of work failed;
- no wait is for ever: `LostError` ends those that take longer than `wait_limit`, and everything that is asked of the
  accelerator afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels import Dispatch, ExpertSpec
from gpu_kernels.waiting import WaitLimit

ByteArray = npt.NDArray[np.uint8]


@runtime_checkable
class Event(Protocol):
    """The end of one piece of work on one lane."""

    @property
    def ended(self) -> bool:
        """True once the work has ended (also when it failed)."""
        ...

    def wait(self) -> None:
        """Blocks until the work has ended. Raises LaneError if it failed."""
        ...

    @property
    def span_us(self) -> tuple[float, float]:
        """Start and end in us on the host's monotonic clock (`clock_us`); each 0 until it is known to have come."""
        ...


Unfold = Callable[[torch.Tensor, torch.Tensor], None]
"""(bytes that came over the link, uint8 [n]; the slot, uint8 [slot_bytes]), both on the device: writes the slot."""


@dataclass(slots=True)
class LayerWork:
    """Inputs and result rows of one call of one layer, shared by the lanes.

    `hidden`: T tokens [..., H] in the model's dtype, on the model's device. `host_hidden`: float32 [T, H] on the host.
    `host_rows`: float32 [T * top_k, H] on the host, row t * top_k + j; a lane writes only the rows of its experts.
    `host_positions`: positions (into dispatch.expert_ids) whose rows the CPU lane wrote; read by `combine`.
    `transform`: applied to result rows [N, H] before the routing weights, which `dispatch` then must not hold (all 1);
    `weights`, float32 [T * top_k], are multiplied in afterwards. None: rows are complete as the kernels write them.
    `like`: a contiguous host tensor of T * H values, float32 or bfloat16: the output's dtype, and its shape where rows
    are added on the host. None: float32 [T, H].
    `out`: where rows are added on the host, a tensor like `like` for the sum; None: one is made for it.
    `in_turn`: (slots, positions) of all experts that `run_experts` will be given piece by piece, in this order, so that
    a device is sent what it needs for them at once. None: not known, or one piece.
    `device_state`: the accelerator's own tensors for this call (rows, indices) when it has its own memory.
    """

    dispatch: Dispatch
    hidden: torch.Tensor
    host_hidden: npt.NDArray[np.float32]
    host_rows: npt.NDArray[np.float32]
    host_positions: Sequence[int] | npt.NDArray[np.int32] = ()
    transform: Callable[[torch.Tensor], torch.Tensor] | None = None
    weights: npt.NDArray[np.float32] | None = None
    like: torch.Tensor | None = None
    out: torch.Tensor | None = None
    in_turn: tuple[Sequence[int], Sequence[int]] | None = None
    device_state: object | None = None


@runtime_checkable
class Accelerator(Protocol):
    """Slot memory and two FIFO lanes of one device."""

    @property
    def name(self) -> str:
        """What is printed, e.g. 'emulated' or 'NVIDIA RTX A6000 (cuda:0)'."""
        ...

    @property
    def kind(self) -> str:
        """'emulated' or the torch device type ('cuda', 'xpu', 'cpu')."""
        ...

    @property
    def device(self) -> torch.device:
        """Where hidden states are expected."""
        ...

    @property
    def wait_limit(self) -> WaitLimit:
        """How long the host waits for any of its work."""
        ...

    @property
    def n_slots(self) -> int:
        """Slots allocated now."""
        ...

    @property
    def slot_bytes(self) -> int:
        """Bytes of one slot."""
        ...

    def allocate(self, n_slots: int, slot_bytes: int) -> None:
        """Drains the lanes, then replaces the slot memory (contents are lost). 0 slots frees it.

        Raises SlotError where there is not enough memory; the slots are then as many and as large as before.
        """
        ...

    def free_bytes(self) -> int | None:
        """Device memory that slots may still take; None where the host's memory is the limit."""
        ...

    def needs_pinned_host(self) -> bool:
        """True when host records should be page-locked for asynchronous copies."""
        ...

    def copy_to_slot(self, slot: int, record: ByteArray, unfold: Unfold | None = None) -> Event:
        """Submits the copy of a host record (uint8 [n], n <= slot_bytes) into a slot.

        With `unfold` the bytes cross the link as they are and `unfold(bytes, slot)` writes the slot on the device,
        from them and from what the slot holds.
        """
        ...

    def read_slot(self, slot: int, n_bytes: int) -> ByteArray:
        """The first bytes of what was copied into a slot, on the host, once it is there. Raises SlotError for a slot
        that was never filled, LaneError where its copy failed."""
        ...

    def run_experts(self, spec: ExpertSpec, slots: Sequence[int], positions: Sequence[int], work: LayerWork) -> Event:
        """Submits experts in order; expert `dispatch.expert_ids[positions[i]]` is read from `slots[i]`."""
        ...

    def combine(self, work: LayerWork, events: Sequence[Event]) -> torch.Tensor:
        """[T, H] on `device`, or a host tensor like `work.like`: each token's rows added in float32, in top-k order.

        The CPU lane must have ended; `events` are all computations submitted for `work`. Waits for them (on the host
        or only in the order of the stream) and raises LaneError if one failed.
        """
        ...

    def sibling(self) -> Accelerator:
        """A second, empty slot memory on the same device, with slots of its own size, behind the same two lanes.

        Closing either of the two ends the lanes for both.
        """
        ...

    def synchronize(self) -> None:
        """Blocks until both lanes are empty; failures of drained work are dropped (their events keep them).

        Raises LostError where the device as a whole has failed, or hangs.
        """
        ...

    def close(self) -> None:
        """Drains, stops the lanes and frees the slots; safe to call twice. What hangs is left alone."""
        ...
