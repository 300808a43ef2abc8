"""`hybrimoe bench streaming`: CPU time of a streamed token beside that of the engine, of a small model."""

import contextlib

import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from hybrimoe.bench.serve.client import ServerError
from hybrimoe.bench.serve.streaming import measure
from hybrimoe.checkpoint import load_tokenizer
from hybrimoe.config.deploy import ServerConfig
from hybrimoe.generation import TextGenerator
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
        assert row.served_us > 0
        assert row.engine_us > 0
        assert row.overhead_us == pytest.approx(row.served_us - row.engine_us)
        least, most = row.overhead_us_range
        assert least <= most


def test_clients_that_do_not_get_all_tokens_end_it(server):
    with pytest.raises(ServerError, match=f"expected {CONTEXT} tokens for each of 1 clients, they were sent"):
        measure(*server, clients=[1], new_tokens=CONTEXT, rounds=1)
