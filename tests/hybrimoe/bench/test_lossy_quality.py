"""`hybrimoe bench quality --lossy`: figures against the lossless run, refused usage, CSV; the text it reads."""

import csv
import math

import pytest
import torch

from hybrimoe.bench.quality import lossy as lossy_quality
from hybrimoe.bench.quality.text import compare, text_windows
from hybrimoe.config.deploy import load_config
from hybrimoe.demo import demo_model_path
from hybrimoe.demo.training.corpora import Document
from hybrimoe.demo.training.held_out import excerpt
from hybrimoe.errors import ConfigError, ModelError


@pytest.fixture(scope="module")
def result():
    kinds = ("hobbit:misses_only=false", "swapmoe:budget=12")
    deployment = load_config(None, expert_dtype="bfloat16", gpu_expert_slots="24")
    return lossy_quality.run(lossy_quality.Request(deployment, None, kinds, 1, 1, 12))


def test_the_lossless_run_is_the_yardstick(result):
    base = result["rows"][0]
    assert base["policy"] == "lossless"
    assert (base["greedy_agreement"], base["decode_greedy_agreement"]) == (1.0, 1.0)
    assert base["divergence"] == pytest.approx(0.0, abs=1e-6)
    assert (base["skipped"], base["substituted"], base["lowered"]) == (0.0, 0.0, 0.0)
    assert 15 < base["perplexity"] < 45  # the card: 3.2 to 3.6 nats a token


def test_losses_are_in_the_order_that_the_policies_suggest(result):
    _, hobbit, swapmoe = result["rows"]
    assert 0 < hobbit["divergence"] < 0.05 < swapmoe["divergence"]
    assert hobbit["greedy_agreement"] > swapmoe["greedy_agreement"]
    assert hobbit["lowered"] > 0.1
    assert swapmoe["substituted"] + swapmoe["skipped"] > 0.5
    assert all(row["tokens_per_s"] > 0 and row["provenance"] == "emulated" for row in result["rows"])
    assert hobbit["host_mib"] > swapmoe["host_mib"]


def test_perplexity_agreement_and_divergence_by_hand():
    base = torch.log(torch.tensor([[0.5, 0.25, 0.25], [0.1, 0.8, 0.1]]))
    mine = torch.log(torch.tensor([[0.25, 0.5, 0.25], [0.1, 0.8, 0.1]]))
    target = torch.tensor([0, 1])
    perplexity, same, divergence = compare([mine], [base], [target], lossy_quality._divergence)
    assert perplexity == pytest.approx(math.exp(-(math.log(0.25) + math.log(0.8)) / 2), rel=1e-5)
    assert same == 0.5
    assert divergence == pytest.approx((0.5 * math.log(2) - 0.25 * math.log(2)) / 2, rel=1e-5)


def test_the_command_writes_csv_and_refuses_wrong_kinds(monkeypatch, tmp_path):
    from typer.testing import CliRunner

    from hybrimoe.cli.app import app

    rows = [{"policy": "lossless", "perplexity": 2.0, "greedy_agreement": 1.0, "decode_perplexity": 2.0,
             "decode_greedy_agreement": 1.0, "decode_divergence": 0.0, "tokens_per_s": 5.0, "hit_rate": None,
             "transfer_kib_per_token": 0.0, "skipped": 0.0, "substituted": 0.0, "lowered": 0.0, "deferred": 0.0,
             "provenance": "measured"}]  # fmt: skip
    asked = []

    def fake(request, progress):
        asked.append(request)
        return {"rows": rows, "dtype": "int8", "prefill_tokens": 1, "decode_tokens": 1, "text": "t"}

    monkeypatch.setattr(lossy_quality, "run", fake)
    file = tmp_path / "rows.csv"
    words = ["bench", "quality", "--lossy", "skip", "--lossy", "all", "--dtype", "int8", "--csv", str(file)]
    outcome = CliRunner().invoke(app, words)
    assert outcome.exit_code == 0, outcome.output
    assert asked[0].lossy[0] == "skip"
    assert len(asked[0].lossy) == len(set(asked[0].lossy)) > 3
    assert next(csv.DictReader(file.read_text(encoding="utf-8").splitlines()))["policy"] == "lossless"
    monkeypatch.undo()
    with pytest.raises(ConfigError, match="did you mean 'skip'"):
        lossy_quality.run(lossy_quality.Request(load_config(None, expert_dtype="bfloat16"), None, ("skp",), 1, 1, 4))


def test_windows_are_spread_over_the_text(tmp_path):
    windows, name = text_windows(demo_model_path(), None, 3)
    assert (name, [len(window) for window in windows]) == ("held-out.txt", [512] * 3)
    card, name = text_windows(demo_model_path(), demo_model_path() / "README.md", 2)
    assert (name, len(card)) == ("README.md", 2)
    with pytest.raises(ModelError, match="there is no text"):
        text_windows(tmp_path, None, 1)


def test_the_excerpt_takes_held_out_documents_only():
    documents = [Document("web", f"chapter {n}", f"text {n}\n\nmore {n}") for n in range(60)]
    held = [d for d in documents if d.held_out]
    assert held
    assert excerpt(documents, 10_000) == "\n\n".join(d.text for d in held) + "\n"
    assert excerpt(documents, 1) == held[0].text.split("\n\n")[0] + "\n"
