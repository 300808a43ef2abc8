"""`simulate`, `trace`, `plan`, `explain-step` and `bench ablation` as command lines."""

import gzip
import json
from dataclasses import replace
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch

from hybrimoe.tracing.sources import DEMO_TRACE as DEMO
from hybrimoe.tracing.study.public import datasheet_residuals
from scheduler.traces.trace import Trace
from yaml_rules.located import read_yaml

REQUIRED = {
    "policy", "cache_ratio", "phase", "tokens", "latency_ms", "hit_rate", "cpu_busy", "accel_busy", "link_busy",
    "transfers", "prefetches", "prefetch_precision",
}  # fmt: skip


def test_simulate_prints_a_list_of_objects(hybrimoe):
    done = hybrimoe(
        "simulate", "--hardware", "laptop", "--policy", "static", "--policy", "ours", "--cache-ratio", "0.25",
        "--cache-ratio", "0.5", "--max-tokens", "80", "--json",
    )  # fmt: skip
    assert done.code == 0
    rows = done.data
    assert {(r["policy"], r["cache_ratio"]) for r in rows} == {(p, c) for p in ("static", "ours") for c in (0.25, 0.5)}
    assert {r["phase"] for r in rows} == {"prefill", "decode"}
    for row in rows:
        assert row.keys() >= REQUIRED
        assert row["kind"] == "simulated"
        assert row["latency_ms"] > 0
    assert rows == hybrimoe(
        "simulate", "--hardware", "laptop", "--policy", "static", "--policy", "ours", "--cache-ratio", "0.25",
        "--cache-ratio", "0.5", "--max-tokens", "80", "--json",
    ).data  # fmt: skip


SMALL = (
    "simulate",
    "--trace",
    "synthetic",
    "--model-shape",
    "olmoe-1b-7b",
    "--max-tokens",
    "150",
    "--policy",
    "static",
)


def test_a_data_sheet_machine_has_the_range_of_public_measurements(hybrimoe):
    """Of decode beside the CPU and of a streamed prompt; none of a prompt that the CPU computes a part of."""
    rows = hybrimoe(*SMALL, "--policy", "llama_cpp", "--hardware", "laptop", "--json").data
    found = {(row["policy"], row["phase"]): row for row in rows}
    residuals = datasheet_residuals()
    for policy, streamed in (("static", False), ("llama_cpp", True)):
        decode, prefill = found[policy, "decode"], found[policy, "prefill"]
        assert decode["tokens_per_s"] == pytest.approx(1e3 / decode["latency_ms"])
        assert decode["tokens_per_s_range"] == list(residuals.interval("decode", decode["tokens_per_s"], mixed=True))
        assert decode["prompt_tokens"] is None
        tokens = prefill["prompt_tokens"]
        assert prefill["tokens_per_s"] == pytest.approx(tokens * 1e3 / prefill["latency_ms"])
        known = residuals.interval("prefill", prefill["tokens_per_s"], mixed=True, streamed=streamed, tokens=tokens)
        assert prefill["tokens_per_s_range"] == (None if known is None else list(known))
        assert (known is not None) == streamed


@pytest.mark.parametrize(
    ("words", "told", "table"),
    [
        (("--hardware", "laptop"), "10th to 90th percentile of public measurements", True),
        (("--hardware", "laptop", "--accelerators", "2"), "no public measurement is near", False),
        (("--hardware", "laptop", "--host-ratio", "0.5"), "no public measurement is near", False),
        (("--hardware", "a6000-xeon5220r"), "is fitted: no range", False),
    ],
)
def test_simulate_says_what_is_known_of_its_error(hybrimoe, words, told, table):
    done = hybrimoe(*SMALL, *words)
    assert done.code == 0, done.err
    assert told in " ".join(done.err.split())
    assert ("Range by public measurements" in done.out) == table
    assert "tokens in the mean, each as one step" in " ".join(done.err.split())


def test_prompts_are_streamed_by_the_preset_or_as_asked(hybrimoe):
    def prefill(*words):
        (row,) = hybrimoe(*SMALL[:-1], *words, "--phase", "prefill", "--max-tokens", "128", "--json").data
        return row

    assert prefill("llama_cpp")["cpu_busy"] == 0.0
    assert prefill("llama_cpp", "--stream", "0")["cpu_busy"] > 0.0
    waits, ahead = prefill("static", "--stream", "1"), prefill("static", "--stream", "1", "--stream-ahead")
    assert waits["cpu_busy"] == ahead["cpu_busy"] == 0.0
    assert ahead["transfers"] > waits["transfers"]
    chunks = prefill("static", "--stream", "1", "--prefill-chunk", "8")
    assert chunks["tokens"] == waits["tokens"]
    assert chunks["transfers"] > waits["transfers"]
    assert chunks["latency_ms"] > waits["latency_ms"]


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("--stream", "-1"), "--stream must be at least 0, found -1"),
        (("--prefill-chunk", "0"), "--prefill-chunk must be at least 1, found 0"),
        (("--stream", "0", "--stream-ahead"), "leave one of them out"),
        (("--stream", "32", "--host-ratio", "0.5"), "not with experts on disk"),
    ],
)
def test_prompts_that_cannot_be_streamed_are_refused(hybrimoe, words, message):
    done = hybrimoe(*SMALL, *words, "--json")
    assert done.code == 2
    assert message in done.data["error"]["message"]


def test_simulate_as_a_table(hybrimoe):
    done = hybrimoe("simulate", "--max-tokens", "30", "--policy", "static", "--phase", "prefill")
    assert done.code == 0
    assert "simulated" in done.out
    assert "decode" not in done.out


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (["--policy", "outs"], None, "did you mean 'ours'"),
        (["--hardware", "laptob"], None, "did you mean 'laptop'"),
        (["--model-shape", "mixtral-8x7"], None, "did you mean 'mixtral-8x7b'"),
        (["--cache-ratio", "1.5"], None, "cache ratio must lie in 0..1"),
        (["--trace", "missing.npz"], 1, "no trace at"),
        (["--trace", "demo", "--model-shape", "mixtral-8x7b"], 1, "model shape 'mixtral-8x7b'"),
        (["--phase", "decoding"], 2, "did you mean 'decode'"),
        (["--predictions", "non"], 2, "did you mean 'none'"),
        (["--max-tokens", "-1"], 2, "at least 0"),
    ],
)
def test_simulate_refuses_bad_input(hybrimoe, words, code, message):
    done = hybrimoe("simulate", *words, "--json")
    assert done.code == code if code is not None else done.code != 0
    assert message in done.data["error"]["message"]


def test_the_bound_is_below_every_policy(hybrimoe):
    rows = hybrimoe(
        "simulate", "--max-tokens", "60", "--policy", "static", "--policy", "llama_cpp", "--policy", "oracle",
        "--cache-ratio", "0.25", "--cache-ratio", "0.5", "--bound", "--json",
    ).data  # fmt: skip
    assert len({(row["cache_ratio"], row["phase"], row["bound_ms"]) for row in rows}) == 4
    assert all(0.0 < row["bound_ms"] <= row["latency_ms"] for row in rows)
    text = hybrimoe("simulate", "--max-tokens", "30", "--policy", "static", "--phase", "prefill", "--bound").out
    assert "What no policy can beat" in text
    assert "of the way" in text


@pytest.mark.parametrize("words", [("--accelerators", "2"), ("--lossy", "skip")])
def test_the_bound_of_what_it_does_not_cover_is_refused(hybrimoe, words):
    done = hybrimoe(*SMALL, "--bound", *words, "--json")
    assert done.code == 2
    assert "--bound is of one accelerator" in done.data["error"]["message"]


def test_damaged_trace_and_empty_phase(hybrimoe, tmp_path):
    (tmp_path / "bad.npz").write_bytes(b"PK\x03\x04 broken")
    assert "damaged" in hybrimoe("simulate", "--trace", tmp_path / "bad.npz", "--json").data["error"]["message"]
    demo = Trace.load(DEMO)
    decode = Trace(demo.expert_ids, demo.sequence, np.ones_like(demo.phase), demo.meta)
    decode.save(tmp_path / "decode.npz")
    shape = str(DEMO.parents[2] / "demo" / "model")
    done = hybrimoe(
        "simulate", "--trace", tmp_path / "decode.npz", "--model-shape", shape, "--phase", "prefill", "--json"
    )
    assert "no prefill tokens" in done.data["error"]["message"]


def test_a_limit_counts_tokens_of_the_phase(hybrimoe, tmp_path):
    """A long prompt does not use it up where decoding is simulated; where both are, what is lost is told."""
    whole = Trace.load(DEMO).select_sequences([0, 1])
    n_prompt = whole.n_tokens - 20
    phase = np.where(np.arange(whole.n_tokens) < n_prompt, 0, 1).astype(np.uint8)
    replace(whole, sequence=np.zeros_like(whole.sequence), phase=phase).save(tmp_path / "long.npz")
    words = ("simulate", "--trace", tmp_path / "long.npz", "--max-tokens", "9", "--policy", "static")
    (row,) = hybrimoe(*words, "--phase", "decode", "--json").data
    assert row["steps"] == 9
    assert "the first 9 tokens have no decode; --max-tokens 0 takes all" in hybrimoe(*words).err


def test_trace_record_analyze_train_simulate(hybrimoe, tmp_path):
    """The whole way: record the demo model, look at it, learn from it, use what was learned."""
    path = tmp_path / "t.npz"
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("In the beginning\n\nShe could not\nThe table\n")
    letter = tmp_path / "letter.txt"
    letter.write_text("My dear Emma,\n\nThe table\n")
    done = hybrimoe(
        "trace", "record", "-o", path, "--prompts", prompts, "--prompt-file", letter, "-n", "6", "--full-scores",
        "--json",
    )  # fmt: skip
    assert done.code == 0, done.err
    assert done.data["sequences"] == 4
    trace = Trace.load(path)
    assert trace.token_ids is not None
    assert trace.has_phase("prefill")
    assert trace.has_phase("decode")
    assert trace.gate_scores is not None
    report = hybrimoe("trace", "analyze", path, "--slow-tokens", "10", "--html", tmp_path / "r.html", "--json").data
    assert set(report["pool_curves"]) >= {"lru", "mrs", "belady", "value"}
    assert 0 < report["predictors"]["token"][0]["precision"] <= 1
    page = (tmp_path / "r.html").read_text()
    assert page.count("data:image/png;base64,") == 3
    assert "http" not in page
    net = tmp_path / "n.onnx"
    assert hybrimoe("trace", "train", path, "-o", net, "--epochs", "1", "--json").data["target"] == "cache"
    shape = str(DEMO.parents[2] / "demo" / "model")
    rows = hybrimoe(
        "simulate",
        "--trace",
        path,
        "--model-shape",
        shape,
        "--policy",
        "optimal/none/learned",
        "--cache-model",
        net,
        "--json",
    ).data
    assert rows[0]["policy"] == "optimal/none/learned"


def test_trace_record_refuses_an_empty_prompt_file(hybrimoe, tmp_path):
    (tmp_path / "p.txt").write_text("\n")
    done = hybrimoe("trace", "record", "--prompts", tmp_path / "p.txt", "--json")
    assert done.code == 1
    assert "holds no prompt" in done.data["error"]["message"]


def test_plan(hybrimoe):
    found = hybrimoe(
        "plan", "olmoe-1b-7b", "--hardware", "laptop", "--gpu-memory", "2GiB", "--host-memory", "8GiB", "--json"
    ).data
    assert 0 < found["device_experts"] < found["n_experts"] == 1024
    assert 0.0 < found["expected"]["hit_rate"] <= 1.0
    assert found["expected"]["kind"] == "simulated"
    text = hybrimoe("plan", "--host-memory", "4GiB", "--hardware", "rtx4090-ryzen9")
    assert text.code == 0
    assert "experts in device slots" in text.out
    assert "hardware: rtx4090-ryzen9 (datasheet)" in " ".join(text.err.split())
    assert "like 12GiB" in hybrimoe("plan", "--gpu-memory", "12", "--json").data["error"]["message"]


def test_plan_says_what_it_keeps_free_and_what_leaves_host_memory(hybrimoe):
    given = "plan", "qwen3-30b-a3b", "--hardware", "laptop", "--policy", "static"
    found = hybrimoe(*given, "--host-copy", "drop", "--json").data
    assert found["host_experts_after_start"] == found["host_experts"] - found["device_experts"]
    assert hybrimoe(*given, "--json").data["host_experts_after_start"] == found["host_experts"]
    said = " ".join(hybrimoe(*given, "--host-copy", "drop").out.split())
    assert all(part in said for part in ("kept free: an expert", "kept free: workspaces", "kept free: recorded steps"))
    first = found["dense_bytes"] + found["kv_bytes"] + found["device_experts"] * found["expert_bytes"]
    kept = ("unpack_bytes", "workspace_bytes", "graph_bytes", "reserve_bytes")
    total = (first + sum(found[name] for name in kept)) / (1 << 30)
    assert f"all of this on one device {total:.2f} GiB of {found['device_bytes'] / (1 << 30):.2f} GiB" in said
    assert "once the slots are filled" in said
    no_slot = sum(found[name] for name in ("dense_bytes", "kv_bytes", *kept)) + (1 << 20)
    for more, message in (
        (("--host-copy", "dorp"), "did you mean 'drop'"),
        (("--host-copy", "drop", "--policy", "ours"), "never move an expert, not 'ours'"),
        (("--host-copy", "drop", "--gpu-memory", f"{no_slot}B"), "no expert has a slot on this hardware"),
    ):
        refused = hybrimoe(*given, *more, "--json")
        assert (refused.code, message in refused.data["error"]["message"]) == (2, True)


def test_plan_fit(hybrimoe):
    done = hybrimoe("plan", "olmoe-1b-7b", "--hardware", "laptop", "--host-memory", "12GiB", "--fit", "--json")
    assert (done.data["expert_dtype"], done.data["dense_dtype"]) == ("int8", "int8")
    assert "experts with int8 dense weights: all 1024 experts" in done.data["reasons"][1]


@pytest.fixture
def uncalibrated(tmp_path, monkeypatch, private_cache):
    """No calibration in the cache: it has the compiled kernels only."""
    monkeypatch.setenv("HYBRIMOE_CACHE", str(private_cache(tmp_path / "cache")))


@pytest.mark.usefixtures("uncalibrated")
def test_plan_fit_measures_this_machine_for_the_dtype_that_it_chooses(hybrimoe):
    done = hybrimoe("plan", "olmoe-1b-7b", "--host-memory", "4096GiB", "--fit", "--json")
    assert done.code == 0, done.err
    assert done.data["expert_dtype"] == "bfloat16"
    assert done.data["expected"]["decode_tokens_per_s"] > 0


@pytest.mark.usefixtures("uncalibrated")
def test_plan_without_calibration_is_for_this_machine_and_within_the_models_context(hybrimoe):
    done = hybrimoe("plan", "olmoe-1b-7b", "--host-memory", "4096GiB", "--json")
    assert "this machine" in done.data["hardware_taken"]
    assert done.data["hardware"] == "this machine"
    assert done.data["max_context"] <= 4096
    assert done.data["context"] == 4096
    if not torch.accelerator.is_available():
        assert (done.data["device_bytes"], done.data["device_experts"]) == (0, 0)
        assert done.data["host_experts"] == 1024
        assert "device" not in hybrimoe("plan", "olmoe-1b-7b", "--host-memory", "64GiB").out
    asked = hybrimoe("plan", "olmoe-1b-7b", "--hardware", "laptop", "--context", "4097", "--json")
    assert asked.code == 2
    assert "own context of 4096" in asked.data["error"]["message"]


def test_plan_takes_a_hub_id_whose_configuration_is_in_the_cache(hybrimoe, tmp_path, monkeypatch):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    missing = hybrimoe("plan", "allenai/OLMoE-1B-7B", "--hardware", "laptop", "--json")
    assert missing.code == 1
    assert "hf download allenai/OLMoE-1B-7B config.json" in missing.data["error"]["message"]
    commit, repository = "0" * 40, tmp_path / "models--allenai--OLMoE-1B-7B"
    snapshot = repository / "snapshots" / commit
    snapshot.mkdir(parents=True)
    (repository / "refs").mkdir()
    (repository / "refs" / "main").write_text(commit)
    config = read_yaml(Path(str(files("yaml_rules.shapes"))) / "olmoe-1b-7b.yaml").data["config"]
    (snapshot / "config.json").write_text(json.dumps(config))
    found = hybrimoe("plan", "allenai/OLMoE-1B-7B", "--hardware", "laptop", "--json").data
    assert (found["model"], found["n_experts"]) == ("OLMoE-1B-7B", 1024)


def test_explain_step(hybrimoe, tmp_path):
    done = hybrimoe("explain-step", "--hardware", "laptop", "--step", "2", "--chrome", tmp_path / "c.json", "--json")
    facts = done.data
    assert len(facts["layers"]) == Trace.load(DEMO).n_layers
    assert {"expert", "cpu_us", "accel_us", "transfer_us", "lane"} <= set(facts["layers"][0]["decisions"][0])
    assert facts["would_bring_us"].keys() >= {"one more slot", "one more GB/s of link"}
    assert sum(facts["critical_path_us"].values()) == pytest.approx(facts["graph_makespan_us"])
    assert json.loads((tmp_path / "c.json").read_text())["traceEvents"]
    assert "Critical path" in hybrimoe("explain-step", "--step", "2", "--timeline").out
    assert "decode, step 2" in hybrimoe("explain-step", "--step", "2", "--timeline").out
    assert "the trace has steps 0" in hybrimoe("explain-step", "--step", "99999", "--json").data["error"]["message"]


def test_a_captured_run_is_replayed_exactly(hybrimoe, tmp_path):
    path = tmp_path / "run.json.gz"
    made = hybrimoe("trace", "capture", "-o", path, "-n", "6", "--slots", "0.25", "--json").data
    assert made["plans"] > 6
    assert made["lanes"] == "emulated accelerator, measured"
    found = hybrimoe("simulate", "--replay", path, "--json").data
    assert found["exact"]
    assert found["plans"] == made["plans"]
    assert found["divergence"] is None
    decode = found["phases"]["decode"]
    assert decode["replayed_us"] == pytest.approx(decode["recorded_us"], rel=0.02)
    assert decode["durations_us"] <= decode["replayed_us"]
    assert "exact: every plan" in hybrimoe("simulate", "--replay", path).out


def test_a_replay_that_differs_fails_and_says_where(hybrimoe, tmp_path):
    path = tmp_path / "run.json.gz"
    hybrimoe("trace", "capture", "-o", path, "-n", "3", "--slots", "0.25", "--json")
    body = json.loads(gzip.decompress(path.read_bytes()))
    body["setup"]["policy"] = "static"
    path.write_bytes(gzip.compress(json.dumps(body).encode()))
    told = hybrimoe("simulate", "--replay", path)
    assert told.code == 1
    assert "First difference: step" in told.out
    refused = hybrimoe("trace", "capture", "--accelerator", "none", "-o", path, "--json")
    assert refused.code == 1
    assert "choose an accelerator" in refused.data["error"]["message"]
    assert "no recording" in hybrimoe("simulate", "--replay", DEMO, "--json").data["error"]["message"]


def test_several_accelerators(hybrimoe):
    rows = hybrimoe("simulate", "--accelerators", "2", "--policy", "ours", "--max-tokens", "40", "--json").data
    assert all(row["policy"] == "ours" and row["latency_ms"] > 0 for row in rows)
    drawn = hybrimoe("explain-step", "--step", "2", "--accelerators", "2", "--timeline").out
    assert "acc 0" in drawn
    assert "acc 1" in drawn
    refused = hybrimoe("simulate", "--accelerators", "0", "--json")
    assert refused.code == 2
    assert "--accelerators" in refused.data["error"]["message"]


def test_bench_batching_as_a_table_and_as_json(hybrimoe):
    words = ("bench", "batching", "--hardware", "laptop", "--policy", "static", "--sequences", "4", "--batch-size", "2")
    words += ("--prompt-tokens", "4", "--new-tokens", "4")
    data = hybrimoe(*words, "--json").data
    assert {"one by one", "expertflow", "moe-lightning"} <= {row["grouping"] for row in data["rows"]}
    shown = hybrimoe(*words)
    assert shown.code == 0
    assert "expertflow" in shown.out
    assert "micro-batches" in shown.err


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="no device that is always full")
def test_a_disk_that_fills_while_a_result_is_written(hybrimoe):
    full = hybrimoe("explain-step", "--hardware", "laptop", "--step", "2", "--chrome", "/dev/full")
    assert full.code == 1
    assert "cannot write /dev/full (No space left on device): make room" in full.err
