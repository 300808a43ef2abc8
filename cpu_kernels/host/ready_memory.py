"""Memory that is written before anybody needs it, so that whoever fills it does not wait for the system."""

import threading
from collections.abc import Sequence

import numpy as np

from cpu_kernels.host.memory import HUGE_PAGE, page_aligned

__all__ = ["ReadyMemory"]

STEP_BYTES = HUGE_PAGE
"""That are written at once: whoever takes memory meanwhile waits for no more."""
PAGE_BYTES = 4096


class ReadyMemory:
    """Pieces of zeros, of `sizes` bytes, that a thread of its own writes; each is taken once. Any thread may call.

    A page that a process has not written yet is found and cleared by the system when it is: 134 MiB take about 18 ms.
    A virtual machine that gives free memory back to its host first asks for it again: 0.3 to 1.2 s were measured.
    """

    def __init__(self, sizes: Sequence[int]) -> None:
        self._pieces = [page_aligned(size) for size in sizes]
        self._used = [0] * len(sizes)
        """Bytes of each piece that were taken, in whole pages."""
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._write, name="hybrimoe-memory", daemon=True)
        self._thread.start()

    @property
    def n_bytes(self) -> int:
        """That nobody has taken."""
        return sum(map(len, self._pieces)) - sum(self._used)

    def take(self, n_bytes: int) -> np.ndarray:
        """uint8 [n_bytes] of zeros, page aligned: of the first piece that has so many left, else new."""
        with self._lock:
            for number, piece in enumerate(self._pieces):
                begin = self._used[number]
                if begin + n_bytes <= len(piece):
                    self._used[number] = min(len(piece), -(-(begin + n_bytes) // PAGE_BYTES) * PAGE_BYTES)
                    return piece[begin : begin + n_bytes]
        return page_aligned(n_bytes)

    def drop(self) -> None:
        """What nobody has taken is given back, as soon as nobody holds anything of the same piece."""
        with self._lock:
            self._pieces, self._used = [], []

    def wait(self, seconds: float) -> bool:
        """Wait until all is written; False where it is not after so long."""
        self._thread.join(seconds)
        return not self._thread.is_alive()

    def _write(self) -> None:
        """The thread: what was taken meanwhile is passed over, because it may hold something already."""
        number = at = 0
        while True:
            with self._lock:
                if number >= len(self._pieces):
                    return
                piece = self._pieces[number]
                at = max(at, self._used[number])
                piece[at : at + STEP_BYTES] = 0  # whole pages, for which NumPy lets other threads run Python
                at += STEP_BYTES
                if at >= len(piece):
                    number, at = number + 1, 0
