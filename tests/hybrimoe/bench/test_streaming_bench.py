"""`hybrimoe bench streaming`: what the server adds to a streamed token of a small model."""

import contextlib
import time

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from hybrimoe.bench.serve.client import ServerError
from hybrimoe.bench.serve.reader import between_ms, body
from hybrimoe.bench.serve.streaming import measure
from hybrimoe.checkpoint import load_tokenizer
from hybrimoe.config.deploy import ServerConfig
from hybrimoe.generation import TextGenerator
from hybrimoe.generation.transcript import Transcript
from hybrimoe.server.http import HttpServer, listening
from hybrimoe.server.models import Models
from hybrimoe.server.served import Served

CONTEXT = 128


@pytest.fixture
def server():
    tokenizer = load_tokenizer(None)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, moe_intermediate_size=16,
        num_hidden_layers=1, num_experts=4, num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, max_position_embeddings=CONTEXT, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    served = Served("tiny", parallel=2)
    served.open(TextGenerator(Qwen3MoeForCausalLM(config).eval(), tokenizer))
    settings = ServerConfig(access_log=False)
    with (
        contextlib.closing(served),
        listening("127.0.0.1", 0) as listener,
        HttpServer(Models.of_one(served), settings, [], listener) as http,
    ):
        yield served, http.url


def test_each_number_of_clients_has_a_row_and_clients_get_all_their_tokens(server):
    rows = measure(*server, clients=[1, 2], new_tokens=12, rounds=2)
    assert [(row.clients, row.tokens) for row in rows] == [(1, 12), (2, 24)]
    for row in rows:
        assert row.text_ms > 0
        for one in (row.first, row.between, row.cpu):
            assert one.served_ms > 0
            assert one.engine_ms > 0
            assert one.added_ms == pytest.approx(one.served_ms - one.engine_ms)
            least, most = one.added_ms_range
            assert least <= most


def test_the_engine_alone_is_without_the_text_and_the_served_reply_with_it(server, monkeypatch):
    """Turning tokens into text that takes 100 ms is what the server adds, to each token of each reply.

    That is far more than the engine takes, on a machine that others use, too.
    """
    push = Transcript.push

    def slow(self, token):
        time.sleep(0.1)
        return push(self, token)

    monkeypatch.setattr(Transcript, "push", slow)
    (row,) = measure(*server, clients=[2], new_tokens=8, rounds=1)
    assert row.text_ms >= 99
    assert row.between.engine_ms < 100
    assert row.between.added_ms > 120


def test_time_between_tokens_is_of_the_middle_half():
    assert between_ms([0.0, 9.0, 9.001, 9.002, 9.003, 9.004, 20.0, 30.0]) == pytest.approx(1000 * (20.0 - 9.001) / 4)
    assert between_ms([0.0, 1.0]) == 0.0


def test_questions_are_new_ones_of_one_length():
    texts = [body(number, 1)["messages"][0]["content"] for number in range(900)]
    assert len(set(texts)) == 900
    assert len({len(text) for text in texts}) == 1


def test_clients_that_do_not_get_all_tokens_end_it(server):
    with pytest.raises(ServerError, match=f"expected {CONTEXT} tokens for each of 1 clients, they were sent"):
        measure(*server, clients=[1], new_tokens=CONTEXT, rounds=1)
