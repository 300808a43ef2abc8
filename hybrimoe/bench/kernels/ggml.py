"""llama.cpp's CPU kernels for `bench kernels`: libggml of llama-cpp-python through ctypes, weights repacked."""

from __future__ import annotations

import ctypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import torch

from hybrimoe.bench.kernels.setting import Call, Setting
from hybrimoe.errors import HybriMoEError

F32 = 0
TYPES = {"q4_0": (2, 4.5), "q8_0": (8, 8.5)}  # GGML type number, bits a weight
OVERHEAD_BYTES = 1 << 20  # of a ggml context that holds no data
P, I64, SIZE, FLOAT = ctypes.c_void_p, ctypes.c_int64, ctypes.c_size_t, ctypes.c_float
SIGNATURES: dict[str, tuple[Any, list[Any]]] = {
    "ggml_new_tensor_2d": (P, [P, ctypes.c_int, I64, I64]),
    "ggml_mul_mat": (P, [P, P, P]),
    "ggml_silu": (P, [P, P]),
    "ggml_mul": (P, [P, P, P]),
    "ggml_add": (P, [P, P, P]),
    "ggml_scale": (P, [P, P, FLOAT]),
    "ggml_new_graph": (P, [P]),
    "ggml_build_forward_expand": (None, [P, P]),
    "ggml_row_size": (SIZE, [ctypes.c_int, I64]),
    "ggml_quantize_chunk": (SIZE, [ctypes.c_int, P, P, I64, I64, I64, P]),
    "ggml_backend_cpu_init": (P, []),
    "ggml_backend_cpu_set_n_threads": (None, [P, ctypes.c_int]),
    "ggml_backend_cpu_buffer_type": (P, []),
    "ggml_backend_cpu_reg": (P, []),
    "ggml_backend_reg_dev_get": (P, [P, SIZE]),
    "ggml_backend_reg_get_proc_address": (P, [P, ctypes.c_char_p]),
    "ggml_backend_buft_name": (ctypes.c_char_p, [P]),
    "ggml_backend_alloc_ctx_tensors_from_buft": (P, [P, P]),
    "ggml_backend_graph_compute": (ctypes.c_int, [P, P]),
    "ggml_backend_tensor_set": (None, [P, P, SIZE, SIZE]),
    "ggml_backend_tensor_get": (None, [P, P, SIZE, SIZE]),
}


class _InitParams(ctypes.Structure):
    _fields_ = (("mem_size", SIZE), ("mem_buffer", P), ("no_alloc", ctypes.c_bool))


class _Ggml:
    """The functions of libggml that are needed, found in whichever of its libraries exports them."""

    def __init__(self) -> None:
        import llama_cpp

        folder = Path(llama_cpp.__file__).parent / "lib"
        names = ("libggml-base.so", "libggml-cpu.so", "libggml.so")
        libraries = [
            ctypes.CDLL(str(folder / name), mode=ctypes.RTLD_GLOBAL) for name in names if (folder / name).exists()
        ]
        for name, (result, arguments) in SIGNATURES.items():
            function = next((getattr(lib, name) for lib in libraries if hasattr(lib, name)), None)
            if function is None:
                raise HybriMoEError(f"this llama-cpp-python has no {name} in {folder}; version 0.3.16 is known to work")
            function.restype, function.argtypes = result, arguments
            setattr(self, name, function)
        self.init = next(lib.ggml_init for lib in libraries if hasattr(lib, "ggml_init"))
        self.init.restype, self.init.argtypes = P, [_InitParams]

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(name)

    def context(self) -> int:
        """A context for tensors whose data lie in backend buffers."""
        return int(self.init(_InitParams(OVERHEAD_BYTES, None, True)))

    def repack_buffer_type(self) -> int | None:
        """Where llama.cpp puts weights that it interleaves for this CPU; None if this build has none."""
        registry = self.ggml_backend_cpu_reg()
        address = self.ggml_backend_reg_get_proc_address(registry, b"ggml_backend_dev_get_extra_bufts")
        if not address:
            return None
        bufts = ctypes.CFUNCTYPE(ctypes.POINTER(P), P)(address)(self.ggml_backend_reg_dev_get(registry, 0))
        for buft in bufts:
            if not buft:
                return None
            if b"REPACK" in self.ggml_backend_buft_name(buft):
                return int(buft)
        return None


@cache
def _library() -> _Ggml:
    return _Ggml()


def make_layers(setting: Setting, kind: str) -> Callable[[int], Call]:
    """Weights of all sets in libggml's memory; returns the maker of a call for M tokens."""
    ggml, (number, bits) = _library(), TYPES[kind]
    backend = ggml.ggml_backend_cpu_init()
    ggml.ggml_backend_cpu_set_n_threads(backend, torch.get_num_threads())
    packed = [_quantised(ggml, number, weight) for weight in (setting.gate, setting.up, setting.down)]
    buft = (ggml.repack_buffer_type() if kind == "q4_0" else None) or ggml.ggml_backend_cpu_buffer_type()
    sets = [_weights(ggml, number, packed, setting, buft) for _ in range(setting.n_sets(bits))]

    def for_tokens(n_tokens: int) -> Call:
        graphs = [_graph(ggml, weights, setting, n_tokens) for weights in sets]
        x = setting.x(n_tokens).numpy()
        for source, _, _ in graphs:
            ggml.ggml_backend_tensor_set(source, x.ctypes.data, 0, x.nbytes)
        out = np.empty_like(x)

        def call(index: int) -> np.ndarray:
            _, graph, result = graphs[index % len(graphs)]
            ggml.ggml_backend_graph_compute(backend, graph)
            ggml.ggml_backend_tensor_get(result, out.ctypes.data, 0, out.nbytes)
            return out

        return call

    return for_tokens


def _quantised(ggml: _Ggml, number: int, weight: torch.Tensor) -> np.ndarray:
    rows, columns = weight.shape
    source = weight.contiguous().numpy()
    data = np.empty(ggml.ggml_row_size(number, columns) * rows, np.uint8)
    ggml.ggml_quantize_chunk(number, source.ctypes.data, data.ctypes.data, 0, rows, columns, None)
    return data


def _weights(ggml: _Ggml, number: int, packed: list[np.ndarray], setting: Setting, buft: int) -> list[list[int]]:
    """k experts of (gate, up, down) tensors."""
    shape, context = setting.shape, ggml.context()
    sizes = [(shape.hidden, shape.inter)] * 2 + [(shape.inter, shape.hidden)]
    experts = [[ggml.ggml_new_tensor_2d(context, number, *size) for size in sizes] for _ in range(shape.k)]
    ggml.ggml_backend_alloc_ctx_tensors_from_buft(context, buft)
    for tensors in experts:
        for tensor, data in zip(tensors, packed, strict=True):
            ggml.ggml_backend_tensor_set(tensor, data.ctypes.data, 0, data.nbytes)
    return experts


def _graph(ggml: _Ggml, experts: list[list[int]], setting: Setting, n_tokens: int) -> tuple[int, int, int]:
    """(input tensor, graph, result tensor) of a layer call."""
    c = ggml.context()
    x = ggml.ggml_new_tensor_2d(c, F32, setting.shape.hidden, n_tokens)
    total = None
    for gate, up, down in experts:
        inner = ggml.ggml_mul(c, ggml.ggml_silu(c, ggml.ggml_mul_mat(c, gate, x)), ggml.ggml_mul_mat(c, up, x))
        part = ggml.ggml_scale(c, ggml.ggml_mul_mat(c, down, inner), 1 / setting.shape.k)
        total = part if total is None else ggml.ggml_add(c, total, part)
    graph = ggml.ggml_new_graph(c)
    ggml.ggml_build_forward_expand(graph, total)
    ggml.ggml_backend_alloc_ctx_tensors_from_buft(c, ggml.ggml_backend_cpu_buffer_type())
    return x, graph, int(total or 0)
