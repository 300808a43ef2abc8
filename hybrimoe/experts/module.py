"""HybridExperts: the module that stands where a model's experts were, for every family."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any, NoReturn, cast

import torch
from torch import is_grad_enabled, nn
from torch.compiler import is_dynamo_compiling

from hybrimoe.errors import ModelError
from hybrimoe.experts.absent import AbsentWeights, PackedWeightsError, explanation
from hybrimoe.experts.gradient import FrozenLayer
from hybrimoe.experts.identity import add_identity_experts
from hybrimoe.experts.layout import ExpertsLayout, read
from hybrimoe.experts.protocol import RunsLayers
from hybrimoe.experts.sorted import run_sorted

HOOKS = (
    "_forward_hooks", "_forward_hooks_with_kwargs", "_forward_hooks_always_called", "_forward_pre_hooks",
    "_forward_pre_hooks_with_kwargs", "_backward_hooks", "_backward_pre_hooks",
)  # fmt: skip
"""Tables of hooks on calls of a module, by attribute name."""


class HybridExperts(nn.Module):
    """Called as the module it replaces: `experts(hidden[T, H], top_k_index[T, k], top_k_weights[T, k])`.

    Has no parameters: the weights are in the session's ExpertStore, frozen. Gradients go through them to hidden states
    and routing weights, see `hybrimoe.experts.gradient`. Plain attributes of the replaced module that others read
    (num_experts, config, has_gate, ...), its hooks and its child modules (activation, norm) are kept.

    `state_dict()` has the replaced module's weights where that still has them, else placeholders that refuse to be
    saved or read. Asking it for a weight, loading weights into it raises ModelError, and so does pickling it.
    """

    def __init__(self, session: RunsLayers, layer: int, layout: ExpertsLayout) -> None:
        """layout: what `read` found in the module that this one replaces."""
        super().__init__()
        replaced = layout.module
        for name, value in vars(replaced).items():
            if not name.startswith("_") and name not in ("training", "forward"):
                setattr(self, name, value)
        for name, child in replaced.named_children():
            self.add_module(name, child)
        for name in HOOKS:
            self.__dict__[name] = replaced.__dict__[name]
        self.num_experts = layout.num_experts
        self.num_identity = layout.num_identity
        self.layer = layer
        self._session = session
        self.__dict__["_replaced"] = replaced
        self.training = replaced.training

    @property
    def session(self) -> RunsLayers:
        """The session that runs this layer."""
        return self._session

    @property
    def replaced(self) -> nn.Module:
        """The module that stood here; no submodule of this one."""
        replaced: nn.Module = self.__dict__["_replaced"]
        return replaced

    def forward(
        self,
        hidden_states: torch.Tensor,
        top_k_index: torch.Tensor | None = None,
        top_k_weights: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Sum over j of top_k_weights[:, j] * FFN_{top_k_index[:, j]}(hidden_states), in hidden_states' dtype.

        hidden_states: floating [T, H] (or [..., H]); top_k_index: integer [T, k], -1 or >= num_experts = absent, and
        of the latter the first num_identity are the identity; top_k_weights: floating [T, k]. Raises ModelError before
        the session has started or after it was closed.
        With hidden_states alone it is Llama-4's call, see `hybrimoe.experts.sorted`.
        """
        if is_dynamo_compiling():
            compiled: torch.Tensor = self._run_outside_graphs(hidden_states, top_k_index, top_k_weights)
            return compiled
        if top_k_index is None or top_k_weights is None:
            return run_sorted(hidden_states, self.num_experts, self.forward)
        if is_grad_enabled() and (hidden_states.requires_grad or top_k_weights.requires_grad):
            frozen = FrozenLayer(self._session, self.layer, self.num_experts, self._norm)
            routed = frozen.run(hidden_states, top_k_index, top_k_weights)
        else:
            routed = self._session.run_layer(self.layer, hidden_states, top_k_index, top_k_weights)
        if not self.num_identity:
            return routed
        return add_identity_experts(
            routed, hidden_states, top_k_index, top_k_weights, self.num_experts, self.num_identity
        )

    def full_weights(self) -> dict[str, torch.Tensor]:
        """The replaced module's own parameters by name, where they lie; dequantised, on the CPU, where only packed ones
        are left.

        Raises ModelError where a lossy policy has given some of the experts up.
        """
        if not self._is_meta:
            return {name: value.detach() for name, value in self.replaced.named_parameters(recurse=False)}
        filled = copy.copy(self.replaced)
        filled._parameters = {
            name: nn.Parameter(torch.zeros_like(value, device="cpu"), requires_grad=False)
            for name, value in self.replaced.named_parameters(recurse=False)
        }
        layout = read(filled)
        for expert in range(self.num_experts):
            layout.assign(expert, self._session.read_expert(self.layer, expert))
        return {name: value.detach() for name, value in filled._parameters.items() if value is not None}

    def named_parameters(
        self, prefix: str = "", recurse: bool = True, remove_duplicate: bool = True
    ) -> Iterator[tuple[str, nn.Parameter]]:
        """The parameters of the child modules. Asked for its own alone, it names the packed ones, as placeholders:
        who looks there for weights to adapt or to move finds them, and is refused instead of passing them over."""
        if recurse:
            yield from super().named_parameters(prefix, recurse, remove_duplicate)
            return
        for name, value in self.replaced.named_parameters(prefix, recurse=False):
            yield name, cast("nn.Parameter", AbsentWeights.like(value, name))

    def __getattr__(self, name: str) -> Any:
        """Raises PackedWeightsError for a weight of the replaced module."""
        replaced = self.__dict__.get("_replaced")
        if replaced is not None and name in replaced._parameters:
            raise PackedWeightsError(
                f"{explanation(name)}. An adapter of the experts has to be merged (merge_and_unload) before the model"
                " is injected"
            )
        return super().__getattr__(name)

    def extra_repr(self) -> str:
        """What `print(model)` shows."""
        return self._session.describe_layer(self.layer)

    def __deepcopy__(self, memo: dict[int, Any]) -> HybridExperts:
        """A copy of a model shares the session, which owns threads and device memory, and copies all else."""
        twin = HybridExperts.__new__(HybridExperts)
        memo[id(self)] = twin
        memo[id(self._session)] = self._session
        twin.__dict__.update({name: copy.deepcopy(value, memo) for name, value in self.__dict__.items()})
        return twin

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        """Pickling would have to write threads, device memory and a memory map."""
        raise ModelError(
            "an injected model cannot be pickled: its experts belong to a running session; call"
            " model.hybrimoe.restore() first, or write it with save_pretrained"
        )

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def _run_outside_graphs(
        self, hidden: torch.Tensor, top_k_index: torch.Tensor | None, top_k_weights: torch.Tensor | None
    ) -> torch.Tensor:
        """`forward` as one break in a compiled graph: the compiler does not walk the runtime's frames."""
        return self.forward(hidden, top_k_index, top_k_weights)

    @property
    def _norm(self) -> nn.Module | None:
        """The norm over each expert's output that some families apply before the routing weight."""
        return self._modules.get("post_expert_norm") if getattr(self, "has_post_expert_norm", False) else None

    @property
    def _is_meta(self) -> bool:
        """Whether the replaced module has no weights of its own."""
        return any(weight.is_meta for weight in self.replaced.parameters(recurse=False))

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        if not self._is_meta:
            self.replaced._save_to_state_dict(destination, prefix, keep_vars)
            return
        for name, value in self.replaced.named_parameters(recurse=False):
            destination[prefix + name] = AbsentWeights.like(value, prefix + name)

    def _load_from_state_dict(
        self, state_dict: dict[str, Any], prefix: str, local_metadata: Any, strict: bool, missing_keys: list[str],
        unexpected_keys: list[str], error_msgs: list[str],
    ) -> None:  # fmt: skip
        children = tuple(f"{prefix}{name}." for name in self._modules)
        own = [key for key in state_dict if key.startswith(prefix) and not key.startswith(children)]
        if own:
            raise ModelError(
                f"{prefix.rstrip('.')} holds packed experts, into which nothing can be loaded, found {own[0]!r}: call"
                " model.hybrimoe.restore() first and inject again afterwards; merge an adapter of the experts"
                " (merge_and_unload) before the model is injected"
            )
        if strict:
            missing_keys += [prefix + name for name, _ in self.replaced.named_parameters(recurse=False)]
