"""The generating thread: its queue, who runs at once, who may leave and when, and how it ends."""

import asyncio
import threading
import time
from dataclasses import replace

import pytest

from hybrimoe.errors import ModelError
from hybrimoe.generation import SamplingOptions
from hybrimoe.generation.continuous_batching import BatchEngine
from hybrimoe.server.errors import DrainingError, LateError, QueueFullError
from hybrimoe.server.inbox import Inbox
from hybrimoe.server.urgency import Urgency
from hybrimoe.server.worker import Job, Turns, Worker

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
    text = ""
    while True:
        for _, item in await job.inbox.take():
            if isinstance(item, Exception):
                raise item
            if item is None:
                return text
            text += item.text


async def began(steps):
    await asyncio.to_thread(steps.began.acquire, timeout=600)


def test_a_client_that_leaves_is_computed_no_further_than_the_step_under_way(generator, steps):
    async def run():
        worker = Worker(BatchEngine(generator))
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
        worker = Worker(BatchEngine(generator))
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
        worker = Worker(BatchEngine(generator), queue_length=1)
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
        worker = Worker(BatchEngine(generator))
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
        worker = Worker(BatchEngine(generator))
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
        worker = Worker(BatchEngine(generator))
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
        worker = Worker(BatchEngine(generator))
        with pytest.raises(ModelError, match="has ended"):
            worker.submit(generator.encode("It was"), SHORT)

    running(run())


class TestSeveralAtOnce:
    """Requests beside each other. The model has no compiled step, so that each token is a step of its own."""

    def test_a_client_that_leaves_frees_its_place_for_one_that_waits(self, generator, steps):
        async def run():
            worker = Worker(BatchEngine(generator, parallel=2))
            worker.start()
            ids = generator.encode("It was")
            jobs = [worker.submit(ids, LONG) for _ in range(3)]
            await began(steps)
            steps.go.release(2)  # both prompts
            await began(steps), await began(steps)
            assert (worker.n_running, worker.n_waiting) == (2, 1)
            jobs[0].cancel()
            while jobs[2].reply is None:
                steps.go.release(1)
                await began(steps)
            n_tokens = [len(job.reply.token_ids) for job in jobs]
            steps.go.release(1000)
            texts = [await text_of(job) for job in jobs[1:]]
            await asyncio.to_thread(worker.close)
            return jobs, n_tokens, texts

        jobs, n_tokens, texts = running(run())
        assert n_tokens[0] <= 2, "its own prompt, and the token under way"
        assert texts[0] == texts[1] != ""
        assert jobs[0].reply.finish_reason == "interrupted"
        assert jobs[2].waited_s >= 0

    def test_the_replies_are_those_of_one_at_a_time(self, generator):
        words = ["It was", "A bright cold day in April", "clocks", "striking thirteen, and he"]

        async def run(parallel):
            worker = Worker(BatchEngine(generator, parallel=parallel))
            worker.start()
            options = [SamplingOptions(max_new_tokens=7 + n, temperature=0.8, seed=n) for n in range(len(words))]
            jobs = [worker.submit(generator.encode(one), own) for one, own in zip(words, options, strict=True)]
            texts = [await text_of(job) for job in jobs]
            await asyncio.to_thread(worker.close)
            return texts

        assert running(run(1)) == running(run(3))

    def test_draining_lets_all_of_them_end_and_cutting_tells_all_of_them(self, generator, steps):
        async def run(cut):
            worker = Worker(BatchEngine(generator, parallel=2))
            worker.start()
            ids = generator.encode("It was")
            jobs = [worker.submit(ids, SHORT) for _ in range(3)]
            await began(steps)
            while worker.n_waiting > 1:
                await asyncio.sleep(0)
            worker.drain()
            if cut:
                worker.cut_running()
            steps.go.release(1000)
            told = await asyncio.gather(*(text_of(job) for job in jobs), return_exceptions=True)
            await asyncio.to_thread(worker.close)
            return told, worker.alive

        (first, second, refused), alive = running(run(cut=False))
        assert first == second != ""
        assert isinstance(refused, DrainingError)
        assert not alive
        told, _ = running(run(cut=True))
        assert all(isinstance(one, DrainingError) for one in told)

    def test_one_that_fails_does_not_take_the_others(self, generator, monkeypatch):
        forward, caches = generator.forward, []

        def fail_second(ids, cache):
            caches.extend([cache] if cache not in caches else [])
            if cache is caches[min(1, len(caches) - 1)] and len(caches) > 1 and len(ids) == 1:
                raise MemoryError("no room for it")
            return forward(ids, cache)

        monkeypatch.setattr(generator, "forward", fail_second)

        async def run():
            worker = Worker(BatchEngine(generator, parallel=3))
            worker.start()
            ids = generator.encode("It was")
            jobs = [worker.submit(ids, SHORT) for _ in range(3)]
            told = await asyncio.gather(*(text_of(job) for job in jobs), return_exceptions=True)
            await asyncio.to_thread(worker.close)
            return told

        told = running(run())
        assert isinstance(told[1], MemoryError)
        assert told[0] == told[2] != ""

    def test_a_refusal_says_when_a_place_should_be_free(self, generator, steps):
        async def run():
            worker = Worker(BatchEngine(generator, parallel=2), queue_length=0)
            worker.start()
            worker._durations_s.extend([6.0, 10.0])
            with pytest.raises(QueueFullError) as refused:
                worker.submit(generator.encode("It was"), SHORT)
            await asyncio.to_thread(worker.close)
            return refused.value

        refused = running(run())
        assert refused.answer_headers() == {"Retry-After": "4"}

    def test_a_request_that_has_waited_too_long_is_refused(self, generator, steps):
        async def run():
            worker = Worker(BatchEngine(generator), max_wait_s=1e-6)
            worker.start()
            ids = generator.encode("It was")
            first = Job(ids, SHORT, Inbox(), submitted_s=time.monotonic() + 3600)  # not late
            worker._waiting.append(first)
            late = worker.submit(ids, SHORT)
            steps.go.release(1000)
            told = await asyncio.gather(text_of(first), text_of(late), return_exceptions=True)
            await asyncio.to_thread(worker.close)
            return told, late

        (text, refused), late = running(run())
        assert text
        assert (type(refused), refused.status) == (LateError, 429)
        assert late.reply is None

    def test_an_engine_that_breaks_tells_everybody(self, generator, steps, monkeypatch):
        monkeypatch.setattr(threading, "excepthook", lambda _: None)  # the thread's end is part of the test

        async def run():
            engine = BatchEngine(generator, parallel=1)
            worker = Worker(engine)
            worker.start()
            jobs = [worker.submit(generator.encode("It was"), SHORT) for _ in range(2)]
            await began(steps)
            monkeypatch.setattr(engine, "_decode", None)
            steps.go.release(1000)
            told = await asyncio.gather(*(text_of(job) for job in jobs), return_exceptions=True)
            return told, worker

        (first, second), worker = running(run())
        assert isinstance(first, ModelError)
        assert isinstance(second, DrainingError)
        worker._thread.join(600)
        assert not worker.alive


class TestTurns:
    """Who is next, and who has no time left. One place, so that replies are computed one after another."""

    def order(self, generator, steps, urgencies):
        """Requests in the order in which they were answered, the first of them already under way, and their texts."""

        async def run():
            worker = Worker(BatchEngine(generator))
            worker.start()
            ids, ended = generator.encode("It was"), []
            jobs = [worker.submit(ids, SHORT, urgencies[0])]
            await began(steps)
            jobs += [worker.submit(ids, SHORT, urgency) for urgency in urgencies[1:]]

            async def answered(number, job):
                text = await text_of(job)
                ended.append(number)
                return text

            steps.go.release(1000)
            texts = await asyncio.gather(*(answered(number, job) for number, job in enumerate(jobs)))
            await asyncio.to_thread(worker.close)
            return ended, texts

        return running(run())

    def test_clients_take_turns_however_many_requests_one_has_sent(self, generator, steps):
        many, few = Urgency("many"), Urgency("few")
        ended, texts = self.order(generator, steps, [many, many, many, few, many, few])
        assert ended == [0, 3, 1, 5, 2, 4]
        assert len(set(texts)) == 1, "each greedy reply is the one that the request gets alone"

    def test_a_lower_priority_comes_first_and_equal_ones_in_their_order(self, generator, steps):
        urgencies = [Urgency(priority=priority) for priority in (0, 5, 0, -1, 0, -1)]
        assert self.order(generator, steps, urgencies)[0] == [0, 3, 5, 2, 4, 1]

    def test_clients_share_the_places(self):
        def job(client, number):
            return Job([number], SHORT, None, urgency=Urgency(client))

        under_way, waiting = [job("a", 0), job("a", 1)], [job("a", 2), job("b", 3)]
        assert Turns().next(waiting, under_way) is waiting[1]

    def test_a_reply_ends_with_what_there_is_when_its_time_is_over(self, generator, steps):
        async def run(max_s, server_s):
            worker = Worker(BatchEngine(generator), max_reply_s=server_s)
            worker.start()
            ids = generator.encode("It was")
            urgency = Urgency(max_s=max_s)
            first = worker.submit(ids, LONG, urgency)
            await began(steps)
            second = worker.submit(ids, SHORT, urgency)
            steps.go.release(2)
            await began(steps), await began(steps)
            first.submitted_s -= 7200  # as if two hours had gone by
            second.submitted_s -= 7200
            steps.go.release(1000)
            told = await asyncio.gather(text_of(first), text_of(second), return_exceptions=True)
            await asyncio.to_thread(worker.close)
            return first.reply, told

        steps.go.release(1000)
        whole = "".join(generator.reply(generator.encode("It was"), LONG))
        while steps.go.acquire(blocking=False) or steps.began.acquire(blocking=False):
            pass
        for limits in ((3600, None), (None, 3600), (3600, 10_000)):
            reply, (text, late) = running(run(*limits))
            assert reply.finish_reason == "deadline"
            assert 0 < len(reply.token_ids) < 80
            assert whole.startswith(text)
            assert isinstance(late, LateError)


@pytest.mark.parametrize("top_logprobs", [None, 1])
def test_a_piece_has_what_belongs_to_its_tokens_and_no_more(generator, top_logprobs):
    """What each piece of a long reply carries must not grow with the reply: a whole answer keeps all of them."""

    async def run():
        worker = Worker(BatchEngine(generator))
        worker.start()
        job = worker.submit(generator.encode("It was"), replace(LONG, top_logprobs=top_logprobs))
        pieces = []
        while not pieces or pieces[-1] is not None:
            pieces.extend(item for _, item in await job.inbox.take())
        await asyncio.to_thread(worker.close)
        return job, pieces[:-1]

    job, pieces = running(run())
    n_recorded = 0 if top_logprobs is None else len(job.reply.token_ids)
    assert len(pieces) > 10
    assert sum(len(piece.logprobs) for piece in pieces) == n_recorded
    assert [offset for piece in pieces for offset in piece.text_offsets] == job.reply.text_offsets[:n_recorded]


@pytest.mark.parametrize(("n_tokens", "n_pauses"), [(1, 0), (20, 1)])
def test_the_first_text_of_a_reply_that_goes_on_is_left_time_to_be_sent(generator, monkeypatch, n_tokens, n_pauses):
    pauses = []
    monkeypatch.setattr(Worker, "_give_way", lambda self: pauses.append(1))

    async def run():
        worker = Worker(BatchEngine(generator))
        worker.start()
        options = SamplingOptions(max_new_tokens=n_tokens, temperature=0.0, ignore_eos=True)
        await text_of(worker.submit(generator.encode("It was"), options))
        await asyncio.to_thread(worker.close)

    running(run())
    assert len(pauses) == n_pauses
