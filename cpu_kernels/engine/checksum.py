"""A checksum that keeps up with memory, so that checking what a disk gives costs little beside reading it.

It finds damage, not malice: whoever can write a file can write its checksum, too, whichever it is.
"""

import hashlib

import numpy as np

from cpu_kernels.jit.compiled import kernel

__all__ = ["LINE_BYTES", "WORD_BYTES", "checksum"]

LINE_BYTES = 64
"""The length of what is summed is a multiple of it."""
LANES = 32
"""Sums that are made side by side, each of every 32nd word."""
WORD_BYTES = 8
PRIME_1, PRIME_2 = np.uint64(0x9E3779B185EBCA87), np.uint64(0xC2B2AE3D27D4EB4F)
TURN, BACK = np.uint64(31), np.uint64(33)
"""The step of XXH64 (xxHash, Y. Collet), on more lanes than its four."""


def checksum(data: np.ndarray) -> str:
    """Of uint8 [n], n a multiple of LINE_BYTES, from an address that is a multiple of 8: 32 hexadecimal digits.

    A lane's sum turns each word in by steps that can be undone, so that two texts which differ in one word never have
    the same; any others have it with a probability of about 2 ** -64.
    """
    words, lanes = data.view(np.uint64), np.arange(1, LANES + 1, dtype=np.uint64)
    _mix(words, lanes)
    return hashlib.sha256(lanes.tobytes() + len(words).to_bytes(WORD_BYTES, "little")).hexdigest()[:32]


@kernel
def _mix(words: np.ndarray, lanes: np.ndarray) -> None:
    n_whole = len(words) // LANES * LANES
    for first in range(0, n_whole, LANES):
        for lane in range(LANES):
            mixed = lanes[lane] + words[first + lane] * PRIME_2
            lanes[lane] = ((mixed << TURN) | (mixed >> BACK)) * PRIME_1
    for at in range(n_whole, len(words)):
        mixed = lanes[at - n_whole] + words[at] * PRIME_2
        lanes[at - n_whole] = ((mixed << TURN) | (mixed >> BACK)) * PRIME_1
