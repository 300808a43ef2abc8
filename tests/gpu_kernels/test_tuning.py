"""Which cut of the kernels is taken on a card: by times, of which each is measured once and kept."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch

from cpu_kernels import ExpertSpec
from gpu_kernels import tuning
from gpu_kernels.fused_choice import FusedChoice, Group
from gpu_kernels.tuning import Timings, kernel_name

HOST = torch.device("cpu")
SPEC = ExpertSpec(64, 64, "int4")
LONG_S = 60.0


@dataclass(frozen=True)
class Named:
    label: str
    single: bool = False


class Kernels:
    """Two cuts for one token, one for more."""

    MAX_TOKENS = 64

    def __init__(self) -> None:
        self.used: list[Any] = []
        self.states: list[Any] = []
        self.one_launch = False

    def supports(self, spec: ExpertSpec) -> bool:
        return True

    def blocks(self) -> tuple[int, ...]:
        return 1, 16

    def block_tokens(self, n_tokens: list[int]) -> int:
        return 1 if max(n_tokens) == 1 else 16

    def candidates(self, spec: ExpertSpec, block: int, device: torch.device) -> Sequence[Named]:
        if block > 1:
            return (Named("tile"),)
        return Named("usual"), Named("wide", self.one_launch), Named("deep")

    def new_state(self, device: torch.device) -> torch.Tensor:
        return torch.zeros(1, device=device)

    def run_group(self, *arguments: Any, cuts: Any = None, state: torch.Tensor | None = None) -> None:
        self.used.append(cuts)
        self.states.append(state)
        arguments[-1].fill_(1.0)


class Clocked:
    """us by label; an exception where it says so. Counts what was asked."""

    def __init__(self, **us: float | type[Exception]) -> None:
        self.us, self.asked = us, [""][:0]

    def __call__(self, block: int, cuts: Named) -> float:
        self.asked.append(cuts.label)
        found = self.us[cuts.label]
        if isinstance(found, float):
            return found
        raise found("on this card")


@pytest.fixture
def timings(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Timings:
    monkeypatch.setenv("HYBRIMOE_CACHE", str(tmp_path))
    return Timings.of("some card")


def chosen(timings: Timings, clock: Clocked, seconds: float = LONG_S) -> dict[int, str]:
    found = tuning.tune(Kernels(), SPEC, HOST, timings, clock, seconds)
    return {block: cuts.label for block, cuts in found.items()}


def test_the_fastest_cut_is_taken_and_timed_once(timings: Timings) -> None:
    clock = Clocked(usual=10.0, wide=7.0, deep=8.0)
    assert chosen(timings, clock) == {1: "wide"}, "where there is no choice, nothing is timed"
    assert clock.asked == ["usual", "wide", "deep"]
    again = Clocked()
    assert chosen(Timings.of("some card"), again) == {1: "wide"}
    assert again.asked == []
    assert Timings.of("some card").best() == {kernel_name(SPEC, 1): "wide"}


def test_noise_does_not_displace_the_default(timings: Timings) -> None:
    assert chosen(timings, Clocked(usual=10.0, wide=9.9, deep=12.0)) == {1: "usual"}


def test_another_card_or_driver_is_timed_by_itself(timings: Timings) -> None:
    chosen(timings, Clocked(usual=10.0, wide=7.0, deep=8.0))
    assert chosen(Timings.of("another card"), Clocked(usual=1.0, wide=7.0, deep=8.0)) == {1: "usual"}


@pytest.mark.parametrize(
    "text", ["", "{", "[]", '{"setting": "some card"}', '{"setting": "some card", "us": {"k": 3}}']
)
def test_a_damaged_file_is_written_anew(timings: Timings, text: str) -> None:
    timings.path.parent.mkdir(parents=True)
    timings.path.write_text(text)
    assert chosen(Timings.of("some card"), Clocked(usual=10.0, wide=7.0, deep=8.0)) == {1: "wide"}
    assert json.loads(timings.path.read_text())["setting"] == "some card"


def test_without_time_the_default_stands_and_the_next_start_goes_on(timings: Timings) -> None:
    assert chosen(timings, Clocked(), seconds=0.0) == {}
    assert not timings.path.exists()
    timings.us = {kernel_name(SPEC, 1): {"usual": 10.0}}
    assert chosen(timings, Clocked(), seconds=0.0) == {1: "usual"}
    assert chosen(timings, Clocked(wide=7.0, deep=12.0)) == {1: "wide"}


def test_a_cut_that_does_not_run_is_never_taken(timings: Timings) -> None:
    assert chosen(timings, Clocked(usual=10.0, wide=RuntimeError, deep=8.0)) == {1: "deep"}
    assert chosen(Timings.of("some card"), Clocked()) == {1: "deep"}, "nor tried again"


def test_without_memory_what_is_known_decides(timings: Timings) -> None:
    clock = Clocked(usual=10.0, wide=torch.OutOfMemoryError, deep=8.0)
    assert chosen(timings, clock) == {1: "usual"}
    assert clock.asked == ["usual", "wide"]
    assert chosen(Timings.of("some card"), Clocked(wide=5.0, deep=8.0)) == {1: "wide"}, "the next start has room"


def test_a_folder_that_cannot_be_written_costs_only_the_next_start(timings: Timings) -> None:
    timings.path.parent.parent.joinpath("cards").write_text("a file")
    assert chosen(timings, Clocked(usual=10.0, wide=7.0, deep=8.0)) == {1: "wide"}


def test_a_session_uses_what_was_chosen(timings: Timings, monkeypatch: pytest.MonkeyPatch) -> None:
    kernels = Kernels()
    choice = FusedChoice(kernels)
    clock = Clocked(usual=10.0, wide=7.0, deep=8.0)
    monkeypatch.setattr("gpu_kernels.fused_choice.timer", lambda *_: clock)
    monkeypatch.setattr("gpu_kernels.fused_choice.setting_of", lambda _: "some card")
    slots = torch.zeros(1, SPEC.record_bytes, dtype=torch.uint8)

    def run(n_tokens: int) -> Any:
        ids, offsets = torch.zeros(1, dtype=torch.int32), torch.tensor([0, n_tokens], dtype=torch.int32)
        out = torch.zeros(n_tokens, 64)
        group = Group(ids, offsets, torch.arange(n_tokens), [n_tokens], out, torch.ones(n_tokens), 1, out)
        choice.run(SPEC, slots, group, lambda: None)
        return kernels.used[-1]

    assert run(1) is None
    assert choice.tune(SPEC, slots, LONG_S)
    assert not choice.is_right(SPEC, 1), "another cut was compared with torch"
    assert run(1) == Named("wide")
    assert choice.is_right(SPEC, 1)
    assert not choice.tune(SPEC, slots, 0.0)
    assert choice.is_right(SPEC, 1), "the same cut as before"
    assert run(3) is None


def test_counters_of_one_launch_are_made_with_its_choice_and_stay(
    timings: Timings, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not while work is recorded, and the same for every call of an accelerator, whatever its kind of experts."""
    kernels = Kernels()
    kernels.one_launch = True
    choice = FusedChoice(kernels)
    clock = Clocked(usual=10.0, wide=7.0, deep=8.0)
    monkeypatch.setattr("gpu_kernels.fused_choice.timer", lambda *_: clock)
    monkeypatch.setattr("gpu_kernels.fused_choice.setting_of", lambda _: "some card")
    slots, other = torch.zeros(1, SPEC.record_bytes, dtype=torch.uint8), ExpertSpec(64, 64, "int8")

    def run(spec: ExpertSpec, n_tokens: int) -> Any:
        ids, offsets = torch.zeros(1, dtype=torch.int32), torch.tensor([0, n_tokens], dtype=torch.int32)
        out = torch.zeros(n_tokens, 64)
        group = Group(ids, offsets, torch.arange(n_tokens), [n_tokens], out, torch.ones(n_tokens), 1, out)
        choice.run(spec, slots, group, lambda: None)
        return kernels.states[-1]

    assert run(SPEC, 1) is None, "the default needs none"
    assert choice.tune(SPEC, slots, LONG_S)
    assert choice.tune(other, slots, LONG_S)
    state = run(SPEC, 1)
    assert state is not None
    assert run(SPEC, 1) is state
    assert run(other, 1) is state
    assert run(SPEC, 3) is None


def test_the_host_has_nothing_to_time() -> None:
    slots = torch.zeros(1, SPEC.record_bytes, dtype=torch.uint8)
    assert tuning.timer(Kernels(), SPEC, slots) is None
    choice = FusedChoice(Kernels())
    choice.tune(SPEC, slots, LONG_S)
    assert choice.cuts(SPEC, [1]) is None
