"""Bodies that no honest client sends: huge, deep, full of what nobody knows. None ends in a 500 or holds up others."""

import json
import time

import pytest
from pydantic import ValidationError

from hybrimoe.server.apis.chat import ChatRequest
from hybrimoe.server.apis.completions import CompletionRequest
from hybrimoe.server.apis.tools import called
from hybrimoe.server.fields import DEEPEST, MOST_TOLD, left_out, shown

USER = [{"role": "user", "content": "Hi"}]
MANY = 300_000
"""Items of a list: each in each form that a field may have took 3 s, all in one the tenth of that."""


@pytest.mark.parametrize("field", ["temperature", "max_tokens", "seed", "top_p", "n", "priority", "logit_bias"])
@pytest.mark.parametrize("digits", [20, 400])
def test_a_number_beyond_every_limit_is_refused(call, field, digits):
    number = 10**digits
    value = {"5": number} if field == "logit_bias" else number
    answer = call("POST", "/v1/chat/completions", {"messages": USER, field: value})
    assert answer.status_code == 400, answer.text
    assert answer.json()["error"]["param"].startswith(field)


def nested(levels):
    return json.loads("[" * levels + "]" * levels)


def test_deep_data_is_refused_before_anything_goes_down_its_levels(call):
    for value, fits in ((nested(DEEPEST - 1), True), (nested(DEEPEST), False), (nested(900), False)):
        tool = {"type": "function", "function": {"name": "a", "parameters": {"type": "object", "default": value}}}
        for path, more in (
            ("/v1/chat/completions", {"chat_template_kwargs": {"enable_thinking": value}}),
            ("/v1/chat/completions", {"tools": [tool], "tool_choice": "none"}),
        ):
            answer = call("POST", path, {"messages": USER, "max_tokens": 1, **more})
            assert answer.status_code in (200, 400), answer.text
            assert ("levels deep" in answer.text) != fits, answer.text


def test_deep_arguments_of_an_earlier_call_stay_text():
    deep = json.dumps({"a": nested(DEEPEST)})
    assert called(None, "f", deep)["function"]["arguments"] == deep
    assert called(None, "f", '{"a": NaN}')["function"]["arguments"] == '{"a": NaN}'
    assert called(None, "f", '{"a": [1]}')["function"]["arguments"] == {"a": [1]}


def test_unknown_fields_are_told_of_up_to_a_limit():
    told = []
    left_out.set(told)
    begin = time.process_time()
    ChatRequest(messages=USER, **{f"k{number}": 1 for number in range(100_000)})
    assert len(told) == MOST_TOLD
    assert time.process_time() - begin < 2, "each was compared with every other: 100 s"


def test_prompts_of_many_tokens_are_looked_through_once():
    for prompt in ([7] * MANY, [[7] * MANY]):
        begin = time.process_time()
        request = CompletionRequest(prompt=prompt)
        assert time.process_time() - begin < 1
        assert request.prompts() == [[7] * MANY]
    assert CompletionRequest(prompt=[1.0, 2]).prompts() == [[1, 2]]


@pytest.mark.parametrize("prompt", [[1, *["a"] * MANY], ["a", *[1] * MANY], [{}] * MANY, [[1], *[{}] * MANY]])
def test_a_list_of_something_else_is_given_up_at_its_first_item(prompt):
    begin = time.process_time()
    with pytest.raises(ValidationError) as refused:
        CompletionRequest(prompt=prompt)
    assert time.process_time() - begin < 1
    assert refused.value.error_count() < 10


def test_what_an_error_shows_is_cut_before_it_is_written():
    begin = time.process_time()
    assert shown([1] * 10_000_000).endswith("...")
    assert shown("a" * 10_000_000).endswith("...")
    assert time.process_time() - begin < 0.5
    assert shown(["a"]) == "['a']"
    assert shown("a" * 58) == repr("a" * 58)
