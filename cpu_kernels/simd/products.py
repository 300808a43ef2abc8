"""Products of integer codes: the sum over one group of 32 columns, by the byte products that the ISA has."""

from llvmlite import ir

from cpu_kernels.simd.vectors import Simd

LARGEST_NARROW, LARGEST_SIGNED = 32767, 127  # of a sum of pairs, and of a code of activations


class GroupDot:
    """Sum over one group of 32 columns for one token and one vector of rows, by the ISA's byte products.

    `bits` of a code: without vpdpbusd pairs of products are 16 bits. 8 pairs of 4-bit codes fit them, 4 of 5-bit and 2
    of 6-bit ones; those of 8-bit codes do not, and become sign-and-magnitude products, which need no correction for
    the codes' offset.
    """

    def __init__(self, simd: Simd, bits: int, correction: ir.Value) -> None:
        self.s = simd
        self.bits = bits
        self.pairwise = simd.dot_kind == "maddubs"
        self.total = simd.zero(simd.i32) if self.pairwise and bits == 8 else correction
        self.narrow: ir.Value | None = None
        self.n_narrow, self.most_narrow = 0, LARGEST_NARROW // (2 * LARGEST_SIGNED * ((1 << bits) - 1))

    def add(self, codes: ir.Value, signed: ir.Value) -> None:
        """Adds four columns: unsigned codes (offset by half of their range) times signed activations."""
        if not self.pairwise:
            self.total = self.s.dot_bytes(self.total, codes, signed)
        elif self.bits < 8:
            if self.narrow is not None and self.n_narrow == self.most_narrow:
                self.total, self.narrow, self.n_narrow = self.result(), None, 0
            products = self.s.dot_pairs(codes, signed)
            self.narrow = products if self.narrow is None else self.s.b.add(self.narrow, products)
            self.n_narrow += 1
        else:
            weight = self.s.b.xor(codes, self.s.constant(self.s.u8, 0x80))
            products = self.s.dot_pairs(self.s.absolute(weight), self.s.copy_sign(signed, weight))
            self.total = self.s.add_pairs(self.total, products)

    def result(self) -> ir.Value:
        """int32 per lane."""
        return self.total if self.narrow is None else self.s.add_pairs(self.total, self.narrow)
