"""Recordings survive the file, a replay of an untouched one is exact, and a changed one names what differs first."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from scheduler import CostModel, LaneState, LayerDemand, LayerEnded, ObservedTask, TransferEnded
from scheduler.host import HostView
from scheduler.planner.layer_blocks import blocks
from scheduler.planner.setup import PlannerSetup
from scheduler.recording.recording import Recorder, Recording, RecordingError
from scheduler.recording.replay import replay
from scheduler.records import TaskRecord

LAYERS, EXPERTS = 3, 16


def run(policy: str = "ours", steps: int = 30, n_accelerators: int = 1, *, on_disk: bool = False) -> Recording:
    """A prefill and some decode steps with drifting times, as a runtime would report them. on_disk: a third of the
    experts is, another one each time."""
    rng = np.random.default_rng(3)
    parts = blocks(LAYERS, 20, n_accelerators)
    costs = [CostModel.uniform(part.n_layers, 100.0, 15.0, 120.0, 10.0, 1.0, dense_us=200.0) for part in parts]
    costs[0].drift[:] = 1.1, 0.9, 1.3
    planner = Recorder(PlannerSetup(EXPERTS, costs, parts, ["hybrid"] * LAYERS, policy, 2))
    for transfer in planner.warm_up(rng.random((LAYERS, EXPERTS))):
        planner.on_event(TransferEnded(transfer.layer, transfer.expert, transfer.slot, 100.0))
    planner.begin_sequence()
    for step in range(steps):
        n_tokens = 6 if step == 0 else 1
        planner.begin_step("decode" if step else "prefill", n_tokens)
        for layer in range(LAYERS):
            ids = np.sort(rng.choice(EXPERTS, 8 if step == 0 else 3, replace=False)).astype(np.int32)
            scores = np.zeros(EXPERTS, np.float32)
            scores[ids] = rng.random(ids.size)
            demand = LayerDemand(
                layer, "decode" if step else "prefill", n_tokens, ids, np.ones(ids.size, np.int32), scores
            )
            lanes, host = LaneState(link_ready_us=float(rng.random() * 50)), None
            if on_disk:
                held = rng.random(LAYERS * EXPERTS) < 0.7
                in_slots = planner.table(layer)[0].slot_of[planner.table(layer)[1] * EXPERTS + ids] >= 0
                waits_us = np.where(held[layer * EXPERTS + ids], 0.0, np.where(in_slots, np.inf, 90.0))
                host = HostView(waits_us, held, ((layer, int(ids[0])),))
            plan = planner.plan_layer(demand, lanes, host)
            assert plan.reads == (((layer, int(ids[0])),) if on_disk else ())
            for t in (*plan.transfers, *plan.prefetches):
                planner.on_event(TransferEnded(t.layer, t.expert, t.slot, float(rng.random() * 300)))
            observed = (ObservedTask("cpu", layer, 1, float(80 + 40 * rng.random())),) if plan.cpu else ()
            planner.on_event(LayerEnded(layer, observed))
            planner.observe(ObservedTask("accel", layer, 1, float(10 + 10 * rng.random())))
    recording = planner.recording
    recording.tasks = [TaskRecord("cpu", "cpu_expert", 0, 1, 1, 0, 1.25, 3.5, 0)]
    recording.expert_bytes, recording.facts = 64, {"model": "none"}
    return recording


@pytest.mark.parametrize("n_accelerators", [1, 2])
@pytest.mark.parametrize("policy", ["ours", "hybrimoe", "freetoken", "fate", "promoe", "ours, on disk"])
def test_a_saved_recording_is_replayed_exactly(policy: str, n_accelerators: int, tmp_path: Path) -> None:
    recording = run(policy.split(",")[0], n_accelerators=n_accelerators, on_disk="disk" in policy)
    recording.save(tmp_path / "run.json.gz")
    found = replay(Recording.load(tmp_path / "run.json.gz"))
    assert found.exact, found.divergence
    assert found.plans == 30 * LAYERS
    assert found.transfers == sum(len(item.plan.transfers) for item in recording.plans)
    assert 0 < found.hits < found.activated == sum(item.demand.expert_ids.size for item in recording.plans)
    assert found.hit_rate == found.hits / found.activated


def test_everything_survives_the_file(tmp_path: Path) -> None:
    recording = run(steps=3)
    recording.save(tmp_path / "run.json.gz")
    loaded = Recording.load(tmp_path / "run.json.gz")
    assert loaded.tasks == recording.tasks
    assert loaded.facts == recording.facts
    assert [call.answer for call in loaded.calls] == [call.answer for call in recording.calls]
    assert loaded.calls[-1] == recording.calls[-1]


def changed(recording: Recording, tmp_path: Path, edit: Any) -> Recording:
    """The recording after ``edit`` of its JSON."""
    path = tmp_path / "run.json.gz"
    recording.save(path)
    body = json.loads(gzip.decompress(path.read_bytes()))
    edit(body)
    path.write_bytes(gzip.compress(json.dumps(body).encode()))
    return Recording.load(path)


def test_the_first_difference_is_named(tmp_path: Path) -> None:
    def other_policy(body: Any) -> None:
        body["setup"]["policy"] = "static"

    found = replay(changed(run(), tmp_path, other_policy)).divergence
    assert found is not None
    assert (found.recorded, found.replayed) != (None, None)

    def slower_link(body: Any) -> None:
        body["setup"]["costs"][0]["drift"][2] = 4.0

    found = replay(changed(run("hybrimoe/none/lru"), tmp_path, slower_link)).divergence
    assert found is not None
    assert found.step == 0
    assert "now" in found.why

    def lost_event(body: Any) -> None:
        calls = body["calls"]
        del calls[next(i for i, c in enumerate(calls) if c[0] == "on_event" and c[1][1] == "TransferEnded")]

    found = replay(changed(run(), tmp_path, lost_event)).divergence
    assert found is not None
    assert found.what in ("hits", "cpu", "accel", "awaited", "transfers", "prefetches", "predicted_makespan_us")


def test_bad_files(tmp_path: Path) -> None:
    path = tmp_path / "x.gz"
    path.write_bytes(b"no gzip")
    with pytest.raises(RecordingError, match="no recording"):
        Recording.load(path)
    path.write_bytes(gzip.compress(b"{}"))
    with pytest.raises(RecordingError, match="something else"):
        Recording.load(path)
    with pytest.raises(RecordingError, match="version 7"):
        changed(run(steps=1), tmp_path, lambda body: body.update(version=7))
    with pytest.raises(RecordingError, match=r"damaged.*setup"):
        changed(run(steps=1), tmp_path, lambda body: body.pop("setup"))
    with pytest.raises(RecordingError, match=r"damaged.*blocks"):
        replay(changed(run(steps=1), tmp_path, lambda body: body["setup"].pop("blocks")))
    run(steps=1).save(path)
    path.write_bytes(path.read_bytes()[:-40])
    with pytest.raises(RecordingError, match="no recording"):
        Recording.load(path)
