"""Norms, linear layers and MLPs: recognised by what they hold and by what they compute."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from cpu_kernels.format.spec import Activation
from cpu_kernels.step.parts import Mlp
from cpu_kernels.step.products import Product, plain_product
from cpu_kernels.step.stream import Norm
from hybrimoe.dense.linear import PackedLinear
from hybrimoe.experts.activation import recognise_function
from hybrimoe.step.errors import NotCompiled
from hybrimoe.step.trace import Call, same

LINEARS = (nn.Linear, PackedLinear)
NORM_TOLERANCE = 1e-5
"""Relative, of a norm in float32 arithmetic."""
SAMPLES = 8
FIT_TOLERANCE = 2e-2
"""Relative, of a factor that is found from bfloat16 values; float32 ones agree to 1e-5."""


def nearest(known: list[float], value: float) -> float:
    """The known number next to one that was found."""
    return min(known, key=lambda one: abs(one - value))


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


def read_mlp(call: Call, calls: list[Call], switch: Product | None = None) -> Mlp:
    """A dense MLP. calls: of the modules inside. Raises NotCompiled where it is none."""
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
    activation, by_first = _activation(call.module, [inner.module for inner in first], second[0].module, gated=gated)
    if fused or not gated:
        return Mlp(products[0], down, activation, fused=fused, switch=switch)
    gate, up = products if by_first else reversed(products)
    return Mlp(up, down, activation, gate=gate, switch=switch)


class _Given(nn.Module):
    """Stands for a linear layer that reads an MLP's input: gives what it was told."""

    values: torch.Tensor

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The values, whatever it is given."""
        return self.values


class _Passed(nn.Module):
    """Stands for the last linear layer of an MLP: gives what it is given."""

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """The same tensor."""
        return hidden


_found_in: dict[type, tuple[Activation, bool]] = {}
"""By class of MLP, the form that was found last: it is tried first."""


def _activation(module: nn.Module, first: list[nn.Module], last: nn.Module, *, gated: bool) -> tuple[Activation, bool]:
    """The closed form of what an MLP computes between its linear layers, and whether the first one is the gate.

    Its own forward tells, over values far beyond those of the recorded step. Raises NotCompiled where it has none.
    """
    acts = [child for child in module.children() if child is not last and child not in first]
    numbers = [value for part in (module, *acts) for value in vars(part).values() if isinstance(value, float)]
    likely = _found_in.get(type(module))
    orders = (True, False)[: len(first)]
    for by_first in orders if likely is None or likely[1] else orders[::-1]:
        own = _between(module, first if by_first else first[::-1], last)
        hints = [likely[0]] if likely is not None and likely[0].gated is gated else []
        try:
            found = recognise_function(own, numbers, gated=gated, likely=hints)
        except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
            raise NotCompiled(f"{type(module).__name__} does not run on sample values ({error})") from error
        if found is not None:
            _found_in[type(module)] = found, by_first
            return found, by_first
    raise NotCompiled(f"{type(module).__name__}: what it computes between its products has no closed form here")


def _between(module: nn.Module, first: list[nn.Module], last: nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """What an MLP computes between its linear layers, of values [n, 1 or 2] that the first ones would give."""
    twin, given = copy.copy(module), [_Given() for _ in first]
    stands_for = {id(last): _Passed(), **{id(one): other for one, other in zip(first, given, strict=True)}}
    twin._modules = {name: stands_for.get(id(child), child) for name, child in module._modules.items() if child}

    def own(values: torch.Tensor) -> torch.Tensor:
        for stand_in, part in zip(given, values.chunk(len(given), -1), strict=True):
            stand_in.values = part[None]
        result: torch.Tensor = twin.forward(values[None, :, :1])
        return result[0]

    return own
