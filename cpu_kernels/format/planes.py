"""An int4 record as two bit planes: the high bits of every code, which are an expert by themselves, and the low bits.

D2MoE's nested quantisation (arXiv 2504.15299: matryoshka quantisation, the 4-bit value contains the 2-bit one, and
what every precision needs is loaded first). A stored code c = q + 8 (`cpu_kernels.format.layout`) is 4 h + l,
both 0..3.
Plane A holds h of every code, the scales and the biases; plane B holds l. From A alone a code is read as

    4 h + 2 for h < 2, 4 h + 1 for h >= 2      (q of about -6, -2, 1, 5: nearest to zero of each pair's middle two)

which leaves no bias for values that are symmetric around 0. A weighs 320 of the 576 bytes of a block, B 256.

Planes hold two codes' bits of byte i in the low and of byte i + 256 in the high nibble of plane byte i; a nibble is the
pair (low nibble's bits, high nibble's bits) of the record's byte. Elementwise torch operations only: any device.
"""

import torch

from cpu_kernels.errors import LayoutError
from cpu_kernels.format.layout import LINE_BYTES, LINES, block_bytes
from cpu_kernels.format.spec import ExpertSpec

CODE_BYTES = LINES["int4"] * LINE_BYTES
HALF = CODE_BYTES // 2
BLOCK_BYTES = block_bytes("int4")
SCALE_BYTES = BLOCK_BYTES - CODE_BYTES


def plane_bytes(spec: ExpertSpec) -> tuple[int, int]:
    """Bytes of planes A and B of one expert; together the record's. Raises LayoutError unless the spec is int4."""
    if spec.dtype != "int4":
        raise LayoutError(f"bit planes are those of int4 experts, found {spec.dtype}")
    low = _blocks(spec) * HALF
    return spec.record_bytes - low, low


def split_record(spec: ExpertSpec, record: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Planes A and B, uint8 of `plane_bytes`, of a record uint8 [record_bytes]."""
    plane_bytes(spec)
    blocks = record[: spec.layout.down_end].view(-1, BLOCK_BYTES)
    codes = blocks[:, :CODE_BYTES]
    high = ((codes >> 2) & 0x03) | ((codes >> 4) & 0x0C)
    low = (codes & 0x03) | ((codes >> 2) & 0x0C)
    parts = (_nibbles(high).reshape(-1), blocks[:, CODE_BYTES:].reshape(-1), record[spec.layout.down_end :])
    return torch.cat(parts), _nibbles(low).reshape(-1)


def expand_high(spec: ExpertSpec, plane: torch.Tensor, record: torch.Tensor) -> None:
    """Writes the record that plane A stands for by itself into `record`, uint8 [record_bytes]; same device."""
    n_codes = _blocks(spec) * HALF
    scales_end = n_codes + _blocks(spec) * SCALE_BYTES
    blocks = record[: spec.layout.down_end].view(-1, BLOCK_BYTES)
    pairs = _bytes_of(plane[:n_codes])
    first, second = pairs & 0x03, pairs >> 2
    blocks[:, :CODE_BYTES] = (first << 2) | (second << 6) | (2 - (first >> 1)) | ((2 - (second >> 1)) << 4)
    blocks[:, CODE_BYTES:] = plane[n_codes:scales_end].view(-1, SCALE_BYTES)
    record[spec.layout.down_end :] = plane[scales_end:]


def merge_low(spec: ExpertSpec, plane: torch.Tensor, record: torch.Tensor) -> None:
    """Completes a record that `expand_high` wrote with plane B: afterwards it is the packed expert, bit by bit."""
    codes = record[: spec.layout.down_end].view(-1, BLOCK_BYTES)[:, :CODE_BYTES]
    pairs = _bytes_of(plane)
    codes.copy_((codes & 0xCC) | (pairs & 0x03) | ((pairs & 0x0C) << 2))


def _blocks(spec: ExpertSpec) -> int:
    return spec.layout.down_end // BLOCK_BYTES


def _nibbles(pairs: torch.Tensor) -> torch.Tensor:
    """[blocks, 512] values below 16 -> [blocks, 256] bytes."""
    return pairs[:, :HALF] | (pairs[:, HALF:] << 4)


def _bytes_of(plane: torch.Tensor) -> torch.Tensor:
    """The inverse of `_nibbles`, from the flat plane."""
    halves = plane.view(-1, HALF)
    return torch.cat([halves & 0x0F, halves >> 4], dim=1)
