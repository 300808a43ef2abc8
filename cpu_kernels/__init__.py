"""Expert feed-forward networks on the CPU: packing, SIMD kernels, and backends behind one protocol.

Names load on first use: what only asks for a folder or a number of threads does not wait for torch and Numba.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
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

_HOMES = {
    "backends": ("CpuBackend", "get_backend"),
    "backends.attention": ("decode_attention", "supports_decode_attention"),
    "backends.shared": ("run_linear",),
    "backends.warm": ("warm_up",),
    "engine.dispatch": ("Dispatch", "build_dispatch", "combine"),
    "errors": (
        "ActivationValueError",
        "BackendError",
        "DispatchError",
        "IsaError",
        "KernelError",
        "LayoutError",
        "ThreadingError",
    ),
    "format.layout": ("LAYOUT_VERSION",),
    "format.linear": ("LinearSpec", "pack_linear", "unpack_linear", "unpack_linear_blocks"),
    "format.pack": ("pack_expert", "unpack_expert"),
    "format.reference": ("apply_activation", "reference_ffn", "relative_error", "tolerance"),
    "format.spec": ("DTYPES", "Activation", "ExpertDtype", "ExpertSpec", "ExpertWeights"),
    "host.memory": ("page_aligned",),
}
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}

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


def __getattr__(name: str) -> Any:
    if name not in _MODULE_OF:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = getattr(importlib.import_module(f"{__name__}.{_MODULE_OF[name]}"), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return __all__
