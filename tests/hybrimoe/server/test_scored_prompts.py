"""Log probabilities of prompts, as evaluations ask for them: `echo` with `logprobs` on /v1/completions."""

import json
from operator import itemgetter

import pytest
import torch

from hybrimoe.generation import SamplingOptions
from hybrimoe.generation.prompts import logprobs as scoring

CONTEXT, CONTINUATION = "It was a bright cold day in April, and the clocks were striking", " thirteen."
SENT = {"model": "tiny", "temperature": 0, "seed": 1234}
"""What `lm_eval --model local-completions` sends beside the prompt (its LocalCompletionsAPI._create_payload)."""


def expected_logprobs(generator, ids):
    """Of each token after the first, by one forward of the whole."""
    with torch.inference_mode():
        logits = generator.model(torch.tensor([ids])).logits[0].float()
    rows = torch.log_softmax(logits, dim=-1)
    return rows, [float(rows[at, token]) for at, token in enumerate(ids[1:])]


def score(call, prompt, **more):
    body = {**SENT, "prompt": prompt, "max_tokens": 1, "logprobs": 1, "echo": True, **more}
    answer = call("POST", "/v1/completions", body)
    assert answer.status_code == 200, answer.text
    return answer.json()


@pytest.mark.parametrize("part", [4, 4096])
def test_each_token_has_the_probability_that_the_model_gives_it_there(call, generator, monkeypatch, part):
    monkeypatch.setattr(generator, "prefill_chunk_tokens", part)
    ids = generator.encode(CONTEXT + CONTINUATION)
    rows, expected = expected_logprobs(generator, ids)
    answer = score(call, ids, logprobs=2)
    told = answer["choices"][0]["logprobs"]
    assert told["token_logprobs"][0] is None
    assert told["top_logprobs"][0] is None
    assert told["token_logprobs"][1:-1] == pytest.approx(expected, abs=1e-4)
    for at, top in enumerate(told["top_logprobs"][1:-1]):
        best = rows[at].topk(2).values.tolist()
        assert sorted(top.values(), reverse=True)[:2] == pytest.approx(best, abs=1e-4)
        assert told["token_logprobs"][at + 1] in top.values()
    assert len(told["tokens"]) == len(told["text_offset"]) == len(ids) + 1
    text = answer["choices"][0]["text"]
    assert text.startswith(CONTEXT + CONTINUATION)
    ends = [*told["text_offset"][1:], len(text)]
    places = list(zip(told["tokens"], told["text_offset"], ends, strict=True))
    assert places[0] == (generator.tokenizer.bos_token, 0, 0), "it has no text"
    assert all(text[start:end].strip() == token.strip() for token, start, end in places[1:])


def test_the_prompt_alone_and_as_a_stream(call, generator):
    alone = score(call, CONTEXT, max_tokens=0)
    assert alone["choices"][0]["text"] == CONTEXT
    assert alone["choices"][0]["finish_reason"] == "length"
    assert alone["usage"]["completion_tokens"] == 0
    longer = score(call, CONTEXT, max_tokens=3)["choices"][0]
    n_prompt = alone["usage"]["prompt_tokens"]
    assert longer["logprobs"]["token_logprobs"][:n_prompt] == alone["choices"][0]["logprobs"]["token_logprobs"]
    body = {**SENT, "prompt": CONTEXT, "max_tokens": 3, "logprobs": 1, "echo": True, "stream": True}
    lines = call("POST", "/v1/completions", body).text.split("\n\n")
    pieces = [json.loads(line.removeprefix("data: "))["choices"][0] for line in lines if line.startswith("data: {")]
    assert "".join(piece["text"] for piece in pieces) == longer["text"]
    for name in ("tokens", "token_logprobs", "text_offset"):
        assert [one for piece in pieces for one in piece["logprobs"][name]] == longer["logprobs"][name]


def test_a_scored_prompt_takes_no_conversation_from_the_cache(application, calling, generator):
    app, _ = application()
    call = calling(app)
    body = {**SENT, "prompt": CONTEXT, "max_tokens": 2}
    first = call("POST", "/v1/completions", body).json()
    score(call, CONTEXT)
    again = call("POST", "/v1/completions", body).json()
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] > 0
    assert again["choices"][0]["text"] == first["choices"][0]["text"]


def test_parts_keep_to_their_bytes_and_begin_anew_without_memory(generator, monkeypatch):
    monkeypatch.setattr(scoring, "LOGITS_BYTES", 4 * scoring.FLOAT_BYTES * len(generator.tokenizer))
    monkeypatch.setattr(scoring, "FEWEST_TOKENS", 1)
    sizes, rows = [], generator.forward_rows

    def failing_once(ids, cache):
        sizes.append(len(ids))
        if len(sizes) == 2:
            raise torch.OutOfMemoryError("a card is full")
        return rows(ids, cache)

    monkeypatch.setattr(generator, "forward_rows", failing_once)
    monkeypatch.setattr(generator, "make_room", lambda error: None)
    ids = generator.encode(CONTEXT)
    reply = generator.reply(ids, SamplingOptions(temperature=0.0, max_new_tokens=1, prompt_logprobs=0))
    "".join(reply)
    assert max(sizes) == 4
    assert [one and one.token_id for one in reply.prompt_logprobs] == [None, *ids[1:]]


def test_lm_eval_reads_sum_and_greediness(call, generator):
    """As its LocalCompletionsAPI.parse_logprobs does: token prompts, a batch, the generated token left out."""
    pairs = [(CONTEXT, CONTINUATION), ("He", " saw the sun")]
    prompts = [generator.encode(a + b) for a, b in pairs]
    lengths = [len(generator.encode(a)) for a, _ in pairs]
    answer = score(call, prompts)
    for choice, length, ids in zip(sorted(answer["choices"], key=itemgetter("index")), lengths, prompts, strict=True):
        own = choice["logprobs"]["token_logprobs"][length:-1]
        tops = choice["logprobs"]["top_logprobs"][length:-1]
        rows, expected = expected_logprobs(generator, ids)
        assert sum(own) == pytest.approx(sum(expected[length - 1 :]), abs=1e-3)
        greedy = all(token == int(rows[at + length - 1].argmax()) for at, token in enumerate(ids[length:]))
        assert all(one == max(top.values()) for one, top in zip(own, tops, strict=True)) is greedy
