"""The HTTP API through the ASGI application: answers, streams, errors, one generation at a time, metrics."""

import json

import pytest

from hybrimoe.generation import SamplingOptions

CONTEXT = 512
HEAD = {"model": "tiny", "temperature": 0.9, "seed": 3, "max_tokens": 8}


def events(response):
    lines = [line for line in response.text.split("\n\n") if line and line[0] != ":"]
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
        ("completions", {"prompt": "word " * 700}, 400, f"context is {CONTEXT} tokens"),
        ("completions", {}, 400, "prompt"),
        ("completions", {"prompt": "x", "temperature": -1}, 400, "temperature"),
        ("completions", {"prompt": "x", "top_p": "much"}, 400, "top_p"),
        ("completions", {"prompt": "x", "n": 0}, 400, "n"),
        ("completions", {"prompt": "x", "n": 2, "best_of": 1}, 400, "best_of"),
        ("completions", {"prompt": "x", "best_of": 2, "stream": True}, 400, "best_of"),
        ("completions", {"prompt": "x", "max_tokens": 0}, 400, "echo"),
        ("completions", {"prompt": "x", "logprobs": 50}, 400, "logprobs"),
        ("completions", {"prompt": "x", "stop": ""}, 400, "stop"),
        ("completions", {"prompt": "x", "model": "other"}, 404, "'tiny', not 'other'"),
        ("completions", {"prompt": []}, 400, "1 to 256 prompts"),
        ("completions", {"prompt": ["a", ""]}, 400, "prompt is empty"),
        ("completions", {"prompt": [1, 10**9]}, 400, "outside the vocabulary"),
        ("chat/completions", {"messages": []}, 400, "messages"),
        ("chat/completions", {"messages": [{"role": "user", "content": "x"}], "tools": [{}]}, 400, "tools"),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "input_audio"}]}]},
            400,
            "expected text content, found input_audio",
        ),
        (
            "chat/completions",
            {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": "data:,"}]}]},
            400,
            "messages.0.content.0: expected text content, found an image: this model takes no images",
        ),
    ],
)
def test_a_bad_request_is_an_error_object_that_says_why(call, path, body, status, words):
    response = call("POST", f"/v1/{path}", body)
    assert response.status_code == status
    error = response.json()["error"]
    assert words in error["message"]
    assert error["type"] == "invalid_request_error"


def test_minus_one_is_what_other_servers_take_it_for(call):
    greedy = {"prompt": "It was", "temperature": 0}
    bodies = [
        {**greedy, "max_tokens": 4},
        {**greedy, "max_tokens": 4, "seed": -1, "top_k": -1},
        {**greedy, "max_tokens": -1, "max_reply_seconds": 60},
    ]
    plain, same, longer = call.together(*(("POST", "/v1/completions", body) for body in bodies))
    assert same.json()["choices"] == plain.json()["choices"]
    assert longer.json()["usage"]["completion_tokens"] > 4, "-1 tokens are no limit"
    sampled = {**HEAD, "prompt": "It was", "temperature": 1.0, "seed": -5}
    first, again = (call("POST", "/v1/completions", sampled).json()["choices"] for _ in range(2))
    assert first == again, "other numbers below zero are seeds"
    for field in ("max_tokens", "max_completion_tokens"):
        body = {"messages": [{"role": "user", "content": "It was"}], "temperature": 0, field: -1}
        assert call("POST", "/v1/chat/completions", body).json()["usage"]["completion_tokens"] > 4
        assert call("POST", "/v1/chat/completions", {**body, field: -2}).status_code == 400
    options = {"num_predict": 3, "seed": -1, "top_k": -1}
    ollama = {"model": "tiny", "prompt": "It was", "stream": False, "options": options}
    assert call("POST", "/api/generate", ollama).json()["eval_count"] == 3


def test_models_and_health(call):
    paths = ("/v1/models", "/v1/models/tiny", "/v1/models/other", "/health", "/v1/nothing")
    models, card, missing, health, nothing = call.together(*(("GET", path) for path in paths))
    assert [entry["id"] for entry in models.json()["data"]] == ["tiny"]
    assert card.json()["id"] == "tiny"
    assert missing.status_code == 404
    assert health.json()["status"] == "ok"
    assert nothing.status_code == 404
    assert nothing.json()["error"]["message"].startswith("there is no page '/v1/nothing'; did you mean '/v1/")


def test_metrics_count_requests_tokens_and_the_expert_cache(call):
    call("POST", "/v1/completions", {**HEAD, "prompt": "It was"})
    text = call("GET", "/metrics").text
    assert "hybrimoe_generated_tokens_total 8.0" in text
    assert 'hybrimoe_requests_total{path="/v1/completions",status="200"} 1.0' in text
    assert "hybrimoe_expert_hit_rate 5.0" in text
    assert "hybrimoe_expert_skipped 5.0" in text, "nobody serves lossy replies unknowingly"
    assert 'hybrimoe_accelerator_n_slots{accelerator="1",name="emulated"} 6.0' in text
    assert 'hybrimoe_accelerator_link_us{accelerator="0",name="emulated"} 2.5' in text
    assert "hybrimoe_ttft_seconds_count 1.0" in text
