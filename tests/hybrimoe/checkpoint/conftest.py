"""A tiny Mixtral on disk, whole and broken in every way that the tests need."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, MixtralConfig, PreTrainedModel

SMALL = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "num_local_experts": 4,
    "num_experts_per_tok": 2,
    "max_position_embeddings": 64,
}


@pytest.fixture(autouse=True)
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, private_cache: Callable[[Path], Path]) -> Path:
    """Packed files that do not lie beside the model go here."""
    monkeypatch.setenv("HYBRIMOE_CACHE", str(private_cache(tmp_path / "cache")))
    return tmp_path / "cache"


@pytest.fixture
def make_model() -> Callable[..., PreTrainedModel]:
    """Builds a small model with seeded weights: `make_model(config, dtype)`, Mixtral in float32 by default."""

    def make(config: Any = None, dtype: torch.dtype = torch.float32, std: float = 0.1) -> PreTrainedModel:
        torch.manual_seed(0)
        model: PreTrainedModel = AutoModelForCausalLM.from_config(config or MixtralConfig(**SMALL), dtype=dtype).eval()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=std)
        return model

    return make


@pytest.fixture
def mixtral(make_model: Callable[..., PreTrainedModel]) -> PreTrainedModel:
    """A small float32 Mixtral."""
    return make_model()


@pytest.fixture
def directory(mixtral: PreTrainedModel, tmp_path: Path) -> Path:
    """The same Mixtral as a checkpoint in one file, one tensor an expert."""
    mixtral.save_pretrained(tmp_path / "model")
    return tmp_path / "model"


@pytest.fixture
def edit(directory: Path) -> Callable[[Callable[[dict[str, torch.Tensor]], None]], Path]:
    """Rewrites the checkpoint's tensors: `edit(lambda tensors: tensors.pop("lm_head.weight"))`."""

    def rewrite(change: Callable[[dict[str, torch.Tensor]], Any]) -> Path:
        file = directory / "model.safetensors"
        tensors = load_file(file)
        change(tensors)
        save_file(tensors, file, metadata={"format": "pt"})
        return directory

    return rewrite


@pytest.fixture
def edit_config(directory: Path) -> Callable[..., Path]:
    """Changes entries of config.json: `edit_config(num_local_experts=5)`."""

    def rewrite(**entries: Any) -> Path:
        file = directory / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))
        return directory

    return rewrite
