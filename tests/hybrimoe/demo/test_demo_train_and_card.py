import dataclasses
import re
import xml.etree.ElementTree as ET

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

from hybrimoe.demo.training import card, train
from hybrimoe.demo.training.plot import MAX_POINTS, line_plot
from hybrimoe.demo.training.run_files import RunFiles
from hybrimoe.errors import ConfigError


@pytest.fixture
def command(tiny_settings, corpora_folder, tmp_path, monkeypatch):
    """Runs the training command with tiny defaults, on corpora of which half is held out."""
    settings = dataclasses.replace(tiny_settings, max_tokens=None, evaluate_windows=2)
    monkeypatch.setattr("hybrimoe.demo.training.corpora.document.HELD_OUT_PERCENT", 50)
    monkeypatch.setattr(train, "Settings", lambda **changes: dataclasses.replace(settings, **changes))

    def run(*arguments: str) -> int:
        return train.main(["--corpora", str(corpora_folder), "--out", str(tmp_path / "run"), *arguments])

    return run


def test_the_command_trains_exports_and_the_card_says_what_came_out(command, corpora_folder, tmp_path, monkeypatch):
    assert command("--tokens", "640", "--precision", "fp32") == 0
    model_folder = tmp_path / "run" / "model"
    model = AutoModelForCausalLM.from_pretrained(model_folder)
    tokenizer = AutoTokenizer.from_pretrained(model_folder)
    assert model.generation_config.do_sample
    assert len(tokenizer) == model.config.vocab_size == 300
    monkeypatch.setattr(card, "SAMPLE_TOKENS", 6)
    run = ["--corpora", str(corpora_folder), "--run", str(tmp_path / "run"), "--model", str(model_folder)]
    assert card.main(run) == 0
    text = (model_folder / "README.md").read_text()
    assert "10 steps of 64 tokens, 640 tokens in all" in text
    assert f"{sum(p.numel() for p in model.parameters()):,} in all" in text
    assert re.search(r"\| postgresql \| [\d,]+ \| [\d,]+ \| \d\.\d{3} \|", text)
    assert len(re.findall(r"^\| [01] \| 0\.\d{3} \|", text, re.MULTILINE)) == 2, "a row of router load a layer"
    assert "Regents of the University of California" in (model_folder / "THIRD-PARTY.md").read_text()
    last = RunFiles(tmp_path / "run").read_metrics()[-1]["bits_per_byte"]
    row = [f"{last[domain]:.3f}" for domain in ("austen", "web", "postgresql")]
    assert f"| {' | '.join(row)} |" in text
    assert ET.parse(model_folder / "curve.svg").getroot().tag.endswith("svg")


def test_the_command_resumes_and_refuses_other_settings(command, tmp_path):
    assert command("--tokens", "256", "--precision", "fp32") == 0
    steps = len(RunFiles(tmp_path / "run").read_metrics())
    assert command("--tokens", "256", "--precision", "fp32") == 0, "a finished run has nothing left to do"
    assert len(RunFiles(tmp_path / "run").read_metrics()) in (steps, steps + 1)
    with pytest.raises(ConfigError, match="seed=1, found 9"):
        command("--tokens", "256", "--precision", "fp32", "--seed", "9")


def test_a_plot_is_small_valid_svg_and_keeps_its_range():
    points = [(float(x), 5.0 + x % 7) for x in range(5000)]
    root = ET.fromstring(line_plot("title", "x", {"a": points, "none": []}))
    lines = [element for element in root if element.get("stroke-width") == "1.5"]
    assert len(lines) == 1
    assert len(lines[0].get("points").split()) <= MAX_POINTS
    labels = [element.text for element in root if element.tag.endswith("text")]
    assert "5.00" in labels
    assert "11.00" in labels
    assert "none" not in labels
