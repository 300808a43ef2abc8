"""Routers: their weights are found by shape, and how they choose by comparing all ways that the step knows."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import nn

from cpu_kernels.step.products import Product
from cpu_kernels.step.reference import select
from cpu_kernels.step.router import (
    AS_SCORED,
    SIGMOID,
    SIGMOID_OF_CHOSEN,
    SOFTMAX,
    SOFTMAX_OF_CHOSEN,
    SUM_TO_ONE,
    Selection,
)
from hybrimoe.step.errors import NotCompiled
from hybrimoe.step.read_parts import array, read_matrix
from hybrimoe.step.trace import Call

SAMPLE_ROWS = 256
WEIGHT_TOLERANCE = 1e-4
"""Relative, of routing weights in float32 arithmetic."""
SAME_CHOICE = 0.99
"""Share of the sample rows whose experts must be the same: equal scores may fall either way."""


def read_router(call: Call, n_experts: int, width: int, top_k: int) -> tuple[Product, Selection]:
    """Weights and choice of a router that was called with hidden states. Raises NotCompiled where no way agrees."""
    weight, bias, others = _weights(call.module, n_experts, width, call.path)
    product = read_matrix(weight, call.path, None if bias is None else array(bias))
    hidden = torch.randn(SAMPLE_ROWS, width, generator=torch.Generator().manual_seed(0))
    ids, weights = _outputs(call, copy.deepcopy(call.module).float(), hidden, top_k)
    logits = nn.functional.linear(hidden, weight.detach().float(), None if bias is None else bias.detach().float())
    for candidate in _candidates(call.module, others, n_experts, top_k):
        found = _agreed(candidate, logits, ids, weights)
        if found is not None:
            return product, found
    raise NotCompiled(
        f"{call.path} ({type(call.module).__name__}) chooses experts in a way that the step does not know"
    )


def _weights(
    module: nn.Module, n_experts: int, width: int, path: str
) -> tuple[torch.Tensor, torch.Tensor | None, list[torch.Tensor]]:
    """The matrix [experts, width], its bias, and what else has a value for each expert."""
    tensors: dict[str, Any] = {**dict(module.named_parameters()), **dict(module.named_buffers())}
    matrices = {name: value for name, value in tensors.items() if tuple(value.shape) == (n_experts, width)}
    if len(matrices) != 1:
        raise NotCompiled(
            f"{path}: {len(matrices)} matrices [{n_experts}, {width}] are found in the router, expected one"
        )
    ((name, matrix),) = matrices.items()
    bias_name = f"{name.rpartition('.')[0]}.bias".lstrip(".")
    others = [
        value for other, value in tensors.items() if value.numel() == n_experts and other not in (name, bias_name)
    ]
    return matrix, tensors.get(bias_name), others


def _outputs(call: Call, module: nn.Module, hidden: torch.Tensor, top_k: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Experts and weights [rows, top_k] that the module gives for sample rows."""
    shape = call.input.shape
    rows = hidden if len(shape) == 2 else hidden[None]
    with torch.no_grad():
        try:
            output = module(rows)
        except (RuntimeError, TypeError, ValueError) as error:
            raise NotCompiled(f"{call.path}: the router takes more than hidden states ({error})") from error
    return chosen(output, top_k, call.path)


def chosen(output: Any, top_k: int, path: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The experts int64 and weights float32 [rows, top_k] among a router's outputs."""
    values = output if isinstance(output, tuple | list) else [output]
    tensors = [value.flatten(0, -2) for value in values if isinstance(value, torch.Tensor) and value.dim() >= 2]
    ids = [value for value in tensors if not value.is_floating_point() and value.shape[-1] == top_k]
    weights = [value for value in tensors if value.is_floating_point() and value.shape[-1] == top_k]
    if len(ids) != 1 or not weights:
        raise NotCompiled(f"{path}: the router's outputs are not expert ids and weights")
    return ids[0], weights[-1].float()


def _candidates(module: nn.Module, others: list[torch.Tensor], n_experts: int, top_k: int) -> Iterator[Selection]:
    """Plain ways first. Numbers (groups, jitter) are taken from the module's own attributes."""
    numbers = [value for value in vars(module).values() if isinstance(value, int) and not isinstance(value, bool)]
    groups = sorted({value for value in numbers if 1 < value < n_experts and n_experts % value == 0})
    corrections: list[np.ndarray | None] = [None, *(array(value).reshape(-1) for value in others)]
    for correction in corrections:
        for scoring, weighing in (
            (SOFTMAX, AS_SCORED), (SOFTMAX, SUM_TO_ONE), (SOFTMAX, SOFTMAX_OF_CHOSEN), (SIGMOID, AS_SCORED),
            (SIGMOID, SUM_TO_ONE), (SIGMOID, SIGMOID_OF_CHOSEN),
        ):  # fmt: skip
            plain = Selection(top_k, scoring, weighing, correction)
            yield plain
            for n_groups in groups:
                for top_groups in range(1, n_groups):
                    for best in (1, 2):
                        yield replace(plain, n_groups=n_groups, top_groups=top_groups, best_of_group=best)
    for value in vars(module).values():
        if isinstance(value, float) and 0 < value < 1:
            yield Selection(top_k, jitter=value)


def _agreed(candidate: Selection, logits: torch.Tensor, ids: torch.Tensor, weights: torch.Tensor) -> Selection | None:
    """The candidate with the factor of its weights, where it chooses and weighs as the module does; else None."""
    own_ids, own_weights = select(candidate, logits)
    n_experts = logits.shape[1]
    mine = torch.zeros(len(logits), n_experts).scatter(1, own_ids, own_weights)
    theirs = torch.zeros(len(logits), n_experts).scatter(1, ids, weights)
    alike = ((mine != 0) == (theirs != 0)).all(-1)
    if float(alike.float().mean()) < SAME_CHOICE:
        return None
    factor = float(theirs[alike].double().sum() / mine[alike].double().sum())
    scaled = mine[alike] * factor
    if float((scaled - theirs[alike]).abs().max()) > WEIGHT_TOLERANCE * float(theirs.abs().max()):
        return None
    return replace(candidate, scale=1.0 if abs(factor - 1) < WEIGHT_TOLERANCE / 10 else factor)
