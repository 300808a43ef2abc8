"""Norms, linear layers and MLPs: recognised by what they hold and by what they compute."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from cpu_kernels.format.spec import Activation
from cpu_kernels.step.parts import Mlp
from cpu_kernels.step.products import Product, plain_product
from cpu_kernels.step.stream import Norm
from hybrimoe.dense.linear import PackedLinear
from hybrimoe.experts.activation import recognise_activation
from hybrimoe.step.errors import NotCompiled
from hybrimoe.step.trace import Call, same

LINEARS = (nn.Linear, PackedLinear)
NORM_TOLERANCE = 1e-5
"""Relative, of a norm in float32 arithmetic."""
SAMPLES = 8


def array(tensor: Any) -> np.ndarray:
    """A tensor as float32, a copy."""
    values: np.ndarray = tensor.detach().to(torch.float32).contiguous().clone().numpy()
    return values


def read_norm(module: nn.Module, width: int) -> Norm | None:
    """The norm over `width` columns that the module is, or None where it is none that the step knows."""
    weights = dict(module.named_parameters())
    if len(weights) > 2 or any(tuple(weight.shape) != (width,) for weight in weights.values()):
        return None
    if any(True for _ in module.children()) or any(True for _ in module.buffers()):
        return None
    own = copy.deepcopy(module).float()
    x = 3 * torch.randn(SAMPLES, width, generator=torch.Generator().manual_seed(0)) + 0.5
    with torch.no_grad():
        try:
            expected = own(x)
        except (RuntimeError, TypeError, ValueError):
            return None
    if not isinstance(expected, torch.Tensor) or expected.shape != x.shape:
        return None
    for norm in _norm_candidates(module, weights, width):
        if _agrees(_norm(norm, x.numpy()), expected):
            return norm
    return None


def _norm_candidates(module: nn.Module, weights: dict[str, nn.Parameter], width: int) -> Iterator[Norm]:
    eps = {float(value) for value in vars(module).values() if isinstance(value, float) and 0 < value < 1e-2}
    values = [array(weight) for name, weight in weights.items() if name != "bias"]
    weight = values[0] if values else np.ones(width, np.float32)
    bias = array(weights["bias"]) if "bias" in weights else None
    for one in sorted(eps) or [1e-6, 1e-5]:
        for scaled in (weight, 1 + weight):
            yield Norm(scaled, one, bias)
            yield Norm(scaled, one, bias, centred=True)


def _norm(norm: Norm, x: np.ndarray) -> np.ndarray:
    """The obvious form of what the compiled norm computes."""
    centred = x - x.mean(-1, keepdims=True) if norm.centred else x
    result: np.ndarray = centred / np.sqrt((centred**2).mean(-1, keepdims=True) + np.float32(norm.eps)) * norm.weight
    return result if norm.bias is None else result + norm.bias


def _agrees(found: np.ndarray, expected: torch.Tensor) -> bool:
    target = expected.float().numpy()
    return bool(np.abs(found - target).max() <= NORM_TOLERANCE * (np.abs(target).max() + 1e-30))


def read_linear(module: nn.Module, path: str) -> Product:
    """A linear layer, packed or as the model holds it. Raises NotCompiled for dtypes and devices that do not fit."""
    bias = None if module.bias is None else array(module.bias)
    if isinstance(module, PackedLinear):
        return Product(module.in_features, module.out_features, module.record_address, module.spec, bias=bias)
    return read_matrix(module.weight, path, bias)


def read_matrix(weight: Any, path: str, bias: np.ndarray | None = None) -> Product:
    """A matrix [n_out, n_in] that stays where it is. Raises NotCompiled for what the kernels cannot read."""
    if weight.device.type != "cpu" or weight.dtype not in (torch.float32, torch.bfloat16) or not weight.is_contiguous():
        raise NotCompiled(
            f"{path}: weights are {weight.dtype} on {weight.device}, expected float32 or bfloat16 rows on cpu"
        )
    halves = weight.dtype == torch.bfloat16
    return plain_product(weight.data_ptr(), weight.shape[0], weight.shape[1], halves=halves, bias=bias)


def read_mlp(call: Call, calls: list[Call], switch: Product | None = None) -> list[Mlp]:
    """The forms that a dense MLP may have; which one it is, the comparison tells.

    calls: of the modules inside. Raises NotCompiled where it is none.
    """
    linears = [inner for inner in calls if isinstance(inner.module, LINEARS)]
    first = [inner for inner in linears if same(inner.input, call.input)]
    second = [inner for inner in linears if inner not in first]
    if len(second) != 1 or len(first) not in (1, 2):
        raise NotCompiled(f"{call.path} ({type(call.module).__name__}) is no MLP of two or three products")
    products = [read_linear(inner.module, inner.path) for inner in first]
    down = read_linear(second[0].module, second[0].path)
    fused = len(products) == 1 and products[0].n_out == 2 * down.n_in
    if not fused and any(product.n_out != down.n_in for product in products):
        raise NotCompiled(f"{call.path}: sizes of its products do not fit together")
    gated = fused or len(products) == 2
    activation = _activation(call.module, gated=gated)
    if fused or not gated:
        return [Mlp(products[0], down, activation, fused=fused, switch=switch)]
    one, other = products
    return [
        Mlp(other, down, activation, gate=one, switch=switch),
        Mlp(one, down, activation, gate=other, switch=switch),
    ]


def _activation(module: nn.Module, *, gated: bool) -> Activation:
    """The closed form of an MLP's activation. Raises NotCompiled where it has none."""
    act: Any = next((getattr(module, name) for name in ACTIVATION_NAMES if hasattr(module, name)), None)
    if act is None:
        raise NotCompiled(f"{type(module).__name__}: no activation function is found on it")
    shell = nn.Module()
    shell.act_fn = act
    found = recognise_activation(shell, gated=gated, concatenated=True)
    if found.custom is not None:
        raise NotCompiled(f"{type(module).__name__}: its activation {act} has no closed form here")
    return found


ACTIVATION_NAMES = ("act_fn", "activation_fn", "activation", "act", "hidden_act")
