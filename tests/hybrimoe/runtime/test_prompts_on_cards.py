"""Prompts on a card: what crosses the link, in how many pieces experts are computed, and slots rewritten in order."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gpu_kernels import TorchAccelerator
from hybrimoe.runtime.layer_call.lanes import SUBMISSIONS, Lanes
from tests.fake_device import DEVICE_TYPE, fake_cards
from tests.fake_device.fused import StreamedKernels
from tests.hybrimoe.runtime.conftest import Rig, routing

CARD = f"{DEVICE_TYPE}:0"
N_TOKENS = 2100
"""Result rows are then more than a MiB, hidden states more than 64 KiB."""


@pytest.fixture
def pieces(monkeypatch: pytest.MonkeyPatch) -> list[list[int]]:
    """Positions of each piece of work that a card is given, by kernels that take any number of tokens."""
    given: list[list[int]] = []
    run = TorchAccelerator.run_experts

    def noting(accelerator: TorchAccelerator, spec: Any, slots: Any, positions: Any, work: Any) -> Any:
        given.append(list(positions))
        return run(accelerator, spec, slots, positions, work)

    monkeypatch.setattr(TorchAccelerator, "run_experts", noting)
    monkeypatch.setattr(StreamedKernels, "MAX_TOKENS", 1 << 20)
    return given


def call(
    rig: Rig, seed: int, n_tokens: int = N_TOKENS, dtype: torch.dtype = torch.bfloat16, layer: int = 0
) -> torch.Tensor:
    hidden, index, weights = routing(n_tokens, 8, 2, seed)
    found = rig.call(layer, hidden.to(dtype).to(CARD), index.to(CARD), weights.to(CARD))
    wanted = rig.expected(layer, hidden.to(dtype), index, weights)
    torch.testing.assert_close(found.cpu().float(), wanted.float(), rtol=2e-2, atol=1e-2)
    return found


@pytest.mark.parametrize(
    ("n_slots", "at_once", "sizes"),
    [
        (8, 1, [4, 1, 1, 1, 1]),
        (8, 3, [4, 3, 1]),
        (8, 1000, [4, 4]),
        (6, 2, [3, 2, 2, 1]),
        (6, 1000, [3, 3, 2]),
        (4, 1000, [2, 2, 2, 2]),
        (2, 1000, [1] * 8),
    ],
)
def test_experts_that_arrive_together_are_one_piece_unless_they_share_slots(
    make_rig: Callable[..., Rig], pieces: list[list[int]], monkeypatch: pytest.MonkeyPatch, n_slots: int, at_once: int,
    sizes: list[int],
) -> None:  # fmt: skip
    monkeypatch.setattr(Lanes, "_arrivals_at_once", lambda lanes, layer: at_once)
    with fake_cards(1):
        rig = make_rig(n_layers=2, accelerator=CARD, gpu_expert_slots=n_slots, policy="on_demand/none/lru")
        for turn in range(3):
            for layer in range(2):  # each takes all slots of the other
                pieces.clear()
                call(rig, turn, layer=layer)
                assert sorted(position for piece in pieces for position in piece) == list(range(8))
        assert [len(piece) for piece in pieces] == sizes
        rig.session.close()


def test_so_many_arrive_together_as_cross_the_link_in_the_time_of_a_piece(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(n_layers=1, policy="on_demand/none/lru")
    lanes, costs = rig.session._runner.experts.lanes, rig.session.planner.costs  # type: ignore[union-attr]
    assert lanes._arrivals_at_once(0) == 1  # nothing is known yet
    for experts, found in ((0.2, 1), (1.0, 1), (2.5, 3), (40.0, 40)):
        lanes._piece_us = experts * costs.transfer_us(0) * (1 - 1e-9)
        assert lanes._arrivals_at_once(0) == found
    call_on_host = rig.call(0, *routing(4, 8, 2, 0))
    assert call_on_host.shape == (4, 64)
    assert lanes._piece_us < 1e6  # measured


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_a_prompt_needs_one_upload_for_all_pieces(
    make_rig: Callable[..., Rig], pieces: list[list[int]], monkeypatch: pytest.MonkeyPatch, dtype: torch.dtype
) -> None:
    """Routing of the call, then one copy an expert; nothing for each piece."""
    monkeypatch.setattr(Lanes, "_arrivals_at_once", lambda lanes, layer: 1)
    with fake_cards(1) as cards:
        rig = make_rig(n_layers=1, accelerator=CARD, gpu_expert_slots=3, policy="on_demand/none/lru")
        call(rig, 0, dtype=dtype)  # kernels are compared with torch
        pieces.clear()
        cards.counts.clear()
        given = [tensor.to(CARD) for tensor in routing(N_TOKENS, 8, 2, 1)]
        before = cards.counts["copy to the card"]
        transfers = rig.session.stats().total.transfers
        rig.call(0, given[0].to(dtype), *given[1:])
        copied = rig.session.stats().total.transfers - transfers
        assert len(pieces) >= 5
        assert cards.counts["copy to the card"] - before == copied + 2  # weights; slots, ends and rows of all experts
        rig.session.close()


def test_rows_of_the_cpu_are_read_where_it_wrote_them(
    make_rig: Callable[..., Rig], pieces: list[list[int]], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Page-locked rows of a prompt are added by the card's kernel: what is sent says where they are."""
    given: list[tuple[torch.Tensor, ...]] = []
    combine = StreamedKernels.combine

    def noting(kernels: StreamedKernels, rows: Any, host_rows: Any, source: Any, *more: Any) -> Any:
        given.append((host_rows, source))
        return combine(kernels, rows, host_rows, source, *more)

    monkeypatch.setattr(StreamedKernels, "combine", noting)
    with fake_cards(1):
        rig = make_rig(n_layers=1, accelerator=CARD, gpu_expert_slots=3, policy="static")
        for seed, n_tokens in enumerate((40, N_TOKENS, N_TOKENS)):
            given.clear()
            call(rig, seed, n_tokens)
            host_rows, source = given[-1]
            is_long = n_tokens == N_TOKENS
            assert host_rows.device.type == ("cpu" if is_long else DEVICE_TYPE)
            assert source.device.type == DEVICE_TYPE
            if is_long:
                assert host_rows.is_pinned()
                assert host_rows.shape == (2 * N_TOKENS, 64)
        rig.session.close()


def test_memory_that_cannot_be_locked_is_told_once_and_rows_are_sent(
    make_rig: Callable[..., Rig], pieces: list[list[int]]
) -> None:
    with fake_cards(1, refuses_locking=True):
        with pytest.warns(RuntimeWarning, match="could not be page-locked"):
            rig = make_rig(n_layers=1, accelerator=CARD, gpu_expert_slots=3, policy="static")
        with pytest.warns(RuntimeWarning, match="a prompt's rows could not be page-locked"):
            call(rig, 0)
        call(rig, 1, N_TOKENS + 500)
        rig.session.close()


def test_the_cpu_gets_less_of_a_prompt_the_longer_the_host_submits(
    make_rig: Callable[..., Rig], pieces: list[list[int]]
) -> None:
    """The same thread submits the device's work first: what it takes for that is no time for experts."""
    with fake_cards(1):
        rig = make_rig(n_layers=1, accelerator=CARD, gpu_expert_slots=2, policy="ours")
        lanes = rig.session._runner.experts.lanes  # type: ignore[union-attr]
        assert lanes.cpu_ready_us() == 0.0
        call(rig, 0, 40)
        assert lanes.cpu_ready_us() > 0.0  # measured
        n_on_cpu = []
        for submitting_us in (0.0, 1e6):
            lanes._submitting_us.extend([submitting_us] * SUBMISSIONS)
            before = rig.session.stats().total.cpu_experts
            call(rig, 1, 40)
            n_on_cpu.append(rig.session.stats().total.cpu_experts - before)
        assert n_on_cpu[0] > 0
        assert n_on_cpu[1] == 0
        rig.session.close()


def test_without_a_device_of_its_own_nothing_is_said_of_submitting(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(n_layers=1, policy="ours")
    rig.call(0, *routing(40, 8, 2, 0))
    assert rig.session._runner.experts.lanes.cpu_ready_us() == 0.0  # type: ignore[union-attr]
