"""Expert feed-forward networks on the CPU: packing, SIMD kernels, and backends behind one protocol."""

from cpu_kernels.backends import CpuBackend, get_backend
from cpu_kernels.backends.attention import decode_attention, supports_decode_attention
from cpu_kernels.backends.shared import run_linear
from cpu_kernels.backends.warm import warm_up
from cpu_kernels.engine.dispatch import Dispatch, build_dispatch, combine
from cpu_kernels.errors import (
    ActivationValueError,
    BackendError,
    DispatchError,
    IsaError,
    KernelError,
    LayoutError,
    ThreadingError,
)
from cpu_kernels.format.layout import LAYOUT_VERSION
from cpu_kernels.format.linear import LinearSpec, pack_linear, unpack_linear, unpack_linear_blocks
from cpu_kernels.format.pack import pack_expert, unpack_expert
from cpu_kernels.format.reference import apply_activation, reference_ffn, relative_error, tolerance
from cpu_kernels.format.spec import DTYPES, Activation, ExpertDtype, ExpertSpec, ExpertWeights
from cpu_kernels.host.memory import page_aligned

__all__ = [
    "DTYPES",
    "LAYOUT_VERSION",
    "Activation",
    "ActivationValueError",
    "BackendError",
    "CpuBackend",
    "Dispatch",
    "DispatchError",
    "ExpertDtype",
    "ExpertSpec",
    "ExpertWeights",
    "IsaError",
    "KernelError",
    "LayoutError",
    "LinearSpec",
    "ThreadingError",
    "apply_activation",
    "build_dispatch",
    "combine",
    "decode_attention",
    "get_backend",
    "pack_expert",
    "pack_linear",
    "page_aligned",
    "reference_ffn",
    "relative_error",
    "run_linear",
    "supports_decode_attention",
    "tolerance",
    "unpack_expert",
    "unpack_linear",
    "unpack_linear_blocks",
    "warm_up",
]
