"""A token without Python: the compiled loop on fake cards, whose driver judges what it submits."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from transformers import PreTrainedTokenizerFast

from tests.fake_device import Cards, fake_cards
from tests.fake_device.graphs import CardGraphs
from tests.hybrimoe.generation.test_on_cards import N_TOKENS, ONE, greedy, own_cache, save_model

__all__ = ["own_cache"]
STEPS = N_TOKENS - 1


class Run:
    """A reply on a fake card: tokens, statistics, and the pieces of its step."""

    def __init__(self, cards: Cards, directory: Path, tokenizer: PreTrainedTokenizerFast, **options: Any) -> None:
        self.step: Any = None
        settings: dict[str, Any] = {"accelerator": ONE, "gpu_expert_slots": 12, "policy": "ours", "backend": "numba"}
        self.tokens, self.stats = greedy(directory, tokenizer, self._keep, **settings | options)

    def _keep(self, model: Any) -> None:
        self.step = model.hybrimoe.step

    @property
    def pieces(self) -> Any:
        return self.step._captured[-1]


@pytest.fixture
def run(tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Run]:
    directory = save_model(tmp_path / "model", "float32")

    def started(cards: Cards, **options: Any) -> Run:
        monkeypatch.setattr("hybrimoe.step.build.graphs_of", lambda device: CardGraphs(cards))
        return Run(cards, directory, byte_tokenizer, **options)

    return started


def test_tokens_are_those_of_python(run: Callable[..., Run], monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cards(1) as cards:
        looped = run(cards)
        assert looped.pieces.loop is not None, looped.pieces.no_loop
        assert looped.pieces.loop.n_tokens > STEPS // 2
        assert looped.pieces.loop._driver.error is None
    monkeypatch.setattr("hybrimoe.step.captured.CapturedStep._loop_over", lambda step, pieces: None)
    with fake_cards(1) as cards:
        plain = run(cards)
        assert plain.pieces.loop is None
    assert looped.tokens == plain.tokens
