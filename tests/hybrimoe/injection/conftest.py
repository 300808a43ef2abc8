"""Small models for the injection tests, and the table of tiny configurations of every family."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import PreTrainedConfig, PreTrainedModel

from hybrimoe.checkpoint.meta import meta_model

FAMILIES_FOLDER = Path(__file__).parents[2] / "families"
sys.path.insert(0, str(FAMILIES_FOLDER))

MakeConfig = Callable[..., PreTrainedConfig]


@pytest.fixture(scope="session")
def tiny() -> MakeConfig:
    """`tiny(family, **overrides)`: the tiny configuration of a family of transformers."""
    from dataclasses import replace

    from tiny_families import FAMILIES, tiny_config

    def make(family: str, **overrides: Any) -> PreTrainedConfig:
        entry = FAMILIES[family]
        return tiny_config(replace(entry, overrides={**entry.overrides, **overrides}))

    return make


@pytest.fixture(scope="session")
def qwen3_meta(tiny: MakeConfig) -> PreTrainedModel:
    """A Qwen3-MoE of three layers on the meta device; tests only look at it."""
    return meta_model(tiny("qwen3_moe", num_hidden_layers=3))


@pytest.fixture
def qwen3(tiny: MakeConfig) -> PreTrainedModel:
    """A Qwen3-MoE of three layers with seeded float32 weights."""
    from transformers import AutoModelForCausalLM

    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(tiny("qwen3_moe", num_hidden_layers=3), dtype=torch.float32).eval()
