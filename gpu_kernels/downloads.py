"""Small device tensors to the host by one wait: through a page-locked buffer that the next ones overwrite."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch

from gpu_kernels.waiting import limit_of

ALIGNMENT_BYTES = 16
"""Where each tensor begins in the buffer."""
SMALLEST_BYTES = 64 << 10
"""The buffer is at least so large, so that one serves every call of a decode step."""
MAX_FORMS = 64
"""Sets of shapes whose places in the buffer are remembered."""

Form = tuple[tuple[torch.Size, torch.dtype], ...]


class Downloads:
    """Copies from one device. Each tensor's copy is submitted, then the host waits once, for the last."""

    def __init__(self, device: torch.device) -> None:
        self._device = device
        self._ready = torch.Event(device)
        self._buffer = torch.empty(0, dtype=torch.uint8)
        self._places: dict[Form, list[torch.Tensor]] = {}

    def fetch(self, *tensors: torch.Tensor) -> list[torch.Tensor]:
        """Each tensor of the device as one of its shape and dtype on the host: valid until the next `fetch`. Raises
        LostError where the device has failed, or hangs."""
        form = tuple((tensor.shape, tensor.dtype) for tensor in tensors)
        landed = self._places.get(form) or self._place(form)
        for place, tensor in zip(landed, tensors, strict=True):
            place.copy_(tensor.detach() if tensor.requires_grad else tensor, non_blocking=True)
        self._ready.record(torch.accelerator.current_stream(self._device))
        limit_of(self._device).wait(self._ready, "the work before a copy to the host")
        return landed

    def _place(self, form: Form) -> list[torch.Tensor]:
        """Gives tensors of these shapes and dtypes their places in the buffer."""
        starts, n_bytes = starts_of(form)
        with torch.inference_mode(False):  # later calls write to it in whichever mode
            if n_bytes > self._buffer.numel():
                size = max(SMALLEST_BYTES, 1 << (n_bytes - 1).bit_length())
                self._buffer = torch.empty(size, dtype=torch.uint8, pin_memory=True)
                self._places.clear()
            if len(self._places) >= MAX_FORMS:
                self._places.clear()
            places = self._places[form] = [
                self._buffer[start : start + shape.numel() * dtype.itemsize].view(dtype).view(shape)
                for start, (shape, dtype) in zip(starts, form, strict=True)
            ]
        return places


def starts_of(form: Iterable[tuple[torch.Size, torch.dtype]]) -> tuple[Sequence[int], int]:
    """Where each tensor begins in a buffer, and the bytes of all of them."""
    starts, at = [], 0
    for shape, dtype in form:
        starts.append(at)
        at += -(-shape.numel() * dtype.itemsize // ALIGNMENT_BYTES) * ALIGNMENT_BYTES
    return starts, at
