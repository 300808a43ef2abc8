"""The HTTP API through the ASGI application: answers, streams, errors, one generation at a time, metrics."""

import asyncio
import json
import threading

import httpx
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from hybrimoe.checkpoint import load_tokenizer
from hybrimoe.generation import SamplingOptions, TextGenerator
from hybrimoe.server.app import create_app
from hybrimoe.server.worker import QueueFullError, Worker

CONTEXT = 96
HEAD = {"model": "tiny", "temperature": 0.9, "seed": 3, "max_tokens": 8}


@pytest.fixture(scope="module")
def generator():
    tokenizer = load_tokenizer(None)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, moe_intermediate_size=16,
        num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, max_position_embeddings=CONTEXT, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    return TextGenerator(Qwen3MoeForCausalLM(config).eval(), tokenizer)


@pytest.fixture
def call(generator):
    """Sends requests to a fresh application; `call(method, path, body)`, or several at once with `call.together`."""
    unit = {"name": "emulated", "n_slots": 6, "n_layers": 2, "total": dict.fromkeys(COUNTERS, 2.5)}
    app = create_app(generator, "tiny", lambda: {"total": dict.fromkeys(COUNTERS, 5.0), "accelerators": [unit, unit]})

    async def request(client, method, path, body=None):
        return await client.request(method, path, json=body)

    def together(*requests):
        async def run():
            transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
            async with (
                app.router.lifespan_context(app),
                httpx.AsyncClient(transport=transport, base_url="http://x") as c,
            ):
                return await asyncio.gather(*(request(c, *words) for words in requests))

        return asyncio.run(run())

    def one(*words):
        return together(words)[0]

    one.together = together
    return one


COUNTERS = ("hits", "misses", "transfers", "prefetches", "transfer_bytes", "hit_rate", "cpu_us", "accel_us", "link_us",
            "routed", "skipped", "substituted", "lowered", "deferred")  # fmt: skip


def events(response):
    lines = [line for line in response.text.split("\n\n") if line]
    assert all(line.startswith("data: ") for line in lines)
    assert lines[-1] == "data: [DONE]"
    return [json.loads(line.removeprefix("data: ")) for line in lines[:-1]]


def expected_reply(generator, prompt):
    reply = generator.reply(generator.encode(prompt), SamplingOptions(temperature=0.9, seed=3, max_new_tokens=8))
    "".join(reply)
    return reply


def test_a_completion_is_the_generators_text_with_its_counts(call, generator):
    expected = expected_reply(generator, "It was")
    answer = call("POST", "/v1/completions", {**HEAD, "prompt": "It was"}).json()
    assert answer["object"] == "text_completion"
    assert answer["choices"][0]["text"] == expected.text
    assert answer["choices"][0]["finish_reason"] == "length"
    usage = answer["usage"]
    assert usage["prompt_tokens"] == len(expected.prompt_ids)
    assert usage["completion_tokens"] == 8
    assert usage["total_tokens"] == len(expected.prompt_ids) + 8
    ids = call("POST", "/v1/completions", {**HEAD, "prompt": expected.prompt_ids}).json()
    assert ids["choices"][0]["text"] == expected.text


def test_a_stream_is_the_same_text_in_pieces(call, generator):
    expected = expected_reply(generator, "It was")
    body = {**HEAD, "prompt": "It was", "stream": True, "stream_options": {"include_usage": True}}
    response = call("POST", "/v1/completions", body)
    assert response.headers["content-type"].startswith("text/event-stream")
    pieces = events(response)
    choices = [piece["choices"][0] for piece in pieces if piece["choices"]]
    assert "".join(choice["text"] for choice in choices) == expected.text
    assert len(choices) > 3
    assert choices[-1]["finish_reason"] == "length"
    assert all(choice["finish_reason"] is None for choice in choices[:-1])
    assert pieces[-1]["usage"]["completion_tokens"] == 8
    assert len({piece["id"] for piece in pieces}) == 1


def test_chat_whole_and_streamed(call):
    messages = [{"role": "user", "content": [{"type": "text", "text": "Good morning"}]}]
    whole = call("POST", "/v1/chat/completions", {**HEAD, "messages": messages}).json()
    assert whole["object"] == "chat.completion"
    message = whole["choices"][0]["message"]
    assert message["role"] == "assistant"
    assert message["content"]
    pieces = events(call("POST", "/v1/chat/completions", {**HEAD, "messages": messages, "stream": True}))
    assert pieces[0]["object"] == "chat.completion.chunk"
    assert pieces[0]["choices"][0]["delta"]["role"] == "assistant"
    text = "".join(piece["choices"][0]["delta"].get("content", "") for piece in pieces)
    assert text == message["content"]


def test_requests_at_once_are_answered_one_after_another_with_their_own_text(call, generator):
    prompts = ["It was", "She had", "He went to", "The"]
    expected = [expected_reply(generator, prompt).text for prompt in prompts]
    requests = [("POST", "/v1/completions", {**HEAD, "prompt": prompt}) for prompt in prompts]
    answers = call.together(*requests)
    assert [answer.json()["choices"][0]["text"] for answer in answers] == expected


@pytest.mark.parametrize(
    ("path", "body", "status", "words"),
    [
        ("completions", {"prompt": ""}, 400, "prompt is empty"),
        ("completions", {"prompt": "word " * 200}, 400, f"context is {CONTEXT} tokens"),
        ("completions", {}, 400, "prompt"),
        ("completions", {"prompt": "x", "temperature": -1}, 400, "temperature"),
        ("completions", {"prompt": "x", "top_p": "much"}, 400, "top_p"),
        ("completions", {"prompt": "x", "n": 2}, 400, "n"),
        ("completions", {"prompt": "x", "logprobs": 5}, 400, "log probabilities"),
        ("completions", {"prompt": "x", "stop": ""}, 400, "stop"),
        ("completions", {"prompt": "x", "model": "other"}, 404, "'tiny', not 'other'"),
        ("completions", {"prompt": ["a", "b"]}, 400, "one prompt"),
        ("completions", {"prompt": [1, 10**9]}, 400, "outside the vocabulary"),
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, 400, "tool calls"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url"}]}]},
            400,
            "expected text content, found image_url",
        ),
    ],
)
def test_a_bad_request_is_an_error_object_that_says_why(call, path, body, status, words):
    response = call("POST", f"/v1/{path}", body)
    assert response.status_code == status
    error = response.json()["error"]
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


def test_models_and_health(call):
    paths = ("/v1/models", "/v1/models/tiny", "/v1/models/other", "/health", "/v1/nothing")
    models, card, missing, health, nothing = call.together(*(("GET", path) for path in paths))
    assert [entry["id"] for entry in models.json()["data"]] == ["tiny"]
    assert card.json()["id"] == "tiny"
    assert missing.status_code == 404
    assert health.json()["status"] == "ok"
    assert nothing.status_code == 404
    assert nothing.json()["error"]["message"] == "Not Found"


def test_metrics_count_requests_tokens_and_the_expert_cache(generator):
    unit = {"name": "emulated", "n_slots": 6, "n_layers": 2, "total": dict.fromkeys(COUNTERS, 2.5)}
    app = create_app(generator, "tiny", lambda: {"total": dict.fromkeys(COUNTERS, 5.0), "accelerators": [unit, unit]})

    async def run():
        transport = httpx.ASGITransport(app=app)
        async with app.router.lifespan_context(app), httpx.AsyncClient(transport=transport, base_url="http://x") as c:
            await c.post("/v1/completions", json={**HEAD, "prompt": "It was"})
            return (await c.get("/metrics")).text

    text = asyncio.run(run())
    assert "hybrimoe_generated_tokens_total 8.0" in text
    assert 'hybrimoe_requests_total{path="/v1/completions",status="200"} 1.0' in text
    assert "hybrimoe_expert_hit_rate 5.0" in text
    assert "hybrimoe_expert_skipped 5.0" in text, "nobody serves lossy replies unknowingly"
    assert 'hybrimoe_accelerator_n_slots{name="emulated",unit="1"} 6.0' in text
    assert 'hybrimoe_accelerator_link_us{name="emulated",unit="0"} 2.5' in text
    assert "hybrimoe_ttft_seconds_count 1.0" in text


def test_a_client_that_leaves_stops_its_generation(generator):
    async def run():
        worker = Worker(generator)
        worker.start()
        job = worker.submit(generator.encode("It was"), SamplingOptions(max_new_tokens=80, temperature=1.0, seed=1))
        pieces = job.stream()
        await anext(pieces)
        await pieces.aclose()
        worker.close()
        return job

    job = asyncio.run(run())
    assert job.cancelled.is_set()
    assert len(job.reply.token_ids) < 80


def test_a_full_queue_refuses_and_a_failed_generation_leaves_the_worker_alive(generator, monkeypatch):
    go_on = threading.Event()
    forward = generator.forward

    def slow(*args):
        go_on.wait(10)
        return forward(*args)

    def fail(*args):
        raise RuntimeError("a lane died")

    async def run():
        worker = Worker(generator, queue_length=1)
        worker.start()
        ids = generator.encode("It was")
        options = SamplingOptions(max_new_tokens=2)
        with monkeypatch.context() as patch:
            patch.setattr(generator, "forward", slow)
            jobs = [worker.submit(ids, options)]
            while worker.n_waiting:
                await asyncio.sleep(0.001)
            jobs.append(worker.submit(ids, options))
            with pytest.raises(QueueFullError, match="1 requests are waiting"):
                worker.submit(ids, options)
            go_on.set()
            texts = ["".join([piece async for piece in job.stream()]) for job in jobs]
        with monkeypatch.context() as patch:
            patch.setattr(generator, "forward", fail)
            with pytest.raises(RuntimeError, match="a lane died"):
                [piece async for piece in worker.submit(ids, options).stream()]
        texts.append("".join([piece async for piece in worker.submit(ids, options).stream()]))
        worker.close()
        return texts

    texts = asyncio.run(run())
    assert len(set(texts)) == 1
