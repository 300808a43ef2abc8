"""Families whose decode steps must run compiled: plain transformers' logits and tokens, nothing left aside."""

from __future__ import annotations

import copy
import dataclasses
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import DynamicCache

import hybrimoe
from cpu_kernels.step.heads import Tuning
from hybrimoe.step.reading import attention as read_attention
from hybrimoe.step.step import Step

sys.path.insert(0, str(Path(__file__).parents[2] / "families"))
from family_check import outputs
from tiny_families import FAMILIES, prompt, tiny_model

COMPILED = (
    "mixtral", "qwen2_moe", "qwen3_moe", "olmoe", "phimoe", "granitemoe", "glm4_moe", "gpt_oss", "ernie4_5_moe",
    "hunyuan_v1_moe", "dots1", "exaone_moe", "flex_olmo", "mellum", "kolibri1", "solar_open", "deepseek_v2",
    "deepseek_v3", "llama4", "minimax_m2", "glm4_moe_lite", "afmoe", "hy_v3", "granitemoeshared", "granitemoe_swa",
    "cohere2_moe", "laguna", "step3p7", "mimo_v2_flash", "axk1", "ernie4_5_vl_moe", "minimax_m3_vl", "mistral4",
    "qwen3_next", "qwen3_5_moe", "kimi_linear", "minimax", "lfm2_moe", "granitemoehybrid", "deepseek_v32",
    "glm_moe_dsa", "nemotron_h", "dots3_note", "bailing_hybrid", "longcat_flash",
)  # fmt: skip
MIXED: dict[str, dict[str, str]] = {
    "jamba": {"0": "feed_forward compiled; the rest by transformers", "1": "compiled"},
}
"""Families with layers that are not understood as a whole, and how the way of each layer begins."""
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


@pytest.mark.parametrize("family", MIXED)
def test_a_family_runs_in_pieces(family: str) -> None:
    """The layers that are understood are compiled, beside transformers' own linear attention or Mamba."""
    model = tiny_model(family)
    plain = outputs(model)
    injection = hybrimoe.inject(model, accelerator="none", expert_dtype="float32")
    assert injection.step is not None, injection.way
    ways = {path.rpartition(".")[2]: way for path, way in injection.explain().ways.items()}
    for layer, way in MIXED[family].items():
        assert ways[layer].startswith(way), ways
    compiled = outputs(model)
    assert injection.step.n_steps == NEW_TOKENS
    assert injection.step.step_us > 0
    assert float((compiled.decode - plain.decode).abs().max()) <= TOLERANCE
    assert torch.equal(compiled.tokens, plain.tokens)
    assert injection.stats().as_dict()["decode"]["tokens"] > 0
    injection.restore()
    after = outputs(model)
    assert torch.equal(after.decode, plain.decode)
    assert not any("forward" in vars(module) for module in model.modules())


def test_a_shared_expert_as_wide_as_there_are_experts() -> None:
    """Its matrices have the shape of the router's, as Qwen3-Next-80B's have."""
    model = tiny_model("qwen3_next", shared_expert_intermediate_size=8)
    plain = outputs(model)
    injection = hybrimoe.inject(model, accelerator="none", expert_dtype="float32")
    assert set(injection.explain().ways.values()) == {"compiled"}, injection.explain().ways
    assert float((outputs(model).decode - plain.decode).abs().max()) <= TOLERANCE


LONG = 24
"""Decode steps that cross several blocks and windows of the tiny models."""
YARN = {
    "rope_type": "yarn", "rope_theta": 1e4, "factor": 128.0, "beta_fast": 32.0, "beta_slow": 1.0, "mscale_all_dim": 1.0,
    "mscale": 1.0, "partial_rotary_factor": 0.5, "max_position_embeddings": 128,
}  # fmt: skip
VARIANTS: dict[str, dict[str, Any]] = {
    "deepseek_v2": {"q_lora_rank": None, "v_head_dim": 16, "qk_rope_head_dim": 4},
    "deepseek_v3": {"rope_interleave": False, "v_head_dim": 16, "kv_lora_rank": 24, "n_group": 4, "topk_group": 2},
    "llama4": {"attention_chunk_size": 12, "floor_scale": 4, "attn_scale": 0.5, "num_experts_per_tok": 2,
               "no_rope_layers": [1, 0], "use_qk_norm": True},
    "gpt_oss": {},
    "deepseek_v32": {"index_topk": 8, "index_n_heads": 24, "index_head_dim": 20, "v_head_dim": 16},
    "glm_moe_dsa": {"index_topk": 7, "index_n_heads": 24, "num_hidden_layers": 3, "mlp_layer_types": ["sparse"] * 3,
                    "indexer_types": ["full", "shared", "full"]},
    "qwen3_next": {"linear_num_value_heads": 6, "linear_value_head_dim": 12, "linear_conv_kernel_dim": 3},
    "qwen3_5_moe": {"linear_num_key_heads": 1, "linear_num_value_heads": 2, "linear_key_head_dim": 20},
    "kimi_linear": {"linear_num_heads": 3, "linear_head_dim": 10},
    "lfm2_moe": {"conv_L_cache": 4, "conv_bias": True},
    "granitemoehybrid": {"mamba_n_groups": 2, "mamba_n_heads": 4, "mamba_d_head": 16, "mamba_d_state": 12,
                         "mamba_proj_bias": True, "time_step_limit": (0.5, 0.7)},
    "granitemoeshared": {"residual_multiplier": 0.5, "attention_multiplier": 0.2},
    "cohere2_moe": {"num_shared_experts": 2, "shared_expert_combination_strategy": "average",
                    "expert_selection_fn": "sigmoid", "norm_topk_prob": True},
    "laguna": {"gating": "per-element", "moe_routed_scaling_factor": 1.5},
    "mimo_v2_flash": {"attention_value_scale": 0.7, "v_head_dim": 8},
    "gemma4": {"hidden_size_per_layer_input": 0, "attention_k_eq_v": True, "final_logit_softcapping": 0.3},
    "axk1": {},
    "longcat_flash": {"zero_expert_num": 6, "v_head_dim": 16, "kv_lora_rank": 24},
    "mistral4": {"rope_parameters": YARN | {"llama_4_scaling_beta": 0.9, "original_max_position_embeddings": 4}},
}  # fmt: skip
"""Settings that change the arithmetic, small enough that the tiny models meet them."""


@pytest.fixture(scope="module", params=VARIANTS)
def variant(request: pytest.FixtureRequest) -> Any:
    """(plain, injected) models of a family in a variant of its own."""
    family = str(request.param)
    known = FAMILIES[family]
    own = dataclasses.replace(known, overrides=known.overrides | VARIANTS[family])
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(FAMILIES, family, own)
        plain, injected = tiny_model(family), tiny_model(family)
    for model in (plain, injected):
        _unlike_ones(model)
    hybrimoe.inject(injected, accelerator="none", expert_dtype="float32")
    assert set(injected.hybrimoe.explain().ways.values()) == {"compiled"}, injected.hybrimoe.way
    return plain, injected


def _unlike_ones(model: Any) -> None:
    """Vectors such as weights of norms, and single factors, are all ones in a new model: here they are not."""
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for _, parameter in sorted(model.named_parameters()):
            if parameter.dim() == 1:
                parameter.add_(torch.randn(parameter.shape, generator=generator), alpha=0.1)
        for name, buffer in model.named_buffers():
            if name.endswith("layer_scalar"):
                buffer.fill_(0.7)


def steps(model: Any, cache: DynamicCache, batch: int, mask: torch.Tensor, n_steps: int) -> list[torch.Tensor]:
    """Logits of steps of one and two tokens behind a prompt that the cache holds."""
    logits = []
    generator = torch.Generator().manual_seed(5)
    for number in range(n_steps):
        new = torch.randint(3, 90, (batch, 1 + number % 2), generator=generator)
        mask = torch.cat([mask, torch.ones_like(new)], 1)
        positions = (mask.cumsum(-1) - 1).clamp(min=0)[:, -new.shape[1] :]
        with torch.no_grad():
            output = model(input_ids=new, past_key_values=cache, attention_mask=mask, position_ids=positions)
        logits.append(output.logits)
    return logits


@pytest.mark.parametrize("padding", [0, 3])
def test_long_batches_with_padding_before_them(variant: Any, padding: int) -> None:
    ids = prompt(2)
    mask = torch.ones_like(ids)
    mask[0, :padding] = 0
    positions = (mask.cumsum(-1) - 1).clamp(min=0)
    found = []
    for model in variant:
        cache = DynamicCache(config=model.config)
        with torch.no_grad():
            model(input_ids=ids, attention_mask=mask, position_ids=positions, past_key_values=cache)
        found.append(steps(model, cache, 2, mask, LONG))
    for number, (plain, compiled) in enumerate(zip(*found, strict=True)):
        assert float((plain - compiled).abs().max()) <= TOLERANCE, number
    assert variant[1].hybrimoe.step.n_steps >= LONG


@pytest.mark.parametrize(
    "family",
    ["deepseek_v3", "llama4", "cohere2_moe", "laguna", "qwen3_next", "kimi_linear", "lfm2_moe", "granitemoehybrid"],
)
def test_the_bits_do_not_depend_on_the_threads(family: str) -> None:
    model = tiny_model(family)
    injection = hybrimoe.inject(model, accelerator="none", expert_dtype="int8", dense_dtype="int8")
    assert injection.step is not None, injection.way
    cache, found = DynamicCache(config=model.config), []
    with torch.no_grad():
        model(input_ids=prompt(1), past_key_values=cache)
    for threads in (1, 2, 3):
        step = Step(model, injection.session, injection.step.reading, threads)
        own = copy.deepcopy(cache)
        logits = [step.next_logits(tokens, own) for tokens in ([5], [6, 7, 8], [9])]
        found.append(torch.stack([one for one in logits if one is not None]))
    assert found[0].shape[0] == 3
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


@pytest.mark.parametrize("family", ["beam"])
def test_what_only_shows_far_on_is_refused(family: str) -> None:
    """Queries that grow with their position: a comparison over a few tokens does not tell."""
    injection = hybrimoe.inject(tiny_model(family), accelerator="none", expert_dtype="float32")
    way = injection.explain().ways["model.layers.1"]  # in Beam the layer whose queries grow; layer 0 has a window
    assert way.startswith(("mlp compiled", "transformers"))


@pytest.mark.parametrize("tuning", [None, Tuning(0.1, 8192.0, by_position=True), Tuning(0.2, 4000.0, by_position=True)])
def test_queries_that_grow_in_another_way_are_refused(monkeypatch: pytest.MonkeyPatch, tuning: Tuning | None) -> None:
    """Attention that is given the positions is compared at far ones, where that shows."""
    monkeypatch.setattr(read_attention, "_tuning_by_position", lambda call: tuning)
    rope = YARN | {"llama_4_scaling_beta": 0.2, "original_max_position_embeddings": 8192}
    model = tiny_model("mistral4", rope_parameters=rope)
    ways = hybrimoe.inject(model, accelerator="none", expert_dtype="float32").explain().ways
    assert all(
        way.startswith("mlp compiled; ") and "self_attn: its compiled form differs" in way for way in ways.values()
    )


def test_a_window_that_moves_in_the_comparison_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    known = FAMILIES["gpt_oss"]
    small = dataclasses.replace(known, overrides=known.overrides | {"sliding_window": 8})
    monkeypatch.setitem(FAMILIES, "gpt_oss", small)
    injection = hybrimoe.inject(tiny_model("gpt_oss"), accelerator="none", expert_dtype="float32")
    ways = injection.explain().ways
    assert any("its window of 8 tokens is shorter than the comparison" in way for way in ways.values()), ways


@pytest.mark.parametrize("large", [200.0, 20_000.0])
@pytest.mark.parametrize("spoiled", [False, True], ids=["as it is", "another scale"])
def test_a_stream_of_bfloat16_with_large_values(spoiled: bool, large: float) -> None:
    """What a branch adds to them is lost in the stream's own rounding there; it is compared where it is not."""
    model = tiny_model("qwen2_moe").to(torch.bfloat16)
    with torch.no_grad():
        model.get_input_embeddings().weight[:, 0] = large
        for name, parameter in model.named_parameters():
            if "layernorm" in name:
                parameter[0], parameter[1:] = 0.0, large
            elif name.endswith(("v_proj.weight", "o_proj.weight")):
                parameter.normal_(std=0.5, generator=torch.Generator().manual_seed(len(name)))
    if spoiled:
        model.model.layers[0].self_attn.o_proj.register_forward_hook(lambda _, __, out: 1.5 * out)
    injection = hybrimoe.inject(model, accelerator="none", expert_dtype="bfloat16")
    ways = injection.explain().ways
    injection.restore()
    assert ways["model.layers.1"] == "compiled", ways
    assert (ways["model.layers.0"] == "compiled") is not spoiled, ways
