"""Several accelerators: the same bits, a block of layers and slots each, timelines, statistics, replay, bad input."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cpu_kernels import get_backend
from gpu_kernels import EmulatedAccelerator, TorchAccelerator
from hybrimoe.errors import BudgetError, ConfigError
from hybrimoe.runtime.startup.budget import DEVICE_RESERVE_BYTES, unpack_bytes
from hybrimoe.runtime.startup.units import share_layers, slots_by_unit
from scheduler.graph import TaskGraph
from scheduler.lossy import LOSSY_POLICIES, resolve_lossy
from scheduler.planner.group import PlannerGroup
from scheduler.recording.recording import Recording
from scheduler.recording.replay import replay
from tests.hybrimoe.runtime.conftest import Rig, routing

TWO = ("emulated", "emulated")
SLACK_US = 1.0
"""Ends and starts that follow each other are read from the clock one after the other."""


def decode(rig: Rig, steps: int = 6, prompt: int = 5) -> list[torch.Tensor]:
    """A prompt and some decode steps through all layers; each layer's output."""
    outputs = []
    for step in range(steps):
        rig.session.announce_step("decode" if step else "prefill")
        for layer in range(len(rig.layers)):
            n_tokens = 1 if step else prompt
            outputs.append(rig.call(layer, *routing(n_tokens, 8, 2, seed=97 * step + layer)))
    return outputs


@pytest.mark.parametrize("policy", ["ours", "hybrimoe", "static", "freetoken", "on_demand/none/lru"])
def test_bits_do_not_depend_on_the_number_of_accelerators(make_rig: Callable[..., Rig], policy: str) -> None:
    alone, one, two, three = (
        make_rig(n_layers=5, accelerator=accelerator, gpu_expert_slots=n_slots, policy=policy)
        for accelerator, n_slots in (("none", 0), ("emulated", 12), (TWO, 12), (("emulated",) * 3, 12))
    )
    expected = decode(alone)
    for rig in (one, two, three):
        assert all(torch.equal(a, b) for a, b in zip(decode(rig), expected, strict=True))
    stats = two.session.stats()
    assert stats.total.accel_experts > 0
    assert all(unit.counters.accel_experts > 0 for unit in stats.accelerators), "both of them computed"


@settings(max_examples=12, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    n_layers=st.integers(2, 5), n_units=st.integers(1, 3), n_slots=st.integers(0, 40), n_tokens=st.integers(1, 9),
    seed=st.integers(0, 99), policy=st.sampled_from(["ours", "hybrimoe", "adapmoe"]),
)  # fmt: skip
def test_any_division_gives_the_same_bits(
    make_rig: Callable[..., Rig], n_layers: int, n_units: int, n_slots: int, n_tokens: int, seed: int, policy: str
) -> None:
    n_units, n_slots = min(n_units, n_layers), min(n_slots, 8 * n_layers)
    rig = make_rig(n_layers, accelerator=("emulated",) * n_units, gpu_expert_slots=n_slots, policy=policy)
    alone = make_rig(n_layers, accelerator="none")
    for layer in range(n_layers):
        inputs = routing(n_tokens, 8, 2, seed + layer)
        assert torch.equal(rig.call(layer, *inputs), alone.call(layer, *inputs))
    assert sum(unit.n_slots for unit in rig.session.stats().accelerators) == n_slots
    for each in (rig, alone):
        each.session.close()


def test_each_has_its_layers_slots_and_lanes(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(n_layers=5, accelerator=TWO, gpu_expert_slots=10, policy="hybrimoe")
    session = rig.session
    assert isinstance(session.planner, PlannerGroup)
    assert [list(unit.layers) for unit in session.units] == [[0, 1, 2], [3, 4]]
    assert [device.n_slots for device in session.accelerators] == [6, 4]
    session.record_timeline(True)
    before = session.slot_contents()
    decode(rig)
    timeline, plans = session.timeline, session.plans
    assert {task.lane_name for task in timeline} == {"cpu", "accel", "accel:1", "link", "link:1"}
    assert all(task.accelerator == (task.layer >= 3) for task in timeline if task.lane != "cpu")
    assert all(slot < 6 if layer < 3 else 6 <= slot < 10 for slot, (layer, _) in session.slot_contents().items())
    graph = TaskGraph.from_plans(plans, session.costs, session.layers[0].spec.record_bytes)  # type: ignore[arg-type]
    graph.validate(10, before)
    graph.check_execution(timeline, SLACK_US)


def test_statistics_of_each_add_up(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(n_layers=4, accelerator=TWO, gpu_expert_slots=8)
    decode(rig)
    stats = rig.session.stats()
    assert (stats.accelerator, stats.accelerator_kind, stats.n_slots) == ("2 x emulated accelerator", "emulated", 8)
    first, second = stats.as_dict()["accelerators"]
    assert (first["first_layer"], first["n_layers"], second["first_layer"], second["n_layers"]) == (0, 2, 2, 2)
    for name in ("hits", "misses", "transfers", "prefetches", "transfer_bytes", "accel_experts"):
        assert first["total"][name] + second["total"][name] == stats.as_dict()["total"][name]
    assert stats.slots_filled == first["slots_filled"] + second["slots_filled"] <= 8


def test_a_recorded_run_is_replayed_exactly(make_rig: Callable[..., Rig], tmp_path: Path) -> None:
    rig = make_rig(n_layers=4, accelerator=TWO, gpu_expert_slots=8, policy="hybrimoe")
    decode(rig, steps=2)
    rig.session.record_run()
    decode(rig, steps=12)
    rig.session.recording.save(tmp_path / "run.json.gz")
    recording = Recording.load(tmp_path / "run.json.gz")
    found = replay(recording)
    assert found.exact, found.divergence
    assert found.plans == 48
    assert {task.accelerator for task in recording.tasks} == {0, 1}
    assert found.transfers + found.prefetches > 0


def test_slots_can_be_resized_and_failures_recovered(make_rig: Callable[..., Rig]) -> None:
    rig = make_rig(n_layers=4, accelerator=TWO, gpu_expert_slots=8)
    expected = decode(make_rig(n_layers=4, accelerator="none"))
    decode(rig)
    assert rig.session.resize_slots(0.5) == 16
    assert [device.n_slots for device in rig.session.accelerators] == [8, 8]
    assert all(torch.equal(a, b) for a, b in zip(decode(rig), expected, strict=True))
    rig.session._runner.consistent = False  # type: ignore[union-attr]
    assert all(torch.equal(a, b) for a, b in zip(decode(rig), expected, strict=True))
    assert rig.session.stats().failures == 1
    assert rig.session.resize_slots(0) == 0
    assert all(torch.equal(a, b) for a, b in zip(decode(rig), expected, strict=True))


def test_devices_of_two_kinds_work_together(make_rig: Callable[..., Rig]) -> None:
    """The first on torch's synchronous device, the second emulated: as a GPU beside another kind of device."""
    rig = make_rig(n_layers=4, start=False, gpu_expert_slots=8)
    rig.session.finalize(accelerator=[TorchAccelerator("cpu"), EmulatedAccelerator(get_backend("torch", 1))])
    assert rig.session.stats().accelerator == "torch on the host, emulated accelerator"
    for mine, plain in zip(decode(rig), decode(make_rig(n_layers=4, accelerator="none")), strict=True):
        torch.testing.assert_close(mine, plain)


class Device:
    """Stands for a device with some free memory."""

    name, kind, device = "test device", "cuda", torch.device("cpu")

    def __init__(self, free: int | None) -> None:
        self._free = free

    def free_bytes(self) -> int | None:
        return self._free


def test_auto_fits_each_device_by_itself(make_rig: Callable[..., Rig]) -> None:
    layers = make_rig(n_layers=6, start=False).session.layers
    size, kv = 1 << 20, 64 << 20
    reserve = DEVICE_RESERVE_BYTES + unpack_bytes(layers[0].spec)
    devices: Any = [Device(reserve + kv + 20 * size), Device(reserve + 10 * size)]
    units = share_layers(layers, devices, None, kv)
    assert [len(unit.layers) for unit in units] == [4, 2], "twice the memory, twice the layers"
    assert slots_by_unit("auto", units, layers, size, None, kv) == [20, 10], "the KV cache is on the first one only"
    assert slots_by_unit(0.5, units, layers, size, None, kv) == [16, 8]
    devices[1] = Device(reserve)
    with pytest.raises(BudgetError, match="does not fit"):
        slots_by_unit("auto", share_layers(layers, devices, None, kv), layers, size, None, kv)


@pytest.mark.parametrize("kind", sorted(LOSSY_POLICIES))
def test_lossy_policies_run_on_both(make_rig: Callable[..., Rig], kind: str) -> None:
    dtype = "int4" if LOSSY_POLICIES[kind].uses_planes else "bfloat16"
    rig = make_rig(n_layers=4, accelerator=TWO, gpu_expert_slots=16, expert_dtype=dtype, lossy=resolve_lossy(kind))
    outputs = decode(rig)
    assert all(torch.isfinite(out).all() for out in outputs)
    stats = rig.session.stats()
    assert all(unit.counters.accel_experts > 0 for unit in stats.accelerators)
    assert all(unit.n_slots > 0 for unit in stats.accelerators)
    assert (stats.n_low_slots > 0) == (LOSSY_POLICIES[kind].uses_low_copy)
    assert stats.total.routed == 4 * 2 * (5 + 5)


def test_d2moe_that_wants_all_bits_is_lossless_on_both(make_rig: Callable[..., Rig]) -> None:
    """Every expert gets its low bits before it is computed, on its own accelerator's link."""
    lossy = resolve_lossy({"kind": "d2moe", "full_share": 0.0})
    settings = {"n_layers": 4, "expert_dtype": "int4", "policy": "on_demand/impact/lru"}
    rig = make_rig(accelerator=TWO, gpu_expert_slots=8, lossy=lossy, **settings)
    alone = make_rig(accelerator="none", **settings)
    assert all(torch.equal(a, b) for a, b in zip(decode(rig), decode(alone), strict=True))
    assert rig.session.stats().total.lowered == 0


def test_what_cannot_be_is_refused(make_rig: Callable[..., Rig]) -> None:
    with pytest.raises(ConfigError, match=r"4 accelerators for 3 MoE layers.*fewer"):
        make_rig(n_layers=3, accelerator=("emulated",) * 4)
