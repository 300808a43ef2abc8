"""Reads the routed experts of any transformers family in one normal form.

transformers 5 stores all experts of a layer in one module, called as `experts(hidden[T, H], top_k_index[T, k],
top_k_weights[T, k])` and described by flags that `@use_experts_implementation` sets on it (`is_concatenated`,
`is_transposed`, `has_bias`, `has_gate`, `has_post_expert_norm`) and by its gate, `_apply_gate`. `read` turns such a
module into an `ExpertsLayout`: number of experts, kernel specification, and the weights of one expert as views of
the module's parameters, row-major [out, in], with gate and up apart.

What the gate computes is recognised by value, not by class name: see `hybrimoe.experts.activation`.
"""

from __future__ import annotations

import inspect
from dataclasses import dataclass

import torch
from torch import nn

from cpu_kernels import Activation, ExpertDtype, ExpertSpec, ExpertWeights
from hybrimoe.errors import UnsupportedExpertsError
from hybrimoe.experts.activation import recognise_activation
from hybrimoe.experts.towers import in_tower, tower_paths

ROUTED_CALL = ("hidden_states", "top_k_index", "top_k_weights")
SORTED_EXPERTS = ("Llama4TextExperts",)
"""Classes of undecorated experts with Llama-4's call, see `hybrimoe.experts.sorted`; stored transposed."""


@dataclass(frozen=True, slots=True, eq=False)
class ExpertsLayout:
    """The experts of one layer in normal form.

    `num_experts` have weights. The `num_identity` ones whose ids follow theirs give back their input (LongCat-Flash's
    zero-computation experts): no weights, no record, no work but `hybrimoe.experts.identity`.
    `post_expert_norm` is the module's norm over an expert's output (applied to [rows, H] before the routing weight), or
    None. Weights returned by `expert` are views: writing into them writes into the module.
    """

    module: nn.Module
    num_experts: int
    hidden: int
    inter: int
    activation: Activation
    has_bias: bool
    is_concatenated: bool
    is_transposed: bool
    post_expert_norm: nn.Module | None
    num_identity: int = 0

    @property
    def is_meta(self) -> bool:
        """True where the module's weights are placeholders without storage (a model on the meta device)."""
        return any(parameter.is_meta for parameter in self.module.parameters(recurse=False))

    def spec(self, dtype: ExpertDtype) -> ExpertSpec:
        """The kernel specification of one expert stored as `dtype`."""
        return ExpertSpec(self.hidden, self.inter, dtype, self.activation, self.has_bias)

    def expert(self, index: int) -> ExpertWeights:
        """Weights of expert `index`: up and gate [I, H], down [H, I], their biases [I], [I], [H]."""
        if not 0 <= index < self.num_experts:
            raise IndexError(f"expert {index} of {self.num_experts}")
        down = self._matrix("down_proj", index)
        down_bias = self._bias("down_proj_bias", index)
        if not self.activation.gated:
            up, up_bias = self._matrix("up_proj", index), self._bias("up_proj_bias", index)
            return ExpertWeights(up=up, down=down, gate=None, gate_bias=None, up_bias=up_bias, down_bias=down_bias)
        gate, up = self._gate_and_up(self._matrix("gate_up_proj", index))
        bias = self._bias("gate_up_proj_bias", index)
        gate_bias, up_bias = (None, None) if bias is None else self._gate_and_up(bias)
        return ExpertWeights(up=up, down=down, gate=gate, gate_bias=gate_bias, up_bias=up_bias, down_bias=down_bias)

    def assign(self, index: int, weights: ExpertWeights) -> None:
        """Copies `weights` into the module's expert `index`, cast to the module's dtype."""
        with torch.no_grad():
            own = self.expert(index)
            for name in ("up", "down", "gate", "gate_bias", "up_bias", "down_bias"):
                target, source = getattr(own, name), getattr(weights, name)
                if target is not None:
                    target.copy_(source)

    def _matrix(self, name: str, index: int) -> torch.Tensor:
        matrix: torch.Tensor = getattr(self.module, name)[index].detach()
        return matrix.T if self.is_transposed else matrix

    def _bias(self, name: str, index: int) -> torch.Tensor | None:
        return getattr(self.module, name)[index].detach() if self.has_bias else None

    def _gate_and_up(self, both: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        if self.is_concatenated:
            return both[: self.inter], both[self.inter :]
        return both[0::2], both[1::2]


FOREIGN_EXPERTS = {
    "DbrxExperts": "its weights are one matrix over all experts and each layer cuts its own experts out of it",
    "JetMoeParallelExperts": "each projection is a module of its own that takes tokens sorted by expert",
    "NllbMoeExperts": "each expert is a module of its own, called by transformers' older code",
    "SwitchTransformersExperts": "each expert is a module of its own, which takes one-hot routing",
}
"""Experts of transformers' language models that cannot be replaced, and why."""


def find_experts(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All experts modules of `model` that `read` understands, as (dotted path, module), in the order of execution.
    Those of towers, which see an image once, stay as they are.

    A dense model gives an empty list. Raises UnsupportedExpertsError where the model has modules which hold experts
    but none of them can be read.
    """
    found = [(path, module) for path, module in seen_by_text(model) if is_experts(module)]
    if not found:
        _refuse_foreign_experts(model)
    return found


def seen_by_text(model: nn.Module) -> list[tuple[str, nn.Module]]:
    """All modules of `model` with their paths, but for experts of its towers."""
    towers = tower_paths(model)
    return [(path, one) for path, one in model.named_modules() if not (in_tower(path, towers) and is_experts(one))]


def is_experts(module: nn.Module) -> bool:
    """True for an experts module with transformers' common call: decorated ones, and those of the same form."""
    if "_is_expert_parallel" in module.__dict__ and hasattr(module, "is_concatenated"):
        return True
    if type(module).__name__ in SORTED_EXPERTS:
        return True
    has_weights = _has_3d(module, "gate_up_proj") and _has_3d(module, "down_proj")
    gates = hasattr(module, "_apply_gate") or _num_identity(module) is not None
    return has_weights and gates and _call_names(module)[:3] == ROUTED_CALL


def read(module: nn.Module) -> ExpertsLayout:
    """The normal form of an experts module.

    Raises UnsupportedExpertsError (with the reason) for a module that does not hold experts in the common form, or that
    holds quantised weights.
    """
    if not is_experts(module):
        raise UnsupportedExpertsError(
            f"{type(module).__name__} is no experts module of the common form: expected 3-D parameters gate_up_proj (or"
            f" up_proj) and down_proj and the call {ROUTED_CALL}, found the call {_call_names(module)}"
        )
    _refuse_quantised(module)
    gated, has_bias = bool(getattr(module, "has_gate", True)), bool(getattr(module, "has_bias", False))
    concatenated = bool(getattr(module, "is_concatenated", True))
    transposed = bool(getattr(module, "is_transposed", type(module).__name__ in SORTED_EXPERTS))
    num_identity = _num_identity(module) or 0
    num_experts, hidden, inter = _sizes(module, gated, transposed, num_identity)
    norm = module.post_expert_norm if getattr(module, "has_post_expert_norm", False) else None
    return ExpertsLayout(
        module=module,
        num_experts=num_experts,
        hidden=hidden,
        inter=inter,
        activation=recognise_activation(module, gated=gated, concatenated=concatenated),
        has_bias=has_bias,
        is_concatenated=concatenated,
        is_transposed=transposed,
        post_expert_norm=norm if isinstance(norm, nn.Module) else None,
        num_identity=num_identity,
    )


def _num_identity(module: nn.Module) -> int | None:
    """How many experts of the module are the identity, after LongCat-Flash's attributes; None for other modules."""
    declared = getattr(module, "zero_expert_num", None)
    has_identity = isinstance(module._modules.get("identity_expert"), nn.Identity)
    return declared if has_identity and isinstance(declared, int) else None


def _sizes(module: nn.Module, gated: bool, transposed: bool, num_identity: int) -> tuple[int, int, int]:
    """(experts with weights, hidden, inter) from the parameters' shapes, which must agree.

    The first projection of a module with identity experts has entries for these as well, which nothing reads.
    """
    first: torch.Tensor = getattr(module, "gate_up_proj" if gated else "up_proj")
    down: torch.Tensor = module.down_proj  # type: ignore[assignment]
    rows, hidden = (first.shape[2], first.shape[1]) if transposed else (first.shape[1], first.shape[2])
    inter = rows // 2 if gated else rows
    num_experts = first.shape[0] - num_identity
    expected = (num_experts, inter, hidden) if transposed else (num_experts, hidden, inter)
    if tuple(down.shape) != expected or (gated and rows % 2):
        raise UnsupportedExpertsError(
            f"{type(module).__name__}: first projection {tuple(first.shape)} asks for down_proj {expected},"
            f" found {tuple(down.shape)}"
        )
    if not hidden or not inter:
        raise UnsupportedExpertsError(
            f"{type(module).__name__}: experts of {hidden} x {inter} have no weights; expected 1 or more of each"
            " (hidden_size, and moe_intermediate_size or intermediate_size in config.json)"
        )
    return num_experts, hidden, inter


def _refuse_quantised(module: nn.Module) -> None:
    for name, parameter in module.named_parameters(recurse=False):
        if parameter.dtype not in (torch.float32, torch.bfloat16, torch.float16, torch.float64):
            raise UnsupportedExpertsError(
                f"{type(module).__name__}.{name} is stored as {parameter.dtype}; expected a floating dtype, at least 16"
                " bits. Load the model dequantised, or use hybrimoe.load"
            )


def _refuse_foreign_experts(model: nn.Module) -> None:
    """Raises for models that do have experts, in a form that transformers' common call does not cover."""
    for path, module in model.named_modules():
        name = type(module).__name__
        if name in FOREIGN_EXPERTS:
            raise UnsupportedExpertsError(f"{path} ({name}) cannot be replaced: {FOREIGN_EXPERTS[name]}")
        if name.endswith("Experts") and any(p.dim() == 3 for p in module.parameters()):
            raise UnsupportedExpertsError(
                f"{path} ({name}) holds experts outside transformers' common form: expected 3-D gate_up_proj and"
                f" down_proj, _apply_gate and forward{ROUTED_CALL}, found forward{_call_names(module)}"
            )


def _has_3d(module: nn.Module, name: str) -> bool:
    value = getattr(module, name, None)
    return isinstance(value, nn.Parameter) and value.dim() == 3


def _call_names(module: nn.Module) -> tuple[str, ...]:
    return tuple(inspect.signature(module.forward).parameters)
