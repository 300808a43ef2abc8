"""The `torch` backend: torch matrix products; runs every spec, custom activations included, on every machine."""

import numpy as np
import torch

from cpu_kernels.backends.base import PerExpertBackend
from cpu_kernels.pack import unpack_expert
from cpu_kernels.reference import reference_ffn
from cpu_kernels.spec import ExpertSpec


class TorchBackend(PerExpertBackend):
    """Float32 matrix products on weights that are unpacked for the call."""

    name = "torch"

    def ffn(self, spec: ExpertSpec, record: np.ndarray, x: torch.Tensor) -> torch.Tensor:
        """float32 [M, H] -> float32 [M, H]."""
        return reference_ffn(spec, unpack_expert(spec, record), x)
