"""A checkpoint with weights that its model does not have: refused with what to do, which then works."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from hybrimoe.demo import demo_model_path

KEY = "model.layers.0.adapter.weight"
WORDS = ("--prompt", "It was", "-n", "4", "-t", "0", "--accelerator", "none", "--json")


@pytest.fixture(scope="module")
def with_extra_keys(tmp_path_factory) -> Path:
    """The demo model with one more tensor."""
    folder = tmp_path_factory.mktemp("extra") / "model"
    shutil.copytree(demo_model_path(), folder)
    file = folder / "model.safetensors"
    save_file(load_file(file) | {KEY: torch.ones(3)}, file, metadata={"format": "pt"})
    return folder


def test_refused_with_what_to_do(hybrimoe, with_extra_keys):
    result = hybrimoe("generate", with_extra_keys, *WORDS)
    assert result.code == 1
    message = result.data["error"]["message"]
    for text in (KEY, "--unknown-keys ignore", "unknown_keys: ignore in the deployment file", 'unknown_keys="ignore"'):
        assert text in message


@pytest.mark.parametrize("way", ["option", "file"])
def test_left_out_where_asked(hybrimoe, with_extra_keys, tmp_path, way):
    words = ["--unknown-keys", "ignore"]
    if way == "file":
        (tmp_path / "deploy.yaml").write_text("unknown_keys: ignore\n")
        words = ["--config", tmp_path / "deploy.yaml"]
    else:
        words += ["--config", "default"]
    result = hybrimoe("generate", with_extra_keys, *WORDS, *words)
    assert result.code == 0, result.err
    plain = hybrimoe("generate", demo_model_path(), *WORDS, "--config", "default")
    assert result.data["text"] == plain.data["text"]


def test_no_other_word_is_taken(hybrimoe, with_extra_keys):
    result = hybrimoe("generate", with_extra_keys, *WORDS, "--unknown-keys", "forgive")
    assert result.code == 2
    assert "unknown_keys" in result.data["error"]["message"]
    assert "ignore" in result.data["error"]["message"]
