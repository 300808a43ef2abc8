"""The one-call way of a layer gives the bits of the long way, and leaves to it what it does not take."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from cpu_kernels import (
    Activation,
    ActivationValueError,
    ExpertDtype,
    ExpertSpec,
    ExpertWeights,
    build_dispatch,
    combine,
    pack_expert,
)
from cpu_kernels.backends.numba_backend import NumbaBackend
from cpu_kernels.engine.routed import MAX_TOKENS

HIDDEN, INTER, N_EXPERTS, TOP_K = 96, 160, 6, 4
FLOATS = (torch.float32, torch.bfloat16)


class Experts:
    """Packed random experts of one layer."""

    def __init__(self, dtype: ExpertDtype = "int4") -> None:
        generator = torch.Generator().manual_seed(7)
        self.spec = ExpertSpec(HIDDEN, INTER, dtype, Activation("silu"))
        self.bytes = np.zeros((N_EXPERTS, self.spec.record_bytes), np.uint8)
        for record in self.bytes:
            up, gate = (torch.randn(INTER, HIDDEN, generator=generator) * 0.1 for _ in range(2))
            down = torch.randn(HIDDEN, INTER, generator=generator) * 0.1
            pack_expert(self.spec, ExpertWeights(up=up, down=down, gate=gate), record)
        self.records = np.array([record.ctypes.data for record in self.bytes], np.uint64)

    def long_way(
        self, backend: NumbaBackend, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor
    ) -> torch.Tensor:
        dispatch = build_dispatch(index.numpy(), weights.float().numpy(), N_EXPERTS)
        x, rows = hidden.float().numpy(), np.full((index.numel(), HIDDEN), np.nan, np.float32)
        positions = np.arange(len(dispatch.expert_ids), dtype=np.int32)
        backend.run(self.spec, self.records[dispatch.expert_ids], positions, dispatch, x, rows)
        out = np.empty_like(x)
        combine(rows, dispatch, out)
        return torch.from_numpy(out).to(hidden.dtype)


def call(n_tokens: int, dtype: torch.dtype, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Routing with absent entries (-1 and N_EXPERTS) and experts that a token names twice."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n_tokens, HIDDEN, generator=generator).to(dtype)
    index = torch.randint(-1, N_EXPERTS + 1, (n_tokens, TOP_K), generator=generator)
    return hidden, index, torch.rand(n_tokens, TOP_K, generator=generator)


@pytest.mark.parametrize("weights_dtype", FLOATS)
@pytest.mark.parametrize("dtype", FLOATS)
@pytest.mark.parametrize("n_tokens", [1, 3, MAX_TOKENS])
def test_gives_the_bits_of_the_long_way(n_tokens: int, dtype: torch.dtype, weights_dtype: torch.dtype) -> None:
    experts, backend = Experts(), NumbaBackend()
    hidden, index, weights = call(n_tokens, dtype)
    weights = weights.to(weights_dtype)
    done = backend.run_routed(experts.spec, experts.records, hidden, index, weights)
    assert done is not None
    out, n_active, counted = done
    assert counted == n_tokens
    assert out.dtype == dtype
    assert torch.equal(out, experts.long_way(backend, hidden, index, weights))
    assert n_active == len({e for e in index.flatten().tolist() if 0 <= e < N_EXPERTS})


@pytest.mark.parametrize("dtype", ["float32", "bfloat16", "int8"])
def test_every_dtype_of_experts(dtype: ExpertDtype) -> None:
    experts, backend = Experts(dtype), NumbaBackend()
    hidden, index, weights = call(2, torch.float32)
    done = backend.run_routed(experts.spec, experts.records, hidden, index, weights)
    assert done is not None
    assert torch.equal(done[0], experts.long_way(backend, hidden, index, weights))


def test_leading_dimensions_are_kept_and_no_expert_gives_zeros() -> None:
    experts, backend = Experts(), NumbaBackend()
    hidden = torch.randn(1, 2, HIDDEN)
    done = backend.run_routed(experts.spec, experts.records, hidden, torch.full((2, TOP_K), -1), torch.ones(2, TOP_K))
    assert done is not None
    assert done[1] == 0
    assert torch.equal(done[0], torch.zeros(1, 2, HIDDEN))


def test_leaves_what_it_does_not_take_to_the_long_way() -> None:
    experts, backend = Experts(), NumbaBackend()
    hidden, index, weights = call(2, torch.float32)
    many = call(MAX_TOKENS + 1, torch.float32)
    refused = [
        many,
        (hidden.half(), index, weights),
        (hidden.T.contiguous().T, index, weights),
        (hidden, index.int(), weights),
        (hidden, index[:1], weights),
        (hidden[:, 1:], index, weights),
        (hidden, torch.full_like(index, -2), weights),  # `build_dispatch` says what is wrong
        (hidden, index.clamp(0, 1), torch.full_like(weights, torch.nan)),
    ]
    for tensors in refused:
        assert backend.run_routed(experts.spec, experts.records, *tensors) is None


def test_hidden_states_that_are_not_finite_are_named() -> None:
    experts, backend = Experts(), NumbaBackend()
    hidden, index, weights = call(3, torch.float32)
    hidden[2, 5] = torch.inf
    with pytest.raises(ActivationValueError, match=r"hidden\[2\]"):
        backend.run_routed(experts.spec, experts.records, hidden, index.clamp(0, 3), weights)


def test_rounds_to_bfloat16_as_torch_does() -> None:
    """Also where results are denormal."""
    experts, backend = Experts(), NumbaBackend()
    for seed in range(5):
        hidden, index, weights = call(MAX_TOKENS, torch.bfloat16, seed)
        done = backend.run_routed(experts.spec, experts.records, hidden * 1e-18, index, weights * 1e-18)
        assert done is not None
        assert torch.equal(done[0], experts.long_way(backend, hidden * 1e-18, index, weights * 1e-18))
