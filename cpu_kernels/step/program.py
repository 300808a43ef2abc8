"""A step as data: a table of operations, the state that they share, and the memory that they point into.

Everything is int64 vectors with named positions. An operation is a worker's address and the address of its own call
vector; workers take tasks from counters, so that unequal loads even out, and every task's result depends on its own
inputs only: the bits are the same for any number of threads.
"""

from dataclasses import dataclass, field
from enum import IntEnum

import numpy as np

from cpu_kernels.engine.call import LINE
from cpu_kernels.errors import KernelError
from cpu_kernels.jit.compiled import Worker

MAX_ROWS = 64
"""Tokens of a step, over all its sequences: so many of a prompt read the weights once."""
MAX_LOGITS = 16
"""Tokens of a step that have logits: the last ones of one sequence, or all of several."""
SCRATCH_BYTES = 64 * 1024
"""Of each thread, for what a task needs only while it runs."""

# An operation. PRESENT: address of a counter of the threads that began it (upper half) and that ended it (lower half);
# behind it those that sleep on it.
WORKER, CALL, MEETS, PART, PRESENT, OP_SIZE = range(6)
# The state. FIRST_ROW: the first of the N_ROWS rows that an operation of the output layer reads; 0 of all others.
(N_ROWS, N_THREADS, OPERATIONS, FIRST, STOP, ROWS, NOT_FINITE, SCRATCH, TICKS, MASK, MASK_ROW,
 FIRST_ROW, STATE_SIZE) = range(13)  # fmt: skip
# A row: one new token of a sequence. SEEN: cached tokens up to itself, itself included; PADDING: those of them that are
# padding before the sequence. POSITION: where the model says that it stands.
TOKEN, SEQUENCE, SEEN, PADDING, POSITION, ROW_SIZE = range(6)


class Part(IntEnum):
    """What an operation's time is counted as."""

    NORMS = 0
    PROJECTIONS = 1
    ATTENTION = 2
    ROUTER = 3
    EXPERTS = 4
    SHARED_EXPERTS = 5
    OUTPUT_LAYER = 6


@dataclass(slots=True)
class Program:
    """Operations in the order in which they are performed. All memory that they name is kept here.

    n_threads: of the team. buffers: of rows, by name and size; programs that run one at a time may share them. The
    lists grow while a program is built; `seal` makes the table that `run_step` reads.
    """

    n_threads: int
    buffers: dict[tuple[str, int], np.ndarray] = field(default_factory=dict)
    state: np.ndarray = field(init=False)  # int64 [STATE_SIZE]
    head_state: np.ndarray = field(init=False)  # int64 [STATE_SIZE], of what comes after the last layer
    rows: np.ndarray = field(init=False)  # int64 [MAX_ROWS, ROW_SIZE]
    ticks: np.ndarray = field(init=False)  # int64 [len(Part)], since the program was made
    counters: np.ndarray = field(init=False)  # int64, zeroed before each run
    table: np.ndarray = field(init=False)  # int64 [operations, OP_SIZE]
    _operations: list[list[int]] = field(default_factory=list)
    _kept: list[np.ndarray] = field(default_factory=list)
    _n_lines: int = 0
    _patches: list[tuple[np.ndarray, int, int]] = field(default_factory=list)

    def __post_init__(self) -> None:
        self.state, self.head_state = self.zeros(STATE_SIZE, np.int64), self.zeros(STATE_SIZE, np.int64)
        self.rows = self.zeros(MAX_ROWS * ROW_SIZE, np.int64).reshape(MAX_ROWS, ROW_SIZE)
        self.ticks = self.zeros(len(Part), np.int64)
        scratch = self._buffer("scratch of threads", self.n_threads * SCRATCH_BYTES)
        self.state[[N_THREADS, ROWS]] = self.n_threads, self.rows.ctypes.data
        self.state[[TICKS, SCRATCH]] = self.ticks.ctypes.data, scratch

    def zeros(self, n: int, dtype: type[np.generic]) -> np.ndarray:
        """A vector on a cache line, kept as long as the program."""
        size = n * np.dtype(dtype).itemsize
        raw = np.zeros(size + LINE, np.uint8)
        start = -raw.ctypes.data % LINE
        array: np.ndarray = raw[start : start + size].view(dtype)
        self._kept.append(raw)
        return array

    def keep(self, array: np.ndarray) -> int:
        """Keeps an array as long as the program; returns its address."""
        self._kept.append(array)
        return int(array.ctypes.data)

    def buffer(self, name: str, row_bytes: int) -> int:
        """Address of [MAX_ROWS] rows of so many bytes; the same name and size is the same memory."""
        return self._buffer(name, MAX_ROWS * row_bytes)

    def _buffer(self, name: str, n_bytes: int) -> int:
        if (name, n_bytes) not in self.buffers:
            self.buffers[name, n_bytes] = self.zeros(n_bytes, np.uint8)
        return int(self.buffers[name, n_bytes].ctypes.data)

    def logits(self, n_out: int) -> int:
        """Address of float32 [MAX_LOGITS, n_out]."""
        return self._buffer("logits", MAX_LOGITS * 4 * n_out)

    def floats(self, name: str, width: int) -> int:
        """Address of float32 [MAX_ROWS, width]."""
        return self.buffer(name, 4 * width)

    def count(self, call: np.ndarray, position: int, n_lines: int = 1) -> None:
        """Lets `call[position]` point at n_lines counters (a cache line each), zero at the start of each run."""
        self._patches.append((call, position, self._n_lines))
        self._n_lines += n_lines

    def add(self, worker: Worker, call: np.ndarray, part: Part, *, meets: bool = True) -> int:
        """Appends an operation; returns its number. meets: it is finished before the next one begins."""
        self._kept.append(call)
        self._operations.append([worker.address, int(call.ctypes.data), int(meets), int(part), self._n_lines])
        self._n_lines += 1
        return len(self._operations) - 1

    def __len__(self) -> int:
        return len(self._operations)

    def seal(self) -> None:
        """Makes the table and the counters. Raises KernelError for a program without operations."""
        if not self._operations:
            raise KernelError("a step without operations: nothing was compiled")
        self.table = self.zeros(len(self._operations) * OP_SIZE, np.int64).reshape(-1, OP_SIZE)
        self.table[:] = self._operations
        self.counters = self.zeros(self._n_lines * LINE // 8, np.int64)
        self.table[:, PRESENT] = self.counters.ctypes.data + LINE * self.table[:, PRESENT]
        for call, position, line in self._patches:
            call[position] = self.counters.ctypes.data + LINE * line
        self.state[OPERATIONS] = self.table.ctypes.data
