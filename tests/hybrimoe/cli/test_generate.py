"""`hybrimoe generate` on the demo model, from the command line to the last line of the summary."""

import io
import json
import re
import signal
from pathlib import Path

import pytest
import torch
import typer
from transformers import AutoModelForCausalLM

from hybrimoe.checkpoint import load_tokenizer
from hybrimoe.cli.generate import read_prompt
from hybrimoe.demo import demo_model_path
from hybrimoe.errors import PromptError
from tests.forked import HYBRIMOE, Forked

PROMPT = "It was a bright morning, and Elizabeth"
SAMPLED = ("--temperature", "0.8", "--top-p", "0.9", "--seed", "7", "--max-new-tokens", "12")


@pytest.fixture(scope="module")
def run(hybrimoe, tmp_path_factory):
    """One run with everything recorded: its JSON document and its trace file."""
    trace = tmp_path_factory.mktemp("trace") / "run.json"
    result = hybrimoe("generate", "-p", PROMPT, *SAMPLED, "--json", "--timeline", "--trace", trace)
    assert result.code == 0, result.err
    assert result.err == ""
    return result.data, json.loads(trace.read_text())


def test_a_later_call_reads_the_prompt_from_disk(hybrimoe, run, tmp_path):
    kept = ("--prefix-cache-disk", "1GiB", "--prefix-cache-folder", tmp_path / "prefixes")
    first, second = (hybrimoe("generate", "-p", PROMPT, *SAMPLED, "--json", *kept).data for _ in range(2))
    n_prompt = first["prompt_tokens"]
    assert [one["reused_from_disk"] for one in (first, second)] == [0, n_prompt]
    assert first["token_ids"] == second["token_ids"] == run[0]["token_ids"]
    other = hybrimoe("generate", "-p", PROMPT, *SAMPLED, "--json", "--dtype", "float32", *kept).data
    assert other["reused_tokens"] == 0, "another dtype has other keys and values"
    refused = hybrimoe("generate", "-p", PROMPT, "--prefix-cache-disk", "12")
    assert refused.code == 2
    assert "--prefix-cache-disk: expected a size" in refused.err


def test_text_goes_to_stdout_and_summary_and_timeline_to_stderr(hybrimoe, run, tmp_path):
    trace = tmp_path / "run.json"
    result = hybrimoe("generate", "--prompt", PROMPT, *SAMPLED, "--timeline", "--trace", trace)
    assert result.code == 0, result.err
    assert result.out == run[0]["text"] + "\n", "the same seed gives the same text"
    for words in ("prefill", "decode", "tokens/s", "first token after", "hit rate", "precision", "CPU", "seed 7"):
        assert words in result.err
    for words in ("prefill, step", "decode, step", "CPU expert", "accelerator expert", "L0", str(trace)):
        assert words in result.err.replace("\n", "")
    assert "accelerator (emulated)" in result.err
    assert max(len(line) for line in result.err.splitlines() if "trace" not in line) <= 80
    assert trace.stat().st_size > 0


def test_json_has_text_counts_speed_and_lanes(run):
    data, trace = run
    assert data["model"] == "demo"
    assert data["new_tokens"] == len(data["token_ids"]) == 12
    assert data["finish_reason"] == "length"
    assert data["seed"] == 7
    assert data["prefill"]["tokens"] == data["prompt_tokens"] > 4
    assert data["decode"]["tokens"] == 11
    assert 0 < data["decode"]["median_us"] <= data["decode"]["p95_us"]
    assert data["provenance"] == "emulated accelerator"
    experts = data["experts"]
    total = experts["total"]
    assert total["hits"] + total["misses"] == total["activated"] == total["cpu_experts"] + total["accel_experts"]
    assert experts["n_slots"] == experts["n_experts"] // 4, "the demo preset caches a quarter"
    assert experts["prefill"]["calls"] * 11 == experts["decode"]["calls"]
    assert {"cpu", "accel"} <= {record["lane"] for record in data["timeline"]}
    events = trace["traceEvents"]
    assert sum(event["ph"] == "X" for event in events) == len(data["timeline"])
    assert all({"pid", "tid", "ts", "name"} <= set(event) for event in events)


def test_greedy_text_of_exact_experts_is_that_of_transformers(hybrimoe):
    model = AutoModelForCausalLM.from_pretrained(demo_model_path(), dtype=torch.float32).eval()
    tokenizer = load_tokenizer(None)
    ids = tokenizer(PROMPT, return_tensors="pt")["input_ids"]
    out = model.generate(ids, do_sample=False, max_new_tokens=12, repetition_penalty=1.0)
    expected = tokenizer.decode(out[0, ids.shape[1] :], skip_special_tokens=True)
    words = ("-t", "0", "--repetition-penalty", "1", "-n", "12", "--config", "high-quality", "--accelerator", "none")
    result = hybrimoe("generate", "-p", PROMPT, *words)
    assert result.out == expected + "\n"
    assert "accelerator" not in result.err


def test_another_seed_gives_another_text_and_a_stop_text_ends_it(hybrimoe, run):
    text = run[0]["text"]
    stop = text[8:11]
    data = hybrimoe("generate", "-p", PROMPT, *SAMPLED, "--json", "--stop", stop).data
    assert data["finish_reason"] == "stop"
    assert data["text"] == text[: text.index(stop)]
    other = hybrimoe("generate", *SAMPLED, "--seed", "8", "-q", stdin=PROMPT + "\n")
    assert other.code == 0
    assert other.err == ""
    assert other.out != text + "\n"


def test_a_prompt_comes_from_one_place_without_the_last_line_end(tmp_path, monkeypatch):
    file = tmp_path / "prompt.txt"
    file.write_text("für dich\n\n", encoding="utf-8")
    assert read_prompt(None, file) == "für dich\n"
    monkeypatch.setattr("sys.stdin", io.StringIO("piped\n"))
    assert read_prompt(None, Path("-")) == "piped"
    monkeypatch.setattr("sys.stdin", io.StringIO("piped"))
    assert read_prompt(None, None) == "piped"
    assert read_prompt("given\n", None) == "given\n"
    file.write_bytes(b"\xff\xfe broken")
    with pytest.raises(PromptError, match="no UTF-8 text"):
        read_prompt(None, file)


def test_without_a_prompt_a_terminal_is_told_how_to_give_one(monkeypatch):
    terminal = io.StringIO()
    terminal.isatty = lambda: True
    monkeypatch.setattr("sys.stdin", terminal)
    with pytest.raises(typer.BadParameter, match="--prompt"):
        read_prompt(None, None)


@pytest.mark.parametrize(
    ("words", "code", "message"),
    [
        (("-p", ""), 1, "the prompt is empty"),
        (("-p", "caf\udce9"), 1, "the prompt is no UTF-8 text: there are other bytes at character 3"),
        (("-p", "x", "--config", "."), 2, "expected a YAML file, found a directory"),
        (("-p", "word " * 4000), 1, "context is 2048 tokens"),
        (("-p", "x", "--prompt-file", "y"), 2, "not both"),
        (("--prompt-file", "/nonexistent/prompt.txt"), 1, "/nonexistent/prompt.txt"),
        (("-p", "x", "--top-p", "3"), 2, "'--top-p': .*(less than or equal to 1|range 0<=x<=1)"),
        (("-p", "x", "-n", "0"), 2, "(greater than or equal to 1|range x>=1)"),
        (("-p", "x", "-t", "hot"), 2, "temperature"),
        (("-p", "x", "--policy", "hybrimo"), 2, "did you mean 'hybrimoe'"),
        (("-p", "x", "--dtype", "int7"), 2, "int4"),
        (("-p", "x", "--slots", "10B"), 1, "10"),
        (("-p", "x", "--slots", "many"), 2, "many"),
        (("-p", "x", "--accelerator", "cuda:7"), 1, "cuda"),
        (("-p", "x", "--accelerator", "gpu"), 2, "gpu"),
        (("-p", "x", "--config", "/nonexistent.yaml"), 2, "/nonexistent.yaml"),
        (("-p", "x", "--trace", "/nonexistent/trace.json"), 1, "/nonexistent/trace.json"),
        (("/nonexistent/model", "-p", "x"), 1, "/nonexistent/model"),
    ],
)
def test_bad_input_is_one_clear_message(hybrimoe, words, code, message):
    result = hybrimoe("generate", *words)
    assert result.code == code, result.err
    assert re.search(message, " ".join(result.err.split())), result.err
    assert "Traceback" not in result.err
    assert "defect" not in result.err
    assert result.out == ""


def test_with_json_bad_input_is_a_json_document(hybrimoe):
    result = hybrimoe("generate", "-p", "x", "--policy", "hybrimo", "--json")
    assert result.code == 2
    assert "hybrimoe" in result.data["error"]["message"]
    assert result.err == ""


def test_a_directory_that_is_no_model_and_one_without_experts(hybrimoe, tmp_path):
    result = hybrimoe("generate", tmp_path, "-p", "x")
    assert result.code == 1
    assert "config.json" in result.err
    dense = {"model_type": "qwen3", "architectures": ["Qwen3ForCausalLM"], "hidden_size": 32, "num_hidden_layers": 1}
    (tmp_path / "config.json").write_text(json.dumps(dense))
    result = hybrimoe("generate", tmp_path, "-p", "x")
    assert result.code == 1
    assert "defect" not in result.err


def test_an_unknown_key_of_a_deployment_file_is_named_with_its_line(hybrimoe, tmp_path):
    file = tmp_path / "deploy.yaml"
    file.write_text("accelerator: none\nmemroy:\n  gpu_experts: 3\n")
    result = hybrimoe("generate", "-p", "x", "--config", file)
    assert result.code == 2
    assert f"{file}:2" in result.err.replace("\n", "")
    assert "memory" in result.err


def test_a_deployment_file_is_used_and_options_go_over_it(hybrimoe, tmp_path):
    file = tmp_path / "deploy.yaml"
    file.write_text("accelerator: emulated\nmemory: {gpu_experts: 16}\ncpu: {expert_dtype: int4}\n")
    few = ("generate", "-p", PROMPT, "-n", "2", "--json", "--config", file)
    data = hybrimoe(*few).data
    assert data["experts"]["n_slots"] == 16
    data = hybrimoe(*few, "--slots", "0").data
    assert data["experts"]["n_slots"] == 0
    assert data["experts"]["total"]["accel_experts"] == 0
    assert data["provenance"] == "measured"


def test_ctrl_c_ends_the_text_and_the_summary_of_what_there_is_follows():
    with Forked(HYBRIMOE, "generate", "-p", PROMPT, "-n", "1500", "--seed", "1", "-t", "1") as process:
        assert len(process.stdout.read(8)) == 8
        process.send_signal(signal.SIGINT)
        out, err = process.communicate()
        assert process.returncode == 130
    assert out.endswith("\n")
    assert "interrupted" in err
    assert "tokens/s" in err
    assert "Traceback" not in err


def test_a_profile_says_where_the_time_of_a_token_went(hybrimoe):
    words = ("generate", "-p", PROMPT, *SAMPLED, "--accelerator", "none", "--profile")
    phases = hybrimoe(*words, "--json").data["profile"]
    for phase, n_tokens in (("prefill", 8), ("decode", 11)):
        assert phases[phase]["tokens"] >= n_tokens
        assert sum(phases[phase]["parts_us"].values()) == pytest.approx(phases[phase]["us"])
    told = hybrimoe(*words).err
    for part in (
        "part of a token's time",
        "decode, ms",
        "attention",
        "experts: CPU",
        "output layer",
        "sampling",
        "all",
    ):
        assert part in told
    assert "accelerator" not in told.split("part of a token's time")[1].split("prefill")[0]


def test_drafts_change_nothing_but_the_steps(hybrimoe):
    text = "the king and the queen and the king and the queen and the king"
    words = ("generate", "-p", text, "--accelerator", "none", "-t", "0", "-n", "24", "--json")
    plain, drafted = hybrimoe(*words).data, hybrimoe(*words, "--speculate").data
    assert drafted["text"] == plain["text"]
    assert "speculation" not in plain
    stats = drafted["speculation"]
    assert stats["steps"] + stats["steps_saved"] == drafted["decode"]["tokens"]
    assert "drafted tokens were right" in hybrimoe(*words[:-1], "--speculate").err


def test_drafts_are_refused_where_experts_have_slots_and_for_batches(hybrimoe, tmp_path):
    refused = hybrimoe("generate", "-p", PROMPT, "--speculate")
    assert refused.code == 2
    assert "--accelerator none" in " ".join(refused.err.split())
    prompts = tmp_path / "prompts.txt"
    prompts.write_text("One morning\nOne evening\n")
    words = ("generate", "--prompts", prompts, "--accelerator", "none", "--speculate", "-n", "4")
    many = hybrimoe(*words)
    assert many.code == 2
    assert "--batch-size 1" in " ".join(many.err.split())
    single = hybrimoe(*words, "--batch-size", "1")
    assert single.code == 0, single.err
    assert len(single.out.splitlines()) == 2


def test_a_prompt_about_images(hybrimoe, tmp_path, monkeypatch):
    images = pytest.importorskip("PIL.Image")
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2] / "families"))
    from seeing_models import picture, write_seeing

    write_seeing(tmp_path / "seer")
    images.fromarray(picture()).save(tmp_path / "one.png")
    (tmp_path / "two.png").write_bytes(b"no image")
    asked = ("generate", tmp_path / "seer", "-p", "What?", "-n", "4", "-t", "0", "--accelerator", "none", "--json")
    seen = hybrimoe(*asked, "--image", tmp_path / "one.png", "--image", tmp_path / "one.png")
    assert seen.code == 0, seen.err
    assert seen.data["prompt_tokens"] > 2 * 24
    for more, words in (
        (("--image", tmp_path / "two.png"), "no image that can be read"),
        (("--image", tmp_path / "three.png"), "cannot read"),
        (("--image", tmp_path / "one.png", "--vision", "none"), "its vision part was left out"),
    ):
        refused = hybrimoe(*asked, *more)
        assert refused.code == 1
        assert words in refused.out
    shown = f"/image {tmp_path / 'one.png'}\n"
    said = hybrimoe(
        "chat", tmp_path / "seer", "-n", "4", "-t", "0", "--accelerator", "none", "--json",
        stdin=f"{shown}What?\nAnd now?\n{shown}/clear\n/image\n",
    )  # fmt: skip
    assert said.code == 0, said.err
    replies = [json.loads(line) for line in said.out.splitlines()]
    assert replies[0]["prompt_tokens"] > 24
    assert replies[1]["reused_tokens"] >= replies[0]["prompt_tokens"]
    told = " ".join(said.err.split())
    assert "24 tokens, with your next message" in told
    assert "no image waits" in told


def test_a_text_model_takes_no_images(hybrimoe, tmp_path):
    images = pytest.importorskip("PIL.Image")
    images.new("RGB", (40, 40)).save(tmp_path / "one.png")
    refused = hybrimoe("generate", "-p", "What?", "--image", tmp_path / "one.png")
    assert refused.code == 1
    assert "takes no images: it was loaded as a model of text" in " ".join(refused.err.split())
