"""Packed weights of the linear layers of a model: one record a layer, all in one buffer."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from cpu_kernels import LinearSpec, page_aligned


@dataclass(frozen=True, slots=True)
class LinearEntry:
    """One linear layer: its module path, what its record is, and the dtype that its weights had before."""

    path: str
    spec: LinearSpec
    weight_dtype: torch.dtype

    @property
    def weight_key(self) -> str:
        """Name of its weights in the model's state dict."""
        return f"{self.path}.weight"


class DenseRecords:
    """Room for the records of `entries`, in their order, on huge pages: every decode step reads all of it."""

    def __init__(self, entries: Sequence[LinearEntry]) -> None:
        """Raises OSError or ValueError where the system refuses the memory."""
        self.entries = tuple(entries)
        self.buffer: npt.NDArray[np.uint8] = page_aligned(sum(entry.spec.record_bytes for entry in entries))
        self._records: dict[str, npt.NDArray[np.uint8]] = {}
        offset = 0
        for entry in entries:
            self._records[entry.path] = self.buffer[offset : offset + entry.spec.record_bytes]
            offset += entry.spec.record_bytes

    @property
    def nbytes(self) -> int:
        """Bytes of all records."""
        return int(self.buffer.nbytes)

    def record(self, path: str) -> npt.NDArray[np.uint8]:
        """uint8 [record_bytes] view of the layer at `path`. Raises KeyError for another path."""
        return self._records[path]

    def __contains__(self, path: str) -> bool:
        return path in self._records
