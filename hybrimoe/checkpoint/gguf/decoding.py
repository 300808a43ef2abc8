"""Reads tensors of GGUF files and decodes their blocks: whole, or one expert's slice.

Quantised types are decoded by llama.cpp's own package gguf (numpy), a few rows at a time.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from hybrimoe.checkpoint.gguf.file import GgufTensor
from hybrimoe.checkpoint.gguf.tensor_types import TensorType
from hybrimoe.checkpoint.reading import read_bytes
from hybrimoe.checkpoint.stored import Storage
from hybrimoe.errors import CheckpointError, MissingExtraError

PACKED_REMARKS = {
    **dict.fromkeys(("Q4_0", "Q8_0"), "codes stay, scales are rounded to bfloat16"),
    "MXFP4": "nothing changes",
}
"""What packing experts as the dtype that suits them changes, by type; others are rounded again."""
VALUES_AT_A_TIME = 1 << 20
"""Decoded at once: the package needs up to ten float32 temporaries a value, 40 MiB together."""


@dataclass(frozen=True, slots=True)
class DecodedTensor:
    """A tensor of a file as a source of weights."""

    tensor: GgufTensor

    @property
    def stored(self) -> tuple[GgufTensor, ...]:
        """The tensors of the file that this source is made from: the one."""
        return (self.tensor,)

    @property
    def key(self) -> str:
        """Its name in the file."""
        return self.tensor.key

    @property
    def shape(self) -> tuple[int, ...]:
        """In torch's order."""
        return self.tensor.shape

    @property
    def storage(self) -> Storage:
        """How its values lie in the file."""
        return storage_of(self.tensor.kind)

    @property
    def dtype(self) -> torch.dtype:
        """Of what `read` gives: the file's own, float32 for quantised types."""
        return dtype_of(self.tensor.kind)

    def read(self) -> torch.Tensor:
        """The whole tensor. Raises CheckpointError where the file ends inside it."""
        return self._values(self.tensor.offset_bytes, self.shape)

    def read_slice(self, index: int) -> torch.Tensor:
        """[1, ...]: entry `index` of the first dimension; the others are not read."""
        if not 0 <= index < self.shape[0]:
            raise CheckpointError(
                f"{self.key} has {self.shape[0]} entries, entry {index} was asked for ({self.tensor.file})"
            )
        shape = (1, *self.shape[1:])
        return self._values(self.tensor.offset_bytes + index * self.tensor.kind.n_bytes(shape), shape)

    def _values(self, offset_bytes: int, shape: tuple[int, ...]) -> torch.Tensor:
        kind = self.tensor.kind
        return decoded(kind, read_bytes(self.tensor.file, self.key, offset_bytes, kind.n_bytes(shape)), shape)


def storage_of(kind: TensorType) -> Storage:
    """What a type is, and which records suit it: the smallest that do not round its codes again, else int8."""
    if kind.dtype is not None:
        return Storage(kind.name)
    remark = PACKED_REMARKS.get(kind.name, "rounded again")
    return Storage(kind.name, "int4" if kind.name == "Q4_0" else "int8", remark)


def dtype_of(kind: TensorType) -> torch.dtype:
    """Of decoded values."""
    dtype: torch.dtype = getattr(torch, kind.dtype or "float32")
    return dtype


def decoded(kind: TensorType, raw: torch.Tensor, shape: tuple[int, ...]) -> torch.Tensor:
    """The values of `shape` that uint8 [n] stands for, as `dtype_of` says.

    Raises MissingExtraError where a quantised type needs the package gguf and it is not installed.
    """
    if kind.dtype is not None:
        return raw.view(dtype_of(kind)).reshape(shape)
    columns = shape[-1]
    rows = raw.numpy().reshape(-1, columns // kind.block_values * kind.block_bytes)
    values = torch.empty(rows.shape[0], columns)
    step = max(1, VALUES_AT_A_TIME // columns)
    for start in range(0, rows.shape[0], step):
        values[start : start + step] = _dequantised(kind, rows[start : start + step])
    return values.reshape(shape)


def _dequantised(kind: TensorType, rows: np.ndarray) -> torch.Tensor:
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("gguf", f"{kind.name} weights are decoded by the package gguf") from error
    with np.errstate(all="ignore"):  # a damaged scale gives infinities, which are found where weights are packed
        return torch.from_numpy(gguf.quants.dequantize(rows, gguf.GGMLQuantizationType(kind.code)))
