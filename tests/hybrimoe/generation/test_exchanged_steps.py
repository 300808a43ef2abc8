"""Captured steps whose experts host and card split: on fake cards, whose graphs are judged when they are replayed."""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedTokenizerFast

from gpu_kernels import TorchAccelerator
from gpu_kernels.exchange import Exchange
from hybrimoe.runtime.layer_call.lanes import Lanes
from hybrimoe.step.captured import CapturedStep
from scheduler.planner.plan_view import PlanView
from tests.fake_device import Cards, fake_cards
from tests.fake_device.graphs import CardGraphs
from tests.fake_device.streams import FakeStream
from tests.hybrimoe.generation.test_on_cards import (
    N_LAYERS,
    N_TOKENS,
    ONE,
    greedy,
    own_cache,
    save_model,
    tokens_of_the_cpu,
)

sys.path.insert(0, str(Path(__file__).parents[2] / "families"))
from tiny_families import tiny_model as tiny_family

__all__ = ["own_cache", "tokens_of_the_cpu"]
STEPS = N_TOKENS - 1
OPTIONS: dict[str, Any] = {"accelerator": ONE, "gpu_expert_slots": 12, "policy": "on_demand/impact/lru"}


class Watched:
    """A run of 20 tokens on a fake card whose graphs are recorded: tokens, statistics, the captured step."""

    def __init__(self, cards: Cards, directory: Path, tokenizer: PreTrainedTokenizerFast, **options: Any) -> None:
        self.cards, self.step = cards, None
        self.tokens, self.stats = greedy(directory, tokenizer, self._prepare, **OPTIONS | options)

    def _prepare(self, model: Any) -> None:
        self.step = model.hybrimoe.step
        assert self.step is not None, model.hybrimoe.way
        self.cards.counts.clear()

    @property
    def sends(self) -> bool:
        """Whether the last step that was recorded sends its calls to the host."""
        return bool(self.sent)

    @property
    def sent(self) -> list[Any]:
        assert self.step is not None
        pieces = self.step._captured[-1]
        return [place for place in pieces.experts if place.sent is not None]


@pytest.fixture
def run(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch
) -> Callable[..., Watched]:
    directory = save_model(tmp_path / "model", "float32")

    def started(cards: Cards, **options: Any) -> Watched:
        monkeypatch.setattr("hybrimoe.step.build.graphs_of", lambda device: CardGraphs(cards))
        return Watched(cards, directory, byte_tokenizer, **options)

    return started


@pytest.fixture
def expected(tokens_of_the_cpu: Callable[[str], list[int]]) -> list[int]:
    return tokens_of_the_cpu("float32")


@pytest.mark.parametrize("policy", ["ours", "hybrimoe", "static", "on_demand/impact/lru"])
def test_tokens_are_those_of_the_cpu(run: Callable[..., Watched], expected: list[int], policy: str) -> None:
    with fake_cards(1) as cards:
        found = run(cards, policy=policy)
        assert found.tokens == expected
        assert len(found.sent) == N_LAYERS
        total = found.stats.by_phase["decode"]
        assert (total.calls, total.activated) == (STEPS * N_LAYERS, 2 * STEPS * N_LAYERS)
        assert total.accel_experts + total.cpu_experts == total.activated
        assert total.accel_experts > 0 or policy == "ours", "which finds the CPU faster for experts so small"
        assert total.accel_us > 0 or policy == "ours", "of one step in several, of which it may have none"
        assert total.accel_experts > 0 or not total.accel_us


@pytest.mark.parametrize("family", ["qwen3_next", "kimi_linear", "nemotron_h", "lfm2_moe", "inkling", "deepseek_v32"])
def test_other_caches_than_keys_and_values_are_part_of_the_graphs(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, family: str
) -> None:
    """States of linear attention of two kinds; Mamba, and layers that are nothing but experts; convolutions, and such
    beside a window; an index of the tokens."""
    directory = tmp_path / family
    tiny_family(family, vocab_size=258).save_pretrained(directory)
    expected, _ = greedy(directory, byte_tokenizer, accelerator="none")
    with fake_cards(1) as cards:
        monkeypatch.setattr("hybrimoe.step.build.graphs_of", lambda device: CardGraphs(cards))
        found = Watched(cards, directory, byte_tokenizer, gpu_expert_slots=6)
        assert found.step is not None
        assert found.step.n_steps == STEPS
        assert found.tokens == expected
        assert found.sends


@pytest.mark.parametrize("slots", [6, 1.0])
def test_experts_that_are_the_identity_add_their_share(
    tmp_path: Path, byte_tokenizer: PreTrainedTokenizerFast, monkeypatch: pytest.MonkeyPatch, slots: float
) -> None:
    """Within the graphs, with some experts in slots and with all."""
    directory = tmp_path / "longcat"
    tiny_family("longcat_flash", vocab_size=258).save_pretrained(directory)
    expected, _ = greedy(directory, byte_tokenizer, accelerator="none")
    with fake_cards(1) as cards:
        monkeypatch.setattr("hybrimoe.step.build.graphs_of", lambda device: CardGraphs(cards))
        found = Watched(cards, directory, byte_tokenizer, gpu_expert_slots=slots)
        assert found.step is not None
        assert found.step.n_steps == STEPS
        assert found.tokens == expected
        assert found.sends == (slots == 6)


def test_a_layer_is_one_wait_and_two_launches(
    run: Callable[..., Watched], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Beyond that a step's numbers go to the card, and its logits are copied."""
    with fake_cards(1) as cards:
        kinds = "graph launches", "launches", "copy to the card", "copy to the host", "waits", "host waits"
        a_step: list[Counter[str]] = []

        class Counted(CapturedStep):
            def _step(self, *args: Any) -> Any:
                before = cards.counts.copy()
                answer = super()._step(*args)
                a_step.append(Counter({kind: cards.counts[kind] - before[kind] for kind in kinds}))
                return answer

        monkeypatch.setattr("hybrimoe.step.build.CapturedStep", Counted)
        found = run(cards, policy="static")
        assert found.tokens == expected
        usual = a_step[STEPS // 2]
        assert usual["graph launches"] <= 2 * N_LAYERS + 1
        assert usual["host waits"] == N_LAYERS
        assert usual["copy to the host"] == 0
        assert (usual["copy to the card"], usual["waits"]) == (1, 0), "the token's numbers"
        assert usual["launches"] == 1, "the logits' copy"


def test_without_slots_nothing_but_the_sum_is_the_cards(run: Callable[..., Watched], expected: list[int]) -> None:
    with fake_cards(1) as cards:
        found = run(cards, gpu_expert_slots=0)
        assert found.tokens == expected
        assert [place.sent.graph for place in found.sent] == [None] * N_LAYERS
        assert found.stats.by_phase["decode"].cpu_experts == 2 * STEPS * N_LAYERS


def test_an_expert_that_takes_over_a_slot_goes_the_long_way(
    run: Callable[..., Watched], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    put: list[torch.Tensor] = []
    own = Exchange.put
    monkeypatch.setattr(PlanView, "hands_over", property(lambda plan: bool(plan.accel)))
    monkeypatch.setattr(Exchange, "put", lambda exchange, output: (put.append(output), own(exchange, output))[1])
    with fake_cards(1) as cards:
        found = run(cards)
        assert found.tokens == expected
        assert found.sends
        assert len(put) > 0


def test_memory_that_runs_out_within_a_step(
    run: Callable[..., Watched], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The layer is computed again with fewer slots; the next step is recorded with these."""
    launch, calls = Lanes.launch, []

    def short(lanes: Lanes, *args: Any) -> None:
        calls.append(lanes)
        if len(calls) == 30:
            raise torch.OutOfMemoryError("no memory")
        launch(lanes, *args)

    monkeypatch.setattr(Lanes, "launch", short)
    with fake_cards(1) as cards:
        with pytest.warns(RuntimeWarning, match="9 expert slots in place of 12"):
            found = run(cards)
        assert found.tokens == expected
        assert found.stats.n_slots == 9
        assert found.sends
        assert calls[-1] is not calls[0]


def test_a_recording_of_sent_calls_that_fails_leaves_the_captured_step(
    run: Callable[..., Watched], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fail(*args: Any) -> None:
        raise RuntimeError("a driver that maps no memory of the host")

    monkeypatch.setattr(TorchAccelerator, "compute_exchanged", fail)
    with fake_cards(1) as cards:
        with pytest.warns(RuntimeWarning, match="layer by layer, more slowly: a driver that maps"):
            found = run(cards)
        assert found.tokens == expected
        assert not found.sends
        assert found.step.n_steps == STEPS


def test_who_watches_the_calls_gets_them_as_they_are(run: Callable[..., Watched], expected: list[int]) -> None:
    told: list[int] = []
    kept: list[Any] = []

    def prepare(found: Watched, model: Any) -> None:
        model.hybrimoe.session.routing_recorder = lambda layer, *rest: told.append(layer)
        kept.append(model)

    with fake_cards(1) as cards, pytest.MonkeyPatch.context() as patch:
        own = Watched._prepare
        patch.setattr(Watched, "_prepare", lambda found, model: (own(found, model), prepare(found, model))[0])
        found = run(cards)
        assert found.tokens == expected
        assert told.count(0) == found.stats.layers[next(iter(found.stats.layers))].calls
        assert not found.sends


def test_without_the_wait_for_a_copy_there_is_a_race(
    run: Callable[..., Watched], monkeypatch: pytest.MonkeyPatch
) -> None:
    """The fake sees what `launch` waits for: experts whose transfer is under way."""
    monkeypatch.setattr(FakeStream, "wait_event", lambda self, event: None)
    with fake_cards(1, link_gbps=1e-3) as cards:
        run(cards, policy="on_demand/none/lru", n_tokens=4)
        assert any("fused" in finding and "may not have been written yet" in finding for finding in cards.findings)
        cards.findings.clear()


def test_without_the_wait_for_the_sending_there_is_garbage(
    run: Callable[..., Watched], expected: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Exchange, "wait", lambda exchange: None)
    with fake_cards(1) as cards:
        try:
            found = run(cards, policy="static").tokens
        except ValueError:  # NaN reaches the kernels
            found = []
        assert found != expected
        cards.findings.clear()
