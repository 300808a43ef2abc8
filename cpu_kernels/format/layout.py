"""Byte layout of a packed expert: one contiguous record, the same for every instruction set and machine.

A matrix [N, K] is padded with zeros to multiples of 64 and cut into blocks of 16 rows x 64 columns, stored row block
by row block, columns ascending inside. A block is a list of 64-byte lines; in each the 32-bit word r belongs to row r:

| dtype    | word of row r in line i                                        | lines | scales           | block  |
|----------|----------------------------------------------------------------|-------|------------------|--------|
| float32  | column i                                                       | 64    | -                | 4096 B |
| bfloat16 | columns 2i, 2i + 1                                             | 32    | -                | 2048 B |
| int8     | columns 4i .. 4i + 3, stored as q + 128                        | 16    | 2 x 16 bfloat16  | 1088 B |
| int4     | group i // 4, j = i % 4: columns 4j .. 4j + 3 in the low and   | 8     | 2 x 16 bfloat16  |  576 B |
|          | 16 + 4j .. 16 + 4j + 3 in the high nibbles, stored as q + 8    |       |                  |        |
| int6     | planes of 2 and 4 bits, stored as q + 32                       | 12    | 2 x 16 bfloat16  |  832 B |
| int5     | planes of 1 and 4 bits, stored as q + 16                       | 10    | 2 x 16 bfloat16  |  704 B |
| int3     | planes of 1 and 2 bits, stored as q + 4                        | 6     | 2 x 16 bfloat16  |  448 B |
| int2     | a plane of 2 bits, stored as q + 2                             | 4     | 2 x 16 bfloat16  |  320 B |

Planes: of each group of 32 columns, the high bits of all codes come first, then the bits below them. A plane of p bits
has p lines; line j holds columns 4w .. 4w + 3 of its group, for w = j, j + p, j + 2p, ..., each in the next p bits of
its bytes (int8 and int4 are codes of one plane).

Scales: one per row and group of 32 columns (group 0 for all rows, then group 1). Integer blocks take half a bit a
weight more than their codes and a whole number of cache lines, so that a row block is one aligned stream. These words
are what vpdpbusd, vdpbf16ps and a broadcast FMA want; a 256-bit path takes half a line, a 128-bit path a quarter.

Record: gate and up with their rows interleaved 32 by 32 (gate 0-31, up 0-31, gate 32-63, ...; only up if ungated), then
down, then float32 biases (gate, up, down; padded). Every part starts on a 64-byte boundary of the record.
"""

from dataclasses import dataclass

LAYOUT_VERSION = 1
BLOCK_ROWS = 16
BLOCK_COLUMNS = 64
GROUP = 32  # columns that share a scale, in weights and in quantised activations
PAD = 64  # rows and columns are padded to multiples of this
PANEL_ROWS = 64  # that the kernels take at a time
INTERLEAVE = 32  # rows of gate, then as many rows of up
SCALE_BYTES = BLOCK_ROWS * (BLOCK_COLUMNS // GROUP) * 2
LINE_BYTES = 64
PLANES = {"int8": (8,), "int6": (2, 4), "int5": (1, 4), "int4": (4,), "int3": (1, 2), "int2": (2,)}
BITS = {dtype: sum(planes) for dtype, planes in PLANES.items()}  # of a code
OFFSET = {dtype: 1 << bits - 1 for dtype, bits in BITS.items()}
"""Stored code = q + OFFSET: unsigned, as vpdpbusd wants its first operand."""
LINES = {"float32": 64, "bfloat16": 32} | {dtype: BLOCK_COLUMNS // GROUP * bits for dtype, bits in BITS.items()}


def padded(size: int) -> int:
    """`size` rounded up to a multiple of PAD."""
    return -(-size // PAD) * PAD


def is_quantised(dtype: str) -> bool:
    """Whether blocks of `dtype` carry scales."""
    return dtype in PLANES


def block_bytes(dtype: str) -> int:
    """Size of a block of 16 rows x 64 columns."""
    return LINES[dtype] * LINE_BYTES + (SCALE_BYTES if is_quantised(dtype) else 0)


def matrix_bytes(rows: int, columns: int, dtype: str) -> int:
    """Size of a packed matrix."""
    return padded(rows) // BLOCK_ROWS * (padded(columns) // BLOCK_COLUMNS) * block_bytes(dtype)


@dataclass(frozen=True, slots=True)
class RecordLayout:
    """Offsets in bytes from the start of a record; bias offsets equal `record_bytes` when there are no biases."""

    hidden_padded: int
    inter_padded: int
    down_offset: int
    down_end: int
    gate_bias_offset: int
    up_bias_offset: int
    down_bias_offset: int
    record_bytes: int


def record_layout(hidden: int, inter: int, dtype: str, gated: bool, has_bias: bool) -> RecordLayout:
    """Where the parts of a record lie. The first part (gate and up) starts at 0."""
    hidden_padded, inter_padded = padded(hidden), padded(inter)
    down = matrix_bytes(inter, hidden, dtype) * (2 if gated else 1)
    gate_bias = down + matrix_bytes(hidden, inter, dtype)
    if not has_bias:
        return RecordLayout(hidden_padded, inter_padded, down, *[gate_bias] * 5)
    up_bias = gate_bias + (4 * inter_padded if gated else 0)
    down_bias = up_bias + 4 * inter_padded
    end = down_bias + 4 * hidden_padded
    return RecordLayout(hidden_padded, inter_padded, down, gate_bias, gate_bias, up_bias, down_bias, end)
