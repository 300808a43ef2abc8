"""A two-layer net as an ONNX file, and a scorer that runs it: ONNX Runtime, else onnx' reference evaluator."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from hybrimoe.errors import CheckpointError

Floats = NDArray[np.float32]

OPSET = 17
IR_VERSION = 8
INPUT, OUTPUT = "features", "score"


def write_net(
    path: Path, weights: Sequence[Floats], features: Sequence[str], target: str, facts: Mapping[str, object] = {}
) -> None:
    """Write sigmoid(relu(x w1 + b1) w2 + b2) and check the file. ``facts``: kept in it, as text."""
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    names = ("w1", "b1", "w2", "b2")
    nodes = [
        helper.make_node("Gemm", [INPUT, "w1", "b1"], ["hidden"]),
        helper.make_node("Relu", ["hidden"], ["active"]),
        helper.make_node("Gemm", ["active", "w2", "b2"], ["logit"]),
        helper.make_node("Sigmoid", ["logit"], [OUTPUT]),
    ]
    graph = helper.make_graph(
        nodes,
        f"hybrimoe-{target}",
        [helper.make_tensor_value_info(INPUT, TensorProto.FLOAT, ["n", weights[0].shape[0]])],
        [helper.make_tensor_value_info(OUTPUT, TensorProto.FLOAT, ["n", weights[2].shape[1]])],
        [
            numpy_helper.from_array(np.ascontiguousarray(array), name)
            for name, array in zip(names, weights, strict=True)
        ],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", OPSET)], producer_name="hybrimoe")
    model.ir_version = IR_VERSION
    told = {name: str(value) for name, value in facts.items()}
    helper.set_model_props(model, {"target": target, "features": ",".join(features), **told})
    onnx.checker.check_model(model, full_check=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(model.SerializeToString())


class OnnxNet:
    """float32 [n, F] -> float32 [n, K]. ``properties``: what ``write_net`` kept in the file.

    ``runtime`` is "onnxruntime" where it is installed, else "onnx reference evaluator". Raises CheckpointError for a
    file that is no such net.
    """

    def __init__(self, path: Path) -> None:
        import onnx

        try:
            model = onnx.load(str(path))
            onnx.checker.check_model(model)
        except (OSError, ValueError, onnx.checker.ValidationError) as error:
            raise CheckpointError(f"{path} is no ONNX predictor: {error}") from error
        except Exception as error:  # protobuf's DecodeError has no public root
            raise CheckpointError(f"{path} is no ONNX predictor: {error}") from error
        properties = {entry.key: entry.value for entry in model.metadata_props}
        if "features" not in properties:
            raise CheckpointError(f"{path} is an ONNX model, but not one that `hybrimoe trace train` wrote")
        self.properties = properties
        self.n_inputs = int(model.graph.input[0].type.tensor_type.shape.dim[1].dim_value)
        self.features = tuple(properties["features"].split(","))
        self.target = properties["target"]
        self.runtime, self._run = _runtime(model)

    def run(self, features: Floats) -> Floats:
        """All outputs."""
        (scores,) = self._run(None, {INPUT: np.ascontiguousarray(features, dtype=np.float32)})
        return np.asarray(scores, np.float32)


class OnnxScorer(OnnxNet):
    """float32 [n, F] -> float32 [n]; what the planner's ``scorer`` and ``prefetch_scorer`` take."""

    def __call__(self, features: Floats) -> Floats:
        return self.run(features)[:, 0]


def _runtime(model: Any) -> tuple[str, Any]:
    try:
        import onnxruntime
    except ImportError:
        from onnx.reference import ReferenceEvaluator

        return "onnx reference evaluator", ReferenceEvaluator(model).run
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = 1  # a net of 16 units: threads cost more than they give
    session = onnxruntime.InferenceSession(model.SerializeToString(), options, providers=["CPUExecutionProvider"])
    return "onnxruntime", session.run
