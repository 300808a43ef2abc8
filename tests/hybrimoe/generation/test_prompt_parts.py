"""The size of a prompt's parts: what fits the time that others may wait, and is worth a call."""

from __future__ import annotations

from itertools import count
from typing import Any

import pytest

from hybrimoe.generation import TextGenerator
from hybrimoe.generation.prompt_parts import FEW_TOKENS, LEAST_TOKENS, MANY_TOKENS, chosen_part, measured_part


@pytest.mark.parametrize(
    ("fixed_us", "per_token_us", "n_tokens", "expected_us"),
    [
        (0.0, 1000.0, 500, 500_000.0),
        (100_000.0, 1000.0, 400, 500_000.0),
        (600_000.0, 100.0, 6000, 1_200_000.0),  # weights that move to an accelerator: not in the time, but worth it
        (0.0, 100_000.0, LEAST_TOKENS, LEAST_TOKENS * 100_000.0),
    ],
)
def test_the_part_that_fits(fixed_us: float, per_token_us: float, n_tokens: int, expected_us: float) -> None:
    part = chosen_part(fixed_us, per_token_us, stall_us=500_000)
    assert (part.n_tokens, part.expected_us) == (n_tokens, pytest.approx(expected_us))


def test_a_machine_is_measured_by_three_prompts(tiny_model: Any, byte_tokenizer: Any, monkeypatch: Any) -> None:
    generator = TextGenerator(tiny_model, byte_tokenizer)
    forward, lengths = generator.forward, []

    def timed(ids: list[int], cache: Any) -> Any:
        lengths.append(len(ids))
        clock_us[0] += 50_000 if len(lengths) == 1 else 1000 * len(ids) + 8000
        return forward(ids, cache)

    clock_us = [0]
    monkeypatch.setattr(generator, "forward", timed)
    part = measured_part(generator, 200_000, clock_ns=lambda: 1000 * clock_us[0])
    assert lengths == [FEW_TOKENS, FEW_TOKENS, MANY_TOKENS]
    assert part.n_tokens == 192
    assert part.expected_us == pytest.approx(200_000)


def test_noise_does_not_make_a_part_endless(tiny_model: Any, byte_tokenizer: Any) -> None:
    generator = TextGenerator(tiny_model, byte_tokenizer)
    ticks = count()  # every prompt takes as long
    part = measured_part(generator, 1.0, clock_ns=lambda: 1_000_000 * next(ticks))
    assert 0 < part.n_tokens <= 2048
