"""The obvious expert FFN in torch, the activation functions, and the tolerances that backends are held to."""

import torch
from torch.nn import functional

from cpu_kernels.format.layout import PLANES
from cpu_kernels.format.spec import Activation, ExpertSpec, ExpertWeights

# Relative error |y - reference|_max / |reference|_max that a backend may show, reference = float32 arithmetic on the
# same (de)quantised weights. float32 and bfloat16 weights are multiplied with unrounded float32 activations, so only
# the order of summation differs. int8 to int2 weights meet activations rounded to int8 per group of 32 twice (input
# and intermediate): about 0.4 % each in the root mean square, larger in single elements and with outliers.
TOLERANCES = {"float32": 1e-5, "bfloat16": 1e-5} | dict.fromkeys(PLANES, 2e-2)


def tolerance(spec: ExpertSpec) -> float:
    """Allowed ``max |y - reference| / max |reference|`` of a backend on experts of `spec`."""
    return TOLERANCES[spec.dtype]


def relative_error(result: torch.Tensor, expected: torch.Tensor) -> float:
    """``max |result - expected| / max |expected|`` (0 for empty tensors)."""
    if expected.numel() == 0:
        return 0.0
    scale = float(expected.abs().max())
    return float((result - expected).abs().max()) / scale if scale else float(result.abs().max())


def reference_ffn(spec: ExpertSpec, weights: ExpertWeights, x: torch.Tensor) -> torch.Tensor:
    """float32 [M, H] -> float32 [M, H]: the expert's FFN in float32, without routing weight."""
    up = _linear(x, weights.up, weights.up_bias)
    if weights.gate is None:
        inner = apply_activation(spec.activation, None, up)
    else:
        inner = apply_activation(spec.activation, _linear(x, weights.gate, weights.gate_bias), up)
    return _linear(inner, weights.down, weights.down_bias)


def apply_activation(activation: Activation, gate: torch.Tensor | None, up: torch.Tensor) -> torch.Tensor:
    """The intermediate of an expert, [..., I], from gate (None if ungated) and up."""
    if activation.custom is not None:
        return activation.custom(up if gate is None else torch.cat([gate, up], dim=-1))
    if gate is None:
        return _act(activation, up)
    if activation.gate_max is not None:
        gate = gate.clamp(max=activation.gate_max)
    value = _act(activation, gate)
    if activation.act_max is not None:
        value = value.clamp(max=activation.act_max)
    if activation.up_limit is not None:
        up = up.clamp(-activation.up_limit, activation.up_limit)
    return value * (up + activation.up_offset)


def _act(activation: Activation, x: torch.Tensor) -> torch.Tensor:
    match activation.kind:
        case "silu":
            return x * torch.sigmoid(activation.alpha * x)
        case "gelu":
            return functional.gelu(x)
        case "gelu_tanh":
            return functional.gelu(x, approximate="tanh")
        case "relu":
            return functional.relu(x)
        case "relu2":
            return functional.relu(x).square()
        case "sigmoid":
            return torch.sigmoid(x)
        case _:
            return x


def _linear(x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return functional.linear(x.float(), weight.float(), None if bias is None else bias.float())
