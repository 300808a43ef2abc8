"""Items on their way from a thread into the event loop: none lost, none late, one wake-up for many."""

import asyncio
import threading

import pytest

from hybrimoe.server.inbox import Inbox


def test_all_items_of_several_threads_arrive_in_the_order_of_each():
    n_each = 2000

    async def run():
        inbox, found = Inbox(), []

        def put_all(sender):
            for number in range(n_each):
                inbox.put((sender, number))

        threads = [threading.Thread(target=put_all, args=(sender,)) for sender in range(4)]
        for thread in threads:
            thread.start()
        while len(found) < 4 * n_each:
            found += await asyncio.wait_for(inbox.take(), 600)
        for thread in threads:
            thread.join()
        return found

    found = asyncio.run(run())
    for sender in range(4):
        assert [number for one, number in found if one == sender] == list(range(n_each))


def test_items_put_in_before_the_loop_looks_are_one_wake_up(monkeypatch):
    async def run():
        inbox, wakes = Inbox(), []
        loop = asyncio.get_running_loop()
        call = loop.call_soon_threadsafe
        monkeypatch.setattr(loop, "call_soon_threadsafe", lambda *words: wakes.append(1) or call(*words))
        for number in range(5):
            inbox.put(number)
        first = await inbox.take()
        await asyncio.sleep(0)  # the loop has looked
        inbox.put(5)
        return first, await inbox.take(), len(wakes)

    assert asyncio.run(run()) == ([0, 1, 2, 3, 4], [5], 2)


def test_a_wait_ends_with_nothing_after_its_time_and_the_next_one_has_its_own():
    async def run():
        inbox = Inbox()
        loop = asyncio.get_running_loop()
        long = asyncio.ensure_future(inbox.take(600))
        await asyncio.sleep(0)
        inbox.put("a")
        assert await long == ["a"]
        began_s = loop.time()
        assert await inbox.take(0.01) == []  # sooner than the timer of the wait before
        waited_s = loop.time() - began_s
        inbox.put("b")
        return waited_s, await inbox.take(0.01), await inbox.take(0.01)

    waited_s, second, third = asyncio.run(run())
    assert 0.01 <= waited_s < 600
    assert (second, third) == (["b"], [])


def test_a_wait_that_is_cancelled_loses_nothing():
    async def run():
        inbox = Inbox()
        wait = asyncio.ensure_future(inbox.take(600))
        await asyncio.sleep(0)
        wait.cancel()
        with pytest.raises(asyncio.CancelledError):
            await wait
        inbox.put("a")
        return await inbox.take()

    assert asyncio.run(run()) == ["a"]


def test_a_loop_that_has_gone_is_told_nothing():
    async def make():
        return Inbox()

    inbox = asyncio.run(make())
    inbox.put("nobody hears it")


def test_a_timer_that_only_can_be_cancelled_is_set_anew(monkeypatch):
    """Of uvloop's timers those that are due by the next millisecond are such."""

    class Timer:
        def __init__(self, own):
            self.cancel = own.cancel

    async def run():
        loop = asyncio.get_running_loop()
        call_at = loop.call_at
        monkeypatch.setattr(loop, "call_at", lambda when, call: Timer(call_at(when, call)))
        inbox = Inbox()
        long = asyncio.ensure_future(inbox.take(600))
        await asyncio.sleep(0)
        inbox.put("a")
        assert await long == ["a"]
        return await inbox.take(0.01)

    assert asyncio.run(run()) == []
