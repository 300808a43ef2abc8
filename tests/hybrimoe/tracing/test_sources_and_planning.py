"""Traces by name, their shapes, the calibration split; and what fits a machine."""

import numpy as np
import pytest

from hybrimoe.errors import BudgetError, ConfigError
from hybrimoe.machine.profiles import open_hardware, open_shape
from hybrimoe.tracing.sources import DEMO_MODEL, DEMO_TRACE, open_trace, split
from hybrimoe.tracing.study.planning import GIB, dense_bytes, fit
from scheduler.traces.synthetic import generate
from scheduler.traces.trace import Trace


def test_the_shipped_trace_is_the_demo_models():
    found = open_trace(None, None)
    assert found.shape.name == "demo"
    assert found.trace.has_phase("prefill")
    assert found.trace.has_phase("decode")
    assert found.trace.predicted_ids is not None
    assert (found.trace.n_layers, found.trace.n_experts, found.trace.top_k) == (
        found.shape.n_layers, found.shape.n_experts, found.shape.top_k,
    )  # fmt: skip
    assert DEMO_TRACE.stat().st_size < 1 << 20


def test_a_file_of_the_demo_models_routing_is_the_demo_models(tmp_path):
    Trace.load(DEMO_TRACE).head(40).save(tmp_path / "part.npz")
    assert open_trace(str(tmp_path / "part.npz"), None).shape == open_trace("demo", None).shape


def test_a_shape_without_a_trace_gets_a_synthetic_one():
    found = open_trace(None, "mixtral-8x7b")
    assert (found.trace.n_layers, found.trace.n_experts) == (32, 8)
    assert "synthetic" in found.notes[0]


def test_the_shape_is_found_by_the_traces_model(tmp_path):
    trace = generate(4, 8, 2, 20, recall=None)
    named = Trace(trace.expert_ids, trace.sequence, trace.phase, {**trace.meta, "model": "allenai/OLMoE-1B-7B-0125"})
    named.save(tmp_path / "a.npz")
    found = open_trace(str(tmp_path / "a.npz"), None)
    assert found.shape.name == "olmoe-1b-7b"
    assert "no routing weights" in found.notes[1]
    mine = Trace(trace.expert_ids, trace.sequence, trace.phase, {**trace.meta, "model": str(DEMO_MODEL)})
    mine.save(tmp_path / "mine.npz")
    assert open_trace(str(tmp_path / "mine.npz"), None).shape == open_shape(str(DEMO_MODEL))
    trace.save(tmp_path / "weighted.npz")
    assert not any("weights" in note for note in open_trace(str(tmp_path / "weighted.npz"), "olmoe-1b-7b").notes)
    trace.save(tmp_path / "b.npz")
    with pytest.raises(ConfigError, match="--model-shape"):
        open_trace(str(tmp_path / "b.npz"), None)


def test_split_keeps_sequences_apart():
    trace = generate(2, 8, 2, 10, 8, recall=None)
    calibration, evaluation = split(trace)
    assert set(np.unique(calibration.sequence)) & set(np.unique(evaluation.sequence)) == set()
    assert (len(calibration.sequence_spans()), len(evaluation.sequence_spans())) == (2, 6)
    single = generate(2, 8, 2, 40, 1, recall=None)
    assert [part.n_tokens for part in split(single)] == [10, 30]


def room(shape, **changed):
    arguments = {
        "context": 4096,
        "expert_dtype": "int4",
        "dense_dtype": "int8",
        "device_bytes": 8 * GIB,
        "host_bytes": 32 * GIB,
    }
    return fit(shape, open_hardware("laptop"), **{**arguments, **changed})


def test_what_fits_adds_up():
    shape = open_shape("qwen3-30b-a3b")
    found = room(shape)
    used = found.dense_bytes + found.kv_bytes + found.device_experts * found.expert_bytes
    kept_free = found.kept_free_bytes
    assert (found.unpack_bytes, kept_free) == (5 * 4 * 2048 * 768, found.unpack_bytes + GIB // 2)
    assert kept_free == found.unpack_bytes + found.workspace_bytes + found.graph_bytes + found.reserve_bytes
    assert found.workspace_bytes == 2 * (32 << 20), "of the cards that take most"
    assert 0 < found.graph_bytes < GIB // 8
    assert used + kept_free <= 8 * GIB < used + kept_free + found.expert_bytes
    assert found.host_experts == found.n_experts
    assert found.disk_experts == 0
    assert room(shape, host_bytes=10 * GIB).disk_experts > 0
    assert room(shape, device_bytes=100 * GIB).device_experts == found.n_experts
    assert room(shape, context=8192).kv_bytes == 2 * found.kv_bytes
    assert dense_bytes(shape, "bfloat16") == pytest.approx(2 * 1.54e9, rel=0.02)


def test_a_large_expert_that_a_prompt_unpacks_takes_slots():
    found = room(open_shape("mixtral-8x7b"), device_bytes=12 * GIB)
    assert found.unpack_bytes == 5 * 4 * 4096 * 14336
    used = found.dense_bytes + found.kv_bytes + found.device_experts * found.expert_bytes
    assert used + found.kept_free_bytes <= 12 * GIB


def test_what_does_not_fit_is_named():
    with pytest.raises(BudgetError, match="shorten --context"):
        room(open_shape("mixtral-8x7b"), context=32_768, device_bytes=4 * GIB)
    with pytest.raises(ConfigError, match="own context of 32768 tokens"):
        room(open_shape("mixtral-8x7b"), context=10**6)
