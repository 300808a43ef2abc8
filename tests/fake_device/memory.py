"""Bytes of a card: which stream read or wrote which range last, and whether the next one waited for it."""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch

from tests.fake_device.streams import FakeStream

if TYPE_CHECKING:
    from tests.fake_device.cards import Cards

Accesses = dict[tuple[int, int, int], tuple[int, str]]
"""Of bytes [lo, hi) by a stream: the tick of the latest one, and the operation."""
POISON_BYTE = 0xFF
"""Fills what nobody has written: NaN in every float type."""


class Memory:
    """One allocation, made while `owner` was current: its allocator gives it to that stream's next work when freed."""

    def __init__(self, cards: Cards, owner: FakeStream, n_bytes: int) -> None:
        self.cards, self._owner, self.n_bytes = cards, owner, n_bytes
        self._reads: Accesses = {}
        self._writes: Accesses = {}
        cards.allocate(owner.device, n_bytes)
        weakref.finalize(self, _freed, cards, owner, n_bytes, self._reads, self._writes).atexit = False

    def read(self, at: tuple[int, int], stream: FakeStream, tick: int, what: str) -> None:
        """A read of bytes [lo, hi) by the operation `what`."""
        self._check(self._writes, at, stream, f"{what} reads what may not have been written yet")
        self._reads[(*at, stream.number)] = tick, what

    def write(self, at: tuple[int, int], stream: FakeStream, tick: int, what: str) -> None:
        """A write of bytes [lo, hi) by the operation `what`."""
        self._check(self._writes, at, stream, f"{what} writes over a write that may not have ended")
        self._check(self._reads, at, stream, f"{what} writes over what may still be read")
        lo, hi = at
        for accesses in (self._reads, self._writes):
            for key in [key for key in accesses if lo <= key[0] and key[1] <= hi]:
                del accesses[key]
        self._writes[(lo, hi, stream.number)] = tick, what

    def record_stream(self, stream: FakeStream) -> None:
        """As torch's: when it is freed, the allocator waits for what `stream` did with it."""
        for accesses in (self._reads, self._writes):
            for key in [key for key in accesses if key[2] == stream.number]:
                del accesses[key]

    def _check(self, accesses: Accesses, at: tuple[int, int], stream: FakeStream, problem: str) -> None:
        for (lo, hi, other), (tick, what) in accesses.items():
            if lo < at[1] and at[0] < hi and stream.seen.get(other, 0) < tick:
                self.cards.report(
                    f"race on {stream.device}, stream {stream.number} against {other}: {problem}, by {what}"
                )
                return


def extent(inner: torch.Tensor) -> tuple[int, int]:
    """Bytes [lo, hi) of its storage between which a tensor's values lie."""
    if not inner.numel():
        return 0, 0
    size = inner.element_size()
    if inner.is_contiguous():
        lo = inner.storage_offset() * size
        return lo, lo + inner.numel() * size
    last = sum((n - 1) * stride for n, stride in zip(inner.shape, inner.stride(), strict=True))
    return inner.storage_offset() * size, (inner.storage_offset() + last + 1) * size


def poison(inner: torch.Tensor) -> None:
    """Makes values that nobody has written recognisable."""
    torch.as_strided(inner, (inner.numel(),), (1,)).view(torch.uint8).fill_(POISON_BYTE)


def _freed(
    cards: Cards, owner: FakeStream, n_bytes: int, reads: Accesses,
    writes: Accesses,
) -> None:  # fmt: skip
    cards.free(owner.device, n_bytes)
    for (_, _, other), (tick, what) in (*reads.items(), *writes.items()):
        if other != owner.number and max(owner.seen.get(other, 0), cards.host.get(other, 0)) < tick:
            cards.report(f"memory of {owner.device} is freed while stream {other} may still use it: {what}")
            return
