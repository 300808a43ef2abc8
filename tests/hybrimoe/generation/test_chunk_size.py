"""Prompts go through the model in parts that its memory has room for."""

from __future__ import annotations

from typing import Any

import pytest

from hybrimoe.generation import kv_memory
from hybrimoe.generation.engine import TextGenerator
from hybrimoe.generation.kv_memory import FEWEST_TOKENS, MOST_TOKENS, chunk_tokens, token_bytes
from hybrimoe.generation.sampling import SamplingOptions


def test_much_memory_takes_the_most_and_little_the_fewest(tiny_model: Any) -> None:
    assert chunk_tokens(tiny_model, 1 << 40) == MOST_TOKENS
    assert chunk_tokens(tiny_model, 0) == FEWEST_TOKENS
    between = int(500 * token_bytes(tiny_model) / kv_memory.WORK_SHARE)
    assert chunk_tokens(tiny_model, between) == pytest.approx(500, abs=1)


def test_a_token_takes_a_row_for_each_of_its_experts(tiny_model: Any) -> None:
    config = tiny_model.config.get_text_config(decoder=True)
    assert token_bytes(tiny_model) > kv_memory.FLOAT_BYTES * config.num_experts_per_tok * config.hidden_size


def test_the_same_reply_where_memory_is_short(
    tiny_model: Any, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """100 tokens: in one part, and in parts of FEWEST_TOKENS."""
    prompt, options = [3 + n % 50 for n in range(100)], SamplingOptions(max_new_tokens=8)
    expected = "".join(TextGenerator(tiny_model, byte_tokenizer).reply(prompt, options))
    lengths: list[int] = []
    monkeypatch.setattr(kv_memory, "device_memory", lambda device: (0, 1))
    generator = TextGenerator(tiny_model, byte_tokenizer)
    real = generator.forward

    def noted(token_ids: list[int], cache: Any) -> Any:
        lengths.append(len(token_ids))
        return real(token_ids, cache)

    monkeypatch.setattr(generator, "forward", noted)
    assert "".join(generator.reply(prompt, options)) == expected
    assert lengths[:2] == [64, 36]


@pytest.mark.parametrize("n_tokens", [FEWEST_TOKENS, FEWEST_TOKENS + 1])
def test_memory_is_asked_for_only_where_a_prompt_may_need_parts(
    n_tokens: int, tiny_model: Any, byte_tokenizer: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    generator, asked = TextGenerator(tiny_model, byte_tokenizer), []
    reply = generator.reply([3 + n % 50 for n in range(n_tokens)], SamplingOptions(max_new_tokens=1))
    monkeypatch.setattr(kv_memory, "device_memory", lambda device: asked.append(device) or (0, 1))
    assert list(reply)
    assert bool(asked) == (n_tokens > FEWEST_TOKENS)
