"""Families whose decode steps must run compiled: plain transformers' logits and tokens, nothing left aside."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest
import torch

import hybrimoe

sys.path.insert(0, str(Path(__file__).parents[2] / "families"))
from family_check import outputs
from tiny_families import tiny_model

COMPILED = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe", "glm4_moe", "gpt_oss", "ernie4_5_moe",
    "hunyuan_v1_moe", "dots1", "exaone_moe", "flex_olmo", "mellum", "kolibri1", "solar_open",
)  # fmt: skip
TOLERANCE = 1e-4
NEW_TOKENS = 5
"""Decode steps of `family_check.outputs` behind its prompt."""


@pytest.mark.parametrize("family", COMPILED)
def test_a_family_runs_compiled(family: str) -> None:
    model = tiny_model(family)
    plain = outputs(model)
    injection = hybrimoe.inject(model, accelerator="none", expert_dtype="float32")
    assert injection.step is not None, injection.way
    assert set(injection.explain().ways.values()) == {"compiled"}
    compiled = outputs(model)
    assert injection.step.n_steps == NEW_TOKENS
    assert float((compiled.decode - plain.decode).abs().max()) <= TOLERANCE
    assert torch.equal(compiled.tokens, plain.tokens)
    assert injection.stats().as_dict()["decode"]["tokens"] > 0
    injection.restore()
    after = outputs(model)
    assert torch.equal(after.decode, plain.decode)
    assert "forward" not in vars(model)
