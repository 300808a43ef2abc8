"""The ipex backend against the reference. Not collected by default: tests/ipex/run.sh runs it beside the extension."""

import gc
import weakref

import numpy as np
import pytest
import torch

import cpu_kernels as ck
from cpu_kernels.backends import ipex_backend, prepared
from cpu_kernels.backends.ipex_backend import BFLOAT16_TOLERANCE, IpexBackend

ACTIVATIONS = [
    ck.Activation("silu", alpha=1.702, gate_max=0.7, up_limit=0.7, up_offset=1.0),
    ck.Activation("gelu", act_max=0.4),
    ck.Activation("relu2", gated=False),
    ck.Activation("custom", custom=lambda both: both[..., :40] * torch.tanh(both[..., 40:])),
]


@pytest.fixture(scope="module")
def backend() -> IpexBackend:
    return IpexBackend(2)


@pytest.fixture(params=["float32", "bfloat16"])
def dtype(request, backend) -> str:
    if request.param == "bfloat16" and not backend.has_bfloat16:
        pytest.skip("this CPU has neither AVX512-BF16 nor AMX")
    return request.param


def assert_parity(spec: ck.ExpertSpec, result: np.ndarray, expected: np.ndarray) -> None:
    assert np.array_equal(np.isnan(result), np.isnan(expected))
    error = ck.relative_error(torch.from_numpy(np.nan_to_num(result)), torch.from_numpy(np.nan_to_num(expected)))
    assert error <= (BFLOAT16_TOLERANCE if spec.dtype == "bfloat16" else ck.tolerance(spec)), error


@pytest.mark.parametrize(("hidden", "inter"), [(64, 64), (70, 50), (33, 100), (96, 7), (1, 1), (1024, 704)])
def test_parity_over_shapes(backend, make_pool, route, dtype, hidden, inter) -> None:
    spec = ck.ExpertSpec(hidden, inter, dtype, has_bias=hidden % 2 == 1)
    pool = make_pool(spec)
    for n_tokens in (0, 1, 5, 64):
        dispatch, x = route(n_tokens, 3, 4, hidden)
        expected = pool.run(ck.get_backend("reference"), dispatch, x)
        assert_parity(spec, pool.run(backend, dispatch, x), expected)


@pytest.mark.parametrize("activation", ACTIVATIONS, ids=lambda a: a.kind)
@pytest.mark.parametrize("bias", [False, True])
def test_parity_over_activations(backend, make_pool, route, dtype, activation, bias) -> None:
    spec = ck.ExpertSpec(72, 40, dtype, activation, bias)
    pool = make_pool(spec, n_experts=2)
    dispatch, x = route(4, 2, 2, 72)
    assert_parity(spec, pool.run(backend, dispatch, x), pool.run(ck.get_backend("reference"), dispatch, x))


def test_rewritten_records_are_noticed_and_experts_freed(make_pool, route, monkeypatch) -> None:
    monkeypatch.setattr(prepared, "_shared", weakref.WeakValueDictionary())
    backend, spec = IpexBackend(1), ck.ExpertSpec(64, 64, "float32")
    pool, other = make_pool(spec, seed=1), make_pool(spec, seed=2)
    dispatch, x = route(3, 2, 4, 64)
    pool.run(backend, dispatch, x)
    pool.memory[:] = other.memory
    assert_parity(spec, pool.run(backend, dispatch, x), other.run(ck.get_backend("reference"), dispatch, x))
    assert backend.experts.used_bytes == len(backend.experts) * spec.record_bytes
    del backend
    gc.collect()
    assert not prepared._shared


def test_threads_are_put_back(backend, make_pool, route) -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    seen: list[int] = []
    spec = ck.ExpertSpec(
        8, 8, "float32", ck.Activation("custom", custom=lambda x: seen.append(torch.get_num_threads()) or x[..., :8])
    )
    make_pool(spec).run(backend, *route(2, 2, 4, 8))
    assert set(seen) == {backend.n_threads}
    assert torch.get_num_threads() == 1
    torch.set_num_threads(before)


def test_quantised_experts_are_refused(backend, make_pool, route) -> None:
    for dtype in ("int8", "int4"):
        with pytest.raises(ck.BackendError, match=f"'ipex' cannot run {dtype} experts here: .*use numba"):
            make_pool(ck.ExpertSpec(8, 8, dtype)).run(backend, *route(2, 2, 4, 8))


def test_bfloat16_is_refused_without_the_instructions(monkeypatch, make_pool, route) -> None:
    monkeypatch.setattr(ipex_backend.load_ipex()._C, "onednn_has_bf16_support", lambda: False)
    backend = IpexBackend(1)
    assert backend.supports(ck.ExpertSpec(8, 8, "float32")) is None
    with pytest.raises(ck.BackendError, match="bfloat16 needs AVX512-BF16 or AMX"):
        make_pool(ck.ExpertSpec(8, 8, "bfloat16")).run(backend, *route(2, 2, 4, 8))


def test_a_model_of_transformers_runs_on_it() -> None:
    from transformers import MixtralConfig, MixtralForCausalLM

    import hybrimoe

    torch.manual_seed(0)
    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "vocab_size": 64}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "num_local_experts": 4}
    model = MixtralForCausalLM(MixtralConfig(**sizes, **heads)).eval()
    ids = torch.arange(7).unsqueeze(0)
    with torch.no_grad():
        plain = model(ids).logits
        injection = hybrimoe.inject(
            model, accelerator="none", expert_dtype="float32", config={"cpu": {"backend": "ipex"}}
        )
        mixed = model(ids).logits
        injection.restore()
    torch.testing.assert_close(mixed, plain, rtol=1e-4, atol=1e-5)
