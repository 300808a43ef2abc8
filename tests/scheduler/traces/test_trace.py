"""The trace format: round trip, steps, and an error for everything that is not a trace."""

import json

import numpy as np
import pytest

from scheduler.traces.trace import OPTIONAL_ARRAYS, Trace, TraceError

META = {"model": "toy", "num_layers": 2, "num_experts": 4, "top_k": 2}


def arrays(**changed):
    """Two sequences: 2 prefill + 1 decode tokens, 1 prefill + 2 decode tokens."""
    ids = np.array([[[0, 1], [2, 3]], [[1, 2], [3, -1]], [[0, 3], [1, 0]]] * 2, np.int16)
    plain = {
        "expert_ids": ids,
        "expert_weights": np.full(ids.shape, 0.5, np.float16),
        "sequence": np.array([0, 0, 0, 7, 7, 7], np.int32),
        "phase": np.array([0, 0, 1, 0, 1, 1], np.uint8),
        "meta": META,
    }
    return {**plain, **changed}


def written(tmp_path, **changed):
    data = {k: v for k, v in arrays(**changed).items() if v is not None}
    data["meta"] = np.array(data["meta"] if isinstance(data["meta"], str) else json.dumps(data["meta"]))
    path = tmp_path / "toy.npz"
    np.savez(path, **data)
    return path


def test_round_trip(tmp_path):
    optional = {
        "expert_weights": np.full((6, 2, 2), 0.5, np.float16),
        "predicted_ids": np.zeros((6, 2, 1, 3), np.int16),
        "embeddings": np.arange(18, dtype=np.float16).reshape(6, 3),
        "gate_scores": np.full((6, 2, 4), 0.25, np.float16),
        "token_ids": np.arange(6, dtype=np.int32),
        "hidden": np.arange(36, dtype=np.float16).reshape(6, 2, 3),
    }
    assert set(optional) == set(OPTIONAL_ARRAYS)
    trace = Trace(**arrays(**optional))
    trace.save(tmp_path / "a.npz")
    again = Trace.load(tmp_path / "a.npz")
    for name in ("expert_ids", "sequence", "phase", *optional):
        assert getattr(again, name).dtype == getattr(trace, name).dtype
        np.testing.assert_array_equal(getattr(again, name), getattr(trace, name))
        np.testing.assert_array_equal(getattr(again.tail(2), name), getattr(trace, name)[4:])
    assert again.meta == META
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_steps_are_prefills_then_single_tokens():
    steps = list(Trace(**arrays()).steps())
    assert [(s.sequence, s.phase, s.start, s.stop, s.position, s.first) for s in steps] == [
        (0, "prefill", 0, 2, 0, True),
        (0, "decode", 2, 3, 2, False),
        (7, "prefill", 3, 4, 0, True),
        (7, "decode", 4, 5, 1, False),
        (7, "decode", 5, 6, 2, False),
    ]
    decode = list(Trace(**arrays()).steps("decode"))
    assert [(s.start, s.first) for s in decode] == [(2, True), (4, True), (5, False)]
    chunked = list(Trace(**arrays()).steps("prefill", prefill_chunk=1))
    assert [(s.start, s.stop) for s in chunked] == [(0, 1), (1, 2), (3, 4)]


def test_cuts():
    trace = Trace(**arrays())
    assert trace.head(2).n_tokens == 2
    assert trace.tail(2).phase.tolist() == [1, 1]
    assert trace.select_sequences([7]).n_tokens == 3
    prompts = trace.as_prefill(3)
    assert [s.n_tokens for s in prompts.steps("prefill")] == [3, 3]
    with pytest.raises(TraceError, match="fewer than one prompt of 7"):
        trace.as_prefill(7)


def test_an_empty_phase_is_named(tmp_path):
    path = written(tmp_path, phase=np.ones(6, np.uint8))
    with pytest.raises(TraceError, match="no prefill tokens, only decode"):
        list(Trace.load(path).steps("prefill"))


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"expert_ids": np.full((6, 2, 2), 4, np.int16)}, r"must lie in -1..3, found 4..4"),
        ({"hidden": np.zeros((6, 3, 4), np.float16)}, r"hidden must be \[6, 2, width\], found \[6, 3, 4\]"),
        ({"hidden": np.full((6, 2, 4), np.nan, np.float16)}, "hidden hold NaN or infinite"),
        ({"expert_ids": np.full((6, 2, 2), -2, np.int16)}, r"must lie in -1..3"),
        ({"expert_ids": np.zeros((6, 3, 2), np.int16)}, r"expert_ids must be \[tokens, 2, 2\], found \[6, 3, 2\]"),
        ({"expert_ids": np.zeros((6, 2, 2), np.float32)}, "expert_ids must be int16, found float32"),
        ({"expert_ids": np.full((6, 2, 2), 70000, np.int64)}, "do not fit int16"),
        ({"expert_weights": np.zeros((6, 2, 1), np.float16)}, "expert_weights must be"),
        ({"expert_weights": np.full((6, 2, 2), np.nan, np.float16)}, "NaN"),
        ({"sequence": np.zeros(5, np.int32)}, "sequence must have 6 entries"),
        ({"sequence": np.array([0, 7, 0, 7, 7, 7], np.int32)}, "contiguous"),
        ({"phase": np.full(6, 2, np.uint8)}, "phase must be 0"),
        ({"phase": np.array([1, 0, 1, 0, 1, 1], np.uint8)}, "prefill tokens follow decode"),
        ({"sequence": None}, r"arrays \['sequence'\] are missing"),
        ({"meta": "{not json"}, "meta must be JSON"),
        ({"meta": "[1]"}, "meta must be a JSON object"),
        ({"meta": {**META, "top_k": 0}}, "top_k must be a positive integer"),
        ({"meta": {"model": "x"}}, "meta lacks"),
        ({"predicted_ids": np.full((6, 2, 1, 2), 9, np.int16)}, "predicted_ids must lie in"),
        ({"predicted_ids": np.zeros((6, 2, 2), np.int16)}, "horizon, p"),
        ({"embeddings": np.zeros((5, 3), np.float16)}, r"embeddings must be \[6, hidden\]"),
        ({"token_ids": np.zeros(5, np.int32)}, r"token_ids must have 6 entries, found \[5\]"),
        ({"embeddings": np.full((6, 3), np.nan, np.float16)}, "embeddings hold NaN"),
    ],
)
def test_bad_arrays_are_refused(tmp_path, changed, message):
    with pytest.raises(TraceError, match=message):
        Trace.load(written(tmp_path, **changed))


def test_empty_trace_is_refused(tmp_path):
    empty = {"expert_ids": np.zeros((0, 2, 2), np.int16), "expert_weights": None,
             "sequence": np.zeros(0, np.int32), "phase": np.zeros(0, np.uint8)}  # fmt: skip
    with pytest.raises(TraceError, match="is empty"):
        Trace.load(written(tmp_path, **empty))


@pytest.mark.parametrize("damage", ["truncated", "garbage", "flipped", "pickle", "npy", "missing", "folder"])
def test_files_that_are_no_trace_are_refused(tmp_path, damage):
    path = written(tmp_path)
    content = bytearray(path.read_bytes())
    if damage == "truncated":
        path.write_bytes(content[: len(content) // 2])
    elif damage == "garbage":
        path.write_bytes(b"\x00\x01 this is no archive")
    elif damage == "flipped":
        for i in range(60, len(content) - 200, 7):
            content[i] ^= 0xFF
        path.write_bytes(content)
    elif damage == "pickle":
        np.savez(path, expert_ids=np.array([{"a": 1}], dtype=object))
    elif damage == "npy":
        with path.open("wb") as handle:
            np.save(handle, np.zeros(3))
    elif damage == "missing":
        path.unlink()
    else:
        path = tmp_path
    with pytest.raises(TraceError):
        Trace.load(path)


def test_a_failed_write_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.npz"
    trace = Trace(**arrays())
    trace.save(path)
    before = path.read_bytes()

    def fails(*args, **kwargs):
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", fails)
    with pytest.raises(OSError, match="disk full"):
        trace.save(path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["a.npz"]


def test_published_traces_load(real_traces):
    trace = Trace.load(real_traces / "gpt-oss-20b.decode.npz")
    assert (trace.n_tokens, trace.n_layers, trace.top_k, trace.n_experts) == (11766, 24, 4, 32)
    assert len(trace.sequence_spans()) == 36
