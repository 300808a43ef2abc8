"""What threads need to meet, for compiled code: atomic int64 in memory, a pause, and calls of the C library.

Addresses are int64. All but `store`, which releases, are sequentially consistent.
"""

from collections.abc import Callable
from typing import Any

from llvmlite import ir
from numba import types
from numba.extending import intrinsic

_I64 = ir.IntType(64)
_WORD_BYTES = 8
PAUSES: dict[str, tuple[str, tuple[int, ...]]] = {
    "x86_64": ("llvm.x86.sse2.pause", ()),
    "aarch64": ("llvm.aarch64.hint", (1,)),
    "arm64": ("llvm.aarch64.hint", (1,)),
}
"""By architecture: LLVM's name of the instruction that says that a thread waits in a loop, and its operands."""

Build = Callable[[Any, Any, list[Any]], Any]


def _on_word(n_values: int, result: types.Type, build: Build) -> Any:
    """Signature and code of an operation on the int64 at an address: the address, then n_values int64."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        place = builder.inttoptr(arguments[0], _I64.as_pointer())
        value = build(builder, place, list(arguments[1:]))
        return context.get_dummy_value() if result == types.void else value

    return result(*[types.int64] * (n_values + 1)), code


@intrinsic
def load(typingctx: Any, address: Any) -> Any:
    """The int64 at `address`; what its writer wrote before is seen too."""
    return _on_word(0, types.int64, lambda builder, place, _: builder.load_atomic(place, "seq_cst", _WORD_BYTES))


@intrinsic
def store(typingctx: Any, address: Any, value: Any) -> Any:
    """Writes the int64 at `address` after everything that this thread wrote before."""
    return _on_word(
        1, types.void, lambda builder, place, values: builder.store_atomic(values[0], place, "release", _WORD_BYTES)
    )


@intrinsic
def add(typingctx: Any, address: Any, value: Any) -> Any:
    """Adds `value` to the int64 at `address`; returns the value before."""
    return _on_word(
        1, types.int64, lambda builder, place, values: builder.atomic_rmw("add", place, values[0], "seq_cst")
    )


@intrinsic
def replace(typingctx: Any, address: Any, expected: Any, value: Any) -> Any:
    """Writes `value` to the int64 at `address` if it is `expected`; returns whether it was."""

    def build(builder: ir.IRBuilder, place: Any, values: list[Any]) -> Any:
        return builder.extract_value(builder.cmpxchg(place, values[0], values[1], "seq_cst", "seq_cst"), 1)

    return _on_word(2, types.boolean, build)


@intrinsic
def pause(typingctx: Any) -> Any:
    """A moment of waiting that leaves the core's resources to its other hyper-thread."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        module = builder.module
        name, operands = PAUSES.get(str(module.triple).split("-")[0], ("", ()))
        if name:
            kind = ir.FunctionType(ir.VoidType(), [ir.IntType(32)] * len(operands))
            function = module.globals.get(name) or ir.Function(module, kind, name)
            builder.call(function, [ir.Constant(ir.IntType(32), operand) for operand in operands])
        return context.get_dummy_value()

    return types.void(), code


def _library_call(n_arguments: int, variadic: bool = False) -> Any:
    """Signature and code of a call of a C function by address: an address, then n_arguments int64; returns int64."""

    def code(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
        named = [_I64] if variadic else [_I64] * n_arguments
        kind = ir.FunctionType(_I64, named, var_arg=variadic)
        return builder.call(builder.inttoptr(arguments[0], kind.as_pointer()), arguments[1:])

    return types.int64(*[types.int64] * (n_arguments + 1)), code


@intrinsic
def call_system(typingctx: Any, function: Any, number: Any, a: Any, b: Any, c: Any, d: Any) -> Any:
    """Calls libc's ``syscall`` at address `function` with a call's number and four arguments."""
    return _library_call(5, variadic=True)


@intrinsic
def call_with_one(typingctx: Any, function: Any, a: Any) -> Any:
    """Calls a C function of one argument at address `function`."""
    return _library_call(1)


@intrinsic
def call_with_two(typingctx: Any, function: Any, a: Any, b: Any) -> Any:
    """Calls a C function of two arguments at address `function`."""
    return _library_call(2)


def symbol_address(symbol: str) -> Any:
    """A function for compiled code that returns the address given to ``llvmlite.binding.add_symbol(symbol, ...)``.

    Code on disk keeps the name only, so that it fits the next start.
    """

    @intrinsic
    def address(typingctx: Any) -> Any:
        def code(context: Any, builder: ir.IRBuilder, signature: Any, arguments: Any) -> Any:
            module = builder.module
            place = module.globals.get(symbol) or ir.GlobalVariable(module, ir.IntType(8), symbol)
            return builder.ptrtoint(place, _I64)

        return types.int64(), code

    return address
