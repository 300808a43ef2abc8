"""What a request may ask: all that is honoured changes the reply, and what cannot be honoured is refused by name."""

import asyncio
import json
import math

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrimoe.server.apis.chat import ChatRequest
from hybrimoe.server.apis.completions import CompletionRequest
from hybrimoe.server.apis.openai import REFUSED, UNUSED
from hybrimoe.server.fields import MAX_STOP_LENGTH, MAX_STOPS

PROMPT = {"prompt": "It was", "max_tokens": 4, "temperature": 0}
USER = [{"role": "user", "content": "Hi"}]
CHAT = {"messages": USER, "max_tokens": 4, "temperature": 0}
SURROGATE = "a\ud83d"


def completion(call, **more):
    return call("POST", "/v1/completions", {**PROMPT, **more})


def chat(call, **more):
    return call("POST", "/v1/chat/completions", {**CHAT, **more})


def refusal(response):
    assert response.status_code == 400, response.text
    error = response.json()["error"]
    assert error["type"] == "invalid_request_error"
    return error["message"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("functions", [{}]), ("modalities", ["text", "audio"]), ("audio", {}), ("store", True),
        ("service_tier", "flex"), ("verbosity", "low"), ("mirostat", 2), ("typical_p", 0.5), ("use_beam_search", True),
    ],
)  # fmt: skip
def test_what_has_no_support_is_refused_by_name(call, field, value):
    for ask in (completion, chat):
        assert refusal(ask(call, **{field: value})).startswith(f"{field}: this server has no support for")


def test_what_one_endpoint_takes_and_the_other_does_not_is_refused_there(call):
    for field, value in {"suffix": "end", "echo": True, "best_of": 2}.items():
        assert refusal(chat(call, **{field: value})).startswith(f"{field}: this server has no support for")
    assert "cannot fill in" in refusal(completion(call, suffix="end"))


UNKNOWN = ["temprature", "max_token", "typical", SURROGATE, "x" * 10_000]


@pytest.mark.parametrize("field", UNKNOWN)
def test_an_unknown_field_is_refused_by_a_strict_server(strict_call, field):
    assert "unknown field" in refusal(completion(strict_call, **{field: 1}))
    messages = [{**USER[0], field: 1}]
    assert "unknown field" in refusal(strict_call("POST", "/v1/chat/completions", {"messages": messages}))


@pytest.mark.parametrize("field", UNKNOWN)
def test_an_unknown_field_is_left_out_with_a_warning(call, field):
    for answer in (completion(call, **{field: 1}), chat(call, messages=[{**USER[0], field: 1}], stream=True)):
        assert answer.status_code == 200
        assert "unknown field" in answer.headers["warning"]
        assert answer.headers["warning"].isascii()
    assert completion(call, **{field: 1}).json()["choices"] == completion(call).json()["choices"]
    assert "warning" not in completion(call).headers


def test_a_misspelt_field_has_a_suggestion(call, strict_call):
    assert "did you mean 'temperature'" in refusal(completion(strict_call, temprature=1))
    assert "did you mean 'temperature'" in completion(call, temprature=1).headers["warning"]


def test_null_is_as_absent_and_asking_for_what_holds_anyway_is_fine(call):
    plain = completion(call).json()["choices"]
    nulls = dict.fromkeys([*CompletionRequest.model_fields, *REFUSED]) | PROMPT
    neutral = {"n": 1, "response_format": {"type": "text"}, "store": False, "modalities": ["text"]}
    unused = {"user": "me", "metadata": {"a": "b"}, "cache_prompt": True}
    assert set(unused) <= set(UNUSED)
    for more in (nulls, neutral, unused):
        assert completion(call, **more).json()["choices"] == plain
    assert chat(call, stream=None, **neutral).json()["choices"] == chat(call).json()["choices"]
    assert chat(call, **(dict.fromkeys(ChatRequest.model_fields) | CHAT)).status_code == 200


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("temperature", True), ("temperature", "0.5"), ("temperature", math.nan), ("temperature", math.inf),
        ("temperature", 1e9), ("top_p", -0.1), ("top_k", 1.5), ("repetition_penalty", 1e-40),
        ("repetition_penalty", 1e300), ("max_tokens", 1e30), ("max_tokens", 0), ("max_tokens", True),
        ("seed", 2**63), ("stream", 1), ("stream", "yes"), ("logit_bias", {"a": 1}), ("logit_bias", {"1": 101}),
        ("logit_bias", {"999999": 1}), ("frequency_penalty", 3), ("stop", ["a"] * (MAX_STOPS + 1)),
        ("stop", "x" * (MAX_STOP_LENGTH + 1)), ("stop", [""]), ("stop", [1]), ("user", 5), ("stream_options", True),
        ("stream_options", {"include_usage": 1}),
    ],
)  # fmt: skip
def test_a_value_that_cannot_be_is_refused_with_its_field(call, field, value):
    for ask in (completion, chat):
        assert field in refusal(ask(call, **{field: value}))


@pytest.mark.parametrize("temperature", [1e-300, 1e-40, 1e-7])
def test_a_temperature_that_float32_cannot_divide_by_is_greedy(call, temperature):
    assert completion(call, temperature=temperature).json()["choices"] == completion(call).json()["choices"]


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": SURROGATE}, {"prompt": [SURROGATE]}, {"prompt": "x", "stop": SURROGATE},
        {"prompt": "x", "model": SURROGATE}, {"prompt": "x", "user": SURROGATE},
        {"prompt": "x", "metadata": {"a": [SURROGATE]}},
        {"prompt": "x", "grammar": SURROGATE}, {"prompt": "x", "json_schema": {"a": SURROGATE}},
    ],
)  # fmt: skip
def test_half_a_surrogate_pair_is_refused_wherever_it_stands(call, body):
    assert "surrogate" in refusal(call("POST", "/v1/completions", body))
    messages = [{"role": "user", "content": SURROGATE}]
    assert "surrogate" in refusal(call("POST", "/v1/chat/completions", {"messages": messages}))
    messages = [{"role": "user", "content": [{"type": "text", "text": SURROGATE}]}]
    assert "surrogate" in refusal(call("POST", "/v1/chat/completions", {"messages": messages}))


def test_a_penalty_and_a_bias_change_the_reply(call):
    def text(**more):
        return completion(call, max_tokens=12, logprobs=0, **more).json()["choices"][0]

    plain = text()
    ids = call("POST", "/v1/completions", {**PROMPT, "logit_bias": {"7": 100}, "logprobs": 1}).json()["choices"][0]
    assert len(set(ids["logprobs"]["tokens"])) == 1, "a bias of 100 decides every choice"
    repeated = text(logit_bias={"7": 30})["logprobs"]["tokens"]
    spread = text(logit_bias={"7": 3}, frequency_penalty=2)["logprobs"]["tokens"]
    assert len(set(spread)) > len(set(repeated))
    assert text(logit_bias={"7": 3}, presence_penalty=2)["text"] != plain["text"]


def test_log_probabilities_of_a_completion(call, generator):
    body = {**PROMPT, "logprobs": 3, "max_tokens": 5}
    choice = call("POST", "/v1/completions", body).json()["choices"][0]
    told = choice["logprobs"]
    assert len(told["tokens"]) == len(told["token_logprobs"]) == len(told["text_offset"]) == 5
    assert all(len(best) <= 3 for best in told["top_logprobs"])
    for token, logprob, best in zip(told["tokens"], told["token_logprobs"], told["top_logprobs"], strict=True):
        assert best[token] == logprob == max(best.values()), "greedy takes the best"
    for token, offset in zip(told["tokens"], told["text_offset"], strict=True):
        assert choice["text"][offset:].startswith(token)


def test_log_probabilities_of_a_chat_whole_and_streamed(call):
    more = {"logprobs": True, "top_logprobs": 2, "max_tokens": 6}
    whole = chat(call, **more).json()["choices"][0]["logprobs"]["content"]
    assert [len(entry["top_logprobs"]) for entry in whole] == [2] * 6
    assert all(bytes(entry["bytes"]).decode() == entry["token"] for entry in whole if entry["bytes"] is not None)
    lines = chat(call, stream=True, **more).text.split("\n\n")
    events = [json.loads(line.removeprefix("data: ")) for line in lines if line.startswith("data: {")]
    told = [event["choices"][0]["logprobs"] for event in events]
    assert [entry for part in told if part is not None for entry in part["content"]] == whole
    assert "needs logprobs" in refusal(chat(call, top_logprobs=2))


@pytest.mark.parametrize("role", ["wizard", "", "User", None])
def test_a_role_that_no_template_has_is_refused(call, role):
    assert "role" in refusal(chat(call, messages=[{"role": role, "content": "x"}]))


@pytest.mark.parametrize(
    "message",
    [
        {"role": "user"}, {"role": "user", "content": None}, {"role": "system", "content": None},
        {"role": "tool", "tool_call_id": "1"}, {"role": "user", "content": [{"type": "text", "text": None}]},
        {"role": "user", "content": [{"type": "text"}]}, {"role": "user", "content": [{"type": "text", "text": 5}]},
        {"role": "user", "content": ["x"]}, {"role": "user", "content": 5},
    ],
)  # fmt: skip
def test_content_that_is_missing_or_no_text_is_refused(call, message):
    assert "content" in refusal(chat(call, messages=[message]))


def test_a_conversation_with_tool_calls_is_accepted_and_nothing_of_it_is_lost(call, generator):
    call_of = {"id": "1", "type": "function", "function": {"name": "add", "arguments": '{"a": 2}'}}
    messages = [
        *USER,
        {"role": "assistant", "content": None, "tool_calls": [call_of], "refusal": None, "annotations": []},
        {"role": "tool", "tool_call_id": "1", "content": "4"},
        {"role": "assistant", "tool_calls": [call_of]},
        {"role": "developer", "content": "Brief."},
    ]
    request = ChatRequest.model_validate({"messages": messages})
    told = request.template_messages()
    assert told[1]["tool_calls"][0]["function"]["arguments"] == {"a": 2}
    answer = chat(call, messages=messages, max_tokens=1)
    assert answer.status_code == 200, answer.text


def test_a_variable_that_the_template_does_not_have_is_refused(call):
    assert "no variable 'enable_thinking'" in refusal(chat(call, chat_template_kwargs={"enable_thinking": False}))
    assert "reasoning_effort" in refusal(chat(call, reasoning_effort="low"))
    assert "tokenize" in refusal(chat(call, chat_template_kwargs={"tokenize": True}))


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8)
    | st.sampled_from([SURROGATE, 1e-300, 1e30, 2**64, "text", "user", "assistant", "wizard"]),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=6), inner, max_size=3),
    max_leaves=6,
)  # fmt: skip
FIELDS = sorted({*ChatRequest.model_fields, *CompletionRequest.model_fields, *REFUSED, "unknown"} - {"stream"})


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    path=st.sampled_from(["completions", "chat/completions"]),
    changes=st.dictionaries(st.sampled_from(FIELDS), JSON, max_size=3),
    stream=st.booleans(),
)
def test_no_body_is_a_failure_of_the_server(call, path, changes, stream):
    """Whatever stands in a request, it is answered or refused with an error object."""
    body = {**(PROMPT if path == "completions" else CHAT), "stream": stream, "max_tokens": 1} | changes
    response = call("POST", f"/v1/{path}", body)
    assert response.status_code in (200, 400, 404), (body, response.text)
    if response.status_code != 200:
        assert response.json()["error"]["message"]


@settings(max_examples=60, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(message=st.dictionaries(st.sampled_from(["role", "content", "name", "tool_calls", "refusal", "x"]), JSON))
def test_no_message_is_a_failure_of_the_server(call, message):
    response = call("POST", "/v1/chat/completions", {**CHAT, "max_tokens": 1, "messages": [message]})
    assert response.status_code in (200, 400), (message, response.text)


@pytest.mark.parametrize("content", [b"", b"{", b"[1]", b"null", b'"x"', b"\xff\xfe", b"[" * 100_000, b"1" * 5000])
def test_a_body_that_is_no_object_is_refused(call, content):
    assert refusal(call("POST", "/v1/completions", content))


def test_priority_and_time_are_fields_or_headers(application, client):
    """A reply whose time is over says so beside its finish reason."""

    async def run():
        app, served = application(parallel=1)
        seen, submit = [], served.worker().submit

        def watched(ids, options, urgency, **more):
            seen.append(urgency)
            return submit(ids, options, urgency, **more)

        served.worker().submit = watched
        async with client(app) as http:
            body = {"prompt": "It was", "max_tokens": 2}
            await http.post("/v1/completions", json={**body, "priority": -2, "max_reply_seconds": 30})
            headers = {"X-HybriMoE-Priority": "7", "X-HybriMoE-Max-Reply-Seconds": "20", "x-api-key": "secret"}
            await http.post("/v1/completions", json=body, headers=headers)
            refused = await http.post("/v1/completions", json=body, headers={"X-HybriMoE-Priority": "urgent"})
            slow = {"prompt": "It was", "max_tokens": 400, "ignore_eos": True, "max_reply_seconds": 0.001}
            late = await http.post("/v1/completions", json=slow)
        return seen, refused, late

    seen, refused, late = asyncio.run(run())
    assert [(one.priority, one.max_s) for one in seen[:2]] == [(-2, 30.0), (7, 20.0)]
    assert seen[0].client != seen[1].client
    assert "secret" not in str(seen[1])
    assert refused.status_code == 400
    assert "X-HybriMoE-Priority" in refused.json()["error"]["message"]
    if late.status_code == 200:  # else it was over before the reply began
        choice = late.json()["choices"][0]
        assert (choice["finish_reason"], choice["stop_reason"]) == ("length", "deadline")
    else:
        assert late.status_code == 429
