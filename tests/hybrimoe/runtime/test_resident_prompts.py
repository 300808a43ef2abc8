"""Prompts where every expert has a slot: the card groups the tokens by itself, and the host waits for nothing."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch

from gpu_kernels import TorchAccelerator
from hybrimoe.runtime import resident as resident_module
from tests.fake_device import DEVICE_TYPE, fake_cards
from tests.fake_device.fused import StreamedKernels
from tests.hybrimoe.runtime.conftest import HIDDEN, Rig, routing

CARD = f"{DEVICE_TYPE}:0"
N_EXPERTS, N_LAYERS = 8, 2


@pytest.fixture(autouse=True)
def any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StreamedKernels, "MAX_TOKENS", 1 << 20)


@pytest.fixture
def submitted(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Experts of each piece of work that the host has submitted."""
    given: list[int] = []
    run = TorchAccelerator.run_experts

    def noting(accelerator: TorchAccelerator, spec: Any, slots: Any, positions: Any, work: Any) -> Any:
        given.append(len(positions))
        return run(accelerator, spec, slots, positions, work)

    monkeypatch.setattr(TorchAccelerator, "run_experts", noting)
    return given


def resident_rig(make_rig: Callable[..., Rig], **settings: Any) -> Rig:
    """After a first prompt, by which kernels are compared with torch."""
    given = {"n_layers": N_LAYERS, "accelerator": CARD, "gpu_expert_slots": N_LAYERS * N_EXPERTS}
    rig = make_rig(**given | {"policy": "on_demand/none/lru"} | settings)
    for layer in range(N_LAYERS):
        compared(rig, 99, layer=layer)
    return rig


def compared(
    rig: Rig, seed: int, n_tokens: int = 50, layer: int = 0, dtype: torch.dtype = torch.float32,
    index: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    """The output of a call on the card, which is that of the original on the host."""
    hidden, own, weights = routing(n_tokens, N_EXPERTS, 2, seed)
    index = own if index is None else index
    hidden = hidden.to(dtype)
    found = rig.call(layer, hidden.to(CARD), index.to(CARD), weights.to(CARD))
    wanted = rig.expected(layer, hidden, index, weights)
    assert found.dtype is dtype
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(found.cpu().float(), wanted.float(), rtol=tolerance, atol=tolerance)
    return index


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_host_neither_waits_nor_submits_experts(
    make_rig: Callable[..., Rig], submitted: list[int], dtype: torch.dtype
) -> None:
    with fake_cards(1) as cards:
        rig = resident_rig(make_rig)
        compared(rig, 1, dtype=dtype)
        submitted.clear()
        given = [tensor.to(CARD) for tensor in routing(50, N_EXPERTS, 2, 2)]
        before = dict(cards.counts)
        for layer in range(N_LAYERS):
            rig.call(layer, given[0].to(dtype), *given[1:])
        assert not submitted
        for what in ("host waits", "copy to the card"):
            assert cards.counts[what] == before.get(what, 0), what
        compared(rig, 2, dtype=dtype)
        rig.session.close()


def test_calls_are_counted_once_somebody_asks(make_rig: Callable[..., Rig], submitted: list[int]) -> None:
    with fake_cards(1):
        rig = resident_rig(make_rig)
        rig.session.reset_stats()
        submitted.clear()
        used = [compared(rig, seed, n_tokens, layer) for seed, n_tokens, layer in ((1, 50, 0), (2, 3, 1), (3, 50, 0))]
        assert not submitted
        counted = rig.session.stats().by_phase["prefill"]
        n_active = sum(len(index.unique()) for index in used)
        assert (counted.calls, counted.tokens) == (3, 103)
        assert counted.hits == counted.activated == counted.accel_experts == n_active
        assert counted.accel_us > 0
        assert rig.session.stats().by_phase["prefill"].calls == 3, "once"
        compared(rig, 4)
        rig.session.reset_stats()
        assert rig.session.stats().total.calls == 0
        rig.session.close()


def test_counts_that_nobody_asks_for_do_not_pile_up(
    make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(resident_module, "MOST_UNCOUNTED", 4)
    with fake_cards(1):
        rig = resident_rig(make_rig)
        rig.session.reset_stats()
        for seed in range(11):
            compared(rig, seed)
        resident = rig.session.resident()
        assert resident is not None
        assert len(resident.uncounted) <= 5
        assert rig.session.stats().total.calls == 11
        rig.session.close()


@pytest.mark.parametrize("absent", [-1, N_EXPERTS])
def test_absent_experts_and_the_same_one_twice(make_rig: Callable[..., Rig], submitted: list[int], absent: int) -> None:
    with fake_cards(1):
        rig = resident_rig(make_rig)
        submitted.clear()
        index = routing(40, N_EXPERTS, 2, 5)[1]
        index[::3, 1] = absent
        index[1::3, 1] = index[1::3, 0]
        index[7] = absent
        compared(rig, 5, 40, index=index)
        compared(rig, 5, 40, index=torch.full((40, 2), 3))  # all of them: more rows than tokens
        assert not submitted
        rig.session.close()


def test_with_fewer_slots_the_host_decides_again(make_rig: Callable[..., Rig], submitted: list[int]) -> None:
    with fake_cards(1):
        rig = resident_rig(make_rig)
        rig.session.reset_stats()
        compared(rig, 1)
        submitted.clear()
        rig.session.resize_slots(N_EXPERTS)
        assert rig.session.stats().total.calls == 1, "what was computed before is counted"
        compared(rig, 2)
        compared(rig, 3, layer=1)
        assert submitted
        rig.session.close()


def test_one_token_and_tensors_of_the_host_go_the_usual_way(make_rig: Callable[..., Rig], submitted: list[int]) -> None:
    with fake_cards(1):
        rig = resident_rig(make_rig)
        submitted.clear()
        compared(rig, 1, n_tokens=1)
        assert len(submitted) == 1
        hidden, index, weights = routing(20, N_EXPERTS, 2, 6)
        found = rig.call(0, hidden, index, weights)
        torch.testing.assert_close(found, rig.expected(0, hidden, index, weights), rtol=1e-5, atol=1e-5)
        assert found.shape == (20, HIDDEN)
        assert len(submitted) > 1
        rig.session.close()


def test_who_records_routing_or_times_lanes_sees_prompts(make_rig: Callable[..., Rig], submitted: list[int]) -> None:
    with fake_cards(1):
        rig = resident_rig(make_rig)
        rig.session.record_timeline(True)
        submitted.clear()
        compared(rig, 1)
        assert submitted
        assert rig.session.timeline
        rig.session.close()
