"""Contexts that are stretched (`rope` of the deployment): angles and logits are those of transformers."""

from __future__ import annotations

import copy
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    Gemma4TextConfig,
    GptOssConfig,
    JambaConfig,
    MixtralConfig,
    Qwen3MoeConfig,
)

import hybrimoe
from hybrimoe.checkpoint import load
from hybrimoe.checkpoint.converting import convert
from hybrimoe.checkpoint.meta import model_shape
from hybrimoe.checkpoint.rope import stretched
from hybrimoe.config.deploy import RopeConfig, load_config
from hybrimoe.errors import ConfigError, ModelError
from hybrimoe.generation.context import model_context_tokens
from hybrimoe.generation.growing import growing_cache
from hybrimoe.server.shelf import deployments

from .conftest import SMALL
from .models import FLOAT32

OWN = 32
"""Tokens that the tiny models are made for."""
SIZES = SMALL | {"max_position_embeddings": OWN}
MLA = {"q_lora_rank": 16, "kv_lora_rank": 16, "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8}
OF_DEEPSEEK = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 2.0, "original_max_position_embeddings": 16, "mscale": 0.7,
    "mscale_all_dim": 0.5,
}  # fmt: skip
MODELS = {
    "mixtral": MixtralConfig(**SIZES, head_dim=8, sliding_window=None),
    "qwen3_moe": Qwen3MoeConfig(**SIZES, head_dim=8, num_experts=4, moe_intermediate_size=16),
    "gpt_oss": GptOssConfig(
        **SIZES, head_dim=8, sliding_window=8, rope_parameters={"rope_type": "default", "rope_theta": 1e4}
    ),
    "deepseek_v3": DeepseekV3Config(
        **SIZES | MLA | {"num_key_value_heads": 4}, moe_intermediate_size=16, n_routed_experts=4, n_group=2,
        topk_group=1, first_k_dense_replace=0, rope_parameters=OF_DEEPSEEK,
    ),
}  # fmt: skip
EXPECTED = {
    "linear": {"rope_type": "linear", "factor": 2.0},
    "dynamic": {"rope_type": "dynamic", "factor": 2.0},
    "yarn": {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": OWN},
}
"""What a config.json has to say for each scaling, by transformers' documentation."""


def ids(n_tokens: int, seed: int = 1) -> torch.Tensor:
    return torch.randint(3, 60, (1, n_tokens), generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def saved(make_model: Callable[..., Any], tmp_path: Path) -> Callable[[Any], Path]:
    def save(config: Any) -> Path:
        make_model(copy.deepcopy(config)).save_pretrained(tmp_path / "model")
        return tmp_path / "model"

    return save


@pytest.mark.parametrize("scaling", EXPECTED)
@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "gpt_oss"])
def test_prompts_and_compiled_steps_are_those_of_transformers(
    family: str, scaling: str, saved: Callable[..., Path]
) -> None:
    folder = saved(MODELS[family])
    ours: Any = load(folder, rope_scaling=scaling, rope_factor=2.0, **FLOAT32)
    config = copy.deepcopy(MODELS[family])
    config.rope_parameters = {"rope_theta": config.rope_parameters["rope_theta"]} | EXPECTED[scaling]
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, config=config).eval()
    assert model_context_tokens(ours.config) == 2 * OWN
    assert ours.hybrimoe.step is not None, ours.hybrimoe.way
    caches = [growing_cache(model.config) for model in (ours, theirs)]
    with torch.inference_mode():
        for tokens in (ids(40), *(ids(1, seed) for seed in range(6))):
            found, expected = (
                model(input_ids=tokens, past_key_values=cache, use_cache=True).logits
                for model, cache in zip((ours, theirs), caches, strict=True)
            )
            assert torch.allclose(found, expected, atol=1e-4), scaling
        positions = torch.arange(46)[None]
        angles = [model.model.rotary_emb(torch.zeros(1, 1, 8), positions) for model in (ours, theirs)]
    assert ours.hybrimoe.step.n_steps >= 6
    assert all(torch.equal(*pair) for pair in zip(*angles, strict=True)), "every bit of the angles"
    cos, sin = (np.empty((46, 4), np.float32) for _ in range(2))
    ours.hybrimoe.step.angles[0].write(list(range(46)), cos, sin)
    assert np.array_equal(cos, angles[0][0][0, :, :4].numpy())


def test_a_model_with_yarn_keeps_the_rest_of_it(saved: Callable[..., Path]) -> None:
    """DeepSeek's attention is scaled by mscale_all_dim and the factor, too."""
    folder = saved(MODELS["deepseek_v3"])
    ours: Any = load(folder, rope_scaling="yarn", rope_factor=3.0, **FLOAT32)
    assert model_context_tokens(ours.config) == 48
    config = copy.deepcopy(MODELS["deepseek_v3"])
    config.rope_parameters = OF_DEEPSEEK | {"factor": 3.0}
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, config=config).eval()
    assert ours.hybrimoe.step is not None, ours.hybrimoe.way
    with torch.inference_mode():
        assert torch.allclose(ours(input_ids=ids(40)).logits, theirs(input_ids=ids(40)).logits, atol=1e-4)


def test_none_takes_the_scaling_of_the_configuration_out(saved: Callable[..., Path]) -> None:
    config = copy.deepcopy(MODELS["mixtral"])
    config.rope_parameters = {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}
    folder = saved(config)
    ours: Any = load(folder, rope_scaling="none", **FLOAT32)
    assert model_context_tokens(ours.config) == 8, "a configuration with linear scaling has the stretched length"
    config.rope_parameters = {"rope_type": "default", "rope_theta": 1e4}
    theirs: Any = AutoModelForCausalLM.from_pretrained(folder, config=config).eval()
    with torch.inference_mode():
        assert torch.allclose(ours(input_ids=ids(8)).logits, theirs(input_ids=ids(8)).logits, atol=1e-4)


def test_angles_of_dynamic_scaling_do_not_depend_on_earlier_texts(saved: Callable[..., Path]) -> None:
    """Transformers keeps those of the longest text so far, until a text comes that is shorter than the model's own."""
    model: Any = load(saved(MODELS["qwen3_moe"]), rope_scaling="dynamic", rope_factor=2.0, **FLOAT32)
    with torch.inference_mode():
        before = model(input_ids=ids(40)).logits
        model(input_ids=ids(60))
        again = model(input_ids=ids(40)).logits
        cache = growing_cache(model.config)
        model(input_ids=ids(40), past_key_values=cache)
        model(input_ids=ids(1), past_key_values=cache)
        within, plain = model(input_ids=ids(30)).logits, before[:, :30]
    assert torch.equal(before, again)
    assert model.hybrimoe.step.n_steps == 1, "it is still the model that was compiled"
    assert not torch.allclose(within, plain, atol=1e-6), "beyond its own context all tokens have other angles"


@pytest.mark.parametrize(
    ("entries", "rope", "parameters", "context"),
    [
        ({"rope_theta": 5.0, "max_position_embeddings": 100}, ("yarn", 2.5), None, 250),
        ({"rope_scaling": {"type": "yarn", "factor": 4.0, "attention_factor": 1.1386}, "max_position_embeddings": 50},
         ("yarn", 2.0), {"rope_type": "yarn", "factor": 2.0, "original_max_position_embeddings": 50}, 100),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "attention_factor": 1.0, "beta_fast": 16,
                              "original_max_position_embeddings": 50}, "max_position_embeddings": 200},
         ("yarn", 8.0), {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 50, "beta_fast": 16,
                         "attention_factor": 1.0}, 400),
        ({"rope_parameters": {"rope_type": "yarn", "factor": 4.0, "beta_fast": 16, "rope_theta": 7.0,
                              "original_max_position_embeddings": 50}, "max_position_embeddings": 200},
         ("linear", 2.0), {"rope_type": "linear", "factor": 2.0, "rope_theta": 7.0}, 100),
        ({"rope_parameters": {"full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
                              "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}},
          "max_position_embeddings": 800},
         ("linear", 16.0), {"full_attention": {"rope_type": "linear", "factor": 16.0, "rope_theta": 1e6},
                            "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}, 1600),
    ],
)  # fmt: skip
def test_what_stays_of_a_configuration(
    entries: dict[str, Any], rope: tuple[str, float], parameters: dict[str, Any] | None, context: int
) -> None:
    found = stretched(entries, RopeConfig(scaling=rope[0], factor=rope[1]), "it")
    assert found.context == context
    assert parameters is None or found.parameters == parameters


@pytest.mark.parametrize(
    ("entries", "words"),
    [
        ({"max_position_embeddings": 64}, "it has no rotary embeddings"),
        ({"rope_theta": 1e4}, "does not say for how many tokens.*--yarn-orig-ctx"),
        ({"rope_parameters": {"rope_type": "llama3"}, "max_position_embeddings": 64}, r"\(llama3\).*would spoil"),
        ({"rope_parameters": {"rope_type": "dynamic", "alpha": 1e3}, "max_position_embeddings": 64}, "would spoil"),
        ({"rope_parameters": {"sliding_attention": {"rope_type": "default"}}}, "every layer of it has a window"),
    ],
)
def test_what_cannot_be_stretched(entries: dict[str, Any], words: str) -> None:
    with pytest.raises(ModelError, match=words):
        stretched(entries, RopeConfig(scaling="yarn", factor=2.0), "it")


def test_models_whose_positions_are_of_another_kind(saved: Callable[..., Path]) -> None:
    plain = JambaConfig(
        **SIZES, mamba_d_state=8, mamba_dt_rank=4, mamba_d_conv=4, attn_layer_period=2, attn_layer_offset=1,
        expert_layer_period=2, expert_layer_offset=1, num_experts=4, use_mamba_kernels=False,
    )  # fmt: skip
    with pytest.raises(ModelError, match="jamba has no rotary embeddings to stretch"):
        load(saved(plain), rope_scaling="yarn", rope_factor=2.0, **FLOAT32)
    windows = Gemma4TextConfig(
        **SIZES, head_dim=8, global_head_dim=8, num_experts=4, top_k_experts=2, moe_intermediate_size=16,
        enable_moe_block=True, sliding_window=16, vocab_size_per_layer_input=64, hidden_size_per_layer_input=8,
    )  # fmt: skip
    with pytest.raises(ModelError, match=r"gemma4_text was trained with stretched rotary embeddings \(proportional\)"):
        load(saved(windows), rope_scaling="yarn", rope_factor=2.0, **FLOAT32)


def test_models_in_memory_and_packs_refuse(make_model: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"rope: hybrimoe\.load stretches a context"):
        hybrimoe.inject(make_model(MODELS["mixtral"]), rope_scaling="yarn", rope_factor=2.0)
    with pytest.raises(ConfigError, match="rope: a pack has the positions of its model"):
        convert(None, tmp_path / "pack", rope_scaling="yarn", rope_factor=2.0)


def test_the_context_of_a_plan() -> None:
    yarn = RopeConfig(scaling="yarn", factor=4.0)
    assert model_shape(None).max_context * 4 == model_shape(None, rope=yarn).max_context == 8192
    assert model_shape("olmoe-1b-7b", rope=yarn).max_context == 16384
    half = RopeConfig(scaling="dynamic", factor=4.0, original_context=1000)
    assert model_shape(None, rope=half).max_context == 4000


def test_further_models_of_a_server_have_their_own_context(saved: Callable[..., Path]) -> None:
    folder = str(saved(MODELS["mixtral"]))
    own = {"model": folder, "rope": {"scaling": "linear", "factor": 3}}
    config = load_config({}, rope_scaling="yarn", rope_factor=2.0, server={"models": {"a": folder, "b": own}})
    shelf = deployments(config)
    assert shelf["a"].rope is None
    assert shelf["b"].rope == RopeConfig(scaling="linear", factor=3.0)
