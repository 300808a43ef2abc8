"""What a session knows of each of its layers."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import get_args

import torch
from torch import nn

from cpu_kernels import CpuBackend, ExpertSpec
from hybrimoe.experts.layout import ExpertsLayout
from hybrimoe.runtime.store import ExpertStore, LayerSpec
from scheduler.plan import Placement

PLACEMENTS: tuple[Placement, ...] = get_args(Placement)


@dataclass(slots=True)
class Layer:
    """One injected layer. `layout` (and with it the replaced module) is dropped once its weights are in the store."""

    path: str
    spec: ExpertSpec
    num_experts: int
    placement: Placement
    layout: ExpertsLayout | None
    experts: nn.Module
    backend: CpuBackend | None = None

    @property
    def layer_spec(self) -> LayerSpec:
        """What the store keeps of it."""
        return LayerSpec(self.path, self.spec, self.num_experts)

    def transform(self) -> nn.Module | None:
        """The norm over an expert's output that some families apply before the routing weight."""
        norm = self.experts._modules.get("post_expert_norm")
        return norm if getattr(self.experts, "has_post_expert_norm", False) else None


def pack_layers(layers: Sequence[Layer], store: ExpertStore) -> None:
    """Writes every layer whose weights are there into the store, and lets go of the modules."""
    for index, layer in enumerate(layers):
        layout = layer.layout
        if layout is not None and not layout.is_meta:
            for expert in range(layer.num_experts):
                store.write(index, expert, layout.expert(expert))
        layer.layout = None


def apply_norm(norm: nn.Module, rows: torch.Tensor) -> torch.Tensor:
    """The norm on float32 rows, without gradient: computed where its weights are, returned where the rows are."""
    weight = next(norm.parameters(), rows)
    with torch.no_grad():
        result: torch.Tensor = norm(rows.to(weight.device))
        return result.to(rows.device)
