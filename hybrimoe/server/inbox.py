"""What the generating thread has to say to a request, on its way into the event loop."""

from __future__ import annotations

import asyncio
from collections import deque
from typing import Generic, TypeVar

__all__ = ["Inbox"]

Item = TypeVar("Item")


class Inbox(Generic[Item]):
    """Any thread puts items in; one task of the event loop that made it takes out all there are.

    Whoever puts an item in wakes the loop only if nobody has since it last looked: many items are one wake-up, and
    none waits for another. Methods of the event loop: `take`, `close`.
    """

    def __init__(self) -> None:
        self._loop = asyncio.get_running_loop()
        self._items: deque[Item] = deque()
        self._woken = False
        self._taker: asyncio.Future[None] | None = None
        self._timer: asyncio.Handle | None = None
        self._rings_s = 0.0
        """When the timer rings, on the loop's clock: those of uvloop that are due at once do not tell."""
        self._due_s = 0.0
        """When the task that waits is to go on with nothing, on the loop's clock."""

    def put(self, item: Item) -> None:
        """Hand an item over; a loop that has gone no longer listens."""
        self._items.append(item)
        if not self._woken and not self._loop.is_closed():
            self._woken = True
            self._loop.call_soon_threadsafe(self._wake)

    async def take(self, seconds: float | None = None) -> list[Item]:
        """All items that are there, at least one; none after so many seconds without any. A wait that is cancelled
        loses none."""
        if not self._items:
            self._taker = self._loop.create_future()
            if seconds is not None:
                self._ring_in(seconds)
            try:
                await self._taker
            finally:
                self._taker = None
        return [self._items.popleft() for _ in range(len(self._items))]

    def close(self) -> None:
        """Nobody takes anything any more."""
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None

    def _wake(self) -> None:
        self._woken = False  # before the items are looked at: what is put in from here on wakes again
        self._go_on()

    def _go_on(self) -> None:
        if self._taker is not None and not self._taker.done():
            self._taker.set_result(None)

    def _ring_in(self, seconds: float) -> None:
        """One timer serves all waits: most end before it rings, and then it is set anew."""
        self._due_s = self._loop.time() + seconds
        if self._timer is not None and self._rings_s > self._due_s:
            self.close()
        if self._timer is None:
            self._ring_when_due()

    def _ring_when_due(self) -> None:
        self._rings_s = self._due_s
        self._timer = self._loop.call_at(self._due_s, self._ring)

    def _ring(self) -> None:
        self._timer = None
        if self._taker is None:
            return
        if self._loop.time() < self._due_s:
            self._ring_when_due()
        else:
            self._go_on()
