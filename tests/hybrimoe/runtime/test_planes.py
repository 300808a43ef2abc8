"""Experts as bit planes: fewer bytes on the link, exact where the gate says so, rough elsewhere, never undefined."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpu_kernels import reference_ffn, unpack_expert
from cpu_kernels.format.planes import expand_high, plane_bytes, split_record
from hybrimoe.errors import ConfigError
from hybrimoe.runtime.layer_call.slots import PlanError
from scheduler import Transfer
from scheduler.lossy import resolve_lossy

from .conftest import routing

N_EXPERTS, TOP_K = 8, 3
FETCH = "on_demand/none/lru"


def planes_rig(make_rig, full_share, **settings):
    lossy = None if full_share is None else resolve_lossy({"kind": "d2moe", "full_share": full_share})
    settings = {"expert_dtype": "int4", "policy": FETCH, "gpu_expert_slots": 6} | settings
    return make_rig(n_experts=N_EXPERTS, lossy=lossy, **settings)


def steps(rig, n_steps=4, n_tokens=1):
    return [
        rig.call(layer, *routing(n_tokens, N_EXPERTS, TOP_K, 10 * step + layer))
        for step in range(n_steps)
        for layer in range(3)
    ]


def rough_expert(rig, layer, expert):
    """The expert that the high plane stands for by itself."""
    spec = rig.session.layers[layer].spec
    record = torch.from_numpy(rig.session.store.record(layer, expert).copy())
    half = torch.empty_like(record)
    expand_high(spec, split_record(spec, record)[0], half)
    return unpack_expert(spec, half)


def by_hand(rig, layer, call, rough):
    """Reference output with the experts of `rough` (routing columns) from their high plane."""
    hidden, index, weights = call
    spec, out = rig.session.layers[layer].spec, torch.zeros_like(hidden)
    for token in range(len(hidden)):
        for j, expert in enumerate(index[token].tolist()):
            given = rough_expert(rig, layer, expert) if j in rough else rig.session.store.read(layer, expert)
            out[token] += weights[token, j] * reference_ffn(spec, given, hidden[token : token + 1])[0]
    return out


def test_all_bits_give_the_bits_of_the_lossless_path(make_rig):
    plain = steps(planes_rig(make_rig, None), n_tokens=3)
    planes = steps(planes_rig(make_rig, 0.0), n_tokens=3)
    assert all(torch.equal(a, b) for a, b in zip(plain, planes, strict=True))


def test_light_experts_are_computed_from_their_high_bits_and_half_the_bytes(make_rig):
    rig = planes_rig(make_rig, 1.0)  # no expert ever needs its low bits
    rig.session.resize_slots(3)
    rig.session._runner.drain()
    rig.session.reset_stats()
    spec = rig.session.layers[0].spec
    high, _ = plane_bytes(spec)
    for layer in (0, 1, 2, 0):  # three slots and three new experts each: nothing of the warm-up is left
        call = routing(1, N_EXPERTS, TOP_K, 50 + layer)
        found = rig.call(layer, *call)
    torch.testing.assert_close(found, by_hand(rig, 0, call, {0, 1, 2}), rtol=2e-2, atol=2e-2)
    assert not torch.allclose(found, by_hand(rig, 0, call, set()), rtol=2e-2, atol=2e-2)
    total = rig.session.stats().total
    assert total.transfers > 0
    assert total.transfer_bytes == total.transfers * high < total.transfers * spec.record_bytes
    assert total.lowered > 0


def test_experts_with_enough_weight_get_their_low_bits_before_they_are_computed(make_rig):
    """The heaviest expert is exact, the others rough; when weights turn, only low bits cross the link."""
    rig = planes_rig(make_rig, 0.5, gpu_expert_slots=12)
    rig.session._runner.drain()  # what is in flight could not be evicted
    high, low = plane_bytes(rig.session.layers[0].spec)
    held = {expert for layer, expert in rig.session.slot_contents().values() if layer == 0}
    index = torch.tensor([[expert for expert in range(N_EXPERTS) if expert not in held][:TOP_K]])
    hidden = routing(1, N_EXPERTS, TOP_K, 7)[0]
    heavy, turned = torch.tensor([[0.8, 0.1, 0.1]]), torch.tensor([[0.1, 0.8, 0.1]])
    first = rig.call(0, hidden, index, heavy)
    torch.testing.assert_close(first, by_hand(rig, 0, (hidden, index, heavy), {1, 2}), rtol=2e-2, atol=2e-2)
    assert rig.session.stats().total.transfer_bytes == 3 * high + low
    rig.session._runner.drain()
    second = rig.call(0, hidden, index, turned)
    torch.testing.assert_close(second, by_hand(rig, 0, (hidden, index, turned), {2}), rtol=2e-2, atol=2e-2)
    total = rig.session.stats().total
    assert total.transfer_bytes == 3 * high + 2 * low
    assert total.transfers == 3, "what is resident is completed, not brought again"
    assert total.lowered == 2 + 1


def test_prefetches_bring_high_bits_only(make_rig):
    rig = planes_rig(make_rig, 0.5)
    steps(rig, 1)
    slots = rig.session._runner.experts.lanes.queues[0]
    high, low = plane_bytes(rig.session.layers[0].spec)
    slots.take_counts()
    wanted = np.ones(N_EXPERTS, np.bool_)
    slots.want(wanted)
    slots.submit(Transfer(2, 5, 0, None, "prefetch", 0.0, True), rig.session.store.record(2, 5), 9)
    assert slots.take_counts() == (high, [])
    slots.want(~wanted)
    slots.before_compute(2, np.array([5], np.int32), [0], [0])
    assert slots.take_counts() == (0, [0]), "computed from its high bits"
    slots.want(wanted)
    slots.before_compute(2, np.array([5], np.int32), [0], [0])
    slots.before_compute(2, np.array([5], np.int32), [0], [0])
    assert slots.take_counts() == (low, []), "completed once"
    with pytest.raises(PlanError, match="slot 99"):
        slots.submit(Transfer(2, 5, 99, None, "demand", 0.0, True), rig.session.store.record(2, 5), 9)


@pytest.mark.parametrize("settings", [{"accelerator": "none"}, {"placement": "cpu"}, {"gpu_expert_slots": 24}])
def test_without_a_link_or_with_room_for_all_nothing_is_lost(make_rig, settings):
    plain = steps(planes_rig(make_rig, None, **settings))
    planes = steps(planes_rig(make_rig, 1.0, **settings))
    assert all(torch.equal(a, b) for a, b in zip(plain, planes, strict=True))


def test_a_session_recovers_and_keeps_its_planes(make_rig):
    rig = planes_rig(make_rig, 0.5)
    steps(rig, 2)
    planes = rig.session._runner.lossy.planes
    assert rig.session.stats().store_bytes == 2 * rig.session.store.nbytes == 2 * planes.nbytes
    rig.session._runner.consistent = False
    out = steps(rig, 2)
    assert rig.session._runner.lossy.planes is planes
    assert all(torch.isfinite(part).all() for part in out)
    rig.session.resize_slots(4)
    assert rig.session._runner.lossy.planes is planes


def test_only_int4_experts_have_planes(make_rig):
    with pytest.raises(ConfigError, match="--dtype int4"):
        planes_rig(make_rig, 0.5, expert_dtype="int8")
