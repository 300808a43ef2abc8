"""Replies on their way: clients that leave, failures before and within a stream, comment lines while nothing comes."""

import asyncio
import json
import threading

import pytest

from hybrimoe.amounts import Amount
from hybrimoe.generation.prefix.budget import DiskSettings, PrefixSettings
from hybrimoe.server import delivery

WHOLE = {"prompt": "It was", "max_tokens": 60, "temperature": 0}
STREAM = {**WHOLE, "stream": True}
PATH = "/v1/completions"


@pytest.fixture
def gate(generator, monkeypatch):
    """The model computes nothing until the event is set; `gate.began` is set when it would begin."""
    forward, gate = generator.forward, threading.Event()
    gate.began, gate.n = threading.Event(), 0

    def waiting(*args):
        gate.n += 1
        gate.began.set()
        assert gate.wait(600)
        return forward(*args)

    monkeypatch.setattr(generator, "forward", waiting)
    yield gate
    gate.set()


def failing_after(generator, monkeypatch, n_steps, error):
    forward, left = generator.forward, [n_steps]

    def fail(*args):
        left[0] -= 1
        if left[0] < 0:
            raise error
        return forward(*args)

    monkeypatch.setattr(generator, "forward", fail)


def idle(served):
    return served.n_waiting == 0 and served.n_running == 0


async def until(condition):
    async with asyncio.timeout(600):
        while not condition():
            await asyncio.sleep(0.002)


@pytest.mark.parametrize("body", [WHOLE, STREAM])
def test_a_client_that_leaves_during_the_prompt_frees_the_server(application, connect, gate, body):
    app, served = application()

    async def run():
        connection = connect(app, PATH, body)
        request = asyncio.create_task(connection.run())
        await asyncio.to_thread(gate.began.wait, 30)
        connection.left.set()
        async with asyncio.timeout(10):
            await request  # the application is done with it though the model still computes
        gate.set()
        await until(lambda: idle(served))

    asyncio.run(run())
    assert gate.n == 1, "no step after the one under way"


def test_a_client_that_leaves_in_the_middle_of_a_stream_frees_the_server(application, connect, generator, monkeypatch):
    app, served = application()
    forward, steps, go = generator.forward, [], threading.Semaphore(8)

    def counted(*args):
        steps.append(1)
        assert go.acquire(timeout=600)
        return forward(*args)

    monkeypatch.setattr(generator, "forward", counted)

    async def run():
        connection = connect(app, PATH, STREAM)
        request = asyncio.create_task(connection.run())
        while b"data" not in (await connection.sent.get()).get("body", b""):
            pass
        connection.left.set()
        async with asyncio.timeout(10):
            await request
        go.release(1000)
        await until(lambda: idle(served))

    asyncio.run(run())
    assert len(steps) <= 9


def test_a_waiting_client_that_leaves_is_forgotten(application, connect, gate):
    app, served = application()

    async def run():
        first = connect(app, PATH, WHOLE)
        running = asyncio.create_task(first.run())
        await asyncio.to_thread(gate.began.wait, 30)
        second = connect(app, PATH, WHOLE)
        waiting = asyncio.create_task(second.run())
        await until(lambda: served.n_waiting == 1)
        second.left.set()
        await waiting
        assert served.n_waiting == 0
        gate.set()
        await running

    asyncio.run(run())


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), MemoryError(), ValueError("a lane died")])
@pytest.mark.parametrize("body", [WHOLE, STREAM])
def test_a_failure_before_the_first_text_is_a_500_with_an_error_object(call, generator, monkeypatch, error, body):
    with monkeypatch.context() as patch:
        failing_after(generator, patch, 0, error)
        response = call("POST", PATH, body)
    assert response.status_code == 500
    assert response.json()["error"]["type"] == "server_error"
    assert type(error).__name__ in response.json()["error"]["message"]
    assert call("POST", PATH, body).status_code == 200, "the next request is answered"


@pytest.mark.parametrize("error", [RuntimeError("CUDA out of memory"), MemoryError(), ValueError("a lane died")])
def test_a_failure_within_a_stream_is_an_event_and_then_nothing_more(call, generator, monkeypatch, error):
    failing_after(generator, monkeypatch, 6, error)
    response = call("POST", PATH, STREAM)
    assert response.status_code == 200
    *texts, last = [line for line in response.text.split("\n\n") if line and line[0] != ":"]
    assert texts
    assert json.loads(last.removeprefix("data: "))["error"]["code"] == "internal_error"
    assert "[DONE]" not in response.text
    assert '"finish_reason": "' not in response.text


def test_a_stream_without_text_begins_and_is_kept_alive(application, connect, gate, monkeypatch):
    monkeypatch.setattr(delivery, "STATUS_SECONDS", 0.01)
    monkeypatch.setattr(delivery, "PING_SECONDS", 0.01)
    app, _ = application()

    async def run():
        connection = connect(app, PATH, STREAM)
        request = asyncio.create_task(connection.run())
        start = await connection.sent.get()
        pings = [(await connection.sent.get())["body"] for _ in range(3)]
        gate.set()
        await request
        rest = b"".join([connection.sent.get_nowait()["body"] for _ in range(connection.sent.qsize())])
        return start["status"], pings, rest

    status, pings, rest = asyncio.run(run())
    assert status == 200
    assert all(ping.startswith(b": ") and ping.endswith(b"\n\n") for ping in pings)
    assert rest.rstrip().endswith(b"data: [DONE]")


def test_a_prompt_is_turned_into_tokens_beside_the_event_loop(application, connect, generator, monkeypatch):
    app, _ = application()
    tokenizer, go = generator.tokenizer, threading.Event()

    class Slow:
        chat_template = None

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def __call__(self, *args, **kwargs):
            assert go.wait(600)
            return tokenizer(*args, **kwargs)

    monkeypatch.setattr(generator, "tokenizer", Slow())

    async def run():
        connections = [connect(app, PATH, WHOLE) for _ in range(2)]
        requests = [asyncio.create_task(one.run()) for one in connections]
        for _ in range(20):
            await asyncio.sleep(0.001)  # the loop runs while both are being turned into tokens
        assert not any(request.done() for request in requests)
        go.set()
        await asyncio.gather(*requests)
        return [(await one.sent.get())["status"] for one in connections]

    assert asyncio.run(run()) == [200, 200]


def test_a_full_queue_is_429_with_the_time_to_come_again(application, connect, client, gate):
    app, served = application(queue_length=1)

    async def run():
        first, second = connect(app, PATH, WHOLE), connect(app, PATH, WHOLE)
        running = asyncio.create_task(first.run())
        await asyncio.to_thread(gate.began.wait, 30)
        waiting = asyncio.create_task(second.run())
        await until(lambda: served.n_waiting == 1)
        async with client(app) as connection:
            refused = await connection.post(PATH, json=WHOLE)
            health = await connection.get("/health")
        gate.set()
        await asyncio.gather(running, waiting)
        return refused, health

    refused, health = asyncio.run(run())
    assert refused.status_code == 429
    assert int(refused.headers["retry-after"]) >= 1
    assert refused.json()["error"]["code"] == "queue_full"
    assert {name: health.json()[name] for name in ("waiting", "running")} == {"waiting": 1, "running": 1}


def test_several_requests_at_once_are_answered_as_one_after_another(application, client):
    prompts = ["It was", "a bright cold day in April, and the clocks were striking", "thirteen", "He said: "]
    bodies = [{**WHOLE, "prompt": prompt, "max_tokens": 12 + 3 * n} for n, prompt in enumerate(prompts)]

    async def run(app, together):
        async with client(app) as connection:
            if together:
                return await asyncio.gather(*(connection.post(PATH, json=body) for body in bodies))
            return [await connection.post(PATH, json=body) for body in bodies]

    (app, served), (alone, _) = application(parallel=3, max_stall_ms=1e-3), application(max_stall_ms=1e-3)
    found, expected = asyncio.run(run(app, True)), asyncio.run(run(alone, False))
    for one, other in zip(found, expected, strict=True):
        assert one.json()["choices"] == other.json()["choices"]
        counts = [answer.json()["usage"] for answer in (one, other)]
        for count in counts:  # what is found of earlier prompts depends on which of the others have ended by then
            del count["prompt_tokens_details"]
        assert counts[0] == counts[1]
    assert served.part.n_tokens >= 16
    assert "up to 3 replies at once, one after another each token" in served.described()


def test_metrics_tell_how_requests_run_beside_each_other(application, client):
    app, served = application(parallel=3)

    async def run():
        async with client(app) as connection:
            await asyncio.gather(*(connection.post(PATH, json=WHOLE) for _ in range(3)))
            return (await connection.get("/metrics")).text

    text = asyncio.run(run())
    assert 'hybrimoe_requests_parallel{reason="the model has no compiled step",way="in turn"} 3.0' in text
    assert f"hybrimoe_prompt_part_tokens {float(served.part.n_tokens)}" in text
    assert "hybrimoe_requests_running 0.0" in text
    assert "hybrimoe_queue_seconds_count 3.0" in text
    assert "hybrimoe_ttft_seconds_count 3.0" in text
    steps = next(line for line in text.splitlines() if line.startswith("hybrimoe_decode_steps "))
    assert 59 <= float(steps.split()[1]) <= 3 * 59


def test_replies_to_one_prompt_compute_it_once(application, client, generator, monkeypatch):
    forward, computed = generator.forward, []

    def counted(token_ids, cache):
        computed.append(len(token_ids))
        return forward(token_ids, cache)

    app, served = application(parallel=2)
    monkeypatch.setattr(generator, "forward", counted)
    prompt = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 4

    async def run():
        async with client(app) as connection:
            chosen = {"prompt": prompt, "max_tokens": 3, "temperature": 0, "n": 3, "best_of": 4}
            answer = (await connection.post(PATH, json=chosen)).json()
            again = (await connection.post(PATH, json={**chosen, "n": 1, "best_of": 1})).json()
            return answer, again, (await connection.get("/metrics")).text

    answer, again, metrics = asyncio.run(run())
    n_prompt, steps = answer["usage"]["prompt_tokens"], 5 * 2
    assert sum(computed) == n_prompt + steps
    assert len({choice["text"] for choice in (*answer["choices"], *again["choices"])}) == 1
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == n_prompt
    told = dict(line.rsplit(" ", 1) for line in metrics.splitlines() if line.startswith("hybrimoe_prefix_cache"))
    assert (told["hybrimoe_prefix_cache_hits"], told["hybrimoe_prefix_cache_misses"]) == ("4.0", "1.0")
    assert 0 < float(told["hybrimoe_prefix_cache_bytes"]) < float(told['hybrimoe_prefix_cache_max_bytes{reason=""}'])
    assert "a prefix cache of" in served.described()


def test_a_restarted_server_reads_what_an_earlier_one_computed(application, client, tmp_path):
    disk = DiskSettings(tmp_path / "prefixes", Amount("bytes", 1 << 30), "a model")
    prompt = "It was the best of times, it was the worst of times, it was the age of wisdom. " * 2

    async def run(app):
        async with client(app) as connection:
            answer = await connection.post(PATH, json={"prompt": prompt, "max_tokens": 3, "temperature": 0})
            return answer.json(), (await connection.get("/metrics")).text, await connection.get("/hybrimoe/state")

    answers = []
    for restarted in (False, True):
        app, served = application(prefix_cache=PrefixSettings(disk=disk))
        assert f"1GiB in {disk.folder}" in served.described()
        answer, metrics, state = asyncio.run(run(app))
        answers.append(answer)
        reused = answer["usage"]["prompt_tokens_details"]["cached_tokens"]
        assert reused == (answer["usage"]["prompt_tokens"] if restarted else 0)
        told = dict(
            line.rsplit(" ", 1) for line in metrics.splitlines() if line.startswith("hybrimoe_prefix_cache_disk")
        )
        assert float(told["hybrimoe_prefix_cache_disk_read_tokens"]) == reused
        assert float(told['hybrimoe_prefix_cache_disk_max_bytes{reason=""}']) == 1 << 30
        tier = next(tier for tier in state.json()["memory"] if tier["name"] == "prefix_cache_disk")
        assert (tier["device"], tier["of_bytes"]) == (str(disk.folder), 1 << 30)
        served.close()
    assert tier["bytes"] > 0
    assert answers[0]["choices"] == answers[1]["choices"]
