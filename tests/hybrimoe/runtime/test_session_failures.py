"""Bad input, failing lanes, interruptions: clear errors, and a session that goes on or says why not."""

from __future__ import annotations

import gc
import re
import threading
import weakref
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from cpu_kernels import ExpertWeights, relative_error
from gpu_kernels import EmulatedAccelerator, LaneError
from hybrimoe.errors import (
    BudgetError,
    CheckpointError,
    ConfigError,
    DeviceError,
    ModelError,
    UnsupportedExpertsError,
)
from hybrimoe.runtime import ExpertStore, RuntimeConfig, Session
from scheduler import SlotError, SlotTable

from .conftest import PROFILE, MiniExperts, Rig, routing

MakeRig = Callable[..., Rig]
CALL = routing(4, 8, 2, seed=1)


def check_works(rig: Rig) -> None:
    for step in range(3):
        for layer in range(len(rig.layers)):
            call = routing(1, 8, 2, seed=100 + 3 * step + layer)
            assert relative_error(rig.call(layer, *call), rig.expected(layer, *call)) < 1e-5


# Configuration -------------------------------------------------------------------------------------------------


def test_zero_slots_run_everything_on_the_cpu(make_rig: MakeRig) -> None:
    rig = make_rig(gpu_expert_slots=0)
    check_works(rig)
    assert rig.session.stats().total.accel_experts == 0


def test_no_accelerator_runs_everything_on_the_cpu(make_rig: MakeRig) -> None:
    rig = make_rig(accelerator="none", placement="accelerator")
    check_works(rig)
    assert rig.session.n_slots == 0
    assert rig.session.stats().accelerator == "none"


def test_shares_and_sizes(make_rig: MakeRig) -> None:
    record = make_rig().session.layer_specs()[0].spec.record_bytes
    assert make_rig(gpu_expert_slots=0.5).session.n_slots == 12
    assert make_rig(gpu_expert_slots=f"{5 * record + 7}B").session.n_slots == 5
    assert make_rig(gpu_expert_slots="1GiB").session.n_slots == 24
    assert make_rig(gpu_expert_slots="auto").session.n_slots == 6


@pytest.mark.parametrize(
    ("settings", "error", "message"),
    [
        ({"gpu_expert_slots": "100B"}, BudgetError, "holds no expert"),
        ({"gpu_expert_slots": 25}, BudgetError, "asked for 25 expert slots, but the model has 24"),
        ({"gpu_expert_slots": -3}, ConfigError, "negative"),
        ({"gpu_expert_slots": "lots"}, ConfigError, "lots"),
        ({"accelerator": "cuda:93"}, DeviceError, "cuda:93"),
        ({"accelerator": "gpu"}, DeviceError, "no device"),
        ({"backend": "nunba"}, ConfigError, "numba"),
        ({"policy": "hybrimo"}, ValueError, "hybrimoe"),
        ({"policy_params": {"alfa": 1}}, ValueError, "alfa"),
        ({"lookahead": -1}, ValueError, "lookahead"),
    ],
)
def test_bad_settings_are_named(make_rig: MakeRig, settings: dict[str, Any], error: type, message: str) -> None:
    with pytest.raises(error, match=message):
        make_rig(**settings)


# Order of use --------------------------------------------------------------------------------------------------


def test_wrong_order_of_use_is_named(make_rig: MakeRig) -> None:
    rig = make_rig(start=False)
    with pytest.raises(ModelError, match="not started"):
        rig.call(0, *CALL)
    with pytest.raises(ModelError, match="finalize"):
        _ = rig.session.store
    rig.session.finalize()
    with pytest.raises(ModelError, match="already finalized"):
        rig.session.finalize()
    with pytest.raises(ModelError, match="already started"):
        rig.session.start()
    with pytest.raises(ModelError, match="already finalized"):
        rig.session.add_layer("more", MiniExperts(2, 0))
    rig.session.close()
    rig.session.close()
    with pytest.raises(ModelError, match="closed"):
        rig.call(0, *CALL)
    with pytest.raises(ModelError, match="no layer"):
        Session(RuntimeConfig(accelerator="none")).finalize()


def test_modules_and_placements_that_are_none_are_refused() -> None:
    session = Session(RuntimeConfig(accelerator="none"))
    with pytest.raises(UnsupportedExpertsError):
        session.add_layer("mlp", nn.Linear(4, 4))
    with pytest.raises(ModelError, match="placement 'gpu'"):
        session.add_layer("experts", MiniExperts(2, 0), placement="gpu")  # type: ignore[arg-type]
    session.close()


@pytest.mark.parametrize(
    ("hidden", "index", "weights"),
    [
        (torch.zeros(4, 63), CALL[1], CALL[2]),
        (torch.zeros(4, 64, dtype=torch.int64), CALL[1], CALL[2]),
        (CALL[0], CALL[1].float(), CALL[2]),
        (CALL[0], CALL[1], CALL[2] * float("nan")),
        (CALL[0], CALL[1] - 9, CALL[2]),
        (CALL[0] * float("nan"), CALL[1], CALL[2]),
        (CALL[0], CALL[1][:3], CALL[2]),
        (CALL[0], CALL[1], CALL[2][:, :1]),
    ],
)
def test_bad_tensors_raise_and_the_session_goes_on(
    make_rig: MakeRig, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
) -> None:
    rig = make_rig(policy="hybrimoe")
    with pytest.raises((ValueError, ModelError)):
        rig.call(0, hidden, index, weights)
    check_works(rig)


# Deferred weights and ready-made stores ---------------------------------------------------------------------------


def test_meta_layers_start_when_their_weights_have_come() -> None:
    session = Session(
        RuntimeConfig("emulated", gpu_expert_slots=4, profile=PROFILE, expert_dtype="float32", backend="torch")
    )
    original = MiniExperts(8, 0)
    with torch.device("meta"):
        placeholder = MiniExperts.__new__(MiniExperts)
        nn.Module.__init__(placeholder)
        placeholder.gate_up_proj = nn.Parameter(torch.empty(8, 64, 64))
        placeholder.down_proj = nn.Parameter(torch.empty(8, 64, 32))
        placeholder.act_fn, placeholder.num_experts = nn.SiLU(), 8
    experts = session.add_layer("experts", placeholder)
    session.finalize()
    with pytest.raises(ModelError, match="not started"):
        experts(*CALL)
    for expert in range(8):
        gate, up = original.gate_up_proj[expert].detach().chunk(2)
        session.store.write(0, expert, ExpertWeights(up=up, down=original.down_proj[expert].detach(), gate=gate))
    session.start()
    assert relative_error(experts(*CALL), original(*CALL).detach()) < 1e-5
    session.close()


def test_a_ready_made_store_is_used_as_it_is(make_rig: MakeRig) -> None:
    source, rig = make_rig(), make_rig(start=False)
    buffer = np.array(source.session.store.buffer)
    aligned = np.empty(buffer.nbytes + 64, np.uint8)
    start = -aligned.ctypes.data % 64
    view = aligned[start : start + buffer.nbytes]
    view[:] = buffer
    view.setflags(write=False)
    rig.session.finalize(store=ExpertStore.from_buffer(rig.session.layer_specs(), view))
    assert torch.equal(rig.call(1, *CALL), source.call(1, *CALL))


def test_packed_bytes_that_do_not_fit_are_refused(make_rig: MakeRig) -> None:
    specs = make_rig().session.layer_specs()
    size = sum(spec.nbytes for spec in specs)
    with pytest.raises(CheckpointError, match=f"expected {size} bytes"):
        ExpertStore.from_buffer(specs, np.zeros(size - 64, np.uint8))
    raw = np.zeros(size + 128, np.uint8)
    start = -raw.ctypes.data % 64 + 1
    with pytest.raises(CheckpointError, match="multiple of 64"):
        ExpertStore.from_buffer(specs, raw[start : start + size])


def test_damaged_weights_are_named(make_rig: MakeRig) -> None:
    rig = make_rig(start=False)
    with torch.no_grad():
        rig.originals[1].down_proj[5, 0, 0] = float("nan")
    with pytest.raises(CheckpointError, match=r"layers\.1\.experts, expert 5: down has values that are NaN"):
        rig.session.finalize()


# Failing lanes ----------------------------------------------------------------------------------------------------


def test_a_failing_copy_reaches_the_caller_and_the_session_goes_on(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch
) -> None:
    rig = make_rig(policy="accel_only/none/lru", gpu_expert_slots=3)
    check_works(rig)
    with monkeypatch.context() as patch:
        patch.setattr(EmulatedAccelerator, "_transfer", _raise(OSError("link down")))
        with pytest.raises(LaneError, match="link down"):
            rig.call(0, *routing(8, 8, 3, seed=0))
    check_works(rig)
    assert rig.session.stats().failures == 1


def test_a_failing_prefetch_reaches_the_caller(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig(policy="ours", gpu_expert_slots=3, start=False)
    monkeypatch.setattr(EmulatedAccelerator, "_transfer", _raise(OSError("link down")))
    rig.session.finalize()
    rig.session.accelerators[0].synchronize()
    with pytest.raises(LaneError, match="link down"):
        rig.call(0, *CALL)
    monkeypatch.undo()
    check_works(rig)


@pytest.mark.parametrize("policy", ["accel_only/none/lru", "ours"])
def test_the_error_of_a_failed_lane_tells_the_story_of_its_experts(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch, policy: str
) -> None:
    rig = make_rig(policy=policy, gpu_expert_slots=3, start=False)
    monkeypatch.setattr(EmulatedAccelerator, "_transfer", _raise(OSError("link down")))
    rig.session.finalize()
    rig.session.accelerators[0].synchronize()
    with pytest.raises(LaneError, match="link down") as failed:
        rig.call(0, *CALL)
    story = r"latest events of layer (\d+) expert (\d+): .*begin_transfer layer \1 expert \2 slot \d+"
    assert re.search(story, str(failed.value)), failed.value


def test_only_the_experts_of_the_failed_work_are_told_of(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    rig = make_rig(policy="accel_only/none/lru", gpu_expert_slots=4)
    check_works(rig)
    rig.session.record_timeline(True)  # expert by expert
    copied = EmulatedAccelerator._transfer
    seen: list[int] = []

    def fail_second(*arguments: Any) -> None:
        seen.append(1)
        if len(seen) == 2:
            raise OSError("link down")
        copied(*arguments)

    monkeypatch.setattr(EmulatedAccelerator, "_transfer", fail_second)
    with pytest.raises(LaneError, match="link down") as failed:
        rig.call(0, *routing(8, 8, 3, seed=0))
    assert str(failed.value).count("latest events of") == 1


@pytest.mark.parametrize("lane", ["cpu", "accelerator"])
def test_a_failing_kernel_reaches_the_caller_and_the_session_goes_on(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch, lane: str
) -> None:
    policy = "cpu_only/none/lru" if lane == "cpu" else "accel_only/none/lru"
    rig = make_rig(policy=policy, backend="torch")
    check_works(rig)
    with monkeypatch.context() as patch:
        patch.setattr("cpu_kernels.backends.torch_backend.TorchBackend.run", _raise(ArithmeticError("bad kernel")))
        with pytest.raises((LaneError, ArithmeticError), match="bad kernel"):
            rig.call(0, *CALL)
    check_works(rig)


@pytest.mark.parametrize("where", ["scheduler.Planner.decide", "hybrimoe.runtime.layer_call.lanes.Lanes.compute"])
def test_an_interrupt_leaves_a_session_that_goes_on(
    make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch, where: str
) -> None:
    rig = make_rig(policy="hybrimoe", gpu_expert_slots=3)
    check_works(rig)
    with monkeypatch.context() as patch:
        patch.setattr(where, _raise(KeyboardInterrupt()))
        with pytest.raises(KeyboardInterrupt):
            rig.call(1, *CALL)
    check_works(rig)
    assert rig.session.stats().failures == 1


def _raise(error: BaseException) -> Callable[..., Any]:
    def raiser(*args: object, **kwargs: object) -> Any:
        raise error

    return raiser


def test_slot_tables_validate_themselves_while_debugging(make_rig: MakeRig, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(SlotTable, "validating", False)
    for value, validating in (("0", False), ("1", True)):
        monkeypatch.setenv("HYBRIMOE_DEBUG", value)
        rig = make_rig()
        table, _ = rig.session.planner.table(0)  # type: ignore[union-attr]
        assert table.validating is validating
    table.pins[-1] = -1
    with pytest.raises(SlotError, match="cannot be with -1 pins"):
        check_works(rig)


# Life -------------------------------------------------------------------------------------------------------------


def test_slots_can_be_resized_while_the_session_lives(make_rig: MakeRig) -> None:
    rig = make_rig(policy="hybrimoe", gpu_expert_slots=4)
    check_works(rig)
    for slots in (12, 1, 0, 5):
        assert rig.session.resize_slots(slots) == slots
        assert rig.session.n_slots == slots
        check_works(rig)
    with pytest.raises(BudgetError):
        rig.session.resize_slots("1B")
    check_works(rig)
    none = make_rig(accelerator="none")
    with pytest.raises(ModelError, match="no accelerator"):
        none.session.resize_slots(3)


def test_threads_stop_when_a_session_is_closed_or_dropped() -> None:
    names = ("hybrimoe-copy", "hybrimoe-compute")
    before = set(threading.enumerate())

    def lanes() -> set[threading.Thread]:
        return {thread for thread in threading.enumerate() if thread.name in names} - before

    for close in (True, False):
        session = Session(RuntimeConfig(accelerator="emulated", gpu_expert_slots=2, profile=PROFILE))
        session.add_layer("experts", MiniExperts(4, 0))
        session.finalize()
        assert sorted(thread.name for thread in lanes()) == sorted(names)
        if close:
            session.close()
        gone = weakref.ref(session)
        del session
        gc.collect()
        assert gone() is None
        assert lanes() == set()


def test_statistics_add_up_and_reset(make_rig: MakeRig) -> None:
    rig = make_rig(policy="hybrimoe", gpu_expert_slots=4)
    check_works(rig)
    stats = rig.session.stats()
    total = stats.total
    assert total.hits + total.misses == total.activated == total.cpu_experts + total.accel_experts
    assert total.calls == 9
    assert total.transfer_bytes == (total.transfers + total.prefetches) * rig.session.layer_specs()[0].spec.record_bytes
    assert sum(counters.activated for counters in stats.layers.values()) == total.activated
    plain = stats.as_dict()
    assert plain["total"]["activated"] == plain["prefill"]["activated"] + plain["decode"]["activated"]
    assert plain["accelerator_kind"] == "emulated"
    assert plain["total"]["wall_us"] >= plain["total"]["overhead_us"] > 0
    rig.session.reset_stats()
    assert rig.session.stats().total.calls == 0
