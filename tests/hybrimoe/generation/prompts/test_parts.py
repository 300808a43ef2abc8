"""The size of a prompt's parts: what fits the time that others may wait, and is worth a call."""

from __future__ import annotations

import os
from itertools import count
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from transformers import OlmoeConfig

from hybrimoe.generation import TextGenerator
from hybrimoe.generation.growing import GrowingLayer
from hybrimoe.generation.prompts import parts
from hybrimoe.generation.prompts.parts import (
    ATTENTION_FACTOR,
    FEW_TOKENS,
    KEPT_DAYS,
    LEAST_SPREAD,
    LEAST_TOKENS,
    MANY_TOKENS,
    ROUNDS,
    PromptTimes,
    TimesFile,
    attention_share,
    chosen_part,
    measured_part,
    measured_times,
    tokens_behind,
)
from hybrimoe.runtime.tier.store import TieredStore


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
    assert lengths == [FEW_TOKENS] + ROUNDS * [FEW_TOKENS, MANY_TOKENS]
    assert part.n_tokens == 173, "a tenth of the time is left for what a part may take longer"
    assert part.expected_us == pytest.approx(200_000 / LEAST_SPREAD, rel=0.01)


@pytest.mark.parametrize(
    ("many_ms", "spread", "per_token_us"),
    [
        ([136, 136, 136], LEAST_SPREAD, 1000),
        ([136, 272, 136], 2.0, 1000),  # a moment in which another program ran changes the margin and not the size
        ([1500, 136, 136], LEAST_SPREAD, (1_500_000 - 24_000) / 112),  # nobody waits for more at the start
    ],
)
def test_the_margin_follows_the_times(
    many_ms: list[int], spread: float, per_token_us: float, tiny_model: Any, byte_tokenizer: Any, monkeypatch: Any
) -> None:
    generator = TextGenerator(tiny_model, byte_tokenizer)
    forward, clock_us, times_ms = generator.forward, [0], iter(many_ms)

    def timed(ids: list[int], cache: Any) -> Any:
        clock_us[0] += 24_000 if len(ids) == FEW_TOKENS else 1000 * next(times_ms)
        return forward(ids, cache)

    monkeypatch.setattr(generator, "forward", timed)
    times = measured_times(generator, clock_ns=lambda: 1000 * clock_us[0])
    assert times.spread == pytest.approx(spread)
    assert times.per_token_us == pytest.approx(per_token_us)


def test_noise_does_not_make_a_part_endless(tiny_model: Any, byte_tokenizer: Any) -> None:
    generator = TextGenerator(tiny_model, byte_tokenizer)
    ticks = count()  # every prompt takes as long
    part = measured_part(generator, 1.0, clock_ns=lambda: 1_000_000 * next(ticks))
    assert 0 < part.n_tokens <= 2048


def test_a_later_start_takes_the_times_that_an_earlier_one_measured(
    tiny_model: Any, byte_tokenizer: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    generator, now_s = TextGenerator(tiny_model, byte_tokenizer), [1e9]
    kept = TimesFile(tmp_path / "new" / "times.json", lambda: now_s[0])
    assert kept.read() is None
    first = measured_part(generator, 200_000, kept=kept)
    monkeypatch.setattr(generator, "forward", None)  # nothing is computed
    now_s[0] += KEPT_DAYS * 86_400
    assert measured_part(generator, 200_000, kept=kept) == first
    assert [path.name for path in kept.path.parent.iterdir()] == ["times.json"]
    now_s[0] += 1
    assert kept.read() is None, "the machine may have been busy then"


def test_of_experts_on_disk_no_times_are_kept(
    tiny_model: Any, byte_tokenizer: Any, monkeypatch: Any, tmp_path: Path
) -> None:
    generator, kept = TextGenerator(tiny_model, byte_tokenizer), TimesFile(tmp_path / "times.json")
    tiered = SimpleNamespace(store=object.__new__(TieredStore), forget_trial=lambda: None)
    monkeypatch.setattr(parts, "_session", lambda _: tiered)
    measured_part(generator, 200_000, kept=kept)
    assert not kept.path.exists()


@pytest.mark.parametrize(
    "content",
    [
        "", "[]", "{}", '{"fixed_us": 1, "per_token_us": 0, "spread": 1.2, "measured_s": 9}',
        '{"fixed_us": 1, "per_token_us": NaN, "spread": 1.2, "measured_s": 9}',
        '{"fixed_us": -1, "per_token_us": 1, "spread": 1.2, "measured_s": 9}',
        '{"fixed_us": null, "per_token_us": 1, "measured_s": 9}',
        '{"fixed_us": 1, "per_token_us": 1, "spread": 1.2, "measured_s": 99}',
        '{"fixed_us": 1, "per_token_us": 1, "spread": 0.5, "measured_s": 9}',
        '{"fixed_us": 1, "per_token_us": 1, "measured_s": 9}',
    ],
)  # fmt: skip
def test_times_that_make_no_sense_are_measured_anew(content: str, tmp_path: Path) -> None:
    kept = TimesFile(tmp_path / "times.json", lambda: 10.0)
    kept.path.write_text(content, encoding="utf-8")
    assert kept.read() is None
    kept.write(PromptTimes(1.0, 2.0))
    assert kept.read() == PromptTimes(1.0, 2.0)


def test_files_that_are_too_old_to_be_read_are_removed(tmp_path: Path) -> None:
    old, other = tmp_path / "prompt-times-1.json", tmp_path / "hardware.yaml"
    for file in (old, other):
        file.write_text("{}", encoding="utf-8")
        os.utime(file, (1.0, 1.0))
    TimesFile(tmp_path / "prompt-times-2.json").write(PromptTimes(1.0, 2.0))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["hardware.yaml", "prompt-times-2.json"]


def test_times_that_cannot_be_kept_are_no_error(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    kept = TimesFile(tmp_path / "file" / "times.json")
    kept.write(PromptTimes(1.0, 2.0))
    assert kept.read() is None


def shaped(**more: Any) -> Any:
    """A model of which only the shape is asked: OLMoE-1B-7B's."""
    shape = {
        "num_hidden_layers": 16, "hidden_size": 2048, "num_attention_heads": 16, "num_key_value_heads": 16,
        "num_experts_per_tok": 8, "intermediate_size": 1024, "vocab_size": 128,
    }  # fmt: skip
    return SimpleNamespace(config=OlmoeConfig(**(shape | more)))


def test_attention_to_earlier_tokens_counts_by_the_models_shape() -> None:
    share = attention_share(shaped())
    weights = 4 * 2048 * 2048 + 8 * 3 * 2048 * 1024
    assert share == pytest.approx(ATTENTION_FACTOR * 2 * 2048 / weights)
    assert 5e-5 < share < 1e-4, "7.7e-5 was measured"
    assert attention_share(shaped(num_hidden_layers=2)) == pytest.approx(share), "of every layer alike"


def test_a_part_far_into_a_prompt_has_fewer_tokens() -> None:
    slower = 1e-4
    sizes = [tokens_behind(n, 400, slower) for n in (0, 10_000, 30_000, 10_000_000)]
    assert sizes == [400, 200, 100, LEAST_TOKENS]
    assert tokens_behind(10_000_000, 5, slower) == 5, "never more than at the beginning"


def test_a_prompt_is_cut_into_parts_that_take_as_long(tiny_model: Any, byte_tokenizer: Any) -> None:
    generator = TextGenerator(tiny_model, byte_tokenizer)
    reply = generator.reply([1] * 120, part_tokens=40, part_slower=0.01)
    assert list(reply._cut(0)) == [(0, 40), (40, 68), (68, 91), (91, 111), (111, 120)]


def test_a_prompt_in_parts_finds_its_room_at_once(tiny_model: Any, byte_tokenizer: Any, monkeypatch: Any) -> None:
    """A new buffer is a copy of all that is held: of a long prompt one of them would take longer than many parts."""
    monkeypatch.setattr(GrowingLayer, "least_room", 4)
    generator = TextGenerator(tiny_model, byte_tokenizer)
    reply = generator.reply([1] * 120, part_tokens=10)
    rooms = set()
    while reply.prefill() is None:
        rooms.add(reply.cache.growing_layers()[0].buffers.keys.data_ptr())
    assert len(rooms) == 1
    assert reply.cache.growing_layers()[0].buffers.keys.shape[-2] == 120 * 9 // 8
