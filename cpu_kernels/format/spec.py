"""What an expert is: its activation, its shape and dtype, and its weights in one normalised form."""

from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from functools import cached_property
from typing import Literal, Self, get_args

import torch

from cpu_kernels.errors import KernelError, LayoutError
from cpu_kernels.format.layout import RecordLayout, record_layout

ExpertDtype = Literal["float32", "bfloat16", "int8", "int6", "int5", "int4", "int3", "int2"]
ActivationKind = Literal["silu", "gelu", "gelu_tanh", "relu", "relu2", "sigmoid", "identity", "custom"]
DTYPES: tuple[ExpertDtype, ...] = get_args(ExpertDtype)
KINDS: tuple[ActivationKind, ...] = get_args(ActivationKind)


@dataclass(frozen=True)
class Activation:
    """The function between the two matrix products of an expert.

    gated:   ``y = min(act(min(g, gate_max)), act_max) * (clamp(u, -up_limit, up_limit) + up_offset)``
    ungated: ``y = act(u)``

    `silu` means ``g * sigmoid(alpha * g)``; alpha 1.702, gate_max and up_limit 7 and up_offset 1 give gpt-oss.
    `custom` maps a tensor ``[..., 2I]`` (gate, then up; or ``[..., I]`` if ungated) to ``[..., I]`` in torch.
    """

    kind: ActivationKind = "silu"
    gated: bool = True
    alpha: float = 1.0
    gate_max: float | None = None
    act_max: float | None = None
    up_limit: float | None = None
    up_offset: float = 0.0
    custom: Callable[[torch.Tensor], torch.Tensor] | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise KernelError(f"activation kind {self.kind!r} is unknown; expected one of {', '.join(KINDS)}")
        if (self.kind == "custom") != (self.custom is not None):
            raise KernelError("an activation of kind 'custom' needs `custom`, and no other kind takes it")
        limits = (self.gate_max, self.act_max, self.up_limit, self.up_offset or None)
        if not self.gated and any(value is not None for value in limits):
            raise KernelError("gate_max, act_max, up_limit and up_offset belong to gated activations")
        if self.up_limit is not None and self.up_limit <= 0:
            raise KernelError(f"up_limit must be positive, found {self.up_limit}")


@dataclass(frozen=True)
class ExpertSpec:
    """Shape, storage dtype and activation of the experts of one layer; equal specs share kernels and record size."""

    hidden: int
    inter: int
    dtype: ExpertDtype
    activation: Activation = Activation()
    has_bias: bool = False

    def __post_init__(self) -> None:
        if self.dtype not in DTYPES:
            raise KernelError(f"expert dtype {self.dtype!r} is unknown; expected one of {', '.join(DTYPES)}")
        if self.hidden < 1 or self.inter < 1:
            raise KernelError(f"hidden and inter must be at least 1, found {self.hidden} and {self.inter}")

    @cached_property
    def layout(self) -> RecordLayout:
        """Byte offsets of the parts of a record."""
        return record_layout(self.hidden, self.inter, self.dtype, self.activation.gated, self.has_bias)

    @property
    def record_bytes(self) -> int:
        """Size of one packed expert in bytes, a multiple of 64."""
        return self.layout.record_bytes

    @property
    def flops_per_token(self) -> int:
        """Floating point operations of one expert for one token (two per weight)."""
        return 2 * self.hidden * self.inter * (3 if self.activation.gated else 2)


@dataclass(frozen=True)
class ExpertWeights:
    """Weights of one expert as float tensors, out x in, not transposed, not interleaved.

    up [I, H], down [H, I], gate [I, H] or None (ungated), biases [I], [I], [H] or None.
    """

    up: torch.Tensor
    down: torch.Tensor
    gate: torch.Tensor | None = None
    gate_bias: torch.Tensor | None = None
    up_bias: torch.Tensor | None = None
    down_bias: torch.Tensor | None = None

    def check(self, spec: ExpertSpec) -> None:
        """Raises LayoutError when a tensor is missing, superfluous, or has another shape than `spec` says."""
        inter, hidden, bias, gated = spec.inter, spec.hidden, spec.has_bias, spec.activation.gated
        self._check("up", self.up, (inter, hidden), True)
        self._check("down", self.down, (hidden, inter), True)
        self._check("gate", self.gate, (inter, hidden), gated)
        self._check("gate_bias", self.gate_bias, (inter,), bias and gated)
        self._check("up_bias", self.up_bias, (inter,), bias)
        self._check("down_bias", self.down_bias, (hidden,), bias)

    def to(self, device: torch.device | str) -> Self:
        """The same weights on a device; tensors that are there already are not copied."""
        parts = {part.name: getattr(self, part.name) for part in fields(self)}
        return replace(self, **{name: tensor.to(device) for name, tensor in parts.items() if tensor is not None})

    @staticmethod
    def _check(name: str, value: torch.Tensor | None, shape: tuple[int, ...], wanted: bool) -> None:
        if not wanted:
            if value is not None:
                raise LayoutError(f"{name} is given, but the spec has no {name}")
            return
        if value is None:
            raise LayoutError(f"{name} is missing; the spec asks for shape {shape}")
        if tuple(value.shape) != shape:
            raise LayoutError(f"{name} has shape {tuple(value.shape)}, expected {shape}")
        if not value.is_floating_point():
            raise LayoutError(f"{name} has dtype {value.dtype}, expected a floating point dtype")
