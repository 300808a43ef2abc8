"""Measured read bandwidth of main memory: what a kernel that streams weights can reach at most."""

import time

import numpy as np

from cpu_kernels.engine.team import run_on_team, start_team
from cpu_kernels.host.memory import page_aligned
from cpu_kernels.host.threads import resolve_threads
from cpu_kernels.jit.compiled import Worker
from cpu_kernels.jit.primitives import int64s_at, take_ticket

CHUNK = 1 << 20  # bytes a thread reads at a time
ADDRESS, N_CHUNKS, TICKET, TOTAL, CALL = range(5)


def _read(call_address: int, thread: int) -> None:
    """Worker: sums chunks of int64."""
    call = int64s_at(call_address, CALL)
    while True:
        chunk = take_ticket(call_address + 8 * TICKET)
        if chunk >= call[N_CHUNKS]:
            return
        values = int64s_at(call[ADDRESS] + chunk * CHUNK, CHUNK // 8)
        total = 0
        for i in range(values.size):
            total += values[i]
        call[TOTAL] += total  # keeps the sum alive; its value does not matter


READ_WORK = Worker(_read)


class ReadBandwidth:
    """Reads a buffer much larger than the last-level cache; `measure()` gives 10^9 bytes a second."""

    def __init__(self, n_bytes: int = 256 << 20, threads: int | None = None) -> None:
        self.n_threads = resolve_threads(threads)
        start_team(self.n_threads)
        self._memory = page_aligned(max(1, n_bytes // CHUNK) * CHUNK)  # as the experts lie
        self._memory.fill(1)
        self._call = np.zeros(CALL, np.int64)
        self._call[ADDRESS], self._call[N_CHUNKS] = self._memory.ctypes.data, self._memory.size // CHUNK

    def measure(self) -> float:
        """One pass over the buffer."""
        self._call[TICKET] = 0
        worker, call = READ_WORK.address, self._call.ctypes.data
        start = time.perf_counter()
        run_on_team(worker, call, self.n_threads)
        return float(self._memory.size / (time.perf_counter() - start) / 1e9)
