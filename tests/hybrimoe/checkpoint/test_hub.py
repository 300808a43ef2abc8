"""What of a hub repository is fetched: the weights once, in the layout that is read."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from pathlib import Path

import huggingface_hub
import pytest
from huggingface_hub.utils import filter_repo_objects

from hybrimoe.checkpoint import model_path
from hybrimoe.errors import ModelError

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


def fetched(files: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, gguf: str | None = None) -> set[str]:
    """What is there after fetching a repository of `files`, or its file `gguf`, by the hub's own filter of names."""
    repository, here = tmp_path / "repository", tmp_path / "here"
    for name in files:
        (repository / name).parent.mkdir(parents=True, exist_ok=True)
        (repository / name).write_text("{}")
    index = repository / "model.safetensors.index.json"
    if index.exists():
        entries = ", ".join(f'"w{number}": "{name}"' for number, name in enumerate(SHARDS))
        index.write_text(f'{{"weight_map": {{{entries}}}}}')

    def snapshot(hub_id: str, *, allow_patterns: list[str], ignore_patterns: list[str] | None = None) -> str:
        here.mkdir(exist_ok=True)
        for name in filter_repo_objects(files, allow_patterns=allow_patterns, ignore_patterns=ignore_patterns):
            (here / name).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(repository / name, here / name)
        return str(here)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot)
    if gguf is None:
        assert model_path("someone/something") == here
    else:
        assert model_path(f"someone/something:{gguf}") == here / gguf.replace("-00002-", "-00001-", 1)
    return {str(file.relative_to(here)) for file in here.rglob("*") if file.is_file()}


def test_shards_by_their_index(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [*SMALL, *SHARDS, "model.safetensors.index.json"]
    assert fetched([*wanted, *EXTRA, "model.safetensors"], tmp_path, monkeypatch) == set(wanted)


def test_one_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wanted = [*SMALL, "model.safetensors"]
    assert fetched([*wanted, *EXTRA], tmp_path, monkeypatch) == set(wanted)


PARTS = ["Q4/m-00001-of-00002.gguf", "Q4/m-00002-of-00002.gguf"]


def test_a_gguf_file_with_all_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    others = ["Q8/m.gguf", "m-Q4_0.gguf", "README.md"]
    assert fetched([*PARTS, *others], tmp_path, monkeypatch, PARTS[1]) == set(PARTS)


def test_one_gguf_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    assert fetched([*PARTS, "m-Q4_0.gguf", "m-Q8_0.gguf"], tmp_path, monkeypatch, "m-Q4_0.gguf") == {"m-Q4_0.gguf"}


def test_a_repository_of_gguf_files_asks_for_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(ModelError, match=r"no config.json; .* name the one to take: someone/something:FILE.gguf"):
        fetched([*PARTS, "params.json"], tmp_path, monkeypatch)
    with pytest.raises(ModelError, match=r"has no file other.gguf"):
        fetched(PARTS, tmp_path, monkeypatch, "other.gguf")
