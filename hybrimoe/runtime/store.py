"""ExpertStore: the one owner of the experts' packed bytes in host memory (or in a memory-mapped packed file).

All records lie in one uint8 buffer: layer after layer, expert after expert, without gaps. A record's size is fixed by
its layer's ExpertSpec and is a multiple of 64 bytes, so every record is as well aligned as the buffer.
"""

from __future__ import annotations

import ctypes
import mmap
import os
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels import ExpertSpec, ExpertWeights, pack_expert, page_aligned, unpack_expert
from gpu_kernels.page_locked import page_locked
from hybrimoe.errors import BudgetError, CheckpointError

ByteArray = npt.NDArray[np.uint8]
ALIGNMENT_BYTES = 64


@dataclass(frozen=True, slots=True)
class LayerSpec:
    """One MoE layer: its module path in the model, the kernel spec of each of its experts, and their number."""

    path: str
    spec: ExpertSpec
    num_experts: int

    @property
    def nbytes(self) -> int:
        """Bytes of all its records."""
        return self.num_experts * self.spec.record_bytes


class ExpertStore:
    """Packed records of every expert. `record(layer, expert)` is a view, never a copy.

    `complete`: False once records were dropped.
    """

    in_memory: ClassVar[bool] = True
    """Whether every record lies at its address all the time."""

    def __init__(self, layers: Sequence[LayerSpec], *, pinned: bool = False) -> None:
        self._attach(tuple(layers), host_bytes(sum(layer.nbytes for layer in layers), pinned))

    @classmethod
    def from_buffer(cls, layers: Sequence[LayerSpec], buffer: ByteArray) -> Self:
        """A store over existing bytes (for example a memory map); they may be read-only.

        Raises CheckpointError if the size or the alignment does not fit the layers.
        """
        expected = sum(layer.nbytes for layer in layers)
        if buffer.dtype != np.uint8 or buffer.ndim != 1 or buffer.nbytes != expected:
            raise CheckpointError(
                f"packed experts: expected {expected} bytes (uint8), found {buffer.dtype}{list(buffer.shape)};"
                " pack the model again"
            )
        if buffer.ctypes.data % ALIGNMENT_BYTES:
            raise CheckpointError(f"packed experts must start at a multiple of {ALIGNMENT_BYTES} bytes in memory")
        store = cls.__new__(cls)
        store._attach(tuple(layers), buffer)
        return store

    is_own: ClassVar[bool] = True
    """Whether its bytes are nowhere else, as in a file."""

    def record(self, layer: int, expert: int) -> ByteArray:
        """uint8 [record_bytes] view of one expert. Raises CheckpointError for one that was released."""
        if self._released and (layer, expert) in self._released:
            raise CheckpointError(
                f"{self.layers[layer].path}, expert {expert}: its host copy was given up (memory.host_copy: drop)"
            )
        return self._records[layer][expert]

    def release(self, layer: int, expert: int) -> None:
        """Gives the memory of a record back to the system, but for pages that it shares with its neighbours. The record
        is not to be read before `refill`. Not for memory that is page-locked."""
        self.released_bytes += give_pages_back(self._records[layer][expert])
        self._released.add((layer, expert))

    def refill(self, layer: int, expert: int, record: ByteArray) -> None:
        """A released record is there again."""
        self._records[layer][expert][:] = record
        self._released.remove((layer, expert))
        if not self._released:
            self.released_bytes = 0

    def released(self) -> list[tuple[int, int]]:
        """(layer, expert) of each record that was released and is not there again."""
        return sorted(self._released)

    @property
    def held_bytes(self) -> int:
        """Bytes of all records but for the released pages."""
        return self.nbytes - self.released_bytes

    @property
    def is_locked(self) -> bool:
        """Whether its memory is page-locked, so that a device reads it by itself."""
        return is_locked(self._buffer)

    def all_records(self, layer: int) -> ByteArray | None:
        """uint8 [num_experts, record_bytes]: a layer's records in one piece; None where they do not lie so."""
        size, addresses = self._layers[layer].spec.record_bytes, self._addresses[layer]
        if self._released or (np.diff(addresses) != size).any():
            return None
        first = int(addresses[0]) - self._buffer.ctypes.data
        return self._buffer[first : first + len(addresses) * size].reshape(len(addresses), size)

    def addresses(self, layer: int) -> npt.NDArray[np.uint64]:
        """uint64 [num_experts]: where each record of a layer starts."""
        return self._addresses[layer]

    def hold(self, layer: int, experts: Iterable[int]) -> npt.NDArray[np.uint64]:
        """uint64 [n]: where the records of some experts start. They stay there until the next call of this."""
        return self._addresses[layer][list(experts)]

    def write(self, layer: int, expert: int, weights: ExpertWeights) -> None:
        """Packs one expert's float weights, from any device, into its record.

        Raises CheckpointError where its values are not finite.
        """
        weights = weights.to("cpu")  # once: each look at them on a card would wait for it
        for name in ("up", "down", "gate", "gate_bias", "up_bias", "down_bias"):
            values = getattr(weights, name)
            if values is not None and not torch.isfinite(values.sum(dtype=torch.float32)):
                if torch.isfinite(values).all():
                    continue
                raise CheckpointError(
                    f"{self.layers[layer].path}, expert {expert}: {name} has values that are NaN or infinite;"
                    " the checkpoint is damaged"
                )
        pack_expert(self.layers[layer].spec, weights, self.record(layer, expert))

    def read(self, layer: int, expert: int) -> ExpertWeights:
        """The weights of one expert, dequantised; bit-exact for float32 and bfloat16."""
        return unpack_expert(self.layers[layer].spec, self.record(layer, expert))

    def drop(self, gone: npt.NDArray[np.bool_]) -> None:
        """Gives up the records of experts [layers, experts]; the others move to memory of their size.

        A dropped expert reads as zeros, so that a transfer of it is harmless; it is never to be computed.
        """
        kept = [np.flatnonzero(~row[: layer.num_experts]) for row, layer in zip(gone, self._layers, strict=True)]
        sizes = [layer.spec.record_bytes for layer in self._layers]
        hole_bytes = max(sizes)
        pinned = self.is_locked
        total_bytes = sum(len(experts) * size for experts, size in zip(kept, sizes, strict=True))
        buffer = host_bytes(total_bytes + hole_bytes, pinned)
        buffer[total_bytes:] = 0
        hole, offset, places = total_bytes, 0, []
        for index, (experts, size) in enumerate(zip(kept, sizes, strict=True)):
            at = np.full(self._layers[index].num_experts, hole, np.int64)
            for expert in experts.tolist():
                buffer[offset : offset + size] = self.record(index, expert)
                at[expert] = offset
                offset += size
            places.append(at)
        self._place(buffer, places)
        self.complete = False

    def check(self) -> None:
        """Raises CheckpointError where bytes of records are lost that a computation may have used."""

    @property
    def failed_reads(self) -> str | None:
        """How many reads of experts from disk have failed, and why the latest did; None where none has."""
        return None

    def expect_again(self, again: bool) -> None:
        """Whether the layer that is called next will be called again before any later one: its experts then stay in
        memory rather than those of other layers."""

    def close(self) -> None:
        """Nothing is brought into memory any more."""

    @property
    def layers(self) -> tuple[LayerSpec, ...]:
        """What is stored, in layer order."""
        return self._layers

    @property
    def buffer(self) -> ByteArray:
        """All records as one uint8 array."""
        return self._buffer

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""
        return int(self._buffer.nbytes)

    def _attach(self, layers: tuple[LayerSpec, ...], buffer: ByteArray) -> None:
        self._layers = layers
        self.complete = True
        self.released_bytes = 0
        self._released: set[tuple[int, int]] = set()
        offset, places = 0, []
        for layer in layers:
            places.append(offset + np.arange(layer.num_experts, dtype=np.int64) * layer.spec.record_bytes)
            offset += layer.nbytes
        self._place(buffer, places)

    def _place(self, buffer: ByteArray, places: Sequence[npt.NDArray[np.int64]]) -> None:
        """Records lie in `buffer` at these offsets, one array [num_experts] a layer."""
        self._buffer = buffer
        self._records: list[list[ByteArray]] = []
        self._addresses: list[npt.NDArray[np.uint64]] = []
        for layer, offsets in zip(self._layers, places, strict=True):
            size = layer.spec.record_bytes
            self._records.append([buffer[offset : offset + size] for offset in offsets.tolist()])
            self._addresses.append(np.uint64(buffer.ctypes.data) + offsets.astype(np.uint64))


def is_locked(memory: ByteArray) -> bool:
    """Whether memory is page-locked for torch's accelerator."""
    return bool(memory.flags.writeable and memory.nbytes and torch.from_numpy(memory[:1]).is_pinned())


def host_bytes(n_bytes: int, pinned: bool) -> ByteArray:
    """uint8 [n_bytes] at a 64-byte boundary, page-locked if asked. Raises BudgetError where the system refuses them."""
    if n_bytes < mmap.PAGESIZE and not pinned:
        return _aligned(np.empty(n_bytes + ALIGNMENT_BYTES, dtype=np.uint8), n_bytes)
    try:
        return page_locked(n_bytes) if pinned else page_aligned(n_bytes)
    except (OSError, ValueError, OverflowError) as error:
        raise BudgetError(
            f"the experts need {n_bytes / 2**30:.2f} GiB of host memory, which the system refused ({error});"
            " choose a smaller expert_dtype (int8 to int2)"
        ) from error


def give_pages_back(memory: ByteArray) -> int:
    """Has the system take the whole pages within `memory`, uint8 [n]; bytes of them. Of a mapped file they come again
    when they are read, of other memory as zeros. Raises OSError where the system refuses."""
    first = -(-memory.ctypes.data // mmap.PAGESIZE) * mmap.PAGESIZE
    n_bytes = max((memory.ctypes.data + memory.nbytes - first) // mmap.PAGESIZE * mmap.PAGESIZE, 0)
    if n_bytes and ctypes.CDLL(None, use_errno=True).madvise(
        ctypes.c_void_p(first), ctypes.c_size_t(n_bytes), mmap.MADV_DONTNEED
    ):
        code = ctypes.get_errno()
        raise OSError(code, f"the system does not take {n_bytes} bytes of memory back: {os.strerror(code)}")
    return n_bytes


def _aligned(raw: ByteArray, n_bytes: int) -> ByteArray:
    offset = -raw.ctypes.data % ALIGNMENT_BYTES
    return raw[offset : offset + n_bytes]
