"""What experts modules ask of the runtime, which is built on them: `hybrimoe.runtime.Session` has these methods."""

from __future__ import annotations

from typing import Protocol

import torch

from cpu_kernels import ExpertSpec, ExpertWeights


class RunsLayers(Protocol):
    """What runs the layers of a model, each known by its index."""

    def run_layer(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The output of a layer's experts, as `HybridExperts.forward` returns it."""

    def describe_layer(self, layer: int) -> str:
        """Where and how a layer's experts are stored, in a line."""

    def expert_spec(self, layer: int) -> ExpertSpec:
        """Shape, storage dtype and activation of a layer's experts."""

    def read_expert(self, layer: int, expert: int) -> ExpertWeights:
        """One expert's weights on the host, dequantised. Raises ModelError where the runtime has given them up."""

    def require_exact(self, purpose: str) -> None:
        """Raises ModelError, naming the purpose, where a lossy policy changes what the experts compute."""
