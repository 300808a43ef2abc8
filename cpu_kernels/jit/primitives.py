"""What the Numba drivers need below Numba's own level: a call by address, an atomic counter, bits as float."""

from typing import Any

import numpy as np
from llvmlite import ir
from numba import carray, types
from numba.core import cgutils
from numba.extending import intrinsic

from cpu_kernels.jit.compiled import inline_kernel

_I64 = ir.IntType(64)


def _kernel_call(n_arguments: int, result: types.Type) -> Any:
    """Signature and code of a call of machine code by address: an address, then n_arguments addresses and sizes."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        returned = ir.VoidType() if result == types.void else _I64
        kind = ir.FunctionType(returned, [_I64] * n_arguments)
        value = builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])
        return context.get_dummy_value() if result == types.void else value

    return result(*[types.int64] * (n_arguments + 1)), code


@intrinsic
def call_panel(
    typingctx: Any,
    function: Any,
    weights: Any,
    row_block_bytes: Any,
    n_blocks: Any,
    x: Any,
    x_row_bytes: Any,
    row_ids: Any,
    n_rows: Any,
    out: Any,
) -> Any:
    """Calls the compiled `panel` (cpu_kernels.simd.tiles) at address `function`; addresses and sizes are int64."""
    return _kernel_call(8, types.void)


@intrinsic
def call_prepare(typingctx: Any, function: Any, source: Any, n_true: Any, target: Any) -> Any:
    """Calls the compiled `prepare` (cpu_kernels.simd.rows) at address `function`; returns its flags."""
    return _kernel_call(3, types.int64)


@intrinsic
def call_finish(
    typingctx: Any,
    function: Any,
    sums: Any,
    n_rows: Any,
    parameters: Any,
    n_true: Any,
    target: Any,
    target_bytes: Any,
    column: Any,
) -> Any:
    """Calls the compiled `finish` (cpu_kernels.simd.rows) at address `function`."""
    return _kernel_call(7, types.void)


@intrinsic
def call_dot_rows(
    typingctx: Any,
    function: Any,
    weights: Any,
    weight_bytes: Any,
    n_outputs: Any,
    n_in: Any,
    x: Any,
    x_bytes: Any,
    n_rows: Any,
    out: Any,
    out_bytes: Any,
) -> Any:
    """Calls the compiled `dot_rows` (cpu_kernels.simd.matrix_rows) at address `function`."""
    return _kernel_call(9, types.void)


@intrinsic
def call_attend(
    typingctx: Any,
    function: Any,
    query: Any,
    keys: Any,
    key_bytes: Any,
    values: Any,
    value_bytes: Any,
    bias: Any,
    n_tokens: Any,
    dim: Any,
    v_dim: Any,
    scores: Any,
    stats: Any,
    out: Any,
    more: Any,
    more_bytes: Any,
    more_dim: Any,
) -> Any:
    """Calls the compiled `attend` (cpu_kernels.simd.attention) at address `function`."""
    return _kernel_call(15, types.void)


@intrinsic
def call_attend_chosen(
    typingctx: Any,
    function: Any,
    query: Any,
    keys: Any,
    key_bytes: Any,
    values: Any,
    value_bytes: Any,
    bias: Any,
    n_tokens: Any,
    dim: Any,
    v_dim: Any,
    scores: Any,
    stats: Any,
    out: Any,
    more: Any,
    more_bytes: Any,
    more_dim: Any,
    positions: Any,
) -> Any:
    """Calls the compiled `attend` (cpu_kernels.simd.attention) of chosen tokens at address `function`."""
    return _kernel_call(16, types.void)


@intrinsic
def call_index_scores(
    typingctx: Any,
    function: Any,
    queries: Any,
    weights: Any,
    width: Any,
    keys: Any,
    key_bytes: Any,
    dim: Any,
    n_tokens: Any,
    scores: Any,
) -> Any:
    """Calls the compiled `index_scores` (cpu_kernels.simd.index_scores) at address `function`."""
    return _kernel_call(8, types.void)


@intrinsic
def take_ticket(typingctx: Any, counter: Any) -> Any:
    """Adds 1 to the int64 at address `counter` atomically; returns the value before."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], _I64.as_pointer())
        return builder.atomic_rmw("add", place, ir.Constant(_I64, 1), "monotonic")

    return types.int64(types.int64), code


@intrinsic
def cycles(typingctx: Any) -> Any:
    """The CPU's time stamp counter, in ticks of a constant rate (0 on CPUs without one)."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(_I64, [])
        return builder.call(cgutils.get_or_insert_function(builder.module, kind, "llvm.readcyclecounter"), [])

    return types.int64(), code


@intrinsic
def float_from_bits(typingctx: Any, bits: Any) -> Any:
    """The float32 with the bits of an int32."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.FloatType())

    return types.float32(types.int32), code


@intrinsic
def bits_of_float(typingctx: Any, x: Any) -> Any:
    """The bits of a float32 as int32."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        return builder.bitcast(arguments[0], ir.IntType(32))

    return types.int32(types.float32), code


@intrinsic
def call_worker(typingctx: Any, function: Any, call: Any, thread: Any) -> Any:
    """Calls a compiled `worker` at address `function` with its two int64 arguments."""
    return _kernel_call(2, types.void)


def _c_call(n_arguments: int) -> Any:
    """Signature and code of a call of a C function that returns an int, as int64."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        kind = ir.FunctionType(ir.IntType(32), [_I64] * n_arguments)
        return builder.sext(builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:]), _I64)

    return types.int64(*[types.int64] * (n_arguments + 1)), code


@intrinsic
def call_c_one(typingctx: Any, function: Any, a: Any) -> Any:
    """Calls a C function of one integer or address at address `function`; returns its int."""
    return _c_call(1)


@intrinsic
def call_c_two(typingctx: Any, function: Any, a: Any, b: Any) -> Any:
    """The same, of two."""
    return _c_call(2)


@intrinsic
def call_c_three(typingctx: Any, function: Any, a: Any, b: Any, c: Any) -> Any:
    """The same, of three."""
    return _c_call(3)


@intrinsic
def call_c_four(typingctx: Any, function: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """The same, of four."""
    return _c_call(4)


def _pointer_to(kind: types.Type) -> Any:
    @intrinsic
    def pointer(typingctx: Any, address: Any) -> Any:
        def code(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            return builder.inttoptr(arguments[0], context.get_value_type(kind).as_pointer())

        return types.CPointer(kind)(types.int64), code

    return pointer


_float_pointer, _int32_pointer, _int64_pointer, _byte_pointer, _half_pointer = (
    _pointer_to(kind) for kind in (types.float32, types.int32, types.int64, types.uint8, types.uint16)
)


@inline_kernel
def floats_at(address: int, n: int) -> np.ndarray:
    """float32 [n] at an address, without a copy."""
    array: np.ndarray = carray(_float_pointer(address), (n,))
    return array


@inline_kernel
def int32s_at(address: int, n: int) -> np.ndarray:
    """int32 [n] at an address, without a copy."""
    array: np.ndarray = carray(_int32_pointer(address), (n,))
    return array


@inline_kernel
def int64s_at(address: int, n: int) -> np.ndarray:
    """int64 [n] at an address, without a copy."""
    array: np.ndarray = carray(_int64_pointer(address), (n,))
    return array


@inline_kernel
def bytes_at(address: int, n: int) -> np.ndarray:
    """uint8 [n] at an address, without a copy."""
    array: np.ndarray = carray(_byte_pointer(address), (n,))
    return array


@inline_kernel
def halves_at(address: int, n: int) -> np.ndarray:
    """uint16 [n] at an address, without a copy: the bits of bfloat16 values."""
    array: np.ndarray = carray(_half_pointer(address), (n,))
    return array
