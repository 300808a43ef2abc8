"""Many tokens' keys or values at once, into the rows of a KV cache and out of them, on all threads.

The compiled step writes and reads rows one by one; these are for what comes from elsewhere: a prompt's keys and values,
which transformers' forward computes and looks at as floats.
"""

import numpy as np
import torch

from cpu_kernels.engine.team import run_on_team, start_team
from cpu_kernels.errors import LayoutError
from cpu_kernels.host.threads import resolve_threads
from cpu_kernels.jit.compiled import Worker, kernel
from cpu_kernels.jit.primitives import int64s_at, take_ticket
from cpu_kernels.step.floats import BFLOAT16, FLOAT32, read_row, write_row
from cpu_kernels.step.stored import is_turned, read_stored, row_bytes, store_row, turn

# A call: sizes, how the rows are stored, which way they go; address of the floats, how they are stored, bytes from
# one sequence, head and token to the next; the same of the rows.
(NEXT, N_HEADS, N_TOKENS, DIM, N_TASKS, KIND, LOADS, FLOATS, FLOATS_KIND, F_BATCH, F_HEAD, F_TOKEN, ROWS, R_BATCH,
 R_HEAD, R_TOKEN, ROWS_CALL) = range(17)  # fmt: skip
STORED, LOADED, AS_STORED, TURNED = range(4)
"""What LOADS says: rows are written; read, and turned back where they are turned; read as they are; read and turned."""
TASK_TOKENS = 64
FLOAT_KINDS = {torch.float32: FLOAT32, torch.bfloat16: BFLOAT16}


def store_tokens(kind: int, floats: torch.Tensor, rows: torch.Tensor, threads: int | None = None) -> None:
    """rows = floats, stored as `kind`.

    floats: float32 or bfloat16 [B, heads, T, D]. rows: [B, heads, T, bytes or values of a row] of any dtype. The last
    dimension of both is contiguous, and both are in host memory. Raises LayoutError where sizes do not fit.
    """
    _run(kind, floats, rows, STORED, threads)


def load_tokens(
    kind: int, rows: torch.Tensor, floats: torch.Tensor, threads: int | None = None, *, as_stored: bool = False
) -> None:
    """floats = what `rows` stand for; as `store_tokens`. as_stored: codes stay turned."""
    _run(kind, floats, rows, AS_STORED if as_stored else LOADED, threads)


def turned(floats: torch.Tensor, threads: int | None = None) -> torch.Tensor:
    """float32 [B, heads, T, D]: `floats` (float32 or bfloat16) turned, as rows of codes are."""
    result = torch.empty(floats.shape)
    _run(FLOAT_KINDS[floats.dtype], result, floats if floats.stride(3) == 1 else floats.contiguous(), TURNED, threads)
    return result


def make_ready() -> None:
    """Compiles (or loads from the cache) what the first prompt would otherwise wait for."""
    turned(torch.zeros(1, 1, 1, 1))


def _run(kind: int, floats: torch.Tensor, rows: torch.Tensor, loads: int, threads: int | None) -> None:
    expected = (*floats.shape[:3], row_bytes(kind, floats.shape[3]))
    found = (*rows.shape[:3], rows.shape[3] * rows.element_size())
    if floats.dtype not in FLOAT_KINDS or expected != found or floats.stride(3) != 1 or rows.stride(3) != 1:
        raise LayoutError(
            f"expected float32 or bfloat16 [B, heads, T, D] and rows of {list(expected)} bytes, both contiguous in the"
            f" last dimension; found {floats.dtype}{list(floats.shape)} and rows of {list(found)} bytes"
        )
    if not floats.numel():
        return
    n_batch, n_heads, n_tokens, dim = floats.shape
    n_tasks = n_batch * n_heads * -(-n_tokens // TASK_TOKENS)
    counter, call = np.zeros(1, np.int64), np.zeros(ROWS_CALL, np.int64)
    call[[NEXT, N_HEADS, N_TOKENS, DIM, N_TASKS]] = counter.ctypes.data, n_heads, n_tokens, dim, n_tasks
    call[[KIND, LOADS, FLOATS_KIND]] = kind, loads, FLOAT_KINDS[floats.dtype]
    call[FLOATS], call[F_BATCH : F_TOKEN + 1] = floats.data_ptr(), _strides(floats)
    call[ROWS], call[R_BATCH : R_TOKEN + 1] = rows.data_ptr(), _strides(rows)
    n_threads = min(resolve_threads(threads), n_tasks)
    start_team(n_threads)
    _perform(ROWS_WORK.address, call, n_threads)


def _strides(tensor: torch.Tensor) -> list[int]:
    return [tensor.element_size() * stride for stride in tensor.stride()[:3]]


@kernel
def _perform(worker: int, call: np.ndarray, n_threads: int) -> None:
    run_on_team(worker, call.ctypes.data, n_threads)


def _move(call_address: int, thread: int) -> None:
    """Worker. Task: TASK_TOKENS of one head of one sequence."""
    call = int64s_at(call_address, ROWS_CALL)
    n_blocks = (call[N_TOKENS] + TASK_TOKENS - 1) // TASK_TOKENS
    values = np.empty(call[DIM], np.float32)
    while True:
        task = take_ticket(call[NEXT])
        if task >= call[N_TASKS]:
            return
        pair, block = task // n_blocks, task % n_blocks
        batch, head = pair // call[N_HEADS], pair % call[N_HEADS]
        floats = call[FLOATS] + batch * call[F_BATCH] + head * call[F_HEAD]
        rows = call[ROWS] + batch * call[R_BATCH] + head * call[R_HEAD]
        for token in range(block * TASK_TOKENS, min(call[N_TOKENS], (block + 1) * TASK_TOKENS)):
            source, row = floats + token * call[F_TOKEN], rows + token * call[R_TOKEN]
            if call[LOADS]:
                read_stored(call[KIND], row, values, np.float32(1))
                if call[LOADS] == TURNED or (call[LOADS] == LOADED and is_turned(call[KIND])):
                    turn(values)
                write_row(call[FLOATS_KIND], source, values)
            else:
                read_row(call[FLOATS_KIND], source, values, np.float32(1))
                store_row(call[KIND], row, values)


ROWS_WORK = Worker(_move)
