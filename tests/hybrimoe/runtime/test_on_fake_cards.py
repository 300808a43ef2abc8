"""Sessions on fake cards: memory that runs out, slots that cannot be resized, what the planner knows of the link."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch

from cpu_kernels import Activation, ExpertDtype, ExpertSpec, reference_ffn, unpack_expert
from gpu_kernels import TorchAccelerator, open_accelerator, torch_events
from hybrimoe.config.deploy import load_config
from hybrimoe.dense.place import dense_device
from hybrimoe.errors import BudgetError, HybriMoEError
from hybrimoe.runtime.layer_call.slots import TransferQueue
from hybrimoe.runtime.startup import startup
from hybrimoe.runtime.startup.budget import unpack_bytes
from scheduler import Transfer
from scheduler.demand import Demand
from scheduler.lossy import LOSSY_POLICIES, resolve_lossy
from scheduler.planner.plan_view import PlanView
from tests.fake_device import DEVICE_TYPE, ManualClock, fake_cards
from tests.hybrimoe.runtime.conftest import Rig, routing

CARD = f"{DEVICE_TYPE}:0"


def call_all(rig: Rig, n_tokens: int, seed: int = 0) -> list[torch.Tensor]:
    """Each layer's output on the host, for hidden states on the card."""
    outputs = []
    for layer in range(len(rig.layers)):
        inputs = routing(n_tokens, 8, 2, seed + layer)
        outputs.append(rig.call(layer, *(tensor.to(CARD) for tensor in inputs)).cpu())
    return outputs


def expected(rig: Rig, n_tokens: int, seed: int = 0) -> list[torch.Tensor]:
    return [rig.expected(layer, *routing(n_tokens, 8, 2, seed + layer)) for layer in range(len(rig.layers))]


def assert_right(rig: Rig, n_tokens: int, seed: int = 0) -> None:
    for found, wanted in zip(call_all(rig, n_tokens, seed), expected(rig, n_tokens, seed), strict=True):
        torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-5)


def filled(rig: Rig) -> int:
    return len(rig.session.slot_contents())


def test_a_resize_that_does_not_fit_keeps_the_slots(make_rig: Callable[..., Rig]) -> None:
    size = make_rig(start=False).session.layer_specs()[0].spec.record_bytes
    with fake_cards(1, card_bytes=16 * size):
        rig = make_rig(accelerator=CARD, gpu_expert_slots=8, policy="static")
        assert_right(rig, 2)
        for refused in (20, 1000, "lots"):
            with pytest.raises(HybriMoEError):
                rig.session.resize_slots(refused)
            assert (rig.session.n_slots, filled(rig)) == (8, 8)
            before = rig.session.stats().total.accel_experts
            assert_right(rig, 2, seed=10)
            assert rig.session.stats().total.accel_experts > before
        assert rig.session.stats().failures == 0
        rig.session.close()


@pytest.mark.parametrize("said", [True, False], ids=["seen before", "found by the allocation"])
def test_a_resize_that_fits_one_card_of_two_keeps_both(
    make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch, said: bool
) -> None:
    size = make_rig(start=False).session.layer_specs()[0].spec.record_bytes
    with fake_cards(2, card_bytes=16 * size):
        rig = make_rig(n_layers=4, accelerator=(CARD, f"{DEVICE_TYPE}:1"), gpu_expert_slots=8, policy="static")
        before = [device.n_slots for device in rig.session.accelerators]
        taken = torch.empty(9 * size, dtype=torch.uint8, device=f"{DEVICE_TYPE}:1")
        if not said:  # as where another program takes the memory in between
            monkeypatch.setattr(TorchAccelerator, "free_bytes", lambda card: None)
        with pytest.raises(BudgetError, match="slots need .* ask for fewer" if said else "do not fit"):
            rig.session.resize_slots(20)
        assert [device.n_slots for device in rig.session.accelerators] == before
        assert_right(rig, 16)
        assert rig.session.stats().failures == 0
        assert taken.numel() == 9 * size
        rig.session.close()


def test_a_prompt_that_finds_no_memory_takes_slots(make_rig: Callable[..., Rig]) -> None:
    spec = make_rig(start=False).session.layer_specs()[0].spec
    with fake_cards(1, card_bytes=12 * spec.record_bytes) as cards:
        rig = make_rig(accelerator=CARD, gpu_expert_slots=8, policy="static")
        free, _ = cards.memory_info()
        taken = torch.empty(free - unpack_bytes(spec) // 2, dtype=torch.uint8, device=CARD)
        with pytest.warns(RuntimeWarning, match="out of memory: 6 expert slots in place of 8"):
            assert_right(rig, 60)
        assert (rig.session.n_slots, rig.session.stats().failures) == (6, 1)
        assert_right(rig, 60, seed=10)
        assert taken.numel() > 0
        rig.session.close()


def test_slots_that_leave_no_room_to_measure_in_are_refused(
    make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(startup, "calibrated", lambda *shape: None)
    size = make_rig(start=False).session.layer_specs()[0].spec.record_bytes
    with fake_cards(1, card_bytes=9 * size):
        rig = make_rig(accelerator=CARD, gpu_expert_slots=8, policy="static", profile=None, start=False)
        with pytest.raises(BudgetError, match=r"8 slots leave fake card.*no memory to compute an expert"):
            rig.session.finalize()
        rig.session.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
@pytest.mark.parametrize("gated", [True, False])
def test_the_reserve_covers_an_unpacked_expert(dtype: ExpertDtype, gated: bool) -> None:
    spec = ExpertSpec(256, 512, dtype, Activation("silu", gated=gated))
    with fake_cards(1) as cards, torch.no_grad():
        record = torch.zeros(spec.record_bytes, dtype=torch.uint8, device=CARD)
        hidden = torch.zeros(32, spec.hidden, device=CARD)
        before = cards.used_bytes()
        reference_ffn(spec, unpack_expert(spec, record), hidden)
        activations = 8 * 32 * spec.inter * 4
        assert cards.peak_bytes() - before <= unpack_bytes(spec) + activations


def test_dense_weights_and_experts_go_to_the_same_card() -> None:
    with fake_cards(2):
        torch.accelerator.set_device_index(1)
        for name in ("auto", f"{DEVICE_TYPE}:1", DEVICE_TYPE):
            accelerator = open_accelerator(name)
            assert accelerator is not None
            assert dense_device(load_config({}, accelerator=name)) == accelerator.device
            accelerator.close()


def test_a_copy_under_way_counts_by_what_is_left_of_it(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, record = ManualClock(), np.zeros(8000, np.uint8)
    monkeypatch.setattr(torch_events, "clock_us", clock.now_us)
    with fake_cards(1, clock=clock, link_gbps=8e-3):  # a copy takes 1000 us, and 2 us to launch
        accelerator = TorchAccelerator(CARD)
        accelerator.allocate(2, record.nbytes)
        slots = TransferQueue(accelerator)
        for slot in range(2):
            slots.submit(Transfer(0, slot, slot, None, "demand", 0.0, True), record, 0)
        assert slots.busy_us(clock.us, lambda layer: 1000.0) == pytest.approx(2000.0, abs=1)
        clock.us += 600.0
        assert slots.busy_us(clock.us, lambda layer: 1000.0) == pytest.approx(1400.0, abs=1)
        accelerator.close()


def test_layers_without_work_for_the_card_upload_their_output_only(make_rig: Callable[..., Rig]) -> None:
    with fake_cards(1) as cards:
        rig = make_rig(accelerator=CARD, gpu_expert_slots=1, policy="static", lookahead=0)
        assert_right(rig, 2)
        (cached, _) = rig.session.slot_contents()[0]
        inputs = [tensor.to(CARD) for tensor in routing(2, 8, 2, 0)]
        cards.counts.clear()
        rig.call((cached + 1) % len(rig.layers), *inputs)
        assert (cards.counts["copy to the card"], cards.counts["launches"]) == (1, 0)
        rig.session.close()


@pytest.mark.parametrize("kind", sorted(LOSSY_POLICIES))
def test_lossy_policies_run_on_cards(make_rig: Callable[..., Rig], kind: str) -> None:
    dtype = "int4" if LOSSY_POLICIES[kind].uses_planes else "bfloat16"
    with fake_cards(2):
        rig = make_rig(
            n_layers=4, accelerator=(CARD, f"{DEVICE_TYPE}:1"), gpu_expert_slots=16, expert_dtype=dtype,
            lossy=resolve_lossy(kind),
        )  # fmt: skip
        for n_tokens in (5, 1, 1, 30):
            for out in call_all(rig, n_tokens, seed=n_tokens):
                assert torch.isfinite(out).all()
        assert rig.session.stats().total.accel_experts > 0
        rig.session.close()


def test_a_part_that_ran_on_the_cpu_alone_is_added_on_the_card(
    make_rig: Callable[..., Rig], monkeypatch: pytest.MonkeyPatch
) -> None:
    with fake_cards(1):
        rig = make_rig(
            n_layers=2, accelerator=(CARD,), gpu_expert_slots=4, expert_dtype="bfloat16", lossy=resolve_lossy("hobbit")
        )  # fmt: skip
        runner = rig.session._runner
        assert runner is not None
        low, plan = runner.every[1], PlanView()

        def on_the_cpu(demand: Demand, *ready_us: float) -> PlanView:
            plan.run_on_cpu(0, demand.layer, len(demand.expert_ids))
            return plan

        monkeypatch.setattr(low.planner, "decide", on_the_cpu)
        monkeypatch.setattr(low.planner, "end_layer", lambda *told: None)
        for n_tokens in (5, 1, 1, 30, 1):
            for out in call_all(rig, n_tokens, seed=n_tokens):
                assert torch.isfinite(out).all()
        total = rig.session.stats().total
        assert total.lowered > 0
        assert total.accel_experts > 0
        rig.session.close()


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize("policy", ["ours", "hybrimoe", "static", "freetoken", "on_demand/none/lru"])
def test_every_kind_of_plan_is_performed_on_two_cards(make_rig: Callable[..., Rig], policy: str, dtype: str) -> None:
    with fake_cards(2):
        rig = make_rig(n_layers=4, accelerator=(CARD, f"{DEVICE_TYPE}:1"), gpu_expert_slots=8, policy=policy)
        for step, n_tokens in enumerate((5, 1, 1, 40, 1)):
            for layer in range(4):
                hidden, index, weights = routing(n_tokens, 8, 2, seed=97 * step + layer)
                given = hidden.to(getattr(torch, dtype))
                found = rig.call(layer, given.to(CARD), index.to(CARD), weights.to(CARD))
                assert (found.device, found.dtype, found.shape) == (torch.device(CARD), given.dtype, given.shape)
                wanted = rig.expected(layer, given, index, weights)
                torch.testing.assert_close(found.cpu(), wanted, rtol=2e-2 if dtype == "bfloat16" else 1e-4, atol=1e-2)
        rig.session.record_timeline(True)
        call_all(rig, 2)
        assert {task.lane for task in rig.session.timeline} >= {"accel"}
        rig.session.close()
