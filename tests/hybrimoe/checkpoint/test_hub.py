"""What of a hub repository is fetched: the weights once, in the layout that is read."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from hybrimoe.checkpoint import model_path

SHARDS = ["model-00001-of-00002.safetensors", "model-00002-of-00002.safetensors"]
EXTRA = [
    "original/consolidated.00.pth",
    "original/model.safetensors",
    "original/params.json",
    "consolidated.safetensors",
    "consolidated-00001-of-00002.safetensors",
    "consolidated.safetensors.index.json",
    "onnx/model.safetensors",
    "fp16/model.safetensors",
    "pytorch_model.bin",
]
SMALL = ["config.json", "tokenizer.json", "chat_template.jinja", "additional_chat_templates/tools.jinja"]


def fetched(files: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> set[str]:
    """What is there after fetching a repository of `files`, by the hub's own filter of names."""
    repository, here = tmp_path / "repository", tmp_path / "here"
    for name in files:
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text("{}")
    index = repository / "model.safetensors.index.json"
    if index.exists():
        entries = ", ".join(f'"w{number}": "{name}"' for number, name in enumerate(SHARDS))
        index.write_text(f'{{"weight_map": {{{entries}}}}}')

    def snapshot(hub_id: str, *, allow_patterns: list[str], ignore_patterns: list[str]) -> str:
        for name in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / name, here / name)
        return str(here)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    assert model_path("someone/something") == here
    return {str(file.relative_to(here)) for file in here.rglob("*") if file.is_file()}


def test_shards_by_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [*SMALL, *SHARDS, "model.safetensors.index.json"]
    assert fetched([*wanted, *EXTRA, "model.safetensors"], tmp_path, monkeypatch) == set(wanted)


def test_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [*SMALL, "model.safetensors"]
    assert fetched([*wanted, *EXTRA], tmp_path, monkeypatch) == set(wanted)
