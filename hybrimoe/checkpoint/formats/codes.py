"""Codes of a few bits out of the bytes and words that they are packed in."""

from __future__ import annotations

import torch

WORD_BITS = 32
FP4_VALUES = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0, -0.0, -0.5, -1.0, -1.5, -2.0, -3.0, -4.0, -6.0)
"""OCP MX v1.0, e2m1: the value of each half byte."""
FP4_PER_BYTE = 2


def unpack(words: torch.Tensor, bits: int, count: int) -> torch.Tensor:
    """int32 [..., W] -> uint8 [..., count]: codes of `bits` (1 to 8) bits, one after the other from the lowest bit of
    the first word on; a code may begin in one word and end in the next."""
    codes = _within_bytes(words, bits) if 8 % bits == 0 else _across_words(words, bits)
    return codes[..., :count]


def n_words(count: int, bits: int) -> int:
    """Words that `count` codes of `bits` bits take."""
    return -(-count * bits // WORD_BITS)


def fp4_values(packed: torch.Tensor) -> torch.Tensor:
    """Bytes [..., n] to float32 [..., 2 n]; the low half of a byte comes first."""
    return half_byte_values(packed, torch.tensor(FP4_VALUES))


def half_byte_values(packed: torch.Tensor, table: torch.Tensor, *, high_first: bool = False) -> torch.Tensor:
    """Bytes [..., n] to what `table` (float32 [16]) has for their halves, float32 [..., 2 n]."""
    halves = torch.arange(256)
    order = (halves >> 4, halves & 15) if high_first else (halves & 15, halves >> 4)
    pairs = table[torch.stack(order, dim=-1)]
    values: torch.Tensor = pairs[packed.view(torch.uint8).long()]
    return values.flatten(-2)


def _within_bytes(words: torch.Tensor, bits: int) -> torch.Tensor:
    shifts = torch.arange(0, 8, bits, dtype=torch.uint8)
    codes: torch.Tensor = (words.contiguous().view(torch.uint8)[..., None] >> shifts) & (2**bits - 1)
    return codes.flatten(-2)


def _across_words(words: torch.Tensor, bits: int) -> torch.Tensor:
    """32 codes are `bits` words."""
    padded = torch.nn.functional.pad(words, (0, -words.shape[-1] % bits)).long() & 0xFFFFFFFF
    groups = padded.unflatten(-1, (-1, bits))
    starts = torch.arange(WORD_BITS) * bits
    first, offset = starts // WORD_BITS, starts % WORD_BITS
    following = (first + 1).clamp(max=bits - 1)  # of the last code: itself, shifted out of what is kept
    both: torch.Tensor = groups[..., first] >> offset | groups[..., following] << (WORD_BITS - offset)
    codes: torch.Tensor = both & (2**bits - 1)
    return codes.to(torch.uint8).flatten(-2)
