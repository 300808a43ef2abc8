"""The checksum of what a disk keeps: any changed bit is another, and so is any other order or length."""

import itertools

import numpy as np
import pytest

from cpu_kernels.engine.checksum import LANES, LINE_BYTES, WORD_BYTES, checksum


def drawn(n_bytes: int) -> np.ndarray:
    return np.random.default_rng(n_bytes).integers(0, 256, n_bytes, dtype=np.uint8)


@pytest.mark.parametrize("n_lines", [1, 3, 4, 5, 9])
def test_each_flipped_bit_is_seen(n_lines: int) -> None:
    data = drawn(n_lines * LINE_BYTES)
    sums = {checksum(data)}
    for bit in range(8 * len(data)):
        data[bit // 8] ^= 1 << bit % 8
        sums.add(checksum(data))
        data[bit // 8] ^= 1 << bit % 8
    assert len(sums) == 8 * len(data) + 1


def test_the_same_bit_flipped_in_two_words_of_a_lane_is_seen() -> None:
    data = np.zeros(8 * LANES * WORD_BYTES, np.uint8)
    sums = {checksum(data)}
    for (one, other), bit in itertools.product(itertools.combinations(range(8), 2), range(64)):
        words = data.view(np.uint64).copy()
        words[[one * LANES, other * LANES]] ^= np.uint64(1 << bit)
        sums.add(checksum(words.view(np.uint8)))
    assert len(sums) == 28 * 64 + 1


def test_order_and_length_count() -> None:
    zeros = np.zeros(64 * LINE_BYTES, np.uint8)
    assert len({checksum(zeros[: n * LINE_BYTES]) for n in range(65)}) == 65
    lines = drawn(16 * LINE_BYTES).reshape(16, LINE_BYTES)
    swapped = {checksum(np.ascontiguousarray(np.roll(lines, n, axis=0)).reshape(-1)) for n in range(16)}
    assert len(swapped) == 16


def test_it_is_the_same_on_every_machine() -> None:
    """Files outlive the CPU that wrote them."""
    assert checksum(np.arange(5 * LINE_BYTES, dtype=np.uint8) * np.uint8(7)) == "4b477dd49ce15bee7808678da591b222"
