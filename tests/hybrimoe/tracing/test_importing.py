"""Routing that llama.cpp, vLLM and SGLang recorded becomes a trace of the same routing, or an error with its place."""

from __future__ import annotations

import base64
import io
import json
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from hybrimoe.cli.app import app
from hybrimoe.tracing.importing import import_traces
from scheduler import ModelShape
from scheduler.traces.trace import Trace, TraceError

SHAPE = ModelShape("tiny", n_layers=3, n_experts=8, top_k=2, hidden=16, inter=16, n_dense_layers=1)
N_PROMPT = 4


def routing(n_tokens: int, seed: int = 0) -> np.ndarray:
    """Distinct experts, int64 [tokens, layers, k]."""
    random = np.random.default_rng(seed)
    return random.permuted(np.tile(np.arange(8), (n_tokens, 3, 1)), axis=-1)[..., :2]


def moe_trace(ids: np.ndarray, n_prompt: int, first_layer: int = 1) -> str:
    """As llama.cpp's tool writes it: steps, in each the layers, in each the tokens; the last layer of the prompt only
    for its last token."""
    lines = ["layer,expert"]
    steps = [ids[:n_prompt], *ids[n_prompt:, None]]
    for step in steps:
        for layer in range(ids.shape[1]):
            wanted = step[-1:] if layer == ids.shape[1] - 1 else step
            lines += [f"{first_layer + layer},{expert}" for expert in wanted[:, layer].ravel()]
    return "\n".join(lines) + "\n"


def response(ids: np.ndarray, n_prompt: int, engine: str) -> dict[str, Any]:
    """A response as the engine's server sends it. The first of four layers is dense, and its rows are zeros."""
    every = np.concatenate([np.zeros_like(ids[:, :1]), ids], axis=1)
    if engine == "sglang":
        wire = base64.b64encode(every.astype("<i4").tobytes()).decode()
        return {"text": "...", "meta_info": {"prompt_tokens": n_prompt, "routed_experts": wire}}
    buffer = io.BytesIO()
    np.save(buffer, every.astype(np.uint8))
    choice = {"index": 0, "routed_experts": base64.b64encode(buffer.getvalue()).decode()}
    return {"choices": [choice], "usage": {"prompt_tokens": n_prompt}}


def imported(*files: Path, prompt_tokens: int = 0) -> Trace:
    return import_traces(files, SHAPE, prompt_tokens=prompt_tokens, licence="none")


def test_llama_cpps_rows_are_steps_again(tmp_path: Path) -> None:
    first, second = routing(7), routing(6, seed=1)
    file = tmp_path / "run.csv"
    file.write_text(moe_trace(first, N_PROMPT) + moe_trace(second, 2).partition("\n")[2])  # two prompts in one run
    trace = imported(file)
    assert [stop - start for start, stop in trace.sequence_spans()] == [7, 6]
    assert trace.phase.tolist() == [0] * 4 + [1] * 3 + [0] * 2 + [1] * 4
    expected = np.concatenate([first, second])
    expected[[0, 1, 2, 7], -1] = -1  # not computed by llama.cpp
    np.testing.assert_array_equal(trace.expert_ids, expected)
    assert (trace.meta["model"], trace.meta["source"]) == ("tiny", "hybrimoe trace import run.csv")


def test_joined_and_cut_off_recordings_of_llama_cpp(tmp_path: Path) -> None:
    file = tmp_path / "joined.csv"
    cut = "\n".join(moe_trace(routing(3), 1).splitlines()[:-1])  # one row of the last layer is missing
    file.write_text(moe_trace(routing(5), N_PROMPT) + cut.rpartition("\n")[0])
    trace = imported(file)
    assert [stop - start for start, stop in trace.sequence_spans()] == [5, 2], "a step without its end does not count"


@pytest.mark.parametrize("engine", ["vllm", "sglang"])
@pytest.mark.parametrize("lines", [True, False], ids=["jsonl", "json"])
def test_responses_of_servers(tmp_path: Path, engine: str, lines: bool) -> None:
    both = [routing(7), routing(5, seed=1)]
    answers = [response(ids, N_PROMPT, engine) for ids in both]
    file = tmp_path / ("answers.jsonl" if lines else "answers.json")
    file.write_text("\n".join(map(json.dumps, answers)) if lines else json.dumps(answers))
    trace = imported(file)
    np.testing.assert_array_equal(trace.expert_ids, np.concatenate(both))
    assert trace.phase.tolist() == [0] * 4 + [1] * 3 + [0] * 4 + [1] * 1


def test_arrays_and_files_in_turn(tmp_path: Path) -> None:
    for name, seed in (("a.npy", 0), ("b.npy", 1)):
        np.save(tmp_path / name, routing(6, seed).astype(np.int32))
    trace = imported(tmp_path / "b.npy", tmp_path / "a.npy", prompt_tokens=2)
    np.testing.assert_array_equal(trace.expert_ids, np.concatenate([routing(6, 1), routing(6, 0)]))
    assert trace.phase.tolist() == [0, 0, 1, 1, 1, 1] * 2


def test_a_collection_of_counts_becomes_tokens_with_these_counts(tmp_path: Path) -> None:
    """As MoE-Infinity writes it: float32, places that were never filled are zeros."""
    told = np.zeros((4, 3, 8), np.float32)
    for at, ids in ((0, routing(9)), (2, routing(5, seed=1))):
        for layer in range(3):
            told[at, layer] = np.bincount(ids[:, layer].ravel(), minlength=8)
    np.save(tmp_path / "collection.npy", told)
    trace = imported(tmp_path / "collection.npy", prompt_tokens=3)
    assert [stop - start for start, stop in trace.sequence_spans()] == [9, 5]
    assert trace.phase.tolist() == [0] * 3 + [1] * 6 + [0] * 3 + [1] * 2
    for (start, stop), at in zip(trace.sequence_spans(), (0, 2), strict=True):
        counted = [np.bincount(trace.expert_ids[start:stop, layer].ravel(), minlength=8) for layer in range(3)]
        np.testing.assert_array_equal(counted, told[at])
    assert all(len(set(row)) == 2 for row in trace.expert_ids.reshape(-1, 2).tolist())
    assert trace.meta["order"] == "drawn"
    np.testing.assert_array_equal(
        imported(tmp_path / "collection.npy", prompt_tokens=3).expert_ids, trace.expert_ids, "drawn alike each time"
    )


def test_what_was_drawn_is_said_where_it_is_simulated(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    counts = np.zeros((1, 16, 64), np.float32)
    counts[:, :, :16] = 5.0  # 10 tokens that choose 8 of 16
    np.save("collection.npy", counts)
    written = CliRunner().invoke(
        app, ["trace", "import", "collection.npy", "--model-shape", "olmoe-1b-7b", "-o", "drawn.npz"]
    )
    assert written.exit_code == 0, written.output
    assert "in no recorded order" in " ".join(written.output.split())
    simulated = CliRunner().invoke(app, ["simulate", "--trace", "drawn.npz", "--policy", "static"])
    assert simulated.exit_code == 0, simulated.output
    assert "drawn from counts of whole sequences" in " ".join(simulated.output.split())


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", "", "expected .csv, .json, .jsonl, .npy, found '.txt'"),
        ("gone.csv", None, "gone.csv cannot be read as text"),
        ("gone.npy", None, "gone.npy cannot be read"),
        ("a.csv", "step,expert\n1,2\n", "expected the header 'layer,expert' in line 1"),
        ("a.csv", "layer,expert\n1,2\n1,x\n", "line 3: expected two integers, found '1,x'"),
        ("a.csv", "layer,expert\n1,2,3\n", "line 2: expected two integers"),
        ("a.csv", "layer,expert\n1,0\n1,1\n2,0\n2,1\n", "2 layers have experts, tiny has 3"),
        ("a.csv", "layer,expert\n1,0\n1,1\n1,2\n2,0\n2,1\n3,0\n3,1\n", "line 2: 3 experts of a layer are no multiple"),
        ("a.csv", "layer,expert\n1,0\n1,1\n3,0\n3,1\n2,0\n2,1\n", "line 2: expected a step through all layers"),
        ("a.csv", "layer,expert\n1,0\n1,0\n2,0\n2,1\n3,0\n3,1\n", "an expert twice in layer 0: [0, 0]"),
        ("a.csv", "layer,expert\n1,0\n1,9\n2,0\n2,1\n3,0\n3,1\n", "must lie in -1..7, found 0..9"),
        ("a.csv", "layer,expert\n", "no sequence"),
        ("a.json", "{", "no JSON"),
        ("a.json", '{"choices": []}', "start the server with --enable-return-routed-experts"),
        ("a.json", '{"routed_experts": "AAAA"}', "does not say its prompt_tokens"),
        ("a.json", '{"prompt_tokens": 1, "routed_experts": "*"}', "routed_experts is no base64"),
        ("a.json", '{"prompt_tokens": 1, "routed_experts": "AAAA"}', "3 bytes of routed_experts are no multiple of 8"),
        ("a.json", '{"prompt_tokens": 1, "routed_experts_dtype": "f8", "routed_experts": ""}', "must be one of int32"),
        ("a.npy", "text", "damaged, or no .npy array"),
        ("a.npy", np.zeros((5, 3, 8)), "no sequence"),
        ("a.npy", np.ones((5, 3, 6)), "counts of 3 layers with 6 experts; tiny has 3 with 8"),
        ("a.npy", np.full((5, 3, 8), 0.5), "found numbers that are no counts"),
        ("a.npy", np.full((5, 3, 8), np.nan), "found numbers that are no counts"),
        ("a.npy", np.full((1, 3, 8), [3.0] + [0.0] * 7), "sequence 0 has 3 to 3 choices a layer, and up to 3 of one"),
        ("a.npy", np.full((1, 3, 8), [4.0] + [0.0] * 7), "up to 4 of one expert; tokens that choose 2 experts"),
        ("a.npy", np.zeros((5, 3), int), "expected integers [tokens, layers, k] or a collection's counts"),
        ("a.npy", routing(4)[:, :2], "2 layers with experts, top-2; tiny has 3 and top-2"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_trace_is_named(tmp_path: Path, name: str, content: Any, message: str) -> None:
    file = tmp_path / name
    if isinstance(content, str):
        file.write_text(content)
    elif content is not None:
        np.save(file, content)
    with pytest.raises(TraceError, match=re.escape(message)):
        imported(file)


def test_the_command_writes_what_simulate_takes(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    ids = np.random.default_rng(0).permuted(np.tile(np.arange(64), (12, 16, 1)), axis=-1)[..., :8]
    np.save("run.npy", ids)
    written = CliRunner().invoke(
        app, ["trace", "import", "run.npy", "--model-shape", "olmoe-1b-7b", "--prompt-tokens", "4", "-o", "run.npz"]
    )
    assert written.exit_code == 0, written.output
    assert "12 tokens of 1 sequence, 16 layers of 64 experts" in written.output
    simulated = CliRunner().invoke(app, ["simulate", "--trace", "run.npz", "--policy", "static", "--phase", "decode"])
    assert simulated.exit_code == 0, simulated.output
