"""Shared helpers: random experts, packed, with their reference results."""

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

import cpu_kernels as ck


@dataclass
class Pool:
    """Packed experts of one spec; keeps the memory that their addresses point to."""

    spec: ck.ExpertSpec
    weights: list[ck.ExpertWeights]
    memory: np.ndarray

    def records(self, dispatch: ck.Dispatch) -> np.ndarray:
        """Addresses of the active experts of a dispatch."""
        return np.array([self.memory[e].ctypes.data for e in dispatch.expert_ids], np.uint64)

    def run(self, backend: ck.CpuBackend, dispatch: ck.Dispatch, hidden: np.ndarray) -> np.ndarray:
        """out_rows of all active experts; rows of no expert stay NaN."""
        out = np.full((dispatch.n_tokens * dispatch.top_k, self.spec.hidden), np.nan, np.float32)
        positions = np.arange(dispatch.expert_ids.size, dtype=np.int32)
        backend.run(self.spec, self.records(dispatch), positions, dispatch, hidden, out)
        return out


def random_weights(spec: ck.ExpertSpec, rng: np.random.Generator, scale: float = 0.1) -> ck.ExpertWeights:
    """Normal weights; biases where the spec has them."""

    def normal(*shape: int) -> torch.Tensor:
        return torch.from_numpy((rng.standard_normal(shape) * scale).astype(np.float32))

    gated, bias, inter, hidden = spec.activation.gated, spec.has_bias, spec.inter, spec.hidden
    return ck.ExpertWeights(
        up=normal(inter, hidden),
        down=normal(hidden, inter),
        gate=normal(inter, hidden) if gated else None,
        gate_bias=normal(inter) if gated and bias else None,
        up_bias=normal(inter) if bias else None,
        down_bias=normal(hidden) if bias else None,
    )


@pytest.fixture
def make_pool() -> Callable[..., Pool]:
    """make_pool(spec, n_experts=4, seed=0)."""

    def make(spec: ck.ExpertSpec, n_experts: int = 4, seed: int = 0) -> Pool:
        rng = np.random.default_rng(seed)
        weights = [random_weights(spec, rng) for _ in range(n_experts)]
        memory = np.zeros((n_experts, spec.record_bytes), np.uint8)
        for record, expert in zip(memory, weights, strict=True):
            ck.pack_expert(spec, expert, record)
        return Pool(spec, weights, memory)

    return make


@pytest.fixture
def route() -> Callable[..., tuple[ck.Dispatch, np.ndarray]]:
    """route(n_tokens, top_k, n_experts, hidden, seed=0): a dispatch with absent and duplicate experts; its input."""

    def make(n_tokens: int, top_k: int, n_experts: int, hidden: int, seed: int = 0) -> tuple[ck.Dispatch, np.ndarray]:
        rng = np.random.default_rng(seed)
        index = rng.integers(-1, n_experts + 1, (n_tokens, top_k))
        weights = rng.random((n_tokens, top_k)).astype(np.float32)
        x = rng.standard_normal((n_tokens, hidden)).astype(np.float32)
        return ck.build_dispatch(index, weights, n_experts), x

    return make
