"""Contenders of `bench kernels`: one MoE layer call with k experts, all of M tokens, by several libraries.

A contender is made for a shape, a number of weight sets and M; calling it with a set index runs one layer call. Sets
hold the same numbers at different addresses, so that weights come from memory, not from a cache.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch.nn import functional

import cpu_kernels as ck
from hybrimoe.bench.kernels import ggml, kt
from hybrimoe.bench.kernels.setting import Call, Setting


def ours(dtype: ck.ExpertDtype, backend_name: str = "numba") -> Callable[[Setting], Callable[[int], Call]]:
    """A backend of this package, its wrapper and `combine` included."""

    def make(setting: Setting) -> Callable[[int], Call]:
        shape = setting.shape
        spec = ck.ExpertSpec(shape.hidden, shape.inter, dtype)
        n_sets = setting.n_sets(8 * spec.record_bytes / (3 * shape.hidden * shape.inter))
        memory = ck.page_aligned(n_sets * shape.k * spec.record_bytes).reshape(-1, spec.record_bytes)
        ck.pack_expert(spec, ck.ExpertWeights(setting.up, setting.down, setting.gate), memory[0])
        memory[1:] = memory[0]
        backend = ck.get_backend(backend_name)
        addresses = np.array([record.ctypes.data for record in memory], np.uint64).reshape(n_sets, shape.k)

        def for_tokens(n_tokens: int) -> Call:
            x = setting.x(n_tokens).numpy()
            index = np.tile(np.arange(shape.k), (n_tokens, 1))
            dispatch = ck.build_dispatch(index, np.full(index.shape, 1 / shape.k, np.float32), shape.k)
            rows, out = np.empty((n_tokens * shape.k, shape.hidden), np.float32), np.empty_like(x)
            positions = np.arange(shape.k, dtype=np.int32)

            def call(number: int) -> np.ndarray:
                records = addresses[number % n_sets]
                assert memory.size  # the addresses point into it: the closure keeps it
                backend.run(spec, records, positions, dispatch, x, rows)
                ck.combine(rows, dispatch, out)
                return out

            return call

        return for_tokens

    return make


def torch_float(dtype: torch.dtype) -> Callable[[Setting], Callable[[int], Call]]:
    """torch matrix products, gate and up in one."""

    def make(setting: Setting) -> Callable[[int], Call]:
        n_sets = setting.n_sets(8 * dtype.itemsize)
        both = torch.cat([setting.gate, setting.up]).to(dtype)
        down = setting.down.to(dtype)
        sets = [[(both.clone(), down.clone()) for _ in range(setting.shape.k)] for _ in range(n_sets)]
        return _torch_layer(setting, sets, functional.linear, dtype)

    return make


def torch_int8(setting: Setting) -> Callable[[int], Call]:
    """fbgemm: int8 per channel, activations quantised per tensor at run time."""
    n_sets = setting.n_sets(8)

    def packed(weight: torch.Tensor) -> object:
        scales = weight.abs().amax(dim=1) / 127
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            codes = torch.quantize_per_channel(
                weight, scales, torch.zeros(len(scales), dtype=torch.long), 0, torch.qint8
            )
        return torch.ops.quantized.linear_prepack(codes, None)

    both = torch.cat([setting.gate, setting.up])
    sets = [[(packed(both), packed(setting.down)) for _ in range(setting.shape.k)] for _ in range(n_sets)]

    def linear(x: torch.Tensor, weight: object) -> torch.Tensor:
        result: torch.Tensor = torch.ops.quantized.linear_dynamic(x, weight, True)
        return result

    return _torch_layer(setting, sets, linear, torch.float32)


def _torch_layer(
    setting: Setting, sets: list[list[tuple[Any, Any]]], linear: Callable[..., torch.Tensor], dtype: torch.dtype
) -> Callable[[int], Call]:
    def for_tokens(n_tokens: int) -> Call:
        x = setting.x(n_tokens).to(dtype)

        def call(number: int) -> np.ndarray:
            out = torch.zeros(x.shape)
            with torch.inference_mode():
                for both, down in sets[number % len(sets)]:
                    gate, up = linear(x, both).chunk(2, dim=1)
                    out += linear(functional.silu(gate) * up, down).float() / setting.shape.k
            result: np.ndarray = out.numpy()
            return result

        return call

    return for_tokens


def onnxruntime_int4(setting: Setting) -> Callable[[int], Call]:
    """ONNX Runtime's MatMulNBits, 4 bits, blocks of 32, accuracy level 4; one session per layer call."""
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = torch.get_num_threads()
    model = _nbits_model(setting)
    sessions = [onnxruntime.InferenceSession(model, options) for _ in range(setting.n_sets(5))]

    def for_tokens(n_tokens: int) -> Call:
        x = setting.x(n_tokens).numpy()

        def call(number: int) -> np.ndarray:
            result: np.ndarray = sessions[number % len(sessions)].run(None, {"x": x})[0]
            return result

        return call

    return for_tokens


def _nbits_model(setting: Setting) -> bytes:
    from onnx import TensorProto, helper, numpy_helper

    nodes, tensors = [], []
    for expert in range(setting.shape.k):
        for name, weight in (("gate", setting.gate), ("up", setting.up), ("down", setting.down)):
            codes, scales = _nbits(weight)
            tensors += [
                numpy_helper.from_array(codes, f"{name}{expert}"),
                numpy_helper.from_array(scales, f"{name}s{expert}"),
            ]

        def product(name: str, x: str, out: str, k: int, n: int, expert: int = expert) -> object:
            sizes = {"K": k, "N": n, "bits": 4, "block_size": 32, "accuracy_level": 4}
            return helper.make_node(
                "MatMulNBits",
                [x, f"{name}{expert}", f"{name}s{expert}"],
                [f"{out}{expert}"],
                domain="com.microsoft",
                **sizes,
            )

        hidden, inter, e = setting.shape.hidden, setting.shape.inter, expert
        nodes += [product("gate", "x", "g", hidden, inter), product("up", "x", "u", hidden, inter)]
        nodes += [
            helper.make_node("Sigmoid", [f"g{e}"], [f"s{e}"]),
            helper.make_node("Mul", [f"g{e}", f"s{e}"], [f"a{e}"]),
        ]
        nodes += [helper.make_node("Mul", [f"a{e}", f"u{e}"], [f"h{e}"]), product("down", f"h{e}", "d", inter, hidden)]
    nodes.append(helper.make_node("Mean", [f"d{e}" for e in range(setting.shape.k)], ["y"]))
    sides = [helper.make_tensor_value_info(n, TensorProto.FLOAT, ["m", setting.shape.hidden]) for n in ("x", "y")]
    graph = helper.make_graph(nodes, "layer", sides[:1], sides[1:], tensors)
    opsets = [helper.make_opsetid("", 20), helper.make_opsetid("com.microsoft", 1)]
    serialised: bytes = helper.make_model(graph, opset_imports=opsets, ir_version=10).SerializeToString()
    return serialised


def _nbits(weight: torch.Tensor) -> tuple[np.ndarray, np.ndarray]:
    """codes uint8 [N, K / 32, 16] (two a byte), scales float32 [N * K / 32]; the zero point is 8."""
    groups = weight.view(weight.shape[0], -1, 32)
    extreme = groups.gather(2, groups.abs().argmax(2, keepdim=True)).squeeze(2)
    scales = extreme / -8
    codes = ((groups / scales.unsqueeze(2)).round().clamp(-8, 7) + 8).to(torch.uint8)
    return (codes[:, :, ::2] | (codes[:, :, 1::2] << 4)).numpy(), scales.flatten().numpy()


def llama_cpp(kind: str) -> Callable[[Setting], Callable[[int], Call]]:
    """llama.cpp's CPU backend; kind "q4_0" (repacked) or "q8_0"."""

    def make(setting: Setting) -> Callable[[int], Call]:
        return ggml.make_layers(setting, kind)

    return make


def kt_kernel(dtype: str) -> Callable[[Setting], Callable[[int], Call]]:
    """KTransformers' kernels; dtype "int4" or "bfloat16"."""

    def make(setting: Setting) -> Callable[[int], Call]:
        return kt.make_layers(setting, dtype)

    return make
