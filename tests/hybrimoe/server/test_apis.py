"""Responses, Anthropic's, Ollama's and llama-server's endpoints as they look on the wire, and how each words errors."""

import json

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from hybrimoe.server.apis.anthropic import MessagesRequest
from hybrimoe.server.apis.responses import ResponseRequest
from hybrimoe.server.errors import RequestError
from hybrimoe.server.infill import can_infill, infill_tokens
from hybrimoe.server.replies.syntax import ReplySyntax

USER = [{"role": "user", "content": "Hi"}]
SAID = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
THOUGHT = "<think>hm</think>Yes. "
ASKED = {
    "/v1/responses": {"input": "Hi", "max_output_tokens": 3},
    "/v1/messages": {"messages": USER, "max_tokens": 3},
    "/api/chat": {"model": "tiny", "messages": USER, "options": {"num_predict": 3}},
    "/api/generate": {"model": "tiny", "prompt": "Hi", "options": {"num_predict": 3}},
    "/completion": {"prompt": "Hi", "n_predict": 3},
}
TOOL = {"type": "object", "properties": {"a": {"type": "integer"}}}


def error_of(path, answer):
    body = answer.json()
    if path.startswith("/v1/messages"):
        assert body["type"] == "error"
    return body["error"] if path.startswith("/api/") else body["error"]["message"]


@pytest.fixture
def saying(application, calling, generator, monkeypatch):
    """A `call` whose model says a given text: thinking, an answer and a call, as a larger model would."""
    pytest.importorskip("llguidance", reason="structured replies need the extra serve")
    from hybrimoe.generation.constraint import Structure

    def make(text):
        monkeypatch.setattr(ReplySyntax, "structure", lambda self, prompt, use, answer: Structure("choice", [text]))
        template = generator.tokenizer.chat_template.removesuffix("{# </think> #}")
        monkeypatch.setattr(generator.tokenizer, "chat_template", template + "{# </think> #}")
        return calling(application()[0])

    return make


def sse(text):
    """(event, data) of each server-sent event, but those that only say that a slow machine is still working."""
    found = []
    for block in text.split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines())
        if "data" in lines and lines.get("event") != "ping":
            found.append((lines.get("event"), json.loads(lines["data"])))
    return found


@pytest.mark.parametrize("path", ASKED)
@pytest.mark.parametrize(
    ("more", "status"),
    [
        ({"model": "other"}, 404),
        ({"stream": "yes"}, 400),
        ({"logprobs": "x" * 3, "messages": 5, "input": 5, "prompt": 5}, 400),
    ],
)
def test_errors_are_in_the_words_of_their_api(call, path, more, status):
    answer = call("POST", path, ASKED[path] | more)
    assert answer.status_code == status, answer.text
    assert error_of(path, answer)


@pytest.mark.parametrize(
    ("path", "more", "words"),
    [
        ("/v1/responses", {"previous_response_id": "resp_1"}, "previous_response_id"),
        ("/v1/responses", {"store": True}, "storing"),
        ("/v1/responses", {"tools": [{"type": "web_search"}]}, "web_search"),
        ("/v1/responses", {"input": [{"type": "item_reference", "id": "a"}]}, "item_reference"),
        ("/v1/responses", {"input": [{"role": "user", "content": [{"type": "input_image"}]}]}, "input_image"),
        ("/v1/responses", {"input": [{"type": "function_call", "name": "a"}]}, "function_call"),
        ("/v1/responses", {"input": []}, "message"),
        ("/v1/messages", {"messages": [{"role": "user", "content": [{"type": "image"}]}]}, "image"),
        ("/v1/messages", {"tools": [{"type": "bash_20250124", "name": "bash"}]}, "bash_20250124"),
        ("/v1/messages", {"tool_choice": {"type": "any"}}, "no tools"),
        ("/v1/messages", {"messages": [{"role": "assistant", "content": "So"}]}, "user"),
        ("/api/chat", {"think": True}, "does not support thinking"),
        ("/api/chat", {"messages": [{"role": "user", "content": "a", "images": ["aa"]}]}, "images"),
        ("/api/chat", {"options": {"mirostat": 2}}, "Mirostat"),
        ("/api/generate", {"suffix": "end"}, "cannot fill in"),
        ("/infill", {"input_prefix": "a", "input_suffix": "b"}, "cannot fill in"),
        ("/detokenize", {"tokens": [10**9]}, "tokens"),
    ],
)
def test_what_has_no_support_is_refused_by_name(call, path, more, words):
    answer = call("POST", path, ASKED.get(path, {}) | more)
    assert answer.status_code == 400, answer.text
    assert words in error_of(path, answer)


def test_responses_hold_reasoning_text_and_calls_whole_and_streamed(saying):
    call = saying(THOUGHT + SAID)
    body = {"input": "Hi", "max_output_tokens": 200, "tools": [{"type": "function", "name": "add", "parameters": TOOL}]}
    whole = call("POST", "/v1/responses", body).json()
    kinds = [item["type"] for item in whole["output"]]
    assert kinds == ["reasoning", "message", "function_call"]
    assert whole["status"] == "completed"
    assert whole["usage"]["output_tokens_details"]["reasoning_tokens"] > 0
    events = sse(call("POST", "/v1/responses", {**body, "stream": True}).text)
    assert all(name == data["type"] for name, data in events)
    final = events[-1][1]["response"]
    assert [item["type"] for item in final["output"]] == kinds
    assert final["output"][1]["content"] == whole["output"][1]["content"]
    assert final["output"][2]["arguments"] == '{"a": 2}'
    names = [name for name, _ in events]
    assert names.count("response.output_item.added") == names.count("response.output_item.done") == 3


def test_anthropic_messages_hold_thinking_text_and_calls_whole_and_streamed(saying):
    call = saying(THOUGHT + SAID)
    body = {"messages": USER, "max_tokens": 200, "tools": [{"name": "add", "input_schema": TOOL}]}
    whole = call("POST", "/v1/messages", body).json()
    assert [block["type"] for block in whole["content"]] == ["thinking", "text", "tool_use"]
    assert whole["content"][2]["input"] == {"a": 2}
    assert whole["stop_reason"] == "tool_use"
    events = sse(call("POST", "/v1/messages", {**body, "stream": True}).text)
    assert [name for name, _ in events if name != "content_block_delta"] == [
        "message_start", *["content_block_start", "content_block_stop"] * 3, "message_delta", "message_stop",
    ]  # fmt: skip
    assert events[-2][1]["delta"]["stop_reason"] == "tool_use"
    hidden = call("POST", "/v1/messages", {**body, "thinking": {"type": "disabled"}}).json()
    assert [block["type"] for block in hidden["content"]] == ["text", "tool_use"]


def test_ollama_holds_thinking_text_and_calls_whole_and_streamed(saying):
    call = saying(THOUGHT + SAID)
    tools = [{"type": "function", "function": {"name": "add", "parameters": TOOL}}]
    body = {"model": "tiny", "messages": USER, "tools": tools, "stream": False, "think": True}
    message = call("POST", "/api/chat", body).json()["message"]
    assert (message["thinking"], message["content"]) == ("hm", "Yes.")
    assert message["tool_calls"] == [{"function": {"name": "add", "arguments": {"a": 2}}}]
    answer = call("POST", "/api/chat", {**body, "stream": None})
    assert answer.headers["content-type"] == "application/x-ndjson"
    lines = [json.loads(line) for line in answer.text.splitlines()]
    assert [line["done"] for line in lines] == [False] * (len(lines) - 1) + [True]
    assert "".join(line["message"]["content"] for line in lines) == "Yes."
    assert "".join(line["message"].get("thinking", "") for line in lines) == "hm"
    assert lines[-1]["eval_count"] > 0
    assert call("POST", "/api/generate", {"model": "tiny"}).json()["done_reason"] == "load"


def test_a_stop_sequence_is_named(call):
    text = call("POST", "/v1/messages", {"messages": USER, "max_tokens": 12, "temperature": 0}).json()["content"][0][
        "text"
    ]
    stop = text.strip()[3:5]
    body = {"messages": USER, "max_tokens": 12, "temperature": 0, "stop_sequences": [stop]}
    answer = call("POST", "/v1/messages", body).json()
    assert (answer["stop_reason"], answer["stop_sequence"]) == ("stop_sequence", stop)
    native = call("POST", "/completion", {"prompt": "Hi", "n_predict": 30, "temperature": 0}).json()
    stop = native["content"].strip()[2:4]
    stopped = call("POST", "/completion", {"prompt": "Hi", "n_predict": 30, "temperature": 0, "stop": stop}).json()
    assert (native["stop_type"], stopped["stop_type"], stopped["stopping_word"]) == ("limit", "word", stop)


def test_conversations_of_responses_and_messages_become_those_of_templates():
    request = ResponseRequest.model_validate(
        {
            "instructions": "Be brief.",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "Hi"}]},
                {"type": "reasoning", "summary": [{"type": "summary_text", "text": "hm"}]},
                {"type": "function_call", "call_id": "1", "name": "add", "arguments": '{"a": 1}'},
                {"type": "function_call", "call_id": "2", "name": "add", "arguments": '{"a": 2}'},
                {"type": "function_call_output", "call_id": "1", "output": "one"},
            ],
        }
    )
    system, user, assistant, tool = request.messages()
    assert (system["role"], user["content"], tool["content"]) == ("system", "Hi", "one")
    assert assistant["reasoning_content"] == "hm"
    assert [one["function"]["arguments"] for one in assistant["tool_calls"]] == [{"a": 1}, {"a": 2}]
    blocks = [
        {"type": "thinking", "thinking": "hm", "signature": "x"},
        {"type": "tool_use", "name": "add", "input": {"a": 1}},
    ]
    results = [
        {"type": "tool_result", "tool_use_id": "1", "content": [{"type": "text", "text": "one"}], "is_error": True},
        {"type": "text", "text": "Go on"},
    ]
    messages = [*USER, {"role": "assistant", "content": blocks}, {"role": "user", "content": results}]
    told, beginning = MessagesRequest.model_validate({"system": "Brief.", "messages": messages}).conversation()
    assert [one["role"] for one in told] == ["system", "user", "assistant", "tool", "user"]
    assert told[3]["content"] == "Error: one"
    assert beginning == ""
    begun = [*USER, {"role": "assistant", "content": "So"}]
    assert MessagesRequest.model_validate({"messages": begun}).conversation() == (USER, "So")


def test_tokens_and_properties_as_llama_server_tells_them(call, generator):
    tokens = call("POST", "/tokenize", {"content": "It was"}).json()["tokens"]
    assert tokens == generator.tokenizer("It was", add_special_tokens=False)["input_ids"]
    assert call("POST", "/detokenize", {"tokens": tokens}).json() == {"content": "It was"}
    pieces = call("POST", "/tokenize", {"content": "It was", "with_pieces": True}).json()["tokens"]
    assert "".join(one["piece"] for one in pieces) == "It was"
    props = call("GET", "/props").json()
    assert props["default_generation_settings"]["n_ctx"] == 512
    assert len(call("GET", "/slots").json()) == props["total_slots"] == 1
    assert call("POST", "/apply-template", {"messages": USER}).json()["prompt"].endswith("Hi")
    stream = call("POST", "/completion", {**ASKED["/completion"], "stream": True}).text
    assert [data["stop"] for _, data in sse(stream)][-1] is True
    assert call("GET", "/api/version").json()["version"]


class Filler:
    """A tokenizer of words with the marks of Codestral or of Qwen Coder."""

    bos_token_id = None

    def __init__(self, *names):
        self.names = [*names, "a", "b"]

    def get_vocab(self):
        return {name: index for index, name in enumerate(self.names)}

    def convert_tokens_to_ids(self, name):
        return self.names.index(name)

    def __call__(self, text, add_special_tokens):
        return {"input_ids": [self.names.index(word) for word in text.split()]}


def test_prefix_and_suffix_stand_where_the_family_has_them():
    qwen = Filler("<|fim_prefix|>", "<|fim_suffix|>", "<|fim_middle|>")
    assert infill_tokens(qwen, "a", "b") == [0, 3, 1, 4, 2]
    assert infill_tokens(Filler("[PREFIX]", "[SUFFIX]"), "a", "b") == [1, 3, 0, 2]
    assert not can_infill(Filler("x"))
    with pytest.raises(RequestError, match="cannot fill in"):
        infill_tokens(Filler("x"), "a", "b")


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=6)
    | st.sampled_from(["a\ud83d", 2**64, "user", "assistant", "text", "function", "json", "tiny", {"type": "text"}]),
    lambda inner: st.lists(inner, max_size=2) | st.dictionaries(
        st.sampled_from(["type", "role", "content", "text", "name", "schema", "input", "stop", "arguments"]), inner,
        max_size=4,
    ),
    max_leaves=6,
)  # fmt: skip
FIELDS = st.sampled_from(
    ["messages", "input", "prompt", "tools", "tool_choice", "format", "text", "system", "options", "stop_sequences",
     "thinking", "think", "output_config", "instructions", "reasoning", "suffix", "input_suffix", "content", "tokens",
     "grammar", "json_schema", "temperature", "unknown"]
)  # fmt: skip
PATHS = [*ASKED, "/v1/messages/count_tokens", "/tokenize", "/detokenize", "/apply-template", "/infill", "/api/show"]


@settings(max_examples=120, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(path=st.sampled_from(PATHS), changes=st.dictionaries(FIELDS, VALUES, max_size=3))
def test_no_body_is_a_failure_of_the_server(call, path, changes):
    """Whatever stands in a request, it is answered or refused in the words of its API."""
    answer = call("POST", path, ASKED.get(path, {}) | changes)
    assert answer.status_code in (200, 400, 404), (path, changes, answer.text)
    if answer.status_code != 200:
        assert error_of(path, answer)
