"""A minimal MoE: experts modules in the common form without transformers, and sessions over them."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import nn

from hybrimoe.runtime import HybridExperts, RuntimeConfig, Session
from scheduler import HardwareProfile
from scheduler.machine.profile import AccelProfile, CpuProfile, LinkProfile

HIDDEN, INTER = 64, 32

PROFILE = HardwareProfile(
    name="test",
    provenance="datasheet",
    cpu=CpuProfile(read_gbps=10.0, gflops=dict.fromkeys(("float32", "bfloat16", "int8", "int4"), 20.0)),
    accel=AccelProfile(mem_gbps=100.0, tflops=1.0, launch_us=1.0),
    link=LinkProfile(gbps=8.0, latency_us=1.0),
)
"""Given costs: plans do not depend on this machine, and no time goes into measuring."""


class MiniExperts(nn.Module):
    """Experts as transformers stores them: gate_up_proj [E, 2I, H], down_proj [E, H, I]."""

    def __init__(self, n_experts: int, seed: int, hidden: int = HIDDEN, inter: int = INTER) -> None:
        super().__init__()
        generator = torch.Generator().manual_seed(seed)
        self.num_experts = n_experts
        self.hidden_dim = hidden
        self.gate_up_proj = nn.Parameter(torch.randn(n_experts, 2 * inter, hidden, generator=generator) * 0.2)
        self.down_proj = nn.Parameter(torch.randn(n_experts, hidden, inter, generator=generator) * 0.2)
        self.act_fn = nn.SiLU()

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        return self.act_fn(gate) * up

    def forward(
        self, hidden_states: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        out = torch.zeros_like(hidden_states, dtype=torch.float32)
        for token, (ids, weights) in enumerate(zip(top_k_index.tolist(), top_k_weights.tolist(), strict=True)):
            for expert, weight in zip(ids, weights, strict=True):
                if 0 <= expert < self.num_experts:
                    inner = self._apply_gate(self.gate_up_proj[expert].float() @ hidden_states[token].float())
                    out[token] += weight * (self.down_proj[expert].float() @ inner)
        return out.to(hidden_states.dtype)


@dataclass
class Rig:
    """A started session over `MiniExperts` layers, and the layers it replaced."""

    session: Session
    layers: list[HybridExperts]
    originals: list[MiniExperts]

    def call(self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.layers[layer](hidden, index, weights)

    def expected(self, layer: int, hidden: torch.Tensor, index: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
        with torch.no_grad():
            return self.originals[layer](hidden, index, weights)


def routing(n_tokens: int, n_experts: int, top_k: int, seed: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Random (hidden, top_k_index, top_k_weights)."""
    generator = torch.Generator().manual_seed(seed)
    hidden = torch.randn(n_tokens, HIDDEN, generator=generator)
    scores = torch.rand(n_tokens, n_experts, generator=generator)
    weights, index = scores.topk(top_k, dim=-1)
    return hidden, index, weights


@pytest.fixture
def make_rig() -> Iterator[Callable[..., Rig]]:
    """Builds rigs, and closes them. Keywords beyond the named ones go to RuntimeConfig.

    The torch backend is the default here: what runs is tested, not how fast, and it has nothing to compile.
    """
    rigs: list[Rig] = []

    def make(
        n_layers: int = 3, n_experts: int = 8, placement: Any = "hybrid", start: bool = True, **settings: Any
    ) -> Rig:
        defaults = {
            "accelerator": "emulated", "gpu_expert_slots": 6, "expert_dtype": "float32", "profile": PROFILE,
            "backend": "torch",
        }  # fmt: skip
        session = Session(RuntimeConfig(**(defaults | settings)))
        originals = [MiniExperts(n_experts, seed) for seed in range(n_layers)]
        placements = [placement] * n_layers if isinstance(placement, str) else placement
        layers = [session.add_layer(f"layers.{i}.experts", m, placements[i]) for i, m in enumerate(originals)]
        rig = Rig(session, layers, originals)
        rigs.append(rig)
        if start:
            session.finalize()
        return rig

    yield make
    for rig in rigs:
        rig.session.close()
