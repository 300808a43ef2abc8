"""Matrix products of a step: packed matrices by the kernels of the experts, and matrices as the model holds them."""

from dataclasses import dataclass

import numpy as np

from cpu_kernels.engine import call as engine
from cpu_kernels.engine.plans import linear_plan
from cpu_kernels.engine.workers import DOWN_WORK
from cpu_kernels.format.layout import BLOCK_COLUMNS, padded
from cpu_kernels.format.linear import LinearSpec
from cpu_kernels.host.isa import BY_NAME
from cpu_kernels.jit.compiled import Worker
from cpu_kernels.jit.primitives import call_dot_rows, floats_at, int64s_at, take_ticket
from cpu_kernels.simd.compile import kernel_address
from cpu_kernels.simd.formats import Format, format_of
from cpu_kernels.simd.matrix_rows import DotRowsKernel
from cpu_kernels.simd.rows import PrepareKernel
from cpu_kernels.step.floats import BFLOAT16, ELEMENT_BYTES, FLOAT32
from cpu_kernels.step.program import MAX_ROWS, N_ROWS, STATE_SIZE, Part, Program
from cpu_kernels.step.stream import Target

(STATE, NEXT, KERNEL, WEIGHTS, WEIGHT_BYTES, BIAS, N_IN, N_OUT, INPUT, INPUT_BYTES, OUT, TASK_ROWS, SCALES,
 PLAIN_CALL) = range(14)  # fmt: skip
PLAIN_FORMAT = Format("plain")
TASK_BYTES, TASKS = 512 * 1024, 8
"""Weights of a task of a plain product, or fewer, so that each thread has TASKS tasks to even out. A plain read by two
threads in pieces of 64 KiB has 28.5 GB/s, of 256 KiB 31, of 512 KiB and more 34 (a Xeon, Granite Rapids class)."""


@dataclass(frozen=True, slots=True)
class Product:
    """y = W x + bias. W [n_out, n_in]: packed as `spec` says, or (spec None) rows of float32 or bfloat16 at `address`.

    kind: of the rows of an unpacked matrix. bias float32 [n_out].
    """

    n_in: int
    n_out: int
    address: int
    spec: LinearSpec | None = None
    kind: int = FLOAT32
    bias: np.ndarray | None = None

    def format(self, isa_name: str) -> Format:
        """How its kernel reads the input."""
        return PLAIN_FORMAT if self.spec is None else format_of(self.spec.dtype, BY_NAME[isa_name])


def target_of(program: Program, name: str, form: Format, n_in: int, isa_name: str, n_rows: int = 1) -> Target:
    """n_rows for each token called `name`, of n_in columns in a format; the same arguments give the same memory."""
    row_bytes = padded(n_in) // BLOCK_COLUMNS * form.block_bytes
    address = program.buffer(f"{name} {form.kind} {form.offset}", n_rows * row_bytes)
    return Target(kernel_address(PrepareKernel(form), isa_name), address, row_bytes)


def _plain(call_address: int, thread: int) -> None:
    """Worker. Task: TASK_ROWS outputs of all rows, of a matrix that is not packed."""
    call = int64s_at(call_address, PLAIN_CALL)
    n_rows = int64s_at(call[STATE], STATE_SIZE)[N_ROWS]
    n_out, weight_bytes, out_bytes = call[N_OUT], call[WEIGHT_BYTES], 4 * call[N_OUT]
    while True:
        first = take_ticket(call[NEXT]) * call[TASK_ROWS]
        if first >= n_out:
            return
        count = min(n_out - first, call[TASK_ROWS])
        out = call[OUT] + 4 * first
        call_dot_rows(
            call[KERNEL], call[WEIGHTS] + first * weight_bytes, weight_bytes, count, call[N_IN], call[INPUT],
            call[INPUT_BYTES], n_rows, out, out_bytes,
        )  # fmt: skip
        if call[BIAS]:
            bias = floats_at(call[BIAS] + 4 * first, count)
            for row in range(n_rows):
                values = floats_at(out + row * out_bytes, count)
                for i in range(count):
                    values[i] += bias[i]
        if call[SCALES]:
            scale = floats_at(call[SCALES], 1)[0]
            for row in range(n_rows):
                values = floats_at(out + row * out_bytes, count)
                for i in range(count):
                    values[i] *= scale


PLAIN_WORK = Worker(_plain)


@dataclass(frozen=True, slots=True)
class Shared:
    """What all products on the same rows use: starts int64 [2] = 0, rows; ids int32 [MAX_ROWS]; the program's state of
    these rows."""

    starts: np.ndarray
    ids: np.ndarray
    state: np.ndarray

    @classmethod
    def of(cls, program: Program, state: np.ndarray) -> "Shared":
        """New ones, kept by the program."""
        ids = program.zeros(MAX_ROWS, np.int32)
        ids[:] = np.arange(MAX_ROWS)
        return cls(program.zeros(2, np.int64), ids, state)


def add_product(
    program: Program, shared: Shared, part: Part, product: Product, source: Target, out: int, isa_name: str, *,
    meets: bool = True, scale: float = 1.0,
) -> int:  # fmt: skip
    """Adds out float32 [rows, n_out] = scale * (W source + bias); returns the operation's number."""
    scales = 0 if scale == 1.0 else program.keep(np.full(MAX_ROWS, scale, np.float32))
    if product.spec is None:
        return _add_plain(program, shared, part, product, source, out, scales, isa_name, meets)
    spec = product.spec
    call = program.zeros(engine.CALL_SIZE, np.int64)
    call[: engine.PLAN_SIZE] = linear_plan(spec.in_features, spec.out_features, spec.dtype, isa_name).vector
    if product.bias is not None:
        bias = np.zeros(padded(product.n_out), np.float32)
        bias[: product.n_out] = product.bias
        call[engine.HAS_BIAS], call[engine.DOWN_BIAS] = 1, program.keep(bias) - product.address
    record = np.array([product.address], np.int64)
    call[engine.N_EXPERTS], call[engine.N_THREADS] = 1, program.n_threads
    call[engine.RECORDS], call[engine.STARTS] = program.keep(record), shared.starts.ctypes.data
    call[engine.FLAT], call[engine.WEIGHTS] = shared.ids.ctypes.data, scales
    call[engine.H], call[engine.OUT_ROWS], call[engine.H_PANEL] = source.address, out, call[engine.PANEL]
    program.count(call, engine.COUNTERS, engine.N_COUNTERS)
    return program.add(DOWN_WORK, call, part, meets=meets)


def _add_plain(
    program: Program, shared: Shared, part: Part, product: Product, source: Target, out: int, scales: int,
    isa_name: str, meets: bool,
) -> int:  # fmt: skip
    call = program.zeros(PLAIN_CALL, np.int64)
    kernel = DotRowsKernel("float32" if product.kind == FLOAT32 else "bfloat16")
    call[[STATE, KERNEL, WEIGHTS]] = shared.state.ctypes.data, kernel_address(kernel, isa_name), product.address
    call[BIAS] = 0 if product.bias is None else program.keep(np.ascontiguousarray(product.bias, np.float32))
    call[[N_IN, N_OUT, INPUT, INPUT_BYTES]] = product.n_in, product.n_out, source.address, source.row_bytes
    call[[OUT, SCALES]] = out, scales
    row_bytes = product.n_in * ELEMENT_BYTES[product.kind]
    fair = max(1, product.n_out // (TASKS * program.n_threads))
    call[WEIGHT_BYTES] = row_bytes
    call[TASK_ROWS] = max(1, min(TASK_BYTES // row_bytes, fair))
    program.count(call, NEXT)
    return program.add(PLAIN_WORK, call, part, meets=meets)


def plain_product(address: int, n_out: int, n_in: int, *, halves: bool, bias: np.ndarray | None = None) -> Product:
    """A matrix [n_out, n_in] as it lies in memory: rows of float32, or of bfloat16 (halves)."""
    return Product(n_in, n_out, address, None, BFLOAT16 if halves else FLOAT32, bias)
