"""Numbers in config.json that fit no forward are refused by name when the model is opened, and nothing else is."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma4TextConfig,
    Glm4MoeConfig,
    GptOssConfig,
    GraniteMoeConfig,
    GraniteMoeHybridConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

from hybrimoe.checkpoint import load
from hybrimoe.errors import HybriMoEError, ModelError

from .conftest import SMALL
from .models import FLOAT32, TOKENS, logits

MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
MIXTRAL = MixtralConfig(**SMALL, head_dim=8)
GROUPED = DeepseekV3Config(
    **SMALL | MLA | {"num_key_value_heads": 4}, moe_intermediate_size=16, n_routed_experts=4, n_group=2, topk_group=1,
    first_k_dense_replace=0,
)  # fmt: skip
SINKS = GptOssConfig(**SMALL, head_dim=8, sliding_window=16)
SCALED = GraniteMoeConfig(**SMALL)
STATES = GraniteMoeHybridConfig(
    **SMALL, mamba_n_heads=8, mamba_d_head=8, mamba_d_state=8, shared_intermediate_size=16,
    layer_types=["mamba", "attention"],
)  # fmt: skip
BY_TOP_K = Gemma4TextConfig(
    **SMALL, head_dim=8, global_head_dim=8, num_experts=4, top_k_experts=2, moe_intermediate_size=16,
    enable_moe_block=True, sliding_window=16, vocab_size_per_layer_input=64, hidden_size_per_layer_input=8,
)  # fmt: skip
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 32}


@pytest.fixture
def saved(make_model: Callable[..., Any], tmp_path: Path) -> Callable[..., Path]:
    """`saved(config, name=value)`: a model of the configuration, with these entries of its config.json changed."""

    def save(config: Any, **entries: Any) -> Path:
        make_model(config).save_pretrained(tmp_path / "model")
        file = tmp_path / "model" / "config.json"
        file.write_text(json.dumps(json.loads(file.read_text()) | entries))
        return file.parent

    return save


@pytest.mark.parametrize(
    ("config", "name", "value"),
    [
        *((MIXTRAL, "sliding_window", value) for value in (-1, 0, float("nan"), "wide", 0.5)),
        (SINKS, "sliding_window", -1),
        (MIXTRAL, "rms_norm_eps", float("nan")),
        (MIXTRAL, "num_experts_per_tok", 5),
        (MIXTRAL, "intermediate_size", 0),
        *((GROUPED, "n_group", value) for value in (0, -1, 3, 4)),
        *((GROUPED, "topk_group", value) for value in (0, -1, 3)),
        *((GROUPED, "head_dim", value) for value in (4, 16)),
        (GROUPED, "routed_scaling_factor", float("inf")),
        (MIXTRAL, "rms_norm_eps", -1.0),
        (SCALED, "logits_scaling", 0.0),
        (STATES, "mamba_chunk_size", 0),
        (BY_TOP_K, "top_k_experts", 5),
    ],
)
def test_what_no_forward_can_run_with_is_named(config: Any, name: str, value: Any, saved: Callable[..., Path]) -> None:
    with pytest.raises(HybriMoEError, match=rf"(?s){name}.*config\.json|config\.json.*{name}"):
        load(saved(config, **{name: value}), **FLOAT32)


@pytest.mark.parametrize("entries", [{"rope_theta": 0.0}, {"rope_theta": -1.0}, YARN | {"factor": 0.0}])
def test_positions_that_are_not_finite(entries: dict[str, Any], saved: Callable[..., Path]) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4} | entries
    with pytest.raises(ModelError, match=r"rope_parameters in config\.json gives positions that are NaN or infinite"):
        load(saved(MIXTRAL, rope_parameters=rope), **FLOAT32)


def test_more_positions_than_a_head_has(saved: Callable[..., Path]) -> None:
    rope = {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 1.5}
    config = Glm4MoeConfig(**SMALL, head_dim=8, n_routed_experts=4, moe_intermediate_size=16, first_k_dense_replace=0)
    with pytest.raises(ModelError, match=r"partial_rotary_factor in config\.json gives positions for 12 dimensions"):
        load(saved(config, rope_parameters=rope), **FLOAT32)


def test_nan_is_named_where_it_stands(saved: Callable[..., Path]) -> None:
    directory = saved(MIXTRAL, task_specific_params={"a": [1.0, float("nan")]})
    with pytest.raises(ModelError, match=r"task_specific_params\.a\[1\] in config\.json is nan; expected a number"):
        load(directory, **FLOAT32)


@pytest.mark.parametrize(
    ("config", "entries"),
    [
        (MIXTRAL, {"sliding_window": None}),
        (MIXTRAL, {"sliding_window": 10**6}),  # a window larger than the context hides nothing
        (MIXTRAL, {"num_experts_per_tok": 4}),
        (MIXTRAL, {"time_step_limit": [0.0, float("inf")]}),  # as models with Mamba layers have it
        (MIXTRAL, {"rope_parameters": YARN}),
        (SINKS, {"layer_types": ["full_attention"] * 2, "sliding_window": 0}),
        (Qwen3MoeConfig(**SMALL, head_dim=8, num_experts=4, moe_intermediate_size=16), {"sliding_window": -1}),
        (GROUPED, {"n_group": 2, "topk_group": 2}),
        (GROUPED, {"n_group": 1, "topk_group": 1}),
    ],
)
def test_what_transformers_runs_with_is_run_with(
    config: Any, entries: dict[str, Any], saved: Callable[..., Path]
) -> None:
    directory = saved(config, **entries)
    original = AutoModelForCausalLM.from_pretrained(directory, config=AutoConfig.from_pretrained(directory)).eval()
    with torch.no_grad():
        expected = original(input_ids=TOKENS).logits
    assert torch.allclose(logits(load(directory, **FLOAT32)), expected, atol=1e-4)
