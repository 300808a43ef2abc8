"""The official clients of OpenAI, Anthropic and Ollama against the application, without a network.

They are no requirement of the tests (`pip install openai anthropic ollama`); test_apis.py does without them.
"""

import asyncio
import json
from types import SimpleNamespace

import httpx
import pytest

pytest.importorskip("llguidance", reason="structured replies need the extra serve")

SCHEMA = {"type": "object", "required": ["a"], "properties": {"a": {"enum": [1, 2]}}, "additionalProperties": False}
USER = [{"role": "user", "content": "Hi"}]
SAID = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'


@pytest.fixture
def http_client(application):
    """A client without a network, of the library that an official client uses: httpx, or httpx2 by now."""

    def make(sdk):
        used = getattr(sdk._base_client, "httpx2", httpx)
        return used.AsyncClient(transport=used.ASGITransport(app=application()[0]))

    return make


@pytest.fixture
def openai_client(http_client):
    openai = pytest.importorskip("openai", reason="the official client is not installed: pip install openai")
    return openai.AsyncOpenAI(base_url="http://x/v1", api_key="unused", http_client=http_client(openai), max_retries=0)


@pytest.fixture
def anthropic_client(http_client):
    anthropic = pytest.importorskip("anthropic", reason="the official client is not installed: pip install anthropic")
    return anthropic.AsyncAnthropic(
        base_url="http://x", api_key="unused", http_client=http_client(anthropic), max_retries=0
    )


@pytest.fixture
def ollama_client(application):
    ollama = pytest.importorskip("ollama", reason="the official client is not installed: pip install ollama")
    return ollama.AsyncClient(host="http://x", transport=httpx.ASGITransport(app=application()[0]))


def run(work):
    return asyncio.run(work())


def test_openai_chat_stream_tools_and_schema(openai_client):
    tools = [{"type": "function", "function": {"name": "add", "parameters": SCHEMA}}]

    async def work():
        create = openai_client.chat.completions.create
        stream = await create(model="tiny", messages=USER, max_tokens=5, stream=True, n=2)
        chunks = [chunk async for chunk in stream]
        called = await create(
            model="tiny", messages=USER, max_tokens=200, tools=tools, seed=1,
            tool_choice={"type": "function", "function": {"name": "add"}},
        )  # fmt: skip
        form = {"type": "json_schema", "json_schema": {"name": "a", "schema": SCHEMA}}
        answer = await create(model="tiny", messages=USER, max_tokens=200, response_format=form)
        listed = await openai_client.models.list()
        text = await openai_client.completions.create(model="tiny", prompt=["a b", "c d"], max_tokens=3, best_of=2)
        return chunks, called, answer, listed, text

    chunks, called, answer, listed, text = run(work)
    assert {choice.index for chunk in chunks for choice in chunk.choices} == {0, 1}
    assert json.loads(called.choices[0].message.tool_calls[0].function.arguments)["a"] in (1, 2)
    assert json.loads(answer.choices[0].message.content)["a"] in (1, 2)
    assert [model.id for model in listed.data] == ["tiny"]
    assert len(text.choices) == 2


def test_openai_responses(openai_client):
    tools = [{"type": "function", "name": "add", "parameters": SCHEMA}]

    async def work():
        create = openai_client.responses.create
        plain = await create(model="tiny", input="Hi", max_output_tokens=5, instructions="Be brief.")
        stream = await create(model="tiny", input=USER, max_output_tokens=5, stream=True)
        events = [event async for event in stream]
        called = await create(
            model="tiny",
            input="Hi",
            max_output_tokens=200,
            tools=tools,
            tool_choice={"type": "function", "name": "add"},
        )
        result = {"type": "function_call_output", "call_id": called.output[0].call_id, "output": "3"}
        told = called.output[0].model_dump(exclude_none=True)
        turn = [*USER, told, result]
        again = await create(model="tiny", input=turn, max_output_tokens=2)
        form = {"format": {"type": "json_schema", "name": "a", "schema": SCHEMA}}
        answer = await create(model="tiny", input="Hi", max_output_tokens=200, text=form)
        return plain, events, called, again, answer

    plain, events, called, again, answer = run(work)
    assert plain.output_text
    assert plain.status == "incomplete"
    assert events[0].type == "response.created"
    assert events[-1].type == "response.incomplete"
    assert [event.sequence_number for event in events] == list(range(len(events)))
    text = "".join(event.delta for event in events if event.type == "response.output_text.delta")
    assert text == events[-1].response.output_text
    assert json.loads(called.output[0].arguments)["a"] in (1, 2)
    assert again.usage.output_tokens == 2
    assert json.loads(answer.output_text)["a"] in (1, 2)


def test_anthropic_messages(anthropic_client):
    tools = [{"name": "add", "input_schema": SCHEMA}]
    head = {"model": "tiny", "max_tokens": 200, "messages": USER}

    async def work():
        create = anthropic_client.messages.create
        plain = await create(**{**head, "max_tokens": 4}, system="Be brief.", stop_sequences=["never"])
        called = await create(**head, tools=tools, tool_choice={"type": "tool", "name": "add"})
        result = {"type": "tool_result", "tool_use_id": called.content[0].id, "content": "3"}
        use = called.content[0].model_dump(exclude_none=True)
        turn = [*USER, {"role": "assistant", "content": [use]}, {"role": "user", "content": [result]}]
        again = await create(model="tiny", max_tokens=2, messages=turn, tools=tools)
        async with anthropic_client.messages.stream(**{**head, "max_tokens": 6}) as stream:
            text = "".join([piece async for piece in stream.text_stream])
            final = await stream.get_final_message()
        async with anthropic_client.messages.stream(
            **head, tools=tools, tool_choice={"type": "any", "disable_parallel_tool_use": True}
        ) as stream:
            streamed = await stream.get_final_message()
        counted = await anthropic_client.messages.count_tokens(model="tiny", messages=USER)
        return plain, called, again, text, final, streamed, counted

    plain, called, again, text, final, streamed, counted = run(work)
    assert (plain.stop_reason, plain.content[0].type) == ("max_tokens", "text")
    assert called.stop_reason == "tool_use"
    assert called.content[0].input["a"] in (1, 2)
    assert again.usage.output_tokens == 2
    assert text == final.content[0].text
    assert streamed.content[0].input["a"] in (1, 2)
    assert counted.input_tokens > 0


def test_ollama(ollama_client):
    tools = [{"type": "function", "function": {"name": "add", "parameters": SCHEMA}}]
    short = {"num_predict": 4, "num_ctx": 4096, "temperature": 0}

    async def work():
        chat = await ollama_client.chat("tiny", USER, options=short)
        pieces = [piece async for piece in await ollama_client.chat("tiny:latest", USER, options=short, stream=True)]
        shaped = await ollama_client.chat("tiny", USER, format=SCHEMA, options={"num_predict": 200})
        offered = await ollama_client.chat("tiny", USER, tools=tools, options=short)
        text = await ollama_client.generate("tiny", "It was", options=short, raw=True)
        listed, shown, running = await ollama_client.list(), await ollama_client.show("tiny"), await ollama_client.ps()
        return chat, pieces, shaped, offered, text, listed, shown, running

    chat, pieces, shaped, offered, text, listed, shown, running = run(work)
    assert chat.done_reason == "length"
    assert chat.eval_count == 4
    assert "".join(piece.message.content for piece in pieces) == chat.message.content
    assert pieces[-1].done
    assert json.loads(shaped.message.content)["a"] in (1, 2)
    assert offered.message.role == "assistant"
    assert text.response
    assert listed.models[0].model == running.models[0].model == "tiny:latest"
    assert "tools" in shown.capabilities


@pytest.mark.filterwarnings("ignore")  # of its own, at import
def test_litellm(openai_client, monkeypatch):
    monkeypatch.setenv("LITELLM_LOCAL_MODEL_COST_MAP", "True")  # it asks the network for prices
    litellm = pytest.importorskip("litellm", reason="the client is not installed: pip install litellm")
    tools = [{"type": "function", "function": {"name": "add", "parameters": SCHEMA}}]
    at = {"api_base": "http://x/v1", "client": openai_client}

    async def work():
        chat = await litellm.acompletion("openai/tiny", USER, max_tokens=4, temperature=0, **at)
        stream = await litellm.acompletion("openai/tiny", USER, max_tokens=4, temperature=0, stream=True, **at)
        pieces = [piece.choices[0].delta.content or "" async for piece in stream]
        forced = {"type": "function", "function": {"name": "add"}}
        called = await litellm.acompletion(
            "openai/tiny", USER, max_tokens=200, tools=tools, tool_choice=forced, seed=1, **at
        )
        return chat, pieces, called

    chat, pieces, called = run(work)
    assert chat.choices[0].message.content == "".join(pieces) != ""
    assert chat.usage.completion_tokens == 4
    assert json.loads(called.choices[0].message.tool_calls[0].function.arguments)["a"] in (1, 2)


def test_lm_eval_reads_the_scores_of_prompts(call, generator):
    """Its own request, and its own reading of the answer; test_scored_prompts.py has both without it."""
    module = pytest.importorskip("lm_eval.models.openai_completions", reason="not installed: pip install lm_eval[api]")
    api = module.LocalCompletionsAPI
    prompts = [generator.encode(text) for text in ("It was a bright day", "He saw the sun")]
    body = api._create_payload(SimpleNamespace(model="tiny"), prompts, generate=False)
    answer = call("POST", "/v1/completions", body)
    assert answer.status_code == 200, answer.text
    scores = api.parse_logprobs([answer.json()], ctxlens=[2, 1])
    assert [type(greedy) for _, greedy in scores] == [bool, bool]
    assert all(score < 0 for score, _ in scores)
    generating = {"until": ["\n"], "max_gen_toks": 4}
    body = api._create_payload(SimpleNamespace(model="tiny", _max_gen_toks=4), prompts, True, generating)
    assert len(api.parse_generations([call("POST", "/v1/completions", body).json()])) == 2
