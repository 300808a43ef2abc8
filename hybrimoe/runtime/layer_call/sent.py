"""A layer's call as a recorded step makes it: always with the same memory of the device and of the host."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch

from gpu_kernels import TorchAccelerator
from gpu_kernels.exchange import Exchange
from gpu_kernels.graphs import Graph


@dataclass(frozen=True, slots=True, eq=False)
class SentCall:
    """The tensors of a call of `layer` on the device, which `exchange` carries to the host and its output back.

    runner: the `ExpertsCall` for whose slots it was recorded. graph: of the experts that have slots (recorded by
    `TorchAccelerator.compute_exchanged`); None where nothing has one.
    """

    runner: Any
    layer: int
    accelerator: TorchAccelerator
    exchange: Exchange
    hidden: torch.Tensor
    ids: torch.Tensor
    weights: torch.Tensor
    graph: Graph | None
