"""A plain quantised linear layer from the same tiles as the experts: attention projections, lm_head."""

import os
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch

from cpu_kernels.errors import KernelError, LayoutError
from cpu_kernels.format.layout import PAD, matrix_bytes, padded
from cpu_kernels.format.pack import pack_matrix, record_tensor, unpack_matrix
from cpu_kernels.format.spec import DTYPES, ExpertDtype
from cpu_kernels.host.threads import torch_threads

FLOAT_ROWS = 16 * PAD
"""Rows that are float32 at once where a matrix is packed or unpacked: with 4096 columns 16 MiB."""
MAX_PACKERS = 8
"""Threads that pack a matrix: beyond it, memory decides."""


@dataclass(frozen=True)
class LinearSpec:
    """Shape and storage dtype of a weight matrix [out_features, in_features]."""

    in_features: int
    out_features: int
    dtype: ExpertDtype

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise KernelError(f"dtype {self.dtype!r} is unknown; expected one of {', '.join(DTYPES)}")
        if self.in_features < 1 or self.out_features < 1:
            raise KernelError(f"expected at least 1 x 1 weights, found {self.out_features} x {self.in_features}")

    @cached_property
    def record_bytes(self) -> int:
        """Size of the packed matrix in bytes, a multiple of 64."""
        return matrix_bytes(self.out_features, self.in_features, self.dtype)


def pack_linear(spec: LinearSpec, weight: torch.Tensor, out: np.ndarray) -> None:
    """Writes a float matrix [out_features, in_features] into the record `out` (uint8[spec.record_bytes]).

    A few rows at a time on several threads: the matrix is never whole in float32. Raises LayoutError for a wrong shape
    or buffer, and for weights that are not finite.
    """
    if tuple(weight.shape) != (spec.out_features, spec.in_features) or not weight.is_floating_point():
        raise LayoutError(
            f"expected a float matrix {[spec.out_features, spec.in_features]}, found {weight.dtype}{list(weight.shape)}"
        )
    data, columns = record_tensor(spec.record_bytes, out), padded(spec.in_features)

    def pack_rows(start: int) -> None:
        end = min(start + FLOAT_ROWS, padded(spec.out_features))
        first, last = (matrix_bytes(row, columns, spec.dtype) for row in (start, end))
        with torch_threads(1):
            pack_matrix(weight[start:end], spec.dtype, "linear", data[first:last])

    starts = range(0, spec.out_features, FLOAT_ROWS)
    with ThreadPoolExecutor(min(len(starts), os.cpu_count() or 1, MAX_PACKERS)) as pool:
        list(pool.map(pack_rows, starts))


def unpack_linear(spec: LinearSpec, record: np.ndarray | torch.Tensor) -> torch.Tensor:
    """The (dequantised) matrix float32 [out_features, in_features], on the record's device."""
    data = record_tensor(spec.record_bytes, record)
    matrix = unpack_matrix(data, padded(spec.out_features), padded(spec.in_features), spec.dtype)
    return matrix[: spec.out_features, : spec.in_features].float()


def unpack_linear_blocks(spec: LinearSpec, record: np.ndarray | torch.Tensor) -> Iterator[tuple[int, torch.Tensor]]:
    """`unpack_linear` a few rows at a time, so that the float matrix is never whole.

    Yields (first row, float32 [up to FLOAT_ROWS, in_features]) in the order of the rows.
    """
    data = record_tensor(spec.record_bytes, record)
    columns = padded(spec.in_features)
    for start in range(0, spec.out_features, FLOAT_ROWS):
        rows = min(FLOAT_ROWS, padded(spec.out_features) - start)
        first, n_bytes = matrix_bytes(start, columns, spec.dtype), matrix_bytes(rows, columns, spec.dtype)
        block = unpack_matrix(data[first : first + n_bytes], rows, columns, spec.dtype)
        yield start, block[: spec.out_features - start, : spec.in_features].float()


def check_linear(spec: LinearSpec, address: int, x: np.ndarray, out: np.ndarray) -> None:
    """Raises LayoutError unless the arguments of `run_linear` fit together."""
    n_tokens = x.shape[0] if x.ndim == 2 else -1
    for name, array, shape in (("x", x, (n_tokens, spec.in_features)), ("out", out, (n_tokens, spec.out_features))):
        if array.dtype != np.float32 or array.shape != shape or not array.flags.c_contiguous:
            found = f"{array.dtype}{list(array.shape)}"
            raise LayoutError(f"{name} must be C-contiguous float32{list(shape)}, found {found}")
    if address == 0:
        raise LayoutError("the address of the packed matrix is 0")
    if not out.flags.writeable or np.may_share_memory(x, out):
        raise LayoutError("out must be writable and must not overlap x")
