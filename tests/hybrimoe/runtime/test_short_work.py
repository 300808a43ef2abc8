"""A call's tensors reach dispatch and demand in one compiled call, with what the long way gives."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpu_kernels import DispatchError
from gpu_kernels import LayerWork
from gpu_kernels.combining import combine_on_host
from hybrimoe.errors import ModelError
from hybrimoe.experts import layout as experts_layout
from hybrimoe.runtime.layer_call.experts import Experts
from hybrimoe.runtime.layer_call.layers import Layer
from hybrimoe.runtime.layer_call.routing import CallSpace, Workspace, call_inputs
from hybrimoe.runtime.layer_call.stats import StatsRecorder
from hybrimoe.runtime.store import ExpertStore

from .conftest import MiniExperts

HIDDEN, N_EXPERTS, TOP_K = 24, 5, 3


def call(n_tokens: int, dtype: torch.dtype) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(n_tokens)
    hidden = torch.randn(n_tokens, HIDDEN, generator=generator).to(dtype)
    index = torch.randint(-1, N_EXPERTS + 1, (n_tokens, TOP_K), generator=generator)
    return hidden, index, torch.rand(n_tokens, TOP_K, generator=generator).to(dtype)


def space_of_a_layer(n_experts: int = N_EXPERTS) -> CallSpace:
    """The space of a layer of 5 experts in a model whose largest layer has `n_experts`."""
    layers = []
    for number in (N_EXPERTS, n_experts):
        module = MiniExperts(number, 0, HIDDEN, 8)
        spec = experts_layout.read(module).spec("float32")
        layers.append(Layer("experts", spec, number, "hybrid", None, module))
    store = ExpertStore([layer.layer_spec for layer in layers])
    return Experts(layers, store, None, StatsRecorder(2, 8)).spaces[0]


def layer_work(*tensors: torch.Tensor) -> LayerWork:
    space = space_of_a_layer()
    space.read(*tensors, Workspace())
    return space.work


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("n_tokens", [1, 4])
def test_short_way_gives_the_dispatch_of_the_long_way(n_tokens: int, dtype: torch.dtype) -> None:
    tensors = call(n_tokens, dtype)
    short = layer_work(*tensors)
    inputs = call_inputs(*tensors, HIDDEN)
    long = inputs.work(inputs.ids, inputs.weights, N_EXPERTS, Workspace())
    assert short.like is not None
    assert long.like is None
    for name in ("expert_ids", "offsets", "rows", "weights"):
        found, expected = getattr(short.dispatch, name), getattr(long.dispatch, name)
        assert found.dtype == expected.dtype
        assert np.array_equal(found, expected)
    assert np.array_equal(short.host_hidden, long.host_hidden)
    assert short.host_rows.shape == long.host_rows.shape


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_rows_are_added_into_the_dtype_of_the_input(dtype: torch.dtype) -> None:
    tensors = call(4, dtype)
    work = layer_work(*tensors)
    work.host_rows[:] = torch.randn(work.host_rows.shape).numpy()
    out = combine_on_host(work)
    work.like = None
    assert out.dtype == dtype
    assert torch.equal(out, combine_on_host(work).to(dtype))


def test_inputs_that_want_a_gradient_are_taken_without_it() -> None:
    hidden, index, weights = call(2, torch.float32)
    work = layer_work(hidden.requires_grad_(), index, weights)
    assert not work.hidden.requires_grad


def test_wrong_input_is_refused_as_on_the_long_way() -> None:
    hidden, index, weights = call(2, torch.float32)
    with pytest.raises(DispatchError, match="expert id -2"):
        layer_work(hidden, torch.full_like(index, -2), weights)
    with pytest.raises(ModelError, match="need top_k_index"):
        layer_work(hidden, index[:1], weights[:1])


def test_a_space_is_filled_anew_by_calls_of_any_size() -> None:
    space, workspace = space_of_a_layer(), Workspace()
    for n_tokens in (4, 1, 3, 16, 1, 40, 2):
        tensors = call(n_tokens, torch.float32)
        space.read(*tensors, workspace)
        inputs = call_inputs(*tensors, HIDDEN)
        expected = inputs.work(inputs.ids, inputs.weights, N_EXPERTS, Workspace()).dispatch
        for name in ("expert_ids", "offsets", "rows", "weights"):
            assert np.array_equal(getattr(space.work.dispatch, name), getattr(expected, name))
        demand = space.demand
        assert demand.expert_ids.tolist() == expected.expert_ids.tolist()
        assert demand.n_tokens.tolist() == expected.n_tokens_per_expert.tolist()


def test_demand_counts_tokens_scores_and_activations() -> None:
    hidden = torch.zeros(2, HIDDEN)
    index, weights = torch.tensor([[3, 1, -1], [1, 4, 4]]), torch.tensor([[0.5, 0.25, 9.0], [0.75, 0.5, 0.25]])
    space = space_of_a_layer(N_EXPERTS + 1)
    counts = np.ones(N_EXPERTS + 1)
    space.count_in(counts)
    assert space.read(hidden, index, weights, Workspace()) == 3
    demand = space.demand
    assert demand.expert_ids.tolist() == [1, 3, 4]
    assert demand.n_tokens.tolist() == [2, 1, 2]
    assert demand.gate_scores.tolist() == [0.0, 0.5, 0.0, 0.25, 0.375, 0.0]
    assert counts.tolist() == [1.0, 2.0, 1.0, 2.0, 2.0, 1.0]
