"""From a checkpoint to 40 greedy tokens on fake cards: the CPU's tokens, and nothing that a real card would punish."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast, Qwen3MoeConfig, Qwen3MoeForCausalLM

import hybrimoe
from hybrimoe.generation import SamplingOptions, TextGenerator
from tests.fake_device import DEVICE_TYPE, Cards, fake_cards

PROMPT = list(b"It was a bright morning, and she had been so long in the world")
N_TOKENS = 40
CARDS = [f"{DEVICE_TYPE}:{index}" for index in range(3)]


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private_cache: Callable[[Path], Path]) -> None:
    monkeypatch.setenv("HYBRIMOE_CACHE", str(private_cache(tmp_path / "cache")))


@pytest.fixture(params=["float32", "bfloat16"])
def directory(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """A small Qwen3-MoE of 4 layers with 8 experts each."""
    config = Qwen3MoeConfig(
        vocab_size=258, hidden_size=64, intermediate_size=32, moe_intermediate_size=32, num_hidden_layers=4,
        num_experts=8, num_experts_per_tok=2, num_attention_heads=2, num_key_value_heads=1, head_dim=32,
        max_position_embeddings=128, bos_token_id=None, eos_token_id=None, initializer_range=0.3,
    )  # fmt: skip
    torch.manual_seed(0)
    Qwen3MoeForCausalLM(config).to(getattr(torch, request.param)).save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def greedy(directory: Path, tokenizer: PreTrainedTokenizerFast, **options: Any) -> tuple[list[int], Any]:
    """40 tokens after the prompt, and the session's statistics."""
    settings: dict[str, Any] = {"progress": False, "expert_dtype": "float32", "backend": "torch"}
    model = hybrimoe.load(directory, **settings | options)
    try:
        reply = TextGenerator(model, tokenizer, prefill_chunk_tokens=40).reply(
            PROMPT, SamplingOptions(temperature=0.0, max_new_tokens=N_TOKENS)
        )
        for _ in reply:
            pass
        return reply.token_ids, model.hybrimoe.stats()
    finally:
        model.hybrimoe.session.close()


@pytest.mark.parametrize("accelerator", [CARDS[0], CARDS[:2]], ids=["one", "two"])
@pytest.mark.parametrize("policy", ["ours", "hybrimoe", "static"])
def test_tokens_are_those_of_the_cpu(
    directory: Path, byte_tokenizer: PreTrainedTokenizerFast, accelerator: str | list[str], policy: str
) -> None:
    expected, _ = greedy(directory, byte_tokenizer, accelerator="none")
    with fake_cards(2) as cards:
        found, stats = greedy(
            directory, byte_tokenizer, accelerator=accelerator, policy=policy, gpu_expert_slots=12
        )
    assert found == expected
    assert len(found) == N_TOKENS
    assert stats.total.accel_experts > 0
    assert cards.counts["launches"] > 0
    print(cards.counts)
