"""Compiles (or loads from the cache) everything a first run needs, in steps that a progress bar can show."""

from collections.abc import Callable, Iterable
from functools import partial

import numpy as np
import torch

from cpu_kernels.backends.numba_backend import NumbaBackend
from cpu_kernels.engine.dispatch import build_dispatch, combine, take_records
from cpu_kernels.engine.routed import FLOAT32, read_call, sum_rows
from cpu_kernels.format.pack import pack_expert
from cpu_kernels.format.spec import Activation, ExpertDtype, ExpertSpec, ExpertWeights
from cpu_kernels.simd.compile import kernel_address
from cpu_kernels.simd.tiles import PanelKernel

Progress = Callable[[int, int, str], None]  # steps done, steps in all, what comes next ("" at the end)
SIZE = 192  # of the square expert that is run once: large enough for the parallel path


def warm_up(
    dtypes: ExpertDtype | Iterable[ExpertDtype] = ("bfloat16",),
    progress: Progress | None = None,
    threads: int | None = None,
) -> None:
    """Makes the kernels of `dtypes` ready: about 10 s with an empty cache, 1 s with a filled one."""
    wanted = (dtypes,) if isinstance(dtypes, str) else tuple(dtypes)
    backend = NumbaBackend(threads)
    steps: list[tuple[str, Callable[[], object]]] = []
    for dtype in wanted:
        steps.append((f"{dtype} kernel", partial(kernel_address, PanelKernel(dtype), backend.choice.isa.name)))
        steps.append((f"{dtype} layer", partial(_run_once, backend, dtype)))
    for done, (label, step) in enumerate(steps):
        if progress is not None:
            progress(done, len(steps), label)
        step()
    if progress is not None:
        progress(len(steps), len(steps), "")


def warm_call_ends() -> None:
    """Makes ready what a planned call reads its routing with and sums its rows with."""
    index, ones, hidden = np.zeros((1, 1), np.int64), np.ones((1, 1), np.float32), np.zeros((1, 1), np.float32)
    out = np.empty_like(hidden)
    ids, rows, counts = (np.zeros(1, np.int32) for _ in range(3))
    offsets, routing = np.zeros(2, np.int32), np.zeros(1, np.float32)
    read_call(
        index.ctypes.data, ones.ctypes.data, FLOAT32, 1, 1, hidden.ctypes.data, FLOAT32, out, routing, counts, ids,
        offsets, rows,
    )  # fmt: skip
    take_records(np.zeros(1, np.uint64), ids, np.zeros(1, np.int64), ids.copy(), np.zeros(1, np.uint64))
    sum_rows(hidden, rows, 1, out.ctypes.data, FLOAT32, 1)


def _run_once(backend: NumbaBackend, dtype: ExpertDtype) -> None:
    """Packs and runs one small expert through every compiled function."""
    spec = ExpertSpec(SIZE, SIZE, dtype, Activation("silu"))
    record = np.zeros(spec.record_bytes, np.uint8)
    weight = torch.zeros(SIZE, SIZE)
    pack_expert(spec, ExpertWeights(weight, weight, weight), record)
    dispatch = build_dispatch(np.zeros((1, 2), np.int64), np.ones((1, 2), np.float32), 1)
    hidden = np.zeros((1, SIZE), np.float32)
    rows = np.zeros((2, SIZE), np.float32)
    records = np.array([record.ctypes.data], np.uint64)
    backend.run(spec, records, np.zeros(1, np.int32), dispatch, hidden, rows)
    combine(rows, dispatch, hidden)
    backend.run_routed(spec, records, torch.zeros(1, SIZE), torch.zeros(1, 2, dtype=torch.int64), torch.ones(1, 2))
