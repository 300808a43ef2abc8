"""An expert as an ONNX graph, with its weights inside: ``x`` float32 [n_tokens, H] -> ``y`` float32 [n_tokens, H].

int4 and int8 experts keep their codes and scales: ``com.microsoft.MatMulNBits`` (a contributed operator of ONNX
Runtime) with blocks of 32 columns and the default zero points 8 and 128 says exactly what a record says. float32 and
bfloat16 experts become float32 ``Gemm`` nodes. Everything else is standard ONNX, opset 20 (the first with ``Gelu``).
Routing weights are not part of the graph. `onnx` is imported when a graph is made.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from cpu_kernels.errors import BackendError
from cpu_kernels.format.layout import GROUP, OFFSET, is_quantised, padded
from cpu_kernels.format.pack import deinterleave, record_tensor, unpack_codes, unpack_expert
from cpu_kernels.format.spec import Activation, ExpertSpec

if TYPE_CHECKING:
    import onnx

OPSET = 20
IR_VERSION = 10  # of onnx 1.16; read by ONNX Runtime 1.18 and later
# MatMulNBits' accuracy_level: 4 rounds activations to int8 per block (fast, like our own kernels), 1 keeps float32.
FAST_ACCURACY, FLOAT_ACCURACY = 4, 1
MAX_GRAPH_BYTES = 2**31 - 2**20  # protobuf's limit for one message, less room for everything but weights
Codes = tuple[np.ndarray, np.ndarray]


def unsupported(spec: ExpertSpec) -> str | None:
    """None, or why an expert of `spec` cannot be a graph."""
    if spec.activation.kind == "custom":
        return "a custom activation is Python code, which ONNX cannot hold; the torch backend runs it"
    if graph_bytes(spec) > MAX_GRAPH_BYTES:
        return f"an ONNX graph with its weights inside ends at 2 GiB, this expert takes {graph_bytes(spec)} bytes"
    return None


def graph_bytes(spec: ExpertSpec) -> int:
    """Bytes of the weights in a graph: float32 for bfloat16 experts too; float32 scales where a record has bfloat16."""
    n_weights = spec.hidden * spec.inter * (3 if spec.activation.gated else 2)
    if not is_quantised(spec.dtype):
        return 4 * n_weights
    columns = padded(spec.hidden) * padded(spec.inter) * (3 if spec.activation.gated else 2)
    return columns * _graph_bits(spec.dtype) // 8 + columns // GROUP * 4


def _graph_bits(dtype: str) -> int:
    """Bits of a code in a graph, which knows 4 and 8: those of other dtypes become 8-bit ones."""
    return 4 if dtype == "int4" else 8


def export_expert(
    spec: ExpertSpec, record: np.ndarray, path: str | Path, accuracy_level: int = FAST_ACCURACY
) -> onnx.ModelProto:
    """Writes the expert packed in `record` (uint8 [spec.record_bytes]) to `path` and returns the checked model.

    int4 and int8 graphs need ONNX Runtime to run; float32 and bfloat16 graphs run wherever ONNX does.
    Raises BackendError for a spec that has no graph or without the package `onnx`; OSError if `path` is not writable.
    """
    model = build_model(spec, record, accuracy_level)
    Path(path).write_bytes(model.SerializeToString())
    return model


def build_model(spec: ExpertSpec, record: np.ndarray, accuracy_level: int = FAST_ACCURACY) -> onnx.ModelProto:
    """The model of the expert packed in `record`, passed by onnx.checker; see `export_expert`."""
    reason = unsupported(spec)
    if reason is not None:
        raise BackendError(f"no ONNX graph of {spec.dtype} experts: {reason}")
    try:
        import onnx
    except ImportError as error:
        raise BackendError("ONNX graphs need the package onnx: pip install 'hybrimoe[onnx]'") from error
    helper = onnx.helper
    graph = _Graph(onnx, accuracy_level)
    _expert(graph, spec, record)
    model = helper.make_model(
        helper.make_graph(
            graph.nodes,
            "expert",
            [helper.make_tensor_value_info("x", onnx.TensorProto.FLOAT, ["n_tokens", spec.hidden])],
            [helper.make_tensor_value_info("y", onnx.TensorProto.FLOAT, ["n_tokens", spec.hidden])],
            graph.initializers,
        ),
        opset_imports=[helper.make_opsetid("", OPSET), helper.make_opsetid("com.microsoft", 1)],
        ir_version=IR_VERSION,
        producer_name="hybrimoe",
    )
    onnx.checker.check_model(model)
    return model


class _Graph:
    """Nodes and initializers in the making; values are named by what they are."""

    def __init__(self, onnx_module: Any, accuracy_level: int) -> None:
        self.onnx, self.accuracy_level = onnx_module, accuracy_level
        self.nodes: list[Any] = []
        self.initializers: list[Any] = []

    def node(self, op: str, inputs: Sequence[str], output: str, domain: str = "", **attributes: Any) -> str:
        self.nodes.append(
            self.onnx.helper.make_node(op, inputs, [output], name=f"{output}.{op}", domain=domain, **attributes)
        )
        return output

    def constant(self, name: str, value: np.ndarray) -> str:
        self.initializers.append(self.onnx.numpy_helper.from_array(np.ascontiguousarray(value), name))
        return name

    def scalar(self, name: str, value: float) -> str:
        return self.constant(name, np.array(value, np.float32))

    def dense(self, x: str, weight: torch.Tensor, bias: torch.Tensor | None, output: str) -> str:
        """output = x @ weight.T + bias, in float32."""
        inputs = [x, self.constant(f"{output}.weight", weight.float().numpy())]
        if bias is not None:
            inputs.append(self.constant(f"{output}.bias", bias.numpy()))
        return self.node("Gemm", inputs, output, transB=1)

    def quantised(self, x: str, codes: Codes, bits: int, shape: tuple[int, int], bias: Any, output: str) -> str:
        """The same with unsigned codes and scales; shape: rows and columns of the matrix."""
        product = output if bias is None else f"{output}.product"
        inputs = [x, self.constant(f"{output}.codes", codes[0]), self.constant(f"{output}.scales", codes[1])]
        attributes = {"N": shape[0], "K": shape[1], "bits": bits, "block_size": GROUP}
        attributes["accuracy_level"] = self.accuracy_level
        self.node("MatMulNBits", inputs, product, domain="com.microsoft", **attributes)
        return (
            product
            if bias is None
            else self.node("Add", [product, self.constant(f"{output}.bias", bias.numpy())], output)
        )


def _expert(graph: _Graph, spec: ExpertSpec, record: np.ndarray) -> None:
    weights = unpack_expert(spec, record)
    if is_quantised(spec.dtype):
        codes, bits = _expert_codes(spec, record), _graph_bits(spec.dtype)

        def product(x: str, name: str, bias: torch.Tensor | None, output: str) -> str:
            shape = (spec.hidden, spec.inter) if name == "down" else (spec.inter, spec.hidden)
            return graph.quantised(x, codes[name], bits, shape, bias, output)
    else:

        def product(x: str, name: str, bias: torch.Tensor | None, output: str) -> str:
            return graph.dense(x, getattr(weights, name), bias, output)

    gate = product("x", "gate", weights.gate_bias, "gate") if spec.activation.gated else None
    inner = _activation(graph, spec.activation, gate, product("x", "up", weights.up_bias, "up"))
    product(inner, "down", weights.down_bias, "y")


def _expert_codes(spec: ExpertSpec, record: np.ndarray) -> dict[str, Codes]:
    """Codes and scales of gate, up and down in the layout of MatMulNBits."""
    data, layout, gated = record_tensor(spec.record_bytes, record), spec.layout, spec.activation.gated
    hidden, inter = layout.hidden_padded, layout.inter_padded
    first = unpack_codes(data[: layout.down_offset], 2 * inter if gated else inter, hidden, spec.dtype)
    parts = {"down": unpack_codes(data[layout.down_offset : layout.down_end], hidden, inter, spec.dtype)}
    if gated:
        (gate, up), (gate_scales, up_scales) = deinterleave(first[0]), deinterleave(first[1])
        parts |= {"gate": (gate, gate_scales), "up": (up, up_scales)}
    else:
        parts["up"] = first
    return {
        name: _blocks(*part, *((spec.hidden, spec.inter) if name == "down" else (spec.inter, spec.hidden)), spec.dtype)
        for name, part in parts.items()
    }


def _blocks(codes: torch.Tensor, scales: torch.Tensor, rows: int, columns: int, dtype: str) -> Codes:
    """Padded codes [N', K'] and scales [N', K' / 32] -> uint8 [N, blocks, 32 * bits / 8] (low nibble first) and
    float32 [N, blocks], for the blocks of 32 columns that hold `columns`."""
    n_blocks = -(-columns // GROUP)
    kept = codes[:rows, : n_blocks * GROUP].reshape(rows, n_blocks, GROUP)
    if _graph_bits(dtype) == 8:
        kept = kept + (OFFSET["int8"] - OFFSET[dtype])
    else:
        kept = kept[:, :, 0::2] | (kept[:, :, 1::2] << 4)
    return kept.contiguous().numpy(), scales[:rows, :n_blocks].float().contiguous().numpy()


def _activation(graph: _Graph, activation: Activation, gate: str | None, up: str) -> str:
    """`cpu_kernels.format.reference.apply_activation` as nodes; returns the name of the intermediate."""
    if gate is None:
        return _act(graph, activation, up)
    if activation.gate_max is not None:
        gate = graph.node("Clip", [gate, "", graph.scalar("gate_max", activation.gate_max)], "gate.clipped")
    value = _act(graph, activation, gate)
    if activation.act_max is not None:
        value = graph.node("Clip", [value, "", graph.scalar("act_max", activation.act_max)], "act.clipped")
    if activation.up_limit is not None:
        limits = [graph.scalar("up_min", -activation.up_limit), graph.scalar("up_max", activation.up_limit)]
        up = graph.node("Clip", [up, *limits], "up.clipped")
    if activation.up_offset:
        up = graph.node("Add", [up, graph.scalar("up_offset", activation.up_offset)], "up.shifted")
    return graph.node("Mul", [value, up], "inner")


def _act(graph: _Graph, activation: Activation, x: str) -> str:
    match activation.kind:
        case "silu":
            scaled = x
            if activation.alpha != 1.0:
                scaled = graph.node("Mul", [x, graph.scalar("alpha", activation.alpha)], "act.scaled")
            return graph.node("Mul", [x, graph.node("Sigmoid", [scaled], "act.sigmoid")], "act")
        case "gelu" | "gelu_tanh":
            return graph.node("Gelu", [x], "act", approximate="tanh" if activation.kind == "gelu_tanh" else "none")
        case "relu":
            return graph.node("Relu", [x], "act")
        case "relu2":
            positive = graph.node("Relu", [x], "act.relu")
            return graph.node("Mul", [positive, positive], "act")
        case "sigmoid":
            return graph.node("Sigmoid", [x], "act")
        case _:
            return x
