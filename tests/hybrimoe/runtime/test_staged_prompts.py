"""Prompts on a card with slots for some experts: layers stream through the last slots, the host waits for nothing."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from gpu_kernels import TorchAccelerator
from gpu_kernels.torch_events import DeviceEvent
from hybrimoe.runtime import staged as staged_module
from hybrimoe.runtime.staged import HALVES, StagedPrompts
from scheduler import CostModel, LayerDemand, Planner, SlotState
from scheduler.machine.profile import LinkProfile
from tests.fake_device import DEVICE_TYPE, ManualClock, fake_cards
from tests.fake_device.fused import StreamedKernels
from tests.fake_device.streams import FakeStream
from tests.hybrimoe.runtime.conftest import PROFILE, Rig, routing

CARD = f"{DEVICE_TYPE}:0"
N_EXPERTS, N_LAYERS, N_TOKENS, TOP_K = 16, 3, 60, 3
FAST_LINK = replace(PROFILE, link=LinkProfile(gbps=1000.0, latency_us=0.0))
SLOW_LINK = replace(PROFILE, link=LinkProfile(gbps=0.01, latency_us=0.0))


@pytest.fixture(autouse=True)
def any_number_of_tokens(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(StreamedKernels, "MAX_TOKENS", 1 << 20)


def rig_of(make_rig: Callable[..., Rig], **settings: Any) -> Rig:
    """After a first prompt, by which kernels are compared with torch."""
    given = {
        "n_layers": N_LAYERS, "n_experts": N_EXPERTS, "accelerator": CARD, "gpu_expert_slots": 20, "policy": "ours",
        "profile": FAST_LINK,
    }  # fmt: skip
    rig = make_rig(**given | settings)
    prompt(rig, 99)
    staged_of(rig).n_calls = 0
    return rig


def prompt(rig: Rig, seed: int, n_tokens: int = N_TOKENS, layers: range = range(N_LAYERS), **how: Any) -> list[Any]:
    """A prompt through the layers, each compared with the original on the host; the routing."""
    return [compared(rig, layer, seed + layer, n_tokens, **how) for layer in layers]


def compared(
    rig: Rig, layer: int, seed: int, n_tokens: int, dtype: torch.dtype = torch.float32,
    index: torch.Tensor | None = None,
) -> torch.Tensor:  # fmt: skip
    hidden, own, weights = routing(n_tokens, N_EXPERTS, TOP_K, seed)
    index, hidden = own if index is None else index, hidden.to(dtype)
    found = rig.call(layer, hidden.to(CARD), index.to(CARD), weights.to(CARD))
    wanted = rig.expected(layer, hidden, index, weights)
    assert found.dtype is dtype
    tolerance = 1e-5 if dtype is torch.float32 else 2e-2
    torch.testing.assert_close(found.cpu().float(), wanted.float(), rtol=tolerance, atol=tolerance)
    return index


def staged_of(rig: Rig) -> StagedPrompts:
    found = rig.session.staged()
    assert found is not None
    return found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("slots", [8, 9, 20, 47])
def test_layers_stream_through_the_last_slots(make_rig: Callable[..., Rig], slots: int, dtype: torch.dtype) -> None:
    """Whether a half holds a layer or a quarter of it, and some experts have slots or none."""
    with fake_cards(1):
        rig = rig_of(make_rig, gpu_expert_slots=slots)
        for seed in (1, 10):
            prompt(rig, seed, dtype=dtype)
        staged = staged_of(rig)
        assert staged.n_calls == 2 * N_LAYERS
        assert staged.n_places == min(N_EXPERTS, slots // HALVES)
        rig.session.close()


def test_the_host_neither_waits_nor_plans(make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch) -> None:
    with fake_cards(1) as cards:
        rig = rig_of(make_rig)
        prompt(rig, 1)
        monkeypatch.setattr(Planner, "decide", lambda *args: pytest.fail("nothing is planned"))
        monkeypatch.setattr(TorchAccelerator, "run_experts", lambda *args: pytest.fail("no piece of work"))
        given = [[tensor.to(CARD) for tensor in routing(N_TOKENS, N_EXPERTS, TOP_K, 2)] for _ in range(N_LAYERS)]
        before = dict(cards.counts)
        for layer in range(N_LAYERS):
            rig.call(layer, *given[layer])
        for what in ("host waits", "waits", "device waits", "copy to the host"):
            assert cards.counts[what] == before.get(what, 0), what
        assert staged_of(rig).n_calls == 2 * N_LAYERS
        monkeypatch.undo()
        rig.session.close()


def test_the_next_part_crosses_the_link_while_one_is_computed(
    make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Each copy but the first of a prompt was submitted before the work of the part before it could end, and waits for
    none but the work two parts before, which reads its half."""
    order: list[str] = []
    stage, part = TorchAccelerator.stage, TorchAccelerator.run_part

    def noted_stage(one: TorchAccelerator, *args: Any) -> Any:
        order.append("copies")
        return stage(one, *args)

    def noted_part(one: TorchAccelerator, *args: Any) -> Any:
        order.append("work")
        return part(one, *args)

    monkeypatch.setattr(TorchAccelerator, "stage", noted_stage)
    monkeypatch.setattr(TorchAccelerator, "run_part", noted_part)
    with fake_cards(1, clock=ManualClock(), link_gbps=1e-2) as cards:
        rig = rig_of(make_rig)
        prompt(rig, 1)
        order.clear()
        staged = staged_of(rig)
        given = [tensor.to(CARD) for tensor in routing(N_TOKENS, N_EXPERTS, TOP_K, 2)]
        ends: list[DeviceEvent] = []
        for layer in range(N_LAYERS):
            rig.call(layer, *given)
        n_parts = order.count("work")
        assert n_parts >= 2 * N_LAYERS
        assert order == ["copies", "work"] + ["copies", "work"] * (n_parts - 1)
        calls = staged.untold[-N_LAYERS:]
        copies = [event for call in calls for event in call.copies]
        ends = [event for call in calls for event in call.ends]
        cards.clock.us += 1e9
        for number in range(2, n_parts):
            assert copies[number].span_us[0] == pytest.approx(
                max(copies[number - 1].span_us[1], ends[number - 2].span_us[1]), abs=3.0
            )
        rig.session.close()


def test_routing_and_copies_are_counted_and_learnt(
    make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    saw: list[LayerDemand] = []
    own = Planner.saw

    def noted(planner: Planner, demand: LayerDemand) -> None:
        demand.validate(N_LAYERS, N_EXPERTS)
        saw.append(demand)
        own(planner, demand)

    monkeypatch.setattr(Planner, "saw", noted)
    with fake_cards(1):
        rig = rig_of(make_rig)
        rig.session.reset_stats()
        saw.clear()
        routed = prompt(rig, 5)
        counted = rig.session.stats().by_phase["prefill"]
        assert (counted.calls, counted.tokens) == (N_LAYERS, N_LAYERS * N_TOKENS)
        assert counted.activated == counted.accel_experts == sum(len(index.unique()) for index in routed)
        assert counted.hits + counted.misses == counted.activated
        record = rig.session.layer_specs()[0].spec.record_bytes
        assert counted.transfers >= counted.misses > 0
        assert counted.transfer_bytes == counted.transfers * record
        assert min(counted.accel_us, counted.link_us) > 0
        for demand, index in zip(saw, routed, strict=True):
            uses = np.bincount(index.reshape(-1).numpy(), minlength=N_EXPERTS)
            assert demand.expert_ids.tolist() == np.flatnonzero(uses).tolist()
            assert demand.n_tokens.tolist() == uses[uses > 0].tolist()
        scores = sum(
            torch.zeros(N_EXPERTS).index_add(0, index.reshape(-1), weights.reshape(-1))
            for index, weights in [(routed[2], routing(N_TOKENS, N_EXPERTS, TOP_K, 7)[2])]
        )
        np.testing.assert_allclose(saw[2].gate_scores, scores.numpy() / N_TOKENS, rtol=1e-5)
        rig.session.close()


def test_decoding_goes_on_behind_it(make_rig: Callable[..., Rig]) -> None:
    """The planner has been told, its slots are as it believes, and it fills those that were lent."""
    with fake_cards(1):
        rig = rig_of(make_rig)
        for turn in range(3):
            prompt(rig, 10 * turn)
            assert staged_of(rig).n_calls == N_LAYERS * (turn + 1)
            for token in range(4):
                prompt(rig, 100 + 10 * turn + token, n_tokens=1)
            assert not staged_of(rig).untold
        slots = rig.session._runner.planner.slots
        slots.validate()
        assert (slots.key_of[-2 * staged_of(rig).n_places :] >= 0).any(), "some of the halves is in use again"
        rig.session.close()


@pytest.mark.parametrize("absent", [-1, N_EXPERTS])
def test_absent_experts_and_experts_that_nobody_wants(make_rig: Callable[..., Rig], absent: int) -> None:
    index = torch.tensor([[0, 1, absent], [2, 3, 15]] * (N_TOKENS // 2))
    with fake_cards(1):
        rig = rig_of(make_rig)
        prompt(rig, 3, index=index)
        assert staged_of(rig).n_calls == N_LAYERS
        rig.session.close()


def test_where_link_and_cpu_are_faster_together_nothing_changes(make_rig: Callable[..., Rig]) -> None:
    with fake_cards(1):
        rig = rig_of(make_rig, profile=SLOW_LINK)
        rig.session._runner.experts.lanes._submitting_us.clear()
        prompt(rig, 1)
        assert staged_of(rig).n_calls == 0
        rig.session._runner.experts.lanes._submitting_us.clear()
        rig.session._runner.experts.lanes._submitting_us.append(1e9)
        compared(rig, 0, 2, N_TOKENS)
        assert staged_of(rig).n_calls == 1, "the host takes long to submit pieces"
        rig.session.close()


def test_of_few_tokens_only_what_is_needed_crosses_the_link(make_rig: Callable[..., Rig]) -> None:
    with fake_cards(1):
        rig = rig_of(make_rig)
        prompt(rig, 1, n_tokens=N_EXPERTS // TOP_K)
        assert staged_of(rig).n_calls == 0
        rig.session.close()


@pytest.mark.parametrize(
    "settings",
    [
        {"policy": "hybrimoe"}, {"policy": "static"}, {"gpu_expert_slots": 7}, {"accelerator": "emulated"},
        {"accelerator": [CARD, f"{DEVICE_TYPE}:1"]},
    ],
)  # fmt: skip
def test_who_has_the_usual_way(make_rig: Callable[..., Rig], settings: dict[str, Any]) -> None:
    """Other policies decide themselves; too few slots; what is no card, or several."""
    with fake_cards(2):
        rig = make_rig(
            **{"n_layers": N_LAYERS, "n_experts": N_EXPERTS, "accelerator": CARD, "profile": FAST_LINK} | settings
        )
        assert rig.session.staged() is None
        rig.session.close()


def test_host_memory_that_is_not_page_locked(make_rig: Callable[..., Rig]) -> None:
    with fake_cards(1, refuses_locking=True):
        with pytest.warns(RuntimeWarning, match="page-lock"):
            rig = make_rig(n_layers=N_LAYERS, n_experts=N_EXPERTS, accelerator=CARD, profile=FAST_LINK, policy="ours")
        assert rig.session.staged() is None
        rig.session.close()


@pytest.mark.parametrize("state", [SlotState.IN_FLIGHT, SlotState.PINNED])
def test_a_slot_in_use_is_not_lent(state: SlotState) -> None:
    costs = CostModel.uniform(N_LAYERS, cpu_us=50.0, accel_us=10.0, transfer_us=20.0, dense_us=100.0)
    planner = Planner(N_LAYERS, N_EXPERTS, 6, costs)
    slots = planner.slots
    for slot in range(4, 6):
        slots.begin_transfer(slot, slot)
    slots.end_transfer(4, 4)
    if state is SlotState.PINNED:
        slots.end_transfer(5, 5)
        slots.pin(5)
    before = slots.key_of.copy()
    assert not planner.lend(2)
    assert np.array_equal(before, slots.key_of)
    if state is SlotState.PINNED:
        slots.unpin(5)
    else:
        slots.end_transfer(5, 5)
    assert planner.lend(2)
    assert (slots.key_of == -1).all()
    slots.validate()


def test_counts_that_nobody_asks_for_do_not_pile_up(
    make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(staged_module, "MOST_UNTOLD", 4)
    with fake_cards(1):
        rig = rig_of(make_rig)
        for seed in range(6):
            prompt(rig, seed)
        assert len(staged_of(rig).untold) <= 5
        rig.session.close()


def test_without_the_wait_for_the_copies_there_is_a_race(
    make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_cards(1, link_gbps=1e-2) as cards:
        rig = rig_of(make_rig)
        prompt(rig, 1)
        given = [tensor.to(CARD) for tensor in routing(N_TOKENS, N_EXPERTS, TOP_K, 2)]
        own = FakeStream.wait_event
        compute = cards.stream()
        monkeypatch.setattr(FakeStream, "wait_event", lambda one, event: None if one is compute else own(one, event))
        for layer in range(N_LAYERS):
            rig.call(layer, *given)
        assert any("may not have been written yet" in finding for finding in cards.findings)
        monkeypatch.undo()
        rig.session.close()
        cards.findings.clear()


def test_without_the_wait_for_the_work_before_there_is_a_race(
    make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_cards(1) as cards:
        rig = rig_of(make_rig)
        prompt(rig, 1)
        given = [tensor.to(CARD) for tensor in routing(N_TOKENS, N_EXPERTS, TOP_K, 2)]
        own = FakeStream.wait_event
        compute = cards.stream()
        monkeypatch.setattr(FakeStream, "wait_event", lambda one, event: own(one, event) if one is compute else None)
        for layer in range(N_LAYERS):
            rig.call(layer, *given)
        assert any("writes over what may still be read" in finding for finding in cards.findings)
        monkeypatch.undo()
        rig.session.close()
        cards.findings.clear()
