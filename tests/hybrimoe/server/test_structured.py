"""Answers of a given structure: by schema, grammar, pattern or choice; whole, streamed and beside each other."""

import asyncio
import json

import jsonschema
import pytest

pytest.importorskip("llguidance", reason="structured replies need the extra serve")

SCHEMA = {
    "type": "object", "required": ["size", "kind"], "additionalProperties": False,
    "properties": {"size": {"type": "integer", "minimum": 0, "maximum": 99}, "kind": {"enum": ["new", "old"]}},
}  # fmt: skip
CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
HEAD = {"temperature": 0.8, "seed": 5, "max_tokens": 300}
MESSAGES = {"messages": [{"role": "user", "content": "Hi"}]}


def chat(**more):
    return ("POST", CHAT, {**HEAD, **MESSAGES, **more})


def named(schema):
    return {"type": "json_schema", "json_schema": {"name": "thing", "strict": True, "schema": schema}}


def content(response):
    assert response.status_code == 200, response.text
    choice = response.json()["choices"][0]
    assert choice["finish_reason"] == "stop"
    return choice["message"]["content"]


def streamed_text(response):
    lines = [line.removeprefix("data: ") for line in response.text.split("\n\n") if line and line[0] != ":"]
    assert lines[-1] == "[DONE]"
    pieces = [json.loads(line)["choices"][0] for line in lines[:-1]]
    assert pieces[-1]["finish_reason"] == "stop"
    return "".join(piece["delta"].get("content", "") for piece in pieces)


BY_SCHEMA = [
    {"response_format": named(SCHEMA)}, {"response_format": {"type": "json_object", "schema": SCHEMA}},
    {"json_schema": SCHEMA}, {"guided_json": json.dumps(SCHEMA)}, {"structured_outputs": {"json": SCHEMA}},
]  # fmt: skip


def test_every_way_to_ask_for_a_schema_gives_the_same_answer_by_it(call):
    answers = {content(call(*chat(**ask))) for ask in BY_SCHEMA}
    assert len(answers) == 1
    jsonschema.validate(json.loads(answers.pop()), SCHEMA)


@pytest.mark.parametrize("temperature", [0, 1.5])
def test_a_stream_has_the_same_answer(call, temperature):
    ask = {"response_format": named(SCHEMA), "temperature": temperature}
    text = content(call(*chat(**ask)))
    jsonschema.validate(json.loads(text), SCHEMA)
    assert streamed_text(call(*chat(stream=True, **ask))) == text


def test_answers_beside_each_other_keep_their_own_structures(application, client):
    asks = [
        {"json_schema": SCHEMA}, {}, {"guided_choice": ["yes", "no"]}, {"guided_regex": "[a-c]{3}-[0-9]{2}"},
        {"json_schema": {"type": "array", "items": {"const": 1}, "minItems": 2, "maxItems": 2}},
    ]  # fmt: skip

    async def run(app, together):
        async with client(app) as connection:
            bodies = [{**HEAD, **MESSAGES, "max_tokens": 120, **ask} for ask in asks]
            if together:
                return await asyncio.gather(*(connection.post(CHAT, json=body) for body in bodies))
            return [await connection.post(CHAT, json=body) for body in bodies]

    (app, _), (alone, _) = application(parallel=5, max_stall_ms=1e-3), application(max_stall_ms=1e-3)
    found, expected = asyncio.run(run(app, True)), asyncio.run(run(alone, False))
    texts = [one.json()["choices"][0]["message"]["content"] for one in found]
    assert texts == [one.json()["choices"][0]["message"]["content"] for one in expected]
    jsonschema.validate(json.loads(texts[0]), SCHEMA)
    assert texts[2] in ("yes", "no")
    assert json.loads(texts[4]) == [1, 1]


@pytest.mark.parametrize(
    ("ask", "possible"),
    [
        ({"grammar": 'root ::= "ja" | "nein"\n'}, ("ja", "nein")),
        ({"grammar": 'start: "a" B\nB: /[0-3]/\n'}, ("a0", "a1", "a2", "a3")),
        ({"structured_outputs": {"regex": "x|yy"}}, ("x", "yy")),
        ({"structured_outputs": {"choice": ['with "quotes"']}}, ('with "quotes"',)),
    ],
)
def test_grammars_patterns_and_choices(call, ask, possible):
    assert content(call(*chat(**ask))) in possible
    completion = call("POST", TEXT, {**HEAD, "prompt": "It was", **ask}).json()["choices"][0]
    assert completion["text"] in possible
    assert completion["finish_reason"] == "stop"


def test_an_answer_that_is_cut_ends_with_length(call):
    for stream in (False, True):
        answer = call(*chat(response_format=named(SCHEMA), max_tokens=2, stream=stream))
        assert '"finish_reason": "length"' in answer.text.replace('":"', '": "')


def test_the_last_token_of_a_structure_ends_it_even_if_no_further_one_was_allowed(call):
    ask = {"guided_choice": ["a"]}
    n_tokens = call(*chat(**ask)).json()["usage"]["completion_tokens"]
    assert call(*chat(**ask, max_tokens=n_tokens)).json()["choices"][0]["finish_reason"] == "stop"


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        ({"response_format": named({"type": "thing"})}, "response_format: Invalid type: thing"),
        ({"response_format": {"type": "json_schema"}}, "needs the field json_schema"),
        ({"response_format": {"type": "yaml"}}, "response_format"),
        ({"grammar": "root ::= ("}, "grammar: neither GBNF nor Lark"),
        ({"guided_regex": "(?=a)b"}, "guided_regex"),
        ({"guided_regex": "a", "guided_choice": ["b"]}, "one structure"),
        ({"guided_json": "no schema"}, "expected a JSON schema"),
        ({"json_schema": {"type": "object", "properties": {"a": {"$ref": "https://example.org/a"}}}}, "json_schema"),
    ],
)  # fmt: skip
def test_a_structure_that_cannot_be_is_refused_and_says_why(call, ask, words):
    for method, path, body in (chat(**ask), ("POST", TEXT, {"prompt": "It was", **ask})):
        answer = call(method, path, body)
        assert answer.status_code == 400, answer.text
        assert words in answer.json()["error"]["message"]


def test_json_of_any_kind(call):
    """Without limits a model may go on for ever; what there is of it is the beginning of an object."""
    text = call(*chat(response_format={"type": "json_object"}, max_tokens=12)).json()["choices"][0]["message"][
        "content"
    ]
    assert text.startswith("{")


@pytest.mark.parametrize(
    ("schema", "words"),
    [
        ({"type": "string", "pattern": "("}, "response_format: regex parse error: ( ^ error: unclosed group"),
        ({"$ref": "#"}, "cannot be followed: no text follows it"),
    ],
)
def test_why_a_schema_is_refused_is_told_whole_and_without_the_state_of_the_parser(call, schema, words):
    answer = call(*chat(response_format=named(schema)))
    assert answer.status_code == 400
    message = answer.json()["error"]["message"]
    assert words in message
    assert "\n" not in message
    assert len(message) < 400
