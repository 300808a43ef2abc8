"""The backend protocol, the checks all backends share, and the loop of those that work expert by expert."""

import ctypes
from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Protocol, runtime_checkable

import numpy as np
import torch

from cpu_kernels.engine.dispatch import Dispatch
from cpu_kernels.errors import ActivationValueError, BackendError, DispatchError, LayoutError
from cpu_kernels.format.spec import ExpertSpec
from cpu_kernels.jit.compiled import kernel


@runtime_checkable
class CpuBackend(Protocol):
    """Runs experts of one layer on the CPU."""

    name: str

    def supports(self, spec: ExpertSpec) -> str | None:
        """None, or the reason why `spec` does not run on this backend."""
        ...

    def run(
        self,
        spec: ExpertSpec,
        records: np.ndarray,
        positions: np.ndarray,
        dispatch: Dispatch,
        hidden: np.ndarray,
        out_rows: np.ndarray,
    ) -> None:
        """``out_rows[r] = weights[r] * FFN(hidden[r // top_k])`` for each row r of the experts at `positions`.

        records: uint64 [n], addresses of the packed experts; positions: int32 [n], indices into
        dispatch.expert_ids without repeats; hidden: float32 [T, H]; out_rows: float32 [T * top_k, H]. Rows of other
        experts are not touched. The GIL is released. Raises DispatchError, LayoutError, ActivationValueError and
        BackendError.
        """
        ...


def check_run(
    spec: ExpertSpec,
    records: np.ndarray,
    positions: np.ndarray,
    dispatch: Dispatch,
    hidden: np.ndarray,
    out_rows: np.ndarray,
) -> None:
    """Raises unless the arguments of `CpuBackend.run` fit together; values of `hidden` are checked elsewhere."""
    _check_array("hidden", hidden, FLOAT32, (dispatch.n_tokens, spec.hidden))
    _check_array("out_rows", out_rows, FLOAT32, (dispatch.n_tokens * dispatch.top_k, spec.hidden))
    _check_array("positions", positions, INT32, (positions.size,))
    _check_array("records", records, UINT64, (positions.size,))
    if not out_rows.flags.writeable:
        raise LayoutError("out_rows is read-only; it receives the results")
    if np.may_share_memory(hidden, out_rows):
        raise LayoutError("hidden and out_rows overlap; give run() two separate buffers")
    if not positions.size:
        return
    bad = _first_bad_position(positions, records, dispatch.expert_ids.size)
    if bad >= 0:
        raise DispatchError(
            f"positions[{bad}] = {positions[bad]} (record address {records[bad]:#x}) is out of range, repeated or "
            f"has no record: positions index the {dispatch.expert_ids.size} active experts, each at most once"
        )


FLOAT32, INT32, UINT64 = (np.dtype(name) for name in ("float32", "int32", "uint64"))


def _check_array(name: str, array: np.ndarray, dtype: np.dtype, shape: tuple[int, ...]) -> None:
    if array.dtype != dtype or array.shape != shape or not array.flags.c_contiguous:
        layout = "" if array.flags.c_contiguous else ", not contiguous"
        raise LayoutError(
            f"{name} must be C-contiguous {dtype}{list(shape)}, found {array.dtype}{list(array.shape)}{layout}"
        )


def not_finite(row: int) -> ActivationValueError:
    """The error of the first input row that is not finite."""
    return ActivationValueError(
        f"hidden[{row}] contains NaN or infinity before the experts: the error lies in an earlier layer, its weights "
        "or its dtype (float16 overflows where bfloat16 does not)"
    )


def raise_not_finite(row: int) -> None:
    """Reports the first input row that is not finite."""
    raise not_finite(row)


def record_view(address: int, spec: ExpertSpec) -> np.ndarray:
    """The record at `address` as uint8[record_bytes], without a copy."""
    pointer = ctypes.cast(address, ctypes.POINTER(ctypes.c_uint8))
    return np.ctypeslib.as_array(pointer, shape=(spec.record_bytes,))


class PerExpertBackend(ABC):
    """Base of the backends that compute one expert after another through `ffn`."""

    name: str

    def supports(self, spec: ExpertSpec) -> str | None:
        """None, or the reason why `spec` does not run here."""
        return None

    @abstractmethod
    def ffn(self, spec: ExpertSpec, record: np.ndarray, x: torch.Tensor) -> torch.Tensor:
        """float32 [M, H] -> float32 [M, H] for the expert packed in `record`."""

    def run(
        self,
        spec: ExpertSpec,
        records: np.ndarray,
        positions: np.ndarray,
        dispatch: Dispatch,
        hidden: np.ndarray,
        out_rows: np.ndarray,
    ) -> None:
        """See `CpuBackend.run`."""
        check_run(spec, records, positions, dispatch, hidden, out_rows)
        reason = self.supports(spec)
        if reason is not None:
            raise BackendError(f"backend {self.name!r} cannot run {spec.dtype} experts here: {reason}")
        row = int(_first_bad_row(hidden)) if positions.size else -1
        if row >= 0:
            raise_not_finite(row)

        def run_one(address: int, position: int) -> None:
            # Tensors are made here: one of a caller in inference mode could not be written by another thread.
            x, rows_out = torch.from_numpy(hidden), torch.from_numpy(out_rows)
            part = slice(int(dispatch.offsets[position]), int(dispatch.offsets[position + 1]))
            rows = torch.from_numpy(dispatch.rows[part].astype(np.int64))
            weights = torch.from_numpy(dispatch.weights)[rows].unsqueeze(1)
            with torch.no_grad():
                rows_out[rows] = self.ffn(spec, record_view(address, spec), x[rows // dispatch.top_k]) * weights

        self.run_each(run_one, records.tolist(), positions.tolist())

    def run_each(self, run_one: Callable[[int, int], None], addresses: list[int], positions: list[int]) -> None:
        """Calls ``run_one(address, position)`` for every expert; they write to rows of their own."""
        for address, position in zip(addresses, positions, strict=True):
            run_one(address, position)


@kernel
def _first_bad_position(positions: np.ndarray, records: np.ndarray, n_active: int) -> int:
    seen = np.zeros(n_active, np.bool_)
    for index in range(positions.size):
        position = positions[index]
        if position < 0 or position >= n_active or seen[position] or records[index] == 0:
            return index
        seen[position] = True
    return -1


@kernel
def _first_bad_row(hidden: np.ndarray) -> int:
    for row in range(hidden.shape[0]):
        zero = np.float32(0)
        for value in hidden[row]:
            zero += value * np.float32(0)
        if zero != 0:
            return row
    return -1
