"""Several accelerators on the command line: generate, capture and replay, plan, and what is refused."""

import pytest

TWO = ("--accelerator", "emulated,emulated")
GREEDY = ("-p", "It was a bright morning, and", "-t", "0", "-n", "8")


def test_generate_on_two_accelerators_gives_the_same_text(hybrimoe, tmp_path):
    one = hybrimoe("generate", *GREEDY, "--accelerator", "emulated", "--json").data
    path = tmp_path / "trace.json"
    both = hybrimoe("generate", *GREEDY, *TWO, "--timeline", "--trace", path, "--json").data
    assert both["text"] == one["text"]
    first, second = both["experts"]["accelerators"]
    assert second["first_layer"] == first["n_layers"] > 0
    assert first["n_slots"] + second["n_slots"] == both["experts"]["n_slots"] == one["experts"]["n_slots"]
    assert first["total"]["accel_experts"] > 0
    assert second["total"]["accel_experts"] > 0
    assert {(record["lane"], record["accelerator"]) for record in both["timeline"]} >= {("accel", 0), ("accel", 1)}
    assert "accelerator 1" in path.read_text()


def test_the_summary_numbers_the_lanes(hybrimoe):
    told = hybrimoe("generate", *GREEDY, *TWO, "--timeline").err
    for words in ("accelerator 0 (emulated)", "accelerator 1 (emulated)", "link 0", "link 1", "acc 1"):
        assert words in told


def test_a_captured_run_on_two_is_replayed_exactly(hybrimoe, tmp_path):
    path = tmp_path / "run.json.gz"
    made = hybrimoe("trace", "capture", *TWO, "-o", path, "-n", "6", "--slots", "0.25", "--json").data
    found = hybrimoe("simulate", "--replay", path, "--json").data
    assert found["exact"], found["divergence"]
    assert found["plans"] == made["plans"] > 6
    assert found["facts"]["accelerator"] == "2 x emulated accelerator"
    decode = found["phases"]["decode"]
    assert decode["replayed_us"] == pytest.approx(decode["recorded_us"], rel=0.02)


def test_plan_shares_layers_and_slots(hybrimoe):
    words = ("plan", "qwen3-30b-a3b", "--hardware", "laptop", "--gpu-memory", "6GiB", "--host-memory", "32GiB")
    one, two = (hybrimoe(*words, "--accelerators", str(n), "--json").data for n in (1, 2))
    assert one["layers_by_accelerator"] == [48]
    assert sum(two["layers_by_accelerator"]) == 48
    assert two["layers_by_accelerator"][0] < two["layers_by_accelerator"][1], "dense weights are on the first"
    assert two["device_experts"] == sum(two["experts_by_accelerator"]) > one["device_experts"]
    assert two["expected"]["hit_rate"] > one["expected"]["hit_rate"]
    assert "accelerator 1" in hybrimoe(*words, "--accelerators", "2").out
    assert "each needs at least one" in hybrimoe(*words, "--accelerators", "49", "--json").data["error"]["message"]


def test_a_device_that_is_not_here_or_stands_twice_is_refused(hybrimoe):
    missing = hybrimoe("generate", *GREEDY, "--accelerator", "emulated,cuda:63", "--json")
    assert missing.code == 1
    assert "uses all of its devices" in missing.data["error"]["message"]
    twice = hybrimoe("generate", *GREEDY, "--accelerator", "cuda:0,cuda:0", "--json")
    assert twice.code != 0
    assert "stands twice" in twice.data["error"]["message"]
    many = hybrimoe("generate", *GREEDY, "--accelerator", ",".join(["emulated"] * 99), "--json")
    assert "list fewer" in many.data["error"]["message"]
