"""The `ipex` backend: oneDNN matrix products of Intel Extension for PyTorch on weights packed by `linear_prepack`.

The extension was discontinued with 2.8.0, which works with torch 2.8 alone (with any other its import dies with an
AttributeError), so versions are compared before anything is imported, and whatever does not fit is refused.

float32 experts take float32 arithmetic. bfloat16 experts need a CPU with AVX512-BF16 or AMX; input and intermediate are
rounded to bfloat16 (`BFLOAT16_TOLERANCE`). int8 and int4 experts are refused.

Memory: a packed copy of each expert beside its record, of the same size, for up to `CACHE_GIB` (or the environment
variable HYBRIMOE_IPEX_CACHE, in GiB) over the whole process.
"""

from __future__ import annotations

import importlib
import importlib.metadata
import platform
import sys
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from cpu_kernels.backends.base import PerExpertBackend
from cpu_kernels.backends.prepared import PreparedExperts, shared_cache
from cpu_kernels.engine.dispatch import Dispatch
from cpu_kernels.errors import BackendError
from cpu_kernels.format.layout import is_quantised
from cpu_kernels.format.pack import unpack_expert
from cpu_kernels.format.reference import apply_activation
from cpu_kernels.format.spec import ExpertSpec
from cpu_kernels.host.isa import cpu_features
from cpu_kernels.host.threads import resolve_threads, torch_threads

PACKAGE, MODULE = "intel-extension-for-pytorch", "intel_extension_for_pytorch"
IPEX_VERSION, TORCH_SERIES = "2.8.0", "2.8"
ENV_CACHE_GIB = "HYBRIMOE_IPEX_CACHE"
CACHE_GIB = 4.0
# Relative to the largest output, as in cpu_kernels.format.reference.tolerance: input, intermediate and output are
# rounded to 8 significant bits each (2 ** -9 = 0.2 % a value), and errors of single elements add up over both products.
BFLOAT16_TOLERANCE = 2e-2
HOW_TO = "make an environment of its own: pip install 'hybrimoe[ipex]' there (tests/ipex/run.sh does), or use numba"


def unfit() -> str | None:
    """None, or why the extension cannot be imported here. Looks at versions and the CPU; imports nothing."""
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "AMD64"):
        return f"the extension exists for Linux on x86-64, this is {sys.platform} on {platform.machine()}"
    found = _version(PACKAGE)
    if found is None:
        return f"{PACKAGE} is not installed; {HOW_TO}"
    if found.split("+")[0] != IPEX_VERSION:
        return f"{PACKAGE} must be {IPEX_VERSION} (its last release), found {found}; {HOW_TO}"
    torch_version = _version("torch") or "none"
    if torch_version.split(".")[:2] != TORCH_SERIES.split("."):
        return (
            f"{PACKAGE} {IPEX_VERSION} works with torch {TORCH_SERIES}.* alone, found torch {torch_version}; {HOW_TO}"
        )
    if "avx2" not in cpu_features():
        return "the extension needs AVX2, which this CPU or its system lacks"
    return None


def _version(package: str) -> str | None:
    try:
        return importlib.metadata.version(package)
    except importlib.metadata.PackageNotFoundError:
        return None


def load_ipex() -> Any:
    """The module `intel_extension_for_pytorch`; raises BackendError with what does not fit."""
    reason = unfit()
    if reason is not None:
        raise BackendError(f"backend 'ipex' does not run here: {reason}")
    try:
        return importlib.import_module(MODULE)
    except (ImportError, AttributeError, OSError) as error:
        raise BackendError(f"backend 'ipex' does not run here: importing {MODULE} failed: {error}; {HOW_TO}") from error


@dataclass(frozen=True, slots=True)
class PackedLinear:
    """A matrix in oneDNN's blocked layout."""

    context: Any
    weight: torch.Tensor
    bias: torch.Tensor | None
    out_features: int

    @classmethod
    def pack(cls, weight: torch.Tensor, bias: torch.Tensor | None, dtype: torch.dtype) -> PackedLinear:
        """weight float [N, K], bias float [N] or None."""
        weight = weight.to(dtype).contiguous()
        bias = None if bias is None else bias.to(dtype)
        context = torch.ops.ipex_prepack.linear_prepack(weight, bias, None)
        return cls(context, context.get_weight(), bias, weight.shape[0])

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        """[M, K] -> [M, N] in the dtype it was packed in."""
        handle = self.context.get_data_handle()
        result = torch.ops.torch_ipex.ipex_linear(x, self.weight, self.bias, handle, self.out_features)
        return torch.as_tensor(result)


@dataclass(frozen=True, slots=True)
class PackedExpert:
    """The matrices of one expert."""

    gate: PackedLinear | None
    up: PackedLinear
    down: PackedLinear


class IpexBackend(PerExpertBackend):
    """Experts one after another, each on `threads` threads of torch's pool."""

    name = "ipex"

    def __init__(self, threads: int | None = None) -> None:
        self._module = load_ipex()
        self.n_threads = resolve_threads(threads)
        self.has_bfloat16 = bool(self._module._C.onednn_has_bf16_support())
        self.experts: PreparedExperts[PackedExpert] = shared_cache(self.name, ENV_CACHE_GIB, CACHE_GIB)

    def supports(self, spec: ExpertSpec) -> str | None:
        """None, or why `spec` does not run here."""
        if is_quantised(spec.dtype):
            return "its weight-only int8 and int4 are right but slow, so they are left out; use numba"
        if spec.dtype == "bfloat16" and not self.has_bfloat16:
            return "bfloat16 needs AVX512-BF16 or AMX, which this CPU lacks; use expert_dtype float32, or numba"
        return None

    def run(
        self,
        spec: ExpertSpec,
        records: np.ndarray,
        positions: np.ndarray,
        dispatch: Dispatch,
        hidden: np.ndarray,
        out_rows: np.ndarray,
    ) -> None:
        """See `CpuBackend.run`."""
        with torch_threads(self.n_threads):
            super().run(spec, records, positions, dispatch, hidden, out_rows)

    def ffn(self, spec: ExpertSpec, record: np.ndarray, x: torch.Tensor) -> torch.Tensor:
        """float32 [M, H] -> float32 [M, H]."""
        expert = self.experts.get(spec, record, lambda: (pack(spec, record), spec.record_bytes))
        dtype = getattr(torch, spec.dtype)
        x = x.to(dtype)
        gate = None if expert.gate is None else expert.gate(x).float()
        inner = apply_activation(spec.activation, gate, expert.up(x).float())
        return expert.down(inner.to(dtype)).float()


def pack(spec: ExpertSpec, record: np.ndarray) -> PackedExpert:
    """The expert of a record (uint8 [spec.record_bytes]), float32 or bfloat16, in oneDNN's layout."""
    weights, dtype = unpack_expert(spec, record), getattr(torch, spec.dtype)
    gate = None if weights.gate is None else PackedLinear.pack(weights.gate, weights.gate_bias, dtype)
    up = PackedLinear.pack(weights.up, weights.up_bias, dtype)
    return PackedExpert(gate, up, PackedLinear.pack(weights.down, weights.down_bias, dtype))
