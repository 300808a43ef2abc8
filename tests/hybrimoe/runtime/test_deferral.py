"""Expert deferral: late experts run while the caller goes on, the next layer adds them, no other step sees them."""

from __future__ import annotations

import threading

import pytest
import torch

from hybrimoe.errors import ModelError
from scheduler.lossy import resolve_lossy

from .conftest import routing

N_EXPERTS, TOP_K = 8, 4


def deferring(make_rig, experts=2, immediate=2, **settings):
    settings = {"accelerator": "none"} | settings
    return make_rig(
        n_experts=N_EXPERTS, lossy=resolve_lossy({"kind": "defer", "experts": experts, "immediate": immediate}),
        **settings,
    )  # fmt: skip


def one_step(rig, seed, n_tokens=1, layers=3):
    """(call, output) of each layer of a decode step."""
    rig.session.announce_step("decode")
    calls = [routing(n_tokens, N_EXPERTS, TOP_K, 10 * seed + layer) for layer in range(layers)]
    return [(call, rig.call(layer, *call)) for layer, call in enumerate(calls)]


def parts(rig, layer, call, late):
    """Output of the first TOP_K - late experts (routing gives them by falling weight), and of the others."""
    hidden, index, weights = call
    cut = TOP_K - late
    return (
        rig.expected(layer, hidden, index[:, :cut], weights[:, :cut]),
        rig.expected(layer, hidden, index[:, cut:], weights[:, cut:]),
    )


def check_step(rig, step):
    """Layer 0 lacks its late part, layer 1 has it and lacks its own, the last layer has everything."""
    (first, out0), (second, out1), (last, out2) = step
    now0, late0 = parts(rig, 0, first, 2)
    now1, late1 = parts(rig, 1, second, 2)
    torch.testing.assert_close(out0, now0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out1, now1 + late0, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(out2, rig.expected(2, *last) + late1, rtol=1e-4, atol=1e-4)


def test_late_results_are_added_by_the_next_layer_and_the_last_layer_defers_nothing(make_rig):
    rig = deferring(make_rig)
    for seed in range(3):
        check_step(rig, one_step(rig, seed))
    total = rig.session.stats().by_phase["decode"]
    assert (total.routed, total.deferred) == (3 * 3 * TOP_K, 3 * 2 * 2)
    assert total.cpu_experts == total.activated == 3 * 3 * TOP_K
    assert total.calls == total.tokens == 9
    assert total.cpu_us > 0


def test_inputs_may_change_once_the_call_has_returned(make_rig):
    """Models add residuals in place: late experts must have a copy."""
    rig = deferring(make_rig)
    rig.session.announce_step("decode")
    first, second = routing(1, N_EXPERTS, TOP_K, 0), routing(1, N_EXPERTS, TOP_K, 1)
    kept = tuple(tensor.clone() for tensor in first)
    release = hold_late_work(rig)
    rig.call(0, *first)
    for tensor in first:
        tensor.zero_()
    release.set()
    out = rig.call(1, *second)
    expected = parts(rig, 1, second, 2)[0] + parts(rig, 0, kept, 2)[1]
    torch.testing.assert_close(out, expected, rtol=1e-4, atol=1e-4)


def hold_late_work(rig):
    """Late experts wait until the returned event is set."""
    release = threading.Event()
    layer = rig.session.layers[0]
    run = layer.backend.run
    caller = threading.get_ident()

    def held(*arguments):
        if threading.get_ident() != caller:
            assert release.wait(600)
        run(*arguments)

    object.__setattr__(layer.backend, "run", held)
    return release


def test_the_caller_goes_on_while_late_experts_run(make_rig):
    rig = deferring(make_rig)
    rig.session.announce_step("decode")
    release = hold_late_work(rig)
    first, second = routing(1, N_EXPERTS, TOP_K, 0), routing(1, N_EXPERTS, TOP_K, 1)
    out = rig.call(0, *first)  # would hang here if it waited for them
    torch.testing.assert_close(out, parts(rig, 0, first, 2)[0], rtol=1e-4, atol=1e-4)
    assert not rig.session._runner.lossy.deferred._pending.done()
    release.set()
    expected = parts(rig, 1, second, 2)[0] + parts(rig, 0, first, 2)[1]
    torch.testing.assert_close(rig.call(1, *second), expected, rtol=1e-4, atol=1e-4)


def test_a_step_that_was_left_leaks_nothing_into_the_next(make_rig):
    rig = deferring(make_rig)
    one_step(rig, 0, layers=1)  # interrupted in the attention of layer 1
    check_step(rig, one_step(rig, 1))


def test_a_failure_in_late_experts_fails_the_next_call_and_nothing_else(make_rig):
    rig = deferring(make_rig)
    backend = rig.session.layers[0].backend
    run, caller = backend.run, threading.get_ident()

    def broken(*arguments):
        if threading.get_ident() != caller:
            raise RuntimeError("a late expert broke")
        run(*arguments)

    object.__setattr__(backend, "run", broken)
    with pytest.raises(RuntimeError, match="a late expert broke"):
        one_step(rig, 0)
    object.__setattr__(backend, "run", run)
    check_step(rig, one_step(rig, 1))
    assert rig.session.stats().failures == 1


def test_a_failed_layer_drops_what_was_pending(make_rig):
    rig = deferring(make_rig)
    one_step(rig, 0, layers=1)
    hidden, index, weights = routing(1, N_EXPERTS, TOP_K, 1)
    with pytest.raises(ModelError, match="tokens need"):
        rig.call(1, hidden, index[:, :1], weights)
    check_step(rig, one_step(rig, 1))


def test_layers_of_other_tokens_are_refused(make_rig):
    rig = deferring(make_rig)
    one_step(rig, 0, layers=1)
    with pytest.raises(ModelError, match="cannot defer"):
        rig.call(1, *routing(2, N_EXPERTS, TOP_K, 1))
    check_step(rig, one_step(rig, 1))


def test_an_accelerator_changes_which_experts_are_late_but_not_the_sum(make_rig):
    """Over a step nothing is lost: the outputs of all layers add up to the lossless sum for the same inputs."""
    rig = deferring(make_rig, accelerator="emulated", gpu_expert_slots=8, policy="on_demand/none/lru")
    for seed in range(4):
        step = one_step(rig, seed, n_tokens=3)
        found = torch.stack([out for _, out in step]).sum(dim=0)
        expected = torch.stack([rig.expected(layer, *call) for layer, (call, _) in enumerate(step)]).sum(dim=0)
        torch.testing.assert_close(found, expected, rtol=1e-3, atol=1e-3)
    decode = rig.session.stats().by_phase["decode"]
    assert decode.deferred > 0
    assert decode.accel_experts > 0
    assert decode.activated == decode.hits + decode.misses == decode.cpu_experts + decode.accel_experts


def test_layers_of_the_accelerator_and_prompts_defer_nothing(make_rig):
    rig = deferring(make_rig, accelerator="emulated", placement="accelerator", gpu_expert_slots=24)
    one_step(rig, 0)
    assert rig.session.stats().total.deferred == 0
    rig = deferring(make_rig)
    rig.session.announce_step("prefill")
    for layer in range(3):
        call = routing(6, N_EXPERTS, TOP_K, layer)
        torch.testing.assert_close(rig.call(layer, *call), rig.expected(layer, *call), rtol=1e-4, atol=1e-4)
    assert rig.session.stats().total.deferred == 0


def test_late_experts_are_on_the_timeline(make_rig):
    rig = deferring(make_rig)
    rig.session.record_timeline(True)
    one_step(rig, 0)
    records = [record for record in rig.session.timeline if record.kind == "cpu_expert"]
    assert sorted(record.layer for record in records) == [0] * 4 + [1] * 4 + [2] * 4


def test_the_worker_ends_with_the_session_and_with_a_replaced_runner(make_rig):
    others = set(threading.enumerate())

    def workers():
        return {thread for thread in threading.enumerate() if thread.name.startswith("hybrimoe-deferred")} - others

    rig = deferring(make_rig, accelerator="emulated")
    one_step(rig, 0, layers=2)
    first = workers()
    assert len(first) == 1
    rig.session.resize_slots(4)
    assert not workers()
    one_step(rig, 1, layers=2)
    assert len(workers()) == 1
    rig.session._runner.consistent = False
    one_step(rig, 2)
    assert len(workers()) == 1
    rig.session.close()
    rig.session.close()
    assert not workers()
