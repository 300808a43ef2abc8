"""Architectures that are not read, each with its reason: tests fail once a reason outside of this project is gone."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
from transformers import MiniMaxConfig
from transformers.models.minimax.modeling_minimax import MiniMaxRotaryEmbedding

from hybrimoe.checkpoint.errors import UnsupportedCheckpointError
from hybrimoe.checkpoint.gguf.config import config_of
from hybrimoe.checkpoint.gguf.families import FAMILIES, NOT_READ
from hybrimoe.checkpoint.gguf.file import open_gguf
from hybrimoe.errors import CheckpointError

from ....families.tiny_families import FOREIGN
from .models import gguf_model

DOCS = Path(__file__).parents[4] / "docs" / "gguf.md"


@pytest.mark.parametrize("architecture", sorted(NOT_READ))
def test_the_error_says_why(architecture: str, tmp_path: Path) -> None:
    writer = gguf.GGUFWriter(str(tmp_path / "model.gguf"), architecture)
    writer.add_tensor("token_embd.weight", np.zeros((8, 8), np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    with pytest.raises(UnsupportedCheckpointError) as error:
        config_of(open_gguf(tmp_path / "model.gguf"))
    assert NOT_READ[architecture] in str(error.value)
    assert f"| `{architecture}` |" in DOCS.read_text()


def test_what_is_read_has_no_reason_against_it() -> None:
    assert NOT_READ.keys().isdisjoint(FAMILIES)


def test_minimax_rotates_whole_heads() -> None:
    half = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}
    config = MiniMaxConfig(head_dim=16, rope_parameters=half)
    assert len(MiniMaxRotaryEmbedding(config).inv_freq) == 16 // 2, "minimax-01 could be read"


def test_dbrx_is_refused_in_every_file() -> None:
    assert "dbrx" in FOREIGN, "dbrx could be read"


def test_a_window_over_what_was_written_is_refused(tmp_path: Path) -> None:
    file = gguf_model("deepseek_ocr2", tmp_path, tokenizer=lambda writer: writer.add_sliding_window(8))
    with pytest.raises(UnsupportedCheckpointError, match="is an Unlimited-OCR"):
        config_of(open_gguf(file))


@pytest.mark.parametrize(("name", "values"), [("swiglu_clamp_exp", [-1.0, 0.0]), ("attention.head_count", [2, 0])])
def test_wrong_values_of_layers_are_named(name: str, values: list[Any], tmp_path: Path) -> None:
    def wrong(writer: gguf.GGUFWriter) -> None:
        writer.add_array(f"{writer.arch}.{name}", values)

    with pytest.raises(CheckpointError, match=rf"step35.{name} is"):
        config_of(open_gguf(gguf_model("step3p7", tmp_path, tokenizer=wrong)))
