"""Lossy policies in a session: parts that run side by side, counted and resizable; without one nothing changes."""

from __future__ import annotations

import threading

import pytest
import torch

from gpu_kernels import TorchAccelerator
from hybrimoe.errors import BudgetError, ConfigError, ModelError
from scheduler.errors import PolicyError
from scheduler.lossy import LOSSY_POLICIES, resolve_lossy

from .conftest import routing

ALL_LOW = {"kind": "hobbit", "t1": 0.0, "t2": 1.0, "misses_only": False, "low_dtype": "bfloat16"}
"""Rank 0 in full precision, everything else from the copy; does not look at the cache."""


def lossy_rig(make_rig, kind, **settings):
    return make_rig(lossy=resolve_lossy(kind), **settings)


def steps(rig, n_steps=4, n_tokens=1, top_k=3):
    """Outputs of some steps through all layers."""
    outputs = []
    for step in range(n_steps):
        for layer in range(len(rig.layers)):
            outputs.append(rig.call(layer, *routing(n_tokens, 8, top_k, 10 * step + layer)))
    return outputs


def test_without_a_lossy_policy_there_is_no_stage(make_rig):
    rig = make_rig()
    assert rig.session._runner.lossy is None
    steps(rig)
    stats = rig.session.stats()
    assert (stats.lossy, stats.n_low_slots, stats.total.routed) == (None, 0, 0)


def test_a_policy_that_changes_nothing_gives_the_bits_of_the_lossless_path(make_rig):
    plain = steps(make_rig(), n_tokens=3)
    kind = {"kind": "hobbit", "t1": 1.0, "t2": 1.0, "misses_only": False, "low_dtype": "bfloat16"}
    rewritten = steps(lossy_rig(make_rig, kind), n_tokens=3)
    assert all(torch.equal(a, b) for a, b in zip(plain, rewritten, strict=True))


def expected_with_low_copy(rig, layer, hidden, index, weights):
    """Every token: its heaviest expert from the store, the others from the copy, in float32."""
    stores = rig.session.store, rig.session._low.store
    out = torch.zeros_like(hidden)
    for token in range(len(hidden)):
        heaviest = int(weights[token].argmax())
        for j, expert in enumerate(index[token].tolist()):
            w = stores[j != heaviest].read(layer, expert)
            inner = torch.nn.functional.silu(w.gate.float() @ hidden[token]) * (w.up.float() @ hidden[token])
            out[token] += weights[token, j] * (w.down.float() @ inner)
    return out


@pytest.mark.parametrize("n_tokens", [1, 5])
def test_entries_of_the_low_part_are_computed_from_the_copy(make_rig, n_tokens):
    rig = lossy_rig(make_rig, ALL_LOW)
    for layer in range(3):
        call = routing(n_tokens, 8, 3, layer)
        found = rig.call(layer, *call)
        # The copy rounds activations to bfloat16, too.
        torch.testing.assert_close(found, expected_with_low_copy(rig, layer, *call), rtol=2e-2, atol=2e-2)
        assert not torch.allclose(found, rig.expected(layer, *call), rtol=1e-6, atol=1e-7)
    total = rig.session.stats().total
    assert (total.calls, total.tokens) == (3, 3 * n_tokens)
    assert (total.routed, total.lowered, total.skipped) == (9 * n_tokens, 6 * n_tokens, 0)


def test_where_an_expert_runs_does_not_change_the_bits_of_either_part(make_rig):
    placed = [
        steps(lossy_rig(make_rig, ALL_LOW, **settings), n_tokens=2)
        for settings in (
            {"accelerator": "none"}, {"gpu_expert_slots": 3}, {"gpu_expert_slots": 24},
            {"placement": "cpu"}, {"placement": ["accelerator", "cpu", "hybrid"], "policy": "on_demand/none/lru"},
        )
    ]  # fmt: skip
    for other in placed[1:]:
        assert all(torch.equal(a, b) for a, b in zip(placed[0], other, strict=True))


@pytest.mark.parametrize("kind", sorted(LOSSY_POLICIES))
@pytest.mark.parametrize("placement", ["hybrid", "cpu", "accelerator"])
def test_every_kind_runs_with_every_placement_in_prefill_and_decode(make_rig, kind, placement):
    chosen = {"kind": kind, "low_dtype": "bfloat16"} if LOSSY_POLICIES[kind].uses_low_copy else kind
    dtype = "int4" if LOSSY_POLICIES[kind].uses_planes else "float32"
    rig = lossy_rig(make_rig, chosen, placement=placement, expert_dtype=dtype)
    outputs = steps(rig, 1, n_tokens=9) + steps(rig, 4)
    assert all(torch.isfinite(out).all() and out.abs().sum() > 0 for out in outputs)
    stats = rig.session.stats()
    assert stats.lossy.startswith(kind)
    assert stats.by_phase["prefill"].routed == 9 * 3 * 3
    assert stats.by_phase["decode"].routed == 4 * 3 * 3
    assert stats.total.cpu_experts + stats.total.accel_experts == stats.total.activated


def test_both_parts_use_slots_of_their_own_on_one_accelerator(make_rig):
    rig = lossy_rig(make_rig, ALL_LOW | {"low_share": 0.5}, policy="on_demand/none/lru", gpu_expert_slots=8)
    session = rig.session
    assert (session.n_slots, session.stats().n_low_slots) == (4, 8)
    session.reset_stats()
    session.record_timeline(True)
    steps(rig)
    assert session._low.accelerators[0]._copy is session.accelerators[0]._copy
    assert len({record.bytes for record in session.timeline if record.lane == "link"}) == 2
    low = session._stats.low.by_phase()["decode"]
    assert low.accel_experts > 0
    assert low.transfer_bytes == low.transfers * session._low.layers[0].spec.record_bytes


def test_slots_are_resized_for_both_parts_and_what_was_learned_stays(make_rig):
    rig = lossy_rig(make_rig, ALL_LOW | {"low_share": 0.5}, gpu_expert_slots=8)
    before = steps(rig)
    policy = rig.session._runner.lossy.policy
    assert rig.session.resize_slots(16) == 8
    assert rig.session.stats().n_low_slots == 16
    assert rig.session._runner.lossy.policy is policy
    assert all(torch.equal(a, b) for a, b in zip(before, steps(rig), strict=True))
    assert rig.session.resize_slots(0) == 0
    assert rig.session.stats().n_low_slots == 0
    assert all(torch.equal(a, b) for a, b in zip(before, steps(rig), strict=True))


def test_a_failed_call_is_recovered_from(make_rig, monkeypatch):
    rig = lossy_rig(make_rig, ALL_LOW)
    expected = steps(rig)
    low = rig.session._runner.lossy.low

    def fail(*_, **__):
        raise RuntimeError("planned failure")

    monkeypatch.setattr(low.lanes, "compute", fail)
    with pytest.raises(RuntimeError, match="planned failure"):
        steps(rig, 1)
    assert all(torch.equal(a, b) for a, b in zip(expected, steps(rig), strict=True))
    assert rig.session.stats().failures == 1


def test_the_budget_changes_while_calls_go_on(make_rig):
    rig = lossy_rig(make_rig, {"kind": "swapmoe", "budget": 24, "frequency": 1})
    policy, errors, done = rig.session._runner.lossy.policy, [], threading.Event()

    def generate():
        try:
            while not done.is_set():
                steps(rig, 1)
        except Exception as error:  # noqa: BLE001
            errors.append(error)

    thread = threading.Thread(target=generate)
    thread.start()
    try:
        for budget, kept in ((6, 6), (0.5, 12), ("100%", 24), (3, 3)):
            assert rig.session.resize_budget(budget) == kept
            steps(rig, 1)
            assert policy.kept.sum() == kept
    finally:
        done.set()
        thread.join()
    assert not errors
    assert rig.session.stats().total.substituted + rig.session.stats().total.skipped > 0


def test_budgets_that_cannot_be_are_refused(make_rig):
    rig = lossy_rig(make_rig, "emoe")
    with pytest.raises(BudgetError, match="100 expert slots"):
        rig.session.resize_budget(100)
    with pytest.raises(PolicyError, match="one for each of the 3 layers"):
        rig.session.resize_budget(2)
    with pytest.raises(PolicyError, match="no memory budget"):
        lossy_rig(make_rig, "skip").session.resize_budget(3)
    with pytest.raises(ModelError, match="nothing lossy runs here"):
        make_rig().session.resize_budget(3)


def test_a_budget_that_was_not_given_follows_the_slots(make_rig):
    rig = lossy_rig(make_rig, "swapmoe", gpu_expert_slots=6)
    steps(rig, 1)
    assert rig.session._runner.lossy.policy.kept.sum() == 6
    rig.session.resize_slots(9)
    assert rig.session._runner.lossy.policy.kept.sum() == 9


def test_a_copy_that_is_no_smaller_is_refused(make_rig):
    with pytest.raises(ConfigError, match=r"as float32 is not smaller .* larger expert_dtype"):
        lossy_rig(make_rig, ALL_LOW | {"low_dtype": "float32"})


BIT_WIDTH = {"kind": "bit_width", "budget": 0.75, "low_dtype": "bfloat16"}


@pytest.mark.parametrize("slots", [0, 9, 24])
def test_bit_width_keeps_each_expert_in_one_store(make_rig, slots):
    rig = lossy_rig(make_rig, BIT_WIDTH, gpu_expert_slots=slots)
    session = rig.session
    low = session._runner.lossy.policy.low
    assert low.sum() == 12  # half of the experts at half of the bytes
    full_bytes, low_bytes = (layers[0].spec.record_bytes for layers in (session.layers, session._low.layers))
    holes = full_bytes + low_bytes
    assert session.stats().store_bytes == 12 * full_bytes + 12 * low_bytes + holes
    stores = session.store, session._low.store
    for layer in range(3):
        for expert in range(8):
            assert stores[int(low[layer, expert])].record(layer, expert).any()
            assert not stores[1 - int(low[layer, expert])].record(layer, expert).any()
        hidden, index, weights = routing(4, 8, 3, layer)
        expected = torch.zeros_like(hidden)
        for token in range(4):
            for expert, weight in zip(index[token].tolist(), weights[token].tolist(), strict=True):
                w = stores[int(low[layer, expert])].read(layer, expert)
                inner = torch.nn.functional.silu(w.gate.float() @ hidden[token]) * (w.up.float() @ hidden[token])
                expected[token] += weight * (w.down.float() @ inner)
        torch.testing.assert_close(rig.call(layer, hidden, index, weights), expected, rtol=2e-2, atol=2e-2)


def test_bit_width_chooses_by_error_and_use(make_rig):
    used = torch.ones(3, 8).double().numpy()
    used[:, 4:] = 1000.0
    rig = lossy_rig(make_rig, BIT_WIDTH, start=False)
    rig.session.finalize(frequencies=used)
    assert rig.session._runner.lossy.policy.low[:, :4].all()
    before = steps(rig)
    rig.session.resize_slots(12)
    assert all(torch.equal(a, b) for a, b in zip(before, steps(rig), strict=True))


def test_a_recorder_sees_the_routers_own_routing(make_rig):
    rig = lossy_rig(make_rig, {"kind": "skip", "threshold": 1.0})
    seen = []
    rig.session.routing_recorder = lambda layer, ids, weights, predictions: seen.append((ids.copy(), weights.copy()))
    hidden, index, weights = routing(2, 8, 3, 0)
    rig.call(0, hidden, index, weights)
    assert torch.equal(torch.from_numpy(seen[0][0]), index)
    assert torch.equal(torch.from_numpy(seen[0][1]), weights)
    assert rig.session._runner.lossy is not None


def test_a_torch_device_keeps_slots_of_both_sizes(make_rig):
    rig = lossy_rig(make_rig, ALL_LOW | {"low_share": 0.5}, start=False, policy="on_demand/none/lru")
    rig.session.finalize(accelerator=TorchAccelerator("cpu"))
    assert rig.session.stats().n_low_slots > 0
    expected = steps(lossy_rig(make_rig, ALL_LOW, accelerator="none"), n_tokens=2)
    for found, wanted in zip(steps(rig, n_tokens=2), expected, strict=True):
        torch.testing.assert_close(found, wanted, rtol=2e-2, atol=2e-2)
    assert rig.session._stats.low.by_phase()["decode"].accel_experts > 0
