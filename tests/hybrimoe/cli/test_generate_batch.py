"""`hybrimoe generate --prompts` on the demo model."""

import json
from contextlib import contextmanager

import numpy as np
import pytest

from hybrimoe.tracing.learning.onnx_net import write_net

TEXTS = (
    "The CREATE TABLE command",
    "It was a bright morning, and Elizabeth",
    "In the beginning",
    "To restore a backup",
)
EXACT = ("-t", "0", "-n", "8", "--config", "high-quality", "--accelerator", "emulated")


@pytest.fixture
def prompts(tmp_path):
    path = tmp_path / "prompts.txt"
    path.write_text("\n".join(TEXTS) + "\n")
    return path


def test_json_lines_come_in_the_order_of_the_file_and_are_the_texts_of_single_runs(hybrimoe, prompts):
    result = hybrimoe("generate", "--prompts", prompts, "--batching", "expertflow", "--batch-size", "2", *EXACT)
    assert result.code == 0, result.err
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert [row["prompt"] for row in rows] == list(TEXTS)
    assert [row["line"] for row in rows] == [1, 2, 3, 4]
    assert {row["batch"] for row in rows} == {0, 1}
    for words in ("4 of 4 prompts ended", "2 batches of at most 2 (expertflow)", "tokens/s", "emulated accelerator"):
        assert words in result.err.replace("\n", "")
    assert "expected distinct experts" in result.err
    for row in rows[:2]:
        assert hybrimoe("generate", "-p", row["prompt"], *EXACT, "-q").out == row["text"] + "\n"


def test_one_json_document_has_results_and_summary(hybrimoe, prompts):
    result = hybrimoe("generate", "--prompts", prompts, "--batching", "moe-lightning", *EXACT, "--json")
    assert result.code == 0, result.err
    summary = result.data["summary"]
    assert [row["prompt"] for row in result.data["results"]] == list(TEXTS)
    assert summary["new_tokens"] == 32
    assert summary["plan"]["micro_batch"] * summary["plan"]["n_micro_batches"] == summary["batch_size"]
    assert summary["plan"]["attention"] == "cpu", "the emulated accelerator's keys and values are in host memory"
    assert 4 <= summary["distinct_experts"] <= 16
    assert summary["provenance"] == "emulated accelerator"
    assert summary["tokens_per_s"] > 0


def test_service_levels_from_stdin(hybrimoe):
    rows = [{"prompt": TEXTS[0], "id": "slow"}, {"prompt": TEXTS[1], "id": "urgent", "priority": 1, "deadline_ms": 1}]
    text = "\n".join(json.dumps(row) for row in rows)
    result = hybrimoe("generate", "--prompts", "-", *EXACT, "-q", stdin=text)
    assert result.err == ""
    first, second = (json.loads(line) for line in result.out.splitlines())
    assert (first["id"], first["batch"]) == ("slow", 1)
    assert (second["id"], second["batch"], second["late"]) == ("urgent", 0, True)
    assert "late" not in first


def test_ctrl_c_keeps_the_finished_ones(hybrimoe, prompts, monkeypatch):
    @contextmanager
    def pressed_later():
        yield press

    class Press:
        asked = 0

        def __call__(self):
            self.asked += 1
            return self.pressed

        @property
        def pressed(self):
            return self.asked > 13

    press = Press()
    monkeypatch.setattr("hybrimoe.generation.interruptible", pressed_later)
    result = hybrimoe("generate", "--prompts", prompts, "--batch-size", "1", *EXACT)
    assert result.code == 130
    rows = [json.loads(line) for line in result.out.splitlines()]
    assert [row["finish_reason"] for row in rows] == ["length", "interrupted"]
    assert "1 of 4 prompts ended" in result.err


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--batching", "expertflow", "-p", "x"), "give --prompts FILE"),
        (("--batch-size", "2", "-p", "x"), "give --prompts FILE"),
        (("--prompts", "FILE", "-p", "x"), "does not go with --prompt"),
        (("--prompts", "FILE", "--timeline"), "does not go with --prompt"),
        (("--prompts", "FILE", "--batching", "expertflo"), "did you mean 'expertflow'"),
        (("--prompts", "FILE", "--batch-size", "0"), "batch-size"),
    ],
)
def test_wrong_usage(hybrimoe, prompts, words, told):
    result = hybrimoe("generate", *(prompts if word == "FILE" else word for word in words))
    assert result.code == 2
    assert told in " ".join(result.err.replace("│", " ").split())


def test_bad_files(hybrimoe, tmp_path):
    missing = hybrimoe("generate", "--prompts", tmp_path / "none.txt")
    assert (missing.code, "none.txt" in missing.err.replace("\n", "")) == (1, True)
    assert "expected a text file, or - for stdin" in " ".join(missing.err.split())
    folder = hybrimoe("generate", "--prompt-file", tmp_path)
    assert (folder.code, "expected a text file" in " ".join(folder.err.split())) == (1, True)
    empty = tmp_path / "empty.txt"
    empty.write_text("\n")
    assert "has no prompts" in hybrimoe("generate", "--prompts", empty).err
    binary = tmp_path / "binary.txt"
    binary.write_bytes(b"\xff\xfe\x00")
    assert "no UTF-8 text" in hybrimoe("generate", "--prompts", binary).err


def test_moe_lightning_needs_a_link(hybrimoe, prompts):
    result = hybrimoe("generate", "--prompts", prompts, "--batching", "moe-lightning", "--accelerator", "none")
    assert result.code == 2
    assert "no accelerator slots" in result.err


@pytest.fixture(scope="module")
def predictor(hybrimoe, tmp_path_factory):
    folder = tmp_path_factory.mktemp("routes")
    trace, net = folder / "t.npz", folder / "routes.onnx"
    recorded = hybrimoe("trace", "record", "--embeddings", "-n", "14", "-o", trace, "--json")
    assert recorded.code == 0, recorded.err
    told = hybrimoe("trace", "train", trace, "--target", "routes", "-o", net, "--epochs", "2", "--json").data
    assert told["examples"] > 20
    assert told["judged_on"] == 3
    return net


def test_expertflow_groups_by_predicted_routes_without_a_prefill(hybrimoe, prompts, predictor, monkeypatch):
    def refuse(*_):
        raise AssertionError("no prefill is needed")

    monkeypatch.setattr("hybrimoe.generation.batch.job.probe_batch", refuse)
    words = ("--prompts", prompts, "--batching", "expertflow", "--batch-size", "2", *EXACT)
    result = hybrimoe("generate", *words, "--route-predictor", predictor, "--json")
    assert result.code == 0, result.err
    summary = result.data["summary"]
    assert (summary["routes"], summary["batches"], summary["ended"]) == ("predicted", 2, 4)
    assert summary["expected_distinct"] > 0
    alone = hybrimoe("generate", "-p", TEXTS[0], *EXACT, "-q").out
    assert result.data["results"][0]["text"] + "\n" == alone


def test_a_route_predictor_that_does_not_fit_is_refused(hybrimoe, prompts, predictor, tmp_path):
    words = ("generate", "--prompts", prompts, *EXACT, "--json")
    lonely = hybrimoe(*words, "--route-predictor", predictor)
    assert lonely.code == 2
    assert "--batching expertflow" in lonely.data["error"]["message"]
    cache, other = tmp_path / "cache.onnx", tmp_path / "other.onnx"
    nets = [np.zeros(shape, np.float32) for shape in ((192, 4), (4,), (4, 6), (6,))]
    write_net(cache, nets, ("mean_embedding",), "cache", {"model": "x", "n_layers": 2, "n_experts": 3})
    wrong = hybrimoe(*words, "--batching", "expertflow", "--route-predictor", cache)
    assert "predicts 'cache', not routes" in wrong.data["error"]["message"]
    write_net(other, nets, ("mean_embedding",), "routes", {"model": "x", "n_layers": 2, "n_experts": 3})
    unfit = hybrimoe(*words, "--batching", "expertflow", "--route-predictor", other)
    assert "2 layers of 3 experts" in unfit.data["error"]["message"]
    assert "Record and train with this model" in unfit.data["error"]["message"]
