"""The `reference` backend: unpack, compute in float32 with torch; slow, obvious, the yardstick of all others."""

import numpy as np
import torch

from cpu_kernels.backends.base import PerExpertBackend
from cpu_kernels.format.pack import unpack_expert
from cpu_kernels.format.reference import reference_ffn
from cpu_kernels.format.spec import ExpertSpec


class ReferenceBackend(PerExpertBackend):
    """`reference_ffn` on the unpacked record."""

    name = "reference"

    def ffn(self, spec: ExpertSpec, record: np.ndarray, x: torch.Tensor) -> torch.Tensor:
        """float32 [M, H] -> float32 [M, H]."""
        return reference_ffn(spec, unpack_expert(spec, record), x)
