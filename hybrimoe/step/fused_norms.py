"""RMSNorm modules whose arithmetic is one of the known kinds, computed by a kernel while a step is recorded.

Which kind a module is, is seen from what it gives for random numbers, never from its name alone.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.func import functional_call

from gpu_kernels.step_kernels import NormsRows
from hybrimoe.step.forward import InPlaceOfForward

EPS_NAMES = ("variance_epsilon", "eps", "epsilon")
KINDS = tuple((offset, round_first) for offset in (0.0, 1.0) for round_first in (True, False))
"""What is added to the weight, and whether values are rounded to the dtype before they meet it."""
PROBE_ROWS = 8
AGREEMENT = {torch.float32: 1e-6, torch.bfloat16: 2e-3, torch.float16: 3e-4}
"""Relative difference of two sums in float32 that are added in another order and then rounded to the dtype."""


@dataclass(frozen=True, slots=True)
class KnownNorm:
    """A module that the kernel computes: `weight` + offset, eps, and when it rounds."""

    module: nn.Module
    eps: float
    offset: float
    round_first: bool


def known_norms(model: nn.Module, kernel: NormsRows) -> list[KnownNorm]:
    """The RMSNorm modules of a model that the kernel computes as they do."""
    kinds: dict[tuple[Any, ...], tuple[float, bool] | None] = {}
    found = []
    for module in model.modules():
        weight, eps = getattr(module, "weight", None), _eps(module)
        if "RMSNorm" not in type(module).__name__ or eps is None or not isinstance(weight, nn.Parameter):
            continue
        alone = dict(module.named_parameters(recurse=False)).keys() == {"weight"} and not any(module.children())
        if not alone or weight.dim() != 1 or weight.dtype not in AGREEMENT or "forward" in module.__dict__:
            continue
        key = type(module), eps, weight.dtype, weight.shape
        if key not in kinds:
            kinds[key] = _kind(module, weight, eps, kernel)
        if (kind := kinds[key]) is not None:
            found.append(KnownNorm(module, eps, *kind))
    return found


@contextmanager
def norms_by(kernel: NormsRows | None, norms: Sequence[KnownNorm]) -> Iterator[None]:
    """Within the block the kernel computes these modules' calls of rows in their weights' dtype."""
    placed = [] if kernel is None else [
        InPlaceOfForward(norm.module, partial(_answer, norm, kernel)) for norm in norms
    ]  # fmt: skip
    try:
        yield
    finally:
        for each in placed:
            each.undo()


def _answer(
    norm: KnownNorm, kernel: NormsRows, own: Callable[..., Any], args: tuple[Any, ...], kwargs: dict[str, Any]
) -> Any:
    weight: Any = norm.module.weight
    if kwargs or len(args) != 1 or args[0].dtype != weight.dtype or args[0].shape[-1] != len(weight):
        return own(*args, **kwargs)
    return kernel(args[0], weight, norm.eps, norm.offset, norm.round_first)


def _eps(module: nn.Module) -> float | None:
    values = (getattr(module, name, None) for name in EPS_NAMES)
    return next((value for value in values if isinstance(value, float)), None)


def _kind(module: nn.Module, weight: torch.Tensor, eps: float, kernel: NormsRows) -> tuple[float, bool] | None:
    """The kind whose result is the module's, for random weights and rows; None where none is."""
    generator = torch.Generator().manual_seed(0)
    rows, other = (
        torch.randn(shape, generator=generator).to(weight.device, weight.dtype)
        for shape in ((PROBE_ROWS, len(weight)), (len(weight),))
    )
    with torch.no_grad():
        try:
            expected = functional_call(module, {"weight": other}, (rows,))
        except TypeError:  # it takes more than rows
            return None
        if not isinstance(expected, torch.Tensor) or expected.dtype != rows.dtype:
            return None
        errors = {
            kind: float((kernel(rows, other, eps, *kind).float() - expected.float()).norm() / expected.float().norm())
            for kind in KINDS
        }
    nearest = min(errors, key=errors.__getitem__)
    return nearest if errors[nearest] <= AGREEMENT[weight.dtype] else None
