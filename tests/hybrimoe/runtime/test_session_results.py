"""What sessions compute: the replaced module's output, whatever the placement, dtype, routing or thread."""

from __future__ import annotations

import copy
import threading
from collections.abc import Callable

import numpy as np
import pytest
import torch

from cpu_kernels import relative_error, tolerance
from hybrimoe.runtime import Session

from .conftest import Rig, routing

MakeRig = Callable[..., Rig]
POLICIES = ["hybrimoe", "ours", "static", "freetoken", "moe_infinity", "cpu_only/none/lru", "accel_only/none/lru"]


def run_steps(rig: Rig, n_steps: int = 6, prompt: int = 12) -> list[torch.Tensor]:
    """A prompt and some decode steps through all layers."""
    outs = []
    for step in range(n_steps):
        for layer in range(len(rig.layers)):
            outs.append(rig.call(layer, *routing(prompt if step == 0 else 1, 8, 2, seed=31 * step + layer)))
    return outs


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("slots", [1, 6, 24])
def test_output_is_that_of_the_replaced_module(make_rig: MakeRig, policy: str, slots: int) -> None:
    rig = make_rig(policy=policy, gpu_expert_slots=slots)
    for step in range(5):
        for layer in range(3):
            call = routing(9 if step == 0 else 1, 8, 2, seed=7 * step + layer)
            assert relative_error(rig.call(layer, *call), rig.expected(layer, *call)) < 1e-5


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8", "int4"])
def test_bits_do_not_depend_on_placement(make_rig: MakeRig, dtype: str) -> None:
    base = run_steps(make_rig(expert_dtype=dtype, accelerator="none", backend="auto"))
    for settings in (
        {"policy": "cpu_only/none/lru"},
        {"policy": "accel_only/none/lru", "gpu_expert_slots": 2},
        {"policy": "hybrimoe"},
        {"policy": "hybrimoe", "gpu_expert_slots": 24},
        {"placement": "accelerator"},
        {"placement": ["cpu", "accelerator", "hybrid"]},
    ):
        for out, wanted in zip(run_steps(make_rig(expert_dtype=dtype, backend="auto", **settings)), base, strict=True):
            assert torch.equal(out, wanted), settings


def test_placements_are_obeyed(make_rig: MakeRig) -> None:
    rig = make_rig(placement=["cpu", "accelerator", "hybrid"], gpu_expert_slots=10)
    run_steps(rig)
    layers = list(rig.session.stats().layers.values())
    assert layers[0].accel_experts == 0 < layers[0].cpu_experts
    assert layers[1].cpu_experts == 0 < layers[1].accel_experts
    assert layers[2].cpu_experts + layers[2].accel_experts == layers[2].activated


@pytest.mark.parametrize("hidden_dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
def test_hidden_dtype_is_kept(make_rig: MakeRig, hidden_dtype: torch.dtype, weights_dtype: torch.dtype) -> None:
    rig = make_rig()
    hidden, index, weights = routing(5, 8, 3, seed=1)
    call = hidden.to(hidden_dtype), index.int(), weights.to(weights_dtype)
    out = rig.call(1, *call)
    assert out.dtype == hidden_dtype
    wanted = rig.expected(1, hidden.to(hidden_dtype).float(), index, weights.to(weights_dtype).float())
    assert relative_error(out.float(), wanted) < (1e-5 if hidden_dtype == torch.float32 else 1e-2)


def test_absent_entries_and_duplicates(make_rig: MakeRig) -> None:
    rig = make_rig()
    hidden, index, weights = routing(4, 8, 3, seed=2)
    index[0] = torch.tensor([-1, 8, 300])
    index[1] = torch.tensor([5, 5, -1])
    out = rig.call(0, hidden, index, weights)
    assert torch.equal(out[0], torch.zeros_like(out[0]))
    assert relative_error(out, rig.expected(0, hidden, index, weights)) < 1e-5


def test_nothing_to_do_gives_zeros(make_rig: MakeRig) -> None:
    rig = make_rig()
    hidden, index, weights = routing(3, 8, 2, seed=3)
    assert torch.equal(rig.call(0, hidden, torch.full_like(index, -1), weights), torch.zeros_like(hidden))
    empty = rig.call(0, hidden[:0], index[:0], weights[:0])
    assert empty.shape == (0, hidden.shape[1])
    assert empty.dtype == hidden.dtype


def test_batched_hidden_keeps_its_shape(make_rig: MakeRig) -> None:
    rig = make_rig()
    hidden, index, weights = routing(6, 8, 2, seed=4)
    out = rig.call(0, hidden.view(2, 3, -1), index, weights)
    assert out.shape == (2, 3, hidden.shape[1])
    assert torch.equal(out.view(6, -1), rig.call(0, hidden, index, weights))


def test_a_long_prompt_with_every_expert_active_and_few_slots(make_rig: MakeRig) -> None:
    rig = make_rig(n_layers=1, gpu_expert_slots=2, policy="accel_only/none/lru", expert_dtype="bfloat16")
    call = routing(4096, 8, 4, seed=5)
    out = rig.call(0, *call)
    few = slice(0, 64)
    wanted = rig.expected(0, *(part[few] for part in call))
    assert relative_error(out[few], wanted) < 2e-2
    counters = rig.session.stats().total
    assert counters.accel_experts == counters.activated == 8
    assert counters.transfers >= 6


def test_inputs_are_not_changed_and_gradients_are_recorded_where_they_are_asked_for(make_rig: MakeRig) -> None:
    rig = make_rig()
    hidden, index, weights = routing(3, 8, 2, seed=6)
    before = hidden.clone()
    out = rig.layers[0](hidden.requires_grad_(), index, weights)
    assert out.requires_grad
    with torch.no_grad():
        assert not rig.layers[0](hidden, index, weights).requires_grad
    assert torch.equal(hidden.detach(), before)


@pytest.mark.parametrize("dtype", ["int8", "int4"])
def test_quantised_experts_stay_within_their_tolerance(make_rig: MakeRig, dtype: str) -> None:
    rig = make_rig(expert_dtype=dtype)
    hidden, index, weights = routing(5, 8, 2, seed=8)
    spec = rig.session.layer_specs()[0].spec
    for expert in range(8):
        stored = rig.session.store.read(0, expert)
        with torch.no_grad():
            rig.originals[0].gate_up_proj[expert] = torch.cat([stored.gate, stored.up])
            rig.originals[0].down_proj[expert] = stored.down
    assert relative_error(rig.call(0, hidden, index, weights), rig.expected(0, hidden, index, weights)) < tolerance(
        spec
    )


def test_two_sessions_in_one_process_do_not_meet(make_rig: MakeRig) -> None:
    first, second = make_rig(policy="hybrimoe"), make_rig(policy="ours", expert_dtype="bfloat16")
    alone = run_steps(make_rig(policy="hybrimoe"))
    mixed = []
    for step in range(6):
        for layer in range(3):
            call = routing(12 if step == 0 else 1, 8, 2, seed=31 * step + layer)
            mixed.append(first.call(layer, *call))
            second.call(layer, *call)
    assert all(torch.equal(a, b) for a, b in zip(mixed, alone, strict=True))


def test_two_threads_in_one_session_are_serialised(make_rig: MakeRig) -> None:
    rig = make_rig(policy="hybrimoe", gpu_expert_slots=4)
    wanted = run_steps(make_rig(policy="hybrimoe", gpu_expert_slots=4))
    results: dict[int, list[torch.Tensor]] = {}
    threads = [threading.Thread(target=lambda i=i: results.update({i: run_steps(rig)})) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=600)
    assert len(results) == 3
    for outs in results.values():
        assert all(torch.equal(a, b) for a, b in zip(outs, wanted, strict=True))


def test_a_copied_model_shares_the_session(make_rig: MakeRig) -> None:
    rig = make_rig()
    twin = copy.deepcopy(rig.layers[1])
    call = routing(2, 8, 2, seed=9)
    assert twin.session is rig.session
    assert torch.equal(twin(*call), rig.call(1, *call))


def test_attributes_that_others_read_are_kept(make_rig: MakeRig) -> None:
    experts = make_rig().layers[0]
    assert experts.num_experts == 8
    assert experts.hidden_dim == 64
    assert isinstance(experts.act_fn, torch.nn.SiLU)
    assert not list(experts.parameters())
    assert "8 x [64 -> 32 -> 64], float32, hybrid" in repr(experts)


def test_the_backend_does_not_change_results_beyond_tolerance(make_rig: MakeRig) -> None:
    outs = [torch.stack(run_steps(make_rig(backend=name), prompt=1)) for name in ("reference", "torch", "auto")]
    for out in outs[1:]:
        assert relative_error(out, outs[0]) < 1e-5


def test_a_session_may_be_a_context(make_rig: MakeRig) -> None:
    rig = make_rig()
    with rig.session as session:
        assert isinstance(session, Session)
        assert session.started
    assert not session.started


def test_routing_recorder_sees_each_call(make_rig: MakeRig) -> None:
    rig = make_rig()
    seen = []
    rig.session.routing_recorder = lambda layer, ids, weights, predictions: seen.append((layer, ids, weights))
    hidden, index, weights = routing(3, 8, 2, seed=10)
    rig.call(2, hidden, index, weights)
    assert [layer for layer, _, _ in seen] == [2]
    assert np.array_equal(seen[0][1], index.numpy())
    assert np.array_equal(seen[0][2], weights.numpy())
