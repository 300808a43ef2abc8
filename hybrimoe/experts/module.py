"""HybridExperts: the module that stands where a model's experts were, for every family."""

from __future__ import annotations

from functools import partial
from typing import Any, Protocol

import torch
from torch import nn

from hybrimoe.experts.sorted import run_sorted


class RunsLayers(Protocol):
    """What runs the layers of a model: `hybrimoe.runtime.Session`, which is built on this module."""

    def run_layer(
        self, layer: int, hidden: torch.Tensor, top_k_index: torch.Tensor, top_k_weights: torch.Tensor
    ) -> torch.Tensor:
        """The output of a layer's experts, as `HybridExperts.forward` returns it."""

    def describe_layer(self, layer: int) -> str:
        """Where and how a layer's experts are stored, in a line."""


class HybridExperts(nn.Module):
    """Called as the module it replaces: `experts(hidden[T, H], top_k_index[T, k], top_k_weights[T, k])`.

    Holds no weights: they are in the session's ExpertStore. Plain attributes of the replaced module that others read
    (num_experts, config, has_gate, ...) and its child modules (activation, norm) are kept. Inference only: the output
    carries no gradient.
    """

    def __init__(self, session: RunsLayers, layer: int, replaced: nn.Module, num_experts: int) -> None:
        super().__init__()
        for name, value in vars(replaced).items():
            if not name.startswith("_") and name != "training":
                setattr(self, name, value)
        for name, child in replaced.named_children():
            self.add_module(name, child)
        self.num_experts = num_experts
        self.layer = layer
        self._session = session
        self.training = replaced.training

    @property
    def session(self) -> RunsLayers:
        """The session that runs this layer."""
        return self._session

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum over j of top_k_weights[:, j] * FFN_{top_k_index[:, j]}(hidden_states), in hidden_states' dtype.

        hidden_states: floating [T, H] (or [..., H]); top_k_index: integer [T, k], -1 or >= num_experts = absent;
        top_k_weights: floating [T, k]. Raises ModelError before the session has started or after it was closed.
        With hidden_states alone it is Llama-4's call, see `hybrimoe.experts.sorted`.
        """
        if top_k_index is None or top_k_weights is None:
            return run_sorted(hidden_states, self.num_experts, partial(self._session.run_layer, self.layer))
        return self._session.run_layer(self.layer, hidden_states, top_k_index, top_k_weights)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return self._session.describe_layer(self.layer)

    def __deepcopy__(self, memo: dict[int, Any]) -> HybridExperts:
        """A copy of a model shares the session, which owns threads and device memory."""
        copy = HybridExperts.__new__(HybridExperts)
        memo[id(self)] = copy
        nn.Module.__init__(copy)
        copy.__dict__.update({name: value for name, value in self.__dict__.items() if not name.startswith("_")})
        copy._session = self._session
        return copy
