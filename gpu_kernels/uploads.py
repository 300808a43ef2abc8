"""Small host arrays to a device without a wait of the host: through page-locked buffers that are used in turn."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

ALIGNMENT_BYTES = 16
"""Where each array begins in a buffer: every dtype's view needs it, and kernels may read 16 bytes at once."""
LARGEST_BYTES = 8 << 20
"""More than this (the rows of a long prompt) is copied from where it lies; the host then waits for the copy."""
SMALLEST_BYTES = 64 << 10
"""Buffers are at least so large, so that one serves every call of a decode step."""

Array = npt.NDArray[Any]


class Uploads:
    """Copies on the current stream of `device`. A buffer is written again only once its last copy has ended."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ring: deque[tuple[torch.Tensor, torch.Event]] = deque()

    def send(self, *arrays: Array) -> list[torch.Tensor]:
        """Each array as a tensor of its shape and dtype on the device, ready for what the current stream does next."""
        if self._device.type == "cpu":
            return [torch.from_numpy(np.ascontiguousarray(array)) for array in arrays]
        starts, n_bytes = _places(arrays)
        if n_bytes > LARGEST_BYTES:
            return [torch.from_numpy(np.ascontiguousarray(array)).to(self._device) for array in arrays]
        buffer, event = self._free_buffer(n_bytes)
        held = buffer.numpy()
        for start, array in zip(starts, arrays, strict=True):
            held[start : start + array.nbytes].view(array.dtype).reshape(array.shape)[...] = array
        sent = torch.empty(n_bytes, dtype=torch.uint8, device=self._device)
        sent.copy_(buffer[:n_bytes], non_blocking=True)
        event.record(torch.accelerator.current_stream(self._device))
        self._ring.append((buffer, event))
        return [
            sent[start : start + array.nbytes].view(_torch_dtype(array.dtype)).view(array.shape)
            for start, array in zip(starts, arrays, strict=True)
        ]

    def _free_buffer(self, n_bytes: int) -> tuple[torch.Tensor, torch.Event]:
        """The buffer that was sent longest ago if its copy has ended and it is large enough, else a new one."""
        if self._ring and self._ring[0][1].query():
            buffer, event = self._ring.popleft()
            if buffer.numel() >= n_bytes:
                return buffer, event
        size = max(SMALLEST_BYTES, 1 << (n_bytes - 1).bit_length())
        return torch.empty(size, dtype=torch.uint8, pin_memory=True), torch.Event(self._device)


def _places(arrays: Sequence[Array]) -> tuple[list[int], int]:
    """Where each array begins in a buffer, and the bytes of all of them."""
    starts, at = [], 0
    for array in arrays:
        starts.append(at)
        at += -(-array.nbytes // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return starts, max(at, ALIGNMENT_BYTES)


@cache
def _torch_dtype(dtype: np.dtype[Any]) -> torch.dtype:
    return torch.from_numpy(np.empty(0, dtype)).dtype
