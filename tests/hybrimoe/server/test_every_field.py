"""Every field of every endpoint's request gets values that no field expects: none of them is a failure of the server,
and null is as good as an absent field."""

from __future__ import annotations

import copy

import pytest

from hybrimoe.server.fields import MAX_TOKENS, Strict
from hybrimoe.server.slots import SlotFiles

SURROGATE = "a\ud83d"
VALUES = (
    None, SURROGATE, True, 0, -1, 1e300, 1e-300, 2**64, -(2**64), "", "x", "\x00", [], {}, [None], {"a": None}, [[]],
    float("nan"), float("inf"), 1.5, [SURROGATE], {SURROGATE: 1},
)  # fmt: skip
USER = [{"role": "user", "content": "a"}]
TOOL = {"name": "a", "description": "x"}
FULL = {
    "/v1/completions": {"prompt": "a", "max_tokens": 1, "stop": ["zz"], "logit_bias": {"5": 1}},
    "/v1/chat/completions": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "max_tokens": 1, "stream": False,
        "tools": [{"type": "function", "function": TOOL | {"parameters": {"type": "object"}}}], "tool_choice": "none",
        "response_format": {"type": "text"},
    },
    "/v1/responses": {
        "input": [{"role": "user", "content": [{"type": "input_text", "text": "a"}]}], "max_output_tokens": 1,
        "instructions": "x", "text": {"format": {"type": "text"}}, "metadata": {"a": "b"}, "tool_choice": "auto",
    },
    "/v1/messages": {
        "messages": [{"role": "user", "content": [{"type": "text", "text": "a"}]}], "max_tokens": 1,
        "system": [{"type": "text", "text": "s"}], "stop_sequences": ["zz"], "metadata": {"user_id": "a"},
        "tools": [TOOL | {"input_schema": {"type": "object"}}], "tool_choice": {"type": "none"},
        "thinking": {"type": "disabled"},
    },
    "/api/chat": {
        "model": "tiny", "messages": USER, "stream": False, "format": "", "keep_alive": "5m", "think": False,
        "options": {"num_predict": 1, "top_k": 3, "stop": ["zz"], "num_ctx": 100},
    },
    "/api/generate": {
        "model": "tiny", "prompt": "a", "system": "s", "raw": False, "stream": False, "options": {"num_predict": 1}
    },
    "/completion": {"prompt": "a", "n_predict": 1, "stop": ["zz"], "stream": False, "logit_bias": {"5": 1}},
    "/apply-template": {"messages": USER},
    "/tokenize": {"content": "a", "add_special": True, "with_pieces": False},
    "/detokenize": {"tokens": [1]},
    "/slots/0?action=erase": {"filename": "a"},
}  # fmt: skip
LENGTHS = {
    "/v1/completions": ("max_tokens",), "/v1/chat/completions": ("max_tokens",), "/v1/messages": ("max_tokens",),
    "/v1/responses": ("max_output_tokens",), "/completion": ("n_predict",), "/api/chat": ("options", "num_predict"),
    "/api/generate": ("options", "num_predict"),
}  # fmt: skip


def places(body, before=()):
    """The path of every value within a body."""
    for key, value in body.items() if isinstance(body, dict) else enumerate(body):
        yield (*before, key)
        if isinstance(value, dict | list):
            yield from places(value, (*before, key))


def changed(body, place, value):
    """The body with another value there."""
    body = copy.deepcopy(body)
    inner = body
    for key in place[:-1]:
        inner = inner[key]
    inner[place[-1]] = value
    return body


@pytest.mark.parametrize("path", FULL)
def test_no_value_is_a_failure_of_the_server(application, calling, path, tmp_path):
    files = SlotFiles(tmp_path, "this model")
    call, body = calling(application(queue_length=1000, slot_files=files)[0]), FULL[path]
    assert call("POST", path, body).status_code == 200
    length = LENGTHS.get(path, ())
    others = [place for place in places(body) if place != length[: len(place)]]  # without a length replies are long
    requests = [("POST", path, changed(body, place, value)) for place in others for value in VALUES]
    for (_, _, sent), answer in zip(requests, call.together(*requests), strict=True):
        assert answer.status_code in (200, 400, 404), (sent, answer.text)


@pytest.mark.parametrize("path", LENGTHS)
def test_a_length_that_no_reply_has_is_refused(call, path):
    for length in (1e30, MAX_TOKENS + 1):
        answer = call("POST", path, changed(FULL[path], LENGTHS[path], length))
        assert answer.status_code == 400, answer.text
        assert LENGTHS[path][-1] in answer.text


def test_null_is_as_absent_in_every_field_that_may_be_absent():
    kinds, asked = [Strict], set()
    while kinds:
        asked.add(kinds[0])
        kinds += kinds.pop(0).__subclasses__()
    optional = {
        (kind, field.alias or name)
        for kind in asked
        for name, field in kind.model_fields.items()
        if not field.is_required()
    }
    assert len(optional) > 150
    for kind, name in optional:
        assert name not in kind._only_known_fields({name: None}), (kind, name)
