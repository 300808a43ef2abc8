"""Memory that is written before anybody needs it."""

import mmap
import threading

import numpy as np

from cpu_kernels.host.ready_memory import STEP_BYTES, ReadyMemory

PATIENCE_S = 30.0


def test_memory_is_taken_once_in_whole_pages_and_then_found_elsewhere() -> None:
    ready = ReadyMemory([3 * STEP_BYTES])
    assert ready.wait(PATIENCE_S)
    first, second = ready.take(STEP_BYTES + 1), ready.take(STEP_BYTES)
    assert (len(first), len(second)) == (STEP_BYTES + 1, STEP_BYTES)
    assert second.ctypes.data - first.ctypes.data == STEP_BYTES + mmap.PAGESIZE
    assert ready.n_bytes == STEP_BYTES - mmap.PAGESIZE
    elsewhere = ready.take(STEP_BYTES)
    assert not first.ctypes.data <= elsewhere.ctypes.data < first.ctypes.data + 3 * STEP_BYTES
    assert ready.n_bytes == STEP_BYTES - mmap.PAGESIZE


def test_what_was_taken_is_not_written_any_more() -> None:
    ready = ReadyMemory([64 * STEP_BYTES])  # its thread has hardly begun
    taken: list[np.ndarray] = []

    def take_some() -> None:
        for _ in range(20):
            piece = ready.take(STEP_BYTES + 4096)
            piece[:] = 7
            taken.append(piece)

    threads = [threading.Thread(target=take_some) for _ in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(PATIENCE_S)
    assert ready.wait(PATIENCE_S)
    assert len(taken) == 40
    assert all((piece == 7).all() for piece in taken)


def test_what_is_dropped_is_not_written_and_not_taken() -> None:
    ready = ReadyMemory([512 * STEP_BYTES])
    kept = ready.take(4096)
    ready.drop()
    assert ready.n_bytes == 0
    assert ready.wait(PATIENCE_S)
    assert not ready.take(4096).any()
    kept[:] = 1


def test_nothing_is_ready_where_nothing_was_asked_for() -> None:
    ready = ReadyMemory(())
    assert ready.wait(PATIENCE_S)
    assert ready.n_bytes == 0
    assert len(ready.take(10)) == 10
