"""Experts that cross the link as bit planes: high bits first, low bits where they are wanted."""

from __future__ import annotations

from collections.abc import Sequence
from functools import partial

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels import ExpertSpec
from cpu_kernels.format.planes import expand_high, merge_low, plane_bytes, split_record
from gpu_kernels import Accelerator
from hybrimoe.errors import ConfigError
from hybrimoe.runtime.layer_call.slots import InFlight, TransferQueue
from hybrimoe.runtime.store import ExpertStore, host_bytes
from scheduler import Transfer

ByteArray = npt.NDArray[np.uint8]


class PlaneStore:
    """Both bit planes of every expert of a complete int4 store, in host memory beside it.

    Raises ConfigError unless every layer is int4.
    """

    def __init__(self, store: ExpertStore, *, pinned: bool = False) -> None:
        self.specs = [layer.spec for layer in store.layers]
        for layer in store.layers:
            if layer.spec.dtype != "int4":
                raise ConfigError(
                    f"{layer.path}: bit planes need int4 experts, found {layer.spec.dtype}; choose --dtype int4"
                )
        self._high: list[ByteArray] = []
        self._low: list[ByteArray] = []
        for index, layer in enumerate(store.layers):
            n_experts = layer.num_experts
            high, low = (
                host_bytes(n_experts * size, pinned).reshape(n_experts, size) for size in plane_bytes(layer.spec)
            )
            for expert in range(layer.num_experts):
                record = torch.from_numpy(np.array(store.record(index, expert)))
                high[expert], low[expert] = (plane.numpy() for plane in split_record(layer.spec, record))
            self._high.append(high)
            self._low.append(low)

    def high(self, layer: int, expert: int) -> ByteArray:
        """The high bits, scales and biases of one expert."""
        plane: ByteArray = self._high[layer][expert]
        return plane

    def low(self, layer: int, expert: int) -> ByteArray:
        """The low bits of one expert."""
        plane: ByteArray = self._low[layer][expert]
        return plane

    @property
    def nbytes(self) -> int:
        """Bytes of all planes: those of the store they were made from."""
        return sum(plane.nbytes for plane in (*self._high, *self._low))


class PlaneQueue(TransferQueue):
    """A queue into slots whose experts may have only their high bits yet.

    `want` says for the call under way which experts must have all bits before they are computed. A demand transfer of
    such an expert brings both planes; every other transfer the high one alone; what is resident without its low bits
    and wanted with them gets them before its computation.
    """

    prepares = True

    def __init__(self, planes: PlaneStore, accelerator: Accelerator, first_slot: int = 0, unit: int = 0) -> None:
        super().__init__(accelerator, first_slot, unit)
        self.planes = planes
        self._moved_bytes = 0
        self._rough: list[int] = []
        self._whole = [False] * accelerator.n_slots
        self._wanted: npt.NDArray[np.bool_] | None = None

    def want(self, experts: npt.NDArray[np.bool_] | None) -> None:
        """Experts of the layer about to be submitted that need all bits, bool [E]; None: all (also of a warm-up)."""
        self._wanted = experts

    def take_counts(self) -> tuple[int, list[int]]:
        """Since the last call: bytes put on the link, and positions submitted to compute without their low bits."""
        counts = self._moved_bytes, self._rough
        self._moved_bytes, self._rough = 0, []
        return counts

    def submit(self, transfer: Transfer, record: ByteArray, step: int, *, traced: bool = False) -> None:
        """Starts one transfer as planes; `record` is what they were made from."""
        layer, expert, slot = transfer.layer, transfer.expert, self.own_slot(transfer)
        high = self.planes.high(layer, expert)
        began = event = self.accelerator.copy_to_slot(slot, high, partial(_expand, self.planes.specs[layer]))
        n_bytes = high.nbytes
        whole = self._wanted is None or (transfer.kind == "demand" and bool(self._wanted[expert]))
        if whole:
            low = self.planes.low(layer, expert)
            event = self.accelerator.copy_to_slot(slot, low, partial(_merge, self.planes.specs[layer]))
            n_bytes += low.nbytes
        self._moved_bytes += n_bytes
        self._whole[slot] = whole
        self.pending.append(InFlight(transfer, event, n_bytes, step, traced, began, self.unit))

    def before_compute(
        self, layer: int, expert_ids: npt.NDArray[np.int32], positions: Sequence[int], slots: Sequence[int]
    ) -> None:
        """Completes the wanted experts, and counts the others."""
        for position, slot in zip(positions, slots, strict=True):
            if self._whole[slot]:
                continue
            expert = int(expert_ids[position])
            if self._wanted is not None and not self._wanted[expert]:
                self._rough.append(position)
                continue
            low = self.planes.low(layer, expert)
            self.accelerator.copy_to_slot(slot, low, partial(_merge, self.planes.specs[layer]))
            self._moved_bytes += low.nbytes
            self._whole[slot] = True


def _expand(spec: ExpertSpec, plane: torch.Tensor, slot: torch.Tensor) -> None:
    expand_high(spec, plane, slot[: spec.record_bytes])


def _merge(spec: ExpertSpec, plane: torch.Tensor, slot: torch.Tensor) -> None:
    merge_low(spec, plane, slot[: spec.record_bytes])
