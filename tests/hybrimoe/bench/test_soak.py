"""The soak against a small model behind the real server, and against servers that do what it must find."""

import contextlib
from dataclasses import replace

import httpx
import pytest
import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from hybrimoe.bench.serve import soak as soaking
from hybrimoe.bench.serve.client import ServerError
from hybrimoe.bench.serve.soak import MALFORMED, Load, Report, soak
from hybrimoe.checkpoint import load_tokenizer
from hybrimoe.config.deploy import ServerConfig
from hybrimoe.errors import PromptError
from hybrimoe.generation import TextGenerator
from hybrimoe.generation.continuous_batching import BatchEngine
from hybrimoe.server.http import HttpServer, listening
from hybrimoe.server.models import Models
from hybrimoe.server.served import Served

LOAD = Load(minutes=1.0, users=6, requests=60, new_tokens=6, long_words=100)


@pytest.fixture
def server():
    tokenizer = load_tokenizer(None)
    config = Qwen3MoeConfig(
        vocab_size=len(tokenizer), hidden_size=32, intermediate_size=32, moe_intermediate_size=16,
        num_hidden_layers=2, num_experts=4, num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=1,
        head_dim=16, max_position_embeddings=512, bos_token_id=None, eos_token_id=None,
    )  # fmt: skip
    torch.manual_seed(0)
    served = Served("tiny", parallel=3)
    served.open(TextGenerator(Qwen3MoeForCausalLM(config).eval(), tokenizer))
    settings = ServerConfig(access_log=False)
    with (
        contextlib.closing(served),
        listening("127.0.0.1", 0) as listener,
        HttpServer(Models.of_one(served), settings, [], listener) as http,
    ):
        yield http.url


def test_mixed_load_leaves_nothing_and_changes_no_reply(server):
    report = soak(server, LOAD)
    assert report.problems == []
    assert report.sent.total() >= LOAD.requests
    assert sum(report.ended[how] for how in ("complete", "left", "rejected", "too long")) == report.sent.total()
    assert report.ended["left"] > 0
    assert report.ended["rejected"] > 0


def only_huge(monkeypatch):
    monkeypatch.setattr(soaking, "SHARES", {"plain": 0.2, "huge": 0.8})


def test_huge_prompts_beyond_the_context_are_refused_and_those_that_fill_it_answered(server, monkeypatch):
    only_huge(monkeypatch)
    report = soak(server, replace(LOAD, requests=12))
    assert report.problems == []
    assert report.ended["too long"] > 0
    assert report.ended["complete"] > 0


def test_huge_prompts_that_fit_are_all_answered(server, monkeypatch):
    only_huge(monkeypatch)
    report = soak(server, replace(LOAD, requests=12, huge_tokens=300))
    assert report.problems == []
    assert report.ended["too long"] == 0


def test_a_huge_prompt_that_is_not_refused_as_it_should_be_is_found(server, monkeypatch):
    only_huge(monkeypatch)

    def refused(self, n_tokens):
        if n_tokens > 600:
            raise PromptError("no")

    monkeypatch.setattr(TextGenerator, "check_prompt", refused)
    report = soak(server, replace(LOAD, requests=12))
    assert any("for a context of 512" in problem for problem in report.problems)


@pytest.mark.parametrize("path", ["completions", "chat/completions"])
def test_the_server_takes_none_of_the_malformed_bodies(server, path):
    for body in MALFORMED:
        answer = httpx.post(f"{server}/v1/{path}", content=body, headers={"content-type": "application/json"})
        assert 400 <= answer.status_code < 500, body
        assert "error" in answer.json()


def test_replies_that_are_mixed_up_are_found(server, monkeypatch):
    admit, count = BatchEngine.admit, [0]

    def other_prompt(self, prompt_ids, *others, **named):
        count[0] += 1
        return admit(self, prompt_ids[::-1] if count[0] > 40 else prompt_ids, *others, **named)

    monkeypatch.setattr(BatchEngine, "admit", other_prompt)
    report = soak(server, LOAD)
    assert any("another reply than alone" in problem for problem in report.problems)


def test_memory_that_grows_is_found():
    report = Report(resident_mib=[50, 90, 100, 100, 101, 100, 103, 102])
    assert report.growth == pytest.approx(0.03)
    assert Report(resident_mib=[1, 2]).growth is None


def test_no_server_is_told():
    with pytest.raises(ServerError, match="does not answer"):
        soak("http://127.0.0.1:9", LOAD)
