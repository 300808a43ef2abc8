"""Small experts, packed, with their reference results."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import pytest
import torch

from cpu_kernels import (
    Activation,
    Dispatch,
    ExpertDtype,
    ExpertSpec,
    ExpertWeights,
    build_dispatch,
    pack_expert,
    reference_ffn,
    unpack_expert,
)
from gpu_kernels import LayerWork


@dataclass
class Experts:
    """`n` packed experts of one spec: records uint8 [n, record_bytes] at 64-byte boundaries."""

    spec: ExpertSpec
    records: np.ndarray

    def work(self, n_tokens: int, top_k: int, seed: int = 0, absent: bool = False) -> LayerWork:
        """Random tokens and routing over all experts; `absent` makes some entries -1."""
        rng = np.random.default_rng(seed)
        index = np.stack([rng.permutation(len(self.records))[:top_k] for _ in range(n_tokens)]).astype(np.int64)
        if absent:
            index[rng.random(index.shape) < 0.3] = -1
        weights = rng.random(index.shape, dtype=np.float32)
        hidden = rng.standard_normal((n_tokens, self.spec.hidden), dtype=np.float32)
        rows = np.full((n_tokens * top_k, self.spec.hidden), np.nan, dtype=np.float32)
        return LayerWork(build_dispatch(index, weights, len(self.records)), torch.from_numpy(hidden), hidden, rows)

    def expected(self, work: LayerWork) -> torch.Tensor:
        """[T, H] by the reference, token by token."""
        dispatch: Dispatch = work.dispatch
        out = torch.zeros(work.host_hidden.shape)
        for position, expert in enumerate(dispatch.expert_ids):
            weights = unpack_expert(self.spec, self.records[expert])
            for row in dispatch.rows[dispatch.offsets[position] : dispatch.offsets[position + 1]]:
                token = int(row) // dispatch.top_k
                x = torch.from_numpy(work.host_hidden[token : token + 1])
                out[token] += reference_ffn(self.spec, weights, x)[0] * float(dispatch.weights[row])
        return out


@pytest.fixture
def make_experts() -> Callable[..., Experts]:
    def make(
        dtype: ExpertDtype = "float32", n: int = 6, hidden: int = 64, inter: int = 32, bias: bool = False
    ) -> Experts:
        spec = ExpertSpec(hidden, inter, dtype, Activation("silu"), bias)
        generator = torch.Generator().manual_seed(1)

        def random(*shape: int) -> torch.Tensor:
            return torch.randn(*shape, generator=generator) * 0.2

        raw = np.zeros(n * spec.record_bytes + 64, np.uint8)
        start = -raw.ctypes.data % 64
        records = raw[start : start + n * spec.record_bytes].reshape(n, -1)
        for record in records:
            weights = ExpertWeights(
                up=random(inter, hidden),
                down=random(hidden, inter),
                gate=random(inter, hidden),
                gate_bias=random(inter) if bias else None,
                up_bias=random(inter) if bias else None,
                down_bias=random(hidden) if bias else None,
            )
            pack_expert(spec, weights, record)
        return Experts(spec, records)

    return make
