"""What LLVM has and llvmlite does not name: the type bfloat, and loads that keep their order."""

from llvmlite import ir


class _Bf16(ir.Type):  # type: ignore[misc] # llvmlite is not typed
    """LLVM's bfloat; only bit casts make and use it."""

    def __str__(self) -> str:
        return "bfloat"

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Bf16)

    def __hash__(self) -> int:
        return hash(_Bf16)


class OrderedLoad(ir.LoadInstr):  # type: ignore[misc] # llvmlite is not typed
    """A volatile load: LLVM keeps these in the order in which they are written."""

    def descr(self, buf: list[str]) -> None:
        own: list[str] = []
        super().descr(own)
        buf.append("".join(own).replace("load", "load volatile", 1))


BF16 = _Bf16()
