"""The onnx backend against the reference: dtypes, activations, odd shapes; its cache, threads and refusals."""

import gc
import importlib.util
import threading
import weakref

import numpy as np
import onnx
import onnx.reference
import pytest
import torch

import cpu_kernels as ck
from cpu_kernels.backends import onnx_backend, onnx_graph, prepared
from cpu_kernels.backends.onnx_backend import OnnxBackend
from cpu_kernels.backends.onnx_graph import FLOAT_ACCURACY, build_model, export_expert

ACTIVATIONS = [
    ck.Activation("silu"),
    ck.Activation("silu", alpha=1.702, gate_max=0.7, up_limit=0.7, up_offset=1.0),
    ck.Activation("gelu", act_max=0.4),
    ck.Activation("gelu_tanh"),
    ck.Activation("relu"),
    ck.Activation("relu2", gated=False),
    ck.Activation("gelu", gated=False),
    ck.Activation("sigmoid"),
    ck.Activation("identity", gated=False),
]
SHAPES = [(64, 64), (70, 50), (33, 100), (96, 7), (1, 1), (160, 33)]


@pytest.fixture(scope="module")
def backend() -> OnnxBackend:
    return OnnxBackend(2)


@pytest.fixture(scope="module")
def reference() -> ck.CpuBackend:
    return ck.get_backend("reference")


def assert_parity(spec: ck.ExpertSpec, result: np.ndarray, expected: np.ndarray) -> None:
    assert np.array_equal(np.isnan(result), np.isnan(expected))  # rows of no expert are untouched
    error = ck.relative_error(torch.from_numpy(np.nan_to_num(result)), torch.from_numpy(np.nan_to_num(expected)))
    assert error <= ck.tolerance(spec), error


@pytest.mark.parametrize("dtype", ck.DTYPES)
@pytest.mark.parametrize(("hidden", "inter"), SHAPES)
def test_parity_over_shapes(backend, reference, make_pool, route, dtype, hidden, inter) -> None:
    spec = ck.ExpertSpec(hidden, inter, dtype, has_bias=hidden % 2 == 1)
    pool = make_pool(spec)
    for n_tokens in (0, 1, 5):
        dispatch, x = route(n_tokens, 3, 4, hidden)
        assert_parity(spec, pool.run(backend, dispatch, x), pool.run(reference, dispatch, x))


@pytest.mark.parametrize("dtype", ["float32", "int4"])
@pytest.mark.parametrize("activation", ACTIVATIONS, ids=str)
@pytest.mark.parametrize("bias", [False, True])
def test_parity_over_activations(backend, reference, make_pool, route, dtype, activation, bias) -> None:
    spec = ck.ExpertSpec(72, 40, dtype, activation, bias)
    pool = make_pool(spec, n_experts=2)
    dispatch, x = route(4, 2, 2, 72)
    assert_parity(spec, pool.run(backend, dispatch, x), pool.run(reference, dispatch, x))


@pytest.mark.parametrize("dtype", ck.DTYPES)
def test_an_exported_file_passes_the_checker_and_is_exact_without_rounded_activations(
    make_pool, tmp_path, dtype
) -> None:
    import onnxruntime

    spec = ck.ExpertSpec(
        70, 50, dtype, ck.Activation("silu", alpha=1.702, gate_max=1.0, up_limit=1.0, up_offset=1.0), True
    )
    record = make_pool(spec, n_experts=1).memory[0]
    export_expert(spec, record, tmp_path / "expert.onnx", FLOAT_ACCURACY)
    onnx.checker.check_model(onnx.load(tmp_path / "expert.onnx"))
    x = np.random.default_rng(1).standard_normal((3, 70)).astype(np.float32)
    session = onnxruntime.InferenceSession(tmp_path / "expert.onnx", providers=["CPUExecutionProvider"])
    (y,) = session.run(["y"], {"x": x})
    expected = ck.reference_ffn(spec, ck.unpack_expert(spec, record), torch.from_numpy(x))
    assert ck.relative_error(torch.from_numpy(y), expected) < 2e-6


def test_float_graphs_are_standard_onnx(make_pool) -> None:
    spec = ck.ExpertSpec(32, 48, "bfloat16", ck.Activation("gelu_tanh"), True)
    pool = make_pool(spec, n_experts=1)
    x = np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)
    (y,) = onnx.reference.ReferenceEvaluator(build_model(spec, pool.memory[0])).run(["y"], {"x": x})
    expected = ck.reference_ffn(spec, ck.unpack_expert(spec, pool.memory[0]), torch.from_numpy(x))
    assert ck.relative_error(torch.from_numpy(y), expected) < 2e-6


@pytest.mark.parametrize(
    ("dtype", "op", "bits"), [("int4", "MatMulNBits", 4), ("int8", "MatMulNBits", 8), ("float32", "Gemm", 0)]
)
def test_weights_keep_their_size(make_pool, dtype, op, bits) -> None:
    spec = ck.ExpertSpec(256, 192, dtype)
    model = build_model(spec, make_pool(spec, n_experts=1).memory[0])
    products = [node for node in model.graph.node if node.op_type == op]
    assert len(products) == 3
    if bits:
        attributes = {a.name: a.i for node in products[:1] for a in node.attribute}
        assert (attributes["bits"], attributes["block_size"], attributes["K"], attributes["N"]) == (bits, 32, 256, 192)
    assert model.ByteSize() == pytest.approx(onnx_graph.graph_bytes(spec), rel=0.03)


def test_results_do_not_depend_on_threads(make_pool, route) -> None:
    spec = ck.ExpertSpec(96, 80, "int4")
    pool = make_pool(spec, n_experts=6)
    dispatch, x = route(9, 3, 6, 96)
    assert np.array_equal(pool.run(OnnxBackend(1), dispatch, x), pool.run(OnnxBackend(2), dispatch, x), equal_nan=True)


def test_two_threads_use_one_backend(backend, reference, make_pool, route) -> None:
    spec = ck.ExpertSpec(64, 96, "int8")
    pool = make_pool(spec, n_experts=6)
    work = [route(5, 2, 6, 64, seed) for seed in range(6)]
    results: dict[int, np.ndarray] = {}

    def run(i: int) -> None:
        results[i] = pool.run(backend, *work[i])

    threads = [threading.Thread(target=run, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    for i in range(6):
        assert_parity(spec, results[i], pool.run(reference, *work[i]))


def test_rewritten_records_are_noticed(backend, reference, make_pool, route) -> None:
    spec = ck.ExpertSpec(64, 64, "int4")
    pool, other = make_pool(spec, seed=1), make_pool(spec, seed=2)
    dispatch, x = route(3, 2, 4, 64)
    first = pool.run(backend, dispatch, x)
    pool.memory[:] = other.memory
    second = pool.run(backend, dispatch, x)
    assert not np.array_equal(first, second, equal_nan=True)
    assert_parity(spec, second, pool.run(reference, dispatch, x))


def test_sessions_are_shared_bounded_and_freed(make_pool, route, monkeypatch) -> None:
    monkeypatch.setattr(prepared, "_shared", weakref.WeakValueDictionary())
    spec = ck.ExpertSpec(64, 64, "int8")
    monkeypatch.setenv(onnx_backend.ENV_CACHE_GIB, str(2.5 * onnx_graph.graph_bytes(spec) / 2**30))
    one, two = OnnxBackend(1), OnnxBackend(1)
    assert one.sessions is two.sessions
    pool = make_pool(spec, n_experts=4)
    dispatch, x = route(8, 4, 4, 64)
    pool.run(one, dispatch, x)
    assert len(one.sessions) == 2
    assert one.sessions.used_bytes <= one.sessions.limit_bytes
    del one, two
    gc.collect()
    assert not prepared._shared


def test_custom_activations_and_giants_are_refused(backend, make_pool, route) -> None:
    custom = ck.ExpertSpec(8, 8, "float32", ck.Activation("custom", custom=lambda x: x[..., :8]))
    assert "torch backend" in backend.supports(custom)
    with pytest.raises(ck.BackendError, match="'onnx' cannot run float32 experts here: a custom activation"):
        make_pool(custom).run(backend, *route(2, 2, 4, 8))
    with pytest.raises(ck.BackendError, match="no ONNX graph of float32 experts"):
        build_model(custom, np.zeros(custom.record_bytes, np.uint8))
    assert "2 GiB" in backend.supports(ck.ExpertSpec(16384, 16384, "float32"))
    assert backend.supports(ck.ExpertSpec(16384, 16384, "int4")) is None


def test_errors_of_one_expert_arrive_and_nan_is_named(backend, make_pool, route) -> None:
    spec = ck.ExpertSpec(64, 32, "int4")
    dispatch, x = route(4, 3, 4, 64)
    x[2, 5] = np.nan
    with pytest.raises(ck.ActivationValueError, match=r"hidden\[2\]"):
        make_pool(spec).run(backend, dispatch, x)


def test_without_onnxruntime_the_extra_is_named(monkeypatch) -> None:
    found = importlib.util.find_spec
    monkeypatch.setattr(onnx_backend, "find_spec", lambda name: None if name == "onnxruntime" else found(name))
    with pytest.raises(ck.BackendError, match=r"needs onnxruntime.*pip install 'hybrimoe\[onnx\]'"):
        ck.get_backend("onnx")


def test_a_graph_that_onnxruntime_refuses_is_reported(monkeypatch, make_pool) -> None:
    spec = ck.ExpertSpec(32, 32, "int4")
    broken = build_model(spec, make_pool(spec).memory[0])
    broken.graph.node[0].op_type = "MatMulNoBits"
    monkeypatch.setattr(onnx_backend, "build_model", lambda *_: broken)
    with pytest.raises(ck.BackendError, match=r"ONNX Runtime .* does not take the graph of int4 experts \(32 x 32\)"):
        onnx_backend.open_session(spec, make_pool(spec).memory[0])


def test_a_model_of_transformers_runs_on_it() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    import hybrimoe

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()
    ids = torch.arange(7).unsqueeze(0)
    settings = {"accelerator": "none", "expert_dtype": "float32", "config": {"cpu": {"backend": "onnx"}}}
    with torch.no_grad():
        plain = model(ids).logits
        injection = hybrimoe.inject(model, **settings)
        mixed = model(ids).logits
        injection.restore()
    torch.testing.assert_close(mixed, plain, rtol=1e-4, atol=1e-5)
