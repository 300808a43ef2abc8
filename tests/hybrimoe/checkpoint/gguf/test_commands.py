"""The commands take a GGUF file: the demo model, written as one, replies as it does from its directory."""

from __future__ import annotations

import json
import os
from pathlib import Path

import gguf
import pytest
from typer.testing import CliRunner, Result

from hybrimoe.cli.app import app
from hybrimoe.demo import demo_model_path

from .conversion import to_gguf


def with_the_demos_tokenizer(writer: gguf.GGUFWriter) -> None:
    """The vocabulary by llama.cpp's keys, and tokenizer.json as a whole: the demo splits text in a way of its own."""
    directory = demo_model_path()
    text = (directory / "tokenizer.json").read_text(encoding="utf-8")
    model = json.loads(text)["model"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("llama-bpe")
    writer.add_token_list(sorted(model["vocab"], key=model["vocab"].__getitem__))
    writer.add_token_merges([" ".join(merge) for merge in model["merges"]])
    for name, number in (("bos", 0), ("eos", 1), ("pad", 2)):
        getattr(writer, f"add_{name}_token_id")(number)
    writer.add_chat_template((directory / "chat_template.jinja").read_text(encoding="utf-8"))
    writer.add_string("tokenizer.huggingface.json", text)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The demo model as a GGUF file in bfloat16, which it is trained in."""
    kind = gguf.GGMLQuantizationType.BF16
    path = tmp_path_factory.mktemp("demo") / "demo.gguf"
    return to_gguf(demo_model_path(), path, kind, tokenizer=with_the_demos_tokenizer)


def run(*words: str, text: str | None = None) -> Result:
    """A command that goes through."""
    done = CliRunner().invoke(app, list(words), input=text, catch_exceptions=False, prog_name="hybrimoe")
    assert done.exit_code == 0, done.output
    return done


def test_the_demo_model_replies_the_same_from_a_gguf_file(demo: Path) -> None:
    options = ("--prompt", "The king", "--max-new-tokens", "12", "--temperature", "0", "--accelerator", "none")
    same = (*options, "--dtype", "bfloat16", "--repetition-penalty", "1.0", "--json")
    texts = [json.loads(run("generate", str(model), *same).stdout)["text"] for model in (demo, demo_model_path())]
    assert texts[0] == texts[1]
    assert texts[0].strip()


def test_a_pack_of_a_gguf_file_replies_the_same_with_its_tokenizer(demo: Path, tmp_path: Path) -> None:
    made = json.loads(run("convert", str(demo), str(tmp_path / "pack"), "--dtype", "int4", "--json").stdout)
    assert made["has_tokenizer"]
    same = ("--prompt", "The king", "--max-new-tokens", "8", "--temperature", "0", "--accelerator", "none", "--json")
    models = ((str(demo), "--dtype", "int4"), (str(tmp_path / "pack"),))
    texts = [
        json.loads(run("generate", *model, *same, "--repetition-penalty", "1.0").stdout)["text"] for model in models
    ]
    assert texts[0] == texts[1]
    assert texts[0].strip()


def test_chat_takes_a_gguf_file(demo: Path) -> None:
    found = run("chat", str(demo), "--accelerator", "none", "--max-new-tokens", "8", "--seed", "1", text="Hello\n")
    assert found.stdout.strip()


@pytest.mark.skipif(os.name != "posix", reason="paths of the file stand in the output")
def test_commands_that_read_no_weights_take_a_gguf_file(demo: Path) -> None:
    explained = json.loads(run("explain", str(demo), "--json").stdout)
    assert (explained["model_type"], len(explained["rows"]) > 0) == ("qwen3_moe", True)
    assert "has its experts as BF16 (0.01 GiB); they are packed once as bfloat16" in explained["remarks"][-1]
    planned = json.loads(run("plan", str(demo), "--hardware", "laptop", "--json").stdout)
    assert (planned["model"], planned["n_experts"]) == ("demo", 6 * 32)
    inspected = run("inspect", str(demo)).stdout
    assert "experts, BF16" in inspected
    assert "none" in inspected, "bfloat16 records are exact"
