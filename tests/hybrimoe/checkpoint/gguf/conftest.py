"""A GGUF file of a tiny model."""

from __future__ import annotations

from pathlib import Path

import pytest

from .models import gguf_model, letters


@pytest.fixture
def file(tmp_path: Path) -> Path:
    """An OLMoE of two layers in float32, with a vocabulary of letters."""
    return gguf_model("olmoe", tmp_path, tokenizer=letters)
