"""Blocks of tokens put together in a KV cache: many small copies as one call on all threads.

A block of 64 tokens lies in the rows of a cache as a piece of each head. Copied one by one from Python, a thousand such
pieces take longer than their bytes do.
"""

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from llvmlite import ir
from numba import types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels.engine.team import run_on_team, start_team
from cpu_kernels.errors import LayoutError
from cpu_kernels.host.threads import resolve_threads
from cpu_kernels.jit.compiled import Worker, kernel
from cpu_kernels.jit.primitives import int64s_at, take_ticket

# A call: its next task, heads of a sequence and of the whole batch, bytes of the target from one sequence and head to
# the next, number of tasks, address of the table of pieces.
NEXT, N_HEADS, N_RUNS, T_BATCH, T_HEAD, N_TASKS, PIECES, COPY_CALL = range(8)
# A piece: address and strides in bytes of its rows, address of their place in the target, bytes of its rows in a head.
SOURCE, S_BATCH, S_HEAD, TARGET, N_BYTES, PIECE = range(6)


def join_tokens(target: torch.Tensor, parts: Sequence[torch.Tensor], threads: int | None = None) -> None:
    """target [B, heads, T, row] = the `parts` [B, heads, n, row] one after another, which have T tokens together.

    All are in host memory, of one dtype, and hold the rows of one head one after another. Raises LayoutError where that
    is not so.
    """
    row_bytes = target.shape[3] * target.element_size()
    alike = (target.shape[0], target.shape[1], target.shape[3], target.dtype)
    pieces = np.empty((len(parts), PIECE), np.int64)
    at = target.data_ptr()
    for number, part in enumerate(parts):
        n_bytes = part.shape[2] * row_bytes
        if (part.shape[0], part.shape[1], part.shape[3], part.dtype) != alike or not _are_rows(part):
            raise LayoutError(_expected(target, part))
        pieces[number] = part.data_ptr(), part.stride(0), part.stride(1), at, n_bytes
        at += n_bytes
    if at - target.data_ptr() != target.shape[2] * row_bytes or not _are_rows(target):
        raise LayoutError(_expected(target, *parts))
    pieces[:, S_BATCH : S_HEAD + 1] *= target.element_size()
    n_runs = target.shape[0] * target.shape[1]
    n_tasks = len(parts) * n_runs
    if not n_tasks:
        return
    counter, call = np.zeros(1, np.int64), np.zeros(COPY_CALL, np.int64)
    call[[NEXT, N_HEADS, N_RUNS, N_TASKS]] = counter.ctypes.data, target.shape[1], n_runs, n_tasks
    call[[T_BATCH, T_HEAD]] = [target.element_size() * target.stride(axis) for axis in (0, 1)]
    call[PIECES] = pieces.ctypes.data
    n_threads = min(resolve_threads(threads), n_tasks)
    start_team(n_threads)
    _perform(COPY_WORK.address, call, n_threads)


def warm_up_copies() -> None:
    """Compiles `join_tokens` or loads it, so that no prompt waits for that."""
    join_tokens(torch.zeros(1, 1, 1, 1), [torch.zeros(1, 1, 1, 1)])


def _are_rows(part: torch.Tensor) -> bool:
    """Whether the rows of a head lie one after another in host memory."""
    n_row = part.shape[3]
    one_by_one = part.shape[2] < 2 or part.stride(2) == n_row
    return part.device.type == "cpu" and one_by_one and (n_row < 2 or part.stride(3) == 1)


def _expected(target: torch.Tensor, *parts: torch.Tensor) -> str:
    found = ", ".join(f"{one.dtype}{list(one.shape)} with strides {list(one.stride())}" for one in parts[:2])
    return (
        f"expected parts of {target.dtype} [B, heads, n, row] that make up {list(target.shape)} together, with the rows"
        f" of a head one after another in host memory; found {found or 'none'}"
    )


@kernel
def _perform(worker: int, call: np.ndarray, n_threads: int) -> None:
    run_on_team(worker, call.ctypes.data, n_threads)


@intrinsic
def _copy_bytes(typingctx: Any, target: Any, source: Any, n_bytes: Any) -> Any:
    """Copies n_bytes (int64) between two addresses whose memory does not overlap, as the C library does."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        to, source, n = arguments
        pointer = ir.IntType(8).as_pointer()
        cgutils.raw_memcpy(builder, builder.inttoptr(to, pointer), builder.inttoptr(source, pointer), n, 1)
        return context.get_dummy_value()

    return types.void(types.int64, types.int64, types.int64), code


def _copy(call_address: int, thread: int) -> None:
    """Worker. Task: the rows of one part in one head of one sequence."""
    call = int64s_at(call_address, COPY_CALL)
    while True:
        task = take_ticket(call[NEXT])
        if task >= call[N_TASKS]:
            return
        run = task % call[N_RUNS]
        piece = int64s_at(call[PIECES] + task // call[N_RUNS] * (8 * PIECE), PIECE)
        batch, head = run // call[N_HEADS], run % call[N_HEADS]
        source = piece[SOURCE] + batch * piece[S_BATCH] + head * piece[S_HEAD]
        _copy_bytes(piece[TARGET] + batch * call[T_BATCH] + head * call[T_HEAD], source, piece[N_BYTES])


COPY_WORK = Worker(_copy)
