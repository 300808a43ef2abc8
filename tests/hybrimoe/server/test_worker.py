"""The generating thread: its queue, who may leave it and when, and how it ends."""

import asyncio
import threading

import pytest

from hybrimoe.errors import ModelError
from hybrimoe.generation import SamplingOptions
from hybrimoe.server.delivery import PieceReader
from hybrimoe.server.errors import DrainingError, QueueFullError
from hybrimoe.server.worker import Worker

SHORT = SamplingOptions(max_new_tokens=2, temperature=0.0)
LONG = SamplingOptions(max_new_tokens=80, temperature=1.0, seed=1)


@pytest.fixture
def steps(generator, monkeypatch):
    """Lets the model compute step by step: `steps.go.release(n)`; `steps.began` counts the steps that began."""
    forward = generator.forward

    class Steps:
        go = threading.Semaphore(0)
        began = threading.Semaphore(0)
        n = 0

    def stepwise(*args):
        Steps.n += 1
        Steps.began.release()
        assert Steps.go.acquire(timeout=600)
        return forward(*args)

    monkeypatch.setattr(generator, "forward", stepwise)
    yield Steps
    Steps.go.release(1000)


def running(coroutine):
    return asyncio.run(coroutine)


async def text_of(job):
    return "".join(piece.text for piece in await PieceReader(job).rest())


async def began(steps):
    await asyncio.to_thread(steps.began.acquire, timeout=600)


def test_a_client_that_leaves_is_computed_no_further_than_the_step_under_way(generator, steps):
    async def run():
        worker = Worker(generator)
        worker.start()
        job = worker.submit(generator.encode("It was"), LONG)
        await began(steps)
        steps.go.release(3)
        await began(steps), await began(steps), await began(steps)
        job.cancel()
        steps.go.release(1)
        await asyncio.to_thread(worker.close)
        return job

    job = running(run())
    assert len(job.reply.token_ids) == 4
    assert steps.n == 4


def test_a_long_prompt_ends_after_the_part_under_way(generator, steps, monkeypatch):
    monkeypatch.setattr(generator, "prefill_chunk_tokens", 4)

    async def run():
        worker = Worker(generator)
        worker.start()
        job = worker.submit(generator.encode("It was a bright cold day in April, and the clocks were striking"), LONG)
        await began(steps)
        job.cancel()
        steps.go.release(1)
        await asyncio.to_thread(worker.close)
        return job

    assert running(run()).reply.token_ids == []
    assert steps.n == 1


def test_a_waiting_client_that_leaves_makes_room_at_once_and_is_never_computed(generator, steps):
    async def run():
        worker = Worker(generator, queue_length=1)
        worker.start()
        ids = generator.encode("It was")
        first = worker.submit(ids, SHORT)
        await began(steps)
        second = worker.submit(ids, SHORT)
        with pytest.raises(QueueFullError, match="1 requests are waiting"):
            worker.submit(ids, SHORT)
        second.cancel()
        assert worker.n_waiting == 0
        third = worker.submit(ids, SHORT)
        steps.go.release(1000)
        texts = [await text_of(job) for job in (first, third)]
        await asyncio.to_thread(worker.close)
        return texts, second

    texts, second = running(run())
    assert texts[0] == texts[1] != ""
    assert second.reply is None


def test_draining_refuses_what_waits_and_lets_the_running_one_end(generator, steps):
    async def run():
        worker = Worker(generator)
        worker.start()
        ids = generator.encode("It was")
        first = worker.submit(ids, SHORT)
        await began(steps)
        waiting = [worker.submit(ids, SHORT) for _ in range(5)]
        worker.drain()
        for job in waiting:
            with pytest.raises(DrainingError, match="before it gets to"):
                await text_of(job)
        with pytest.raises(DrainingError):
            worker.submit(ids, SHORT)
        steps.go.release(1000)
        text = await text_of(first)
        await asyncio.to_thread(worker.close)
        return text, worker.alive, [job.reply for job in waiting]

    text, alive, refused = running(run())
    assert text
    assert not alive
    assert refused == [None] * 5


def test_a_reply_that_is_cut_tells_its_client_at_once(generator, steps):
    async def run():
        worker = Worker(generator)
        worker.start()
        job = worker.submit(generator.encode("It was"), LONG)
        await began(steps)
        worker.drain()
        worker.cut_running()
        with pytest.raises(DrainingError, match="before the reply was complete"):
            await text_of(job)  # though its step has not ended
        steps.go.release(1)
        await asyncio.to_thread(worker.close)
        return worker.alive

    assert not running(run())


def test_a_failed_generation_leaves_the_worker_alive(generator, monkeypatch):
    def fail(*args):
        raise RuntimeError("a lane died")

    async def run():
        worker = Worker(generator)
        worker.start()
        ids = generator.encode("It was")
        with monkeypatch.context() as patch:
            patch.setattr(generator, "forward", fail)
            with pytest.raises(RuntimeError, match="a lane died"):
                await text_of(worker.submit(ids, SHORT))
        text = await text_of(worker.submit(ids, SHORT))
        worker.close()
        return text

    assert running(run())


def test_a_worker_whose_thread_has_ended_says_so(generator):
    async def run():
        worker = Worker(generator)
        with pytest.raises(ModelError, match="has ended"):
            worker.submit(generator.encode("It was"), SHORT)

    running(run())
