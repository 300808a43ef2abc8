"""Products of integer codes: the sum over one group of 32 columns, by the byte products that the ISA has."""

from llvmlite import ir

from cpu_kernels.simd.vectors import Simd


class GroupDot:
    """Sum over one group of 32 columns for one token and one vector of rows, by the ISA's byte products.

    `bits` is 4 or 8: 16 products of 4-bit codes fit 16 bits, those of 8-bit codes do not, so without vpdpbusd they
    become sign-and-magnitude products, which need no correction for the codes' offset.
    """

    def __init__(self, simd: Simd, bits: int, correction: ir.Value) -> None:
        self.s = simd
        self.bits = bits
        self.pairwise = simd.dot_kind == "maddubs"
        self.total = simd.zero(simd.i32) if self.pairwise and bits == 8 else correction
        self.narrow: ir.Value | None = None

    def add(self, codes: ir.Value, signed: ir.Value) -> None:
        """Adds four columns: unsigned codes (offset by 8 or 128) times signed activations."""
        if not self.pairwise:
            self.total = self.s.dot_bytes(self.total, codes, signed)
        elif self.bits == 4:
            products = self.s.dot_pairs(codes, signed)
            self.narrow = products if self.narrow is None else self.s.b.add(self.narrow, products)
        else:
            weight = self.s.b.xor(codes, self.s.constant(self.s.u8, 0x80))
            products = self.s.dot_pairs(self.s.absolute(weight), self.s.copy_sign(signed, weight))
            self.total = self.s.add_pairs(self.total, products)

    def result(self) -> ir.Value:
        """int32 per lane."""
        return self.total if self.narrow is None else self.s.add_pairs(self.total, self.narrow)
