"""Tiny configurations of every family: 2 layers or a few more, hidden 32, 8 experts, random float32 weights.

A family is a model folder of transformers whose modelling file carries `@use_experts_implementation`. `SMALL` holds
the sizes that all of them share under various names; `FAMILIES` names the model type that is built for a family and
what that type needs beyond `SMALL`. A family that is neither in `FAMILIES` nor in `NOT_CAUSAL` fails the tests by name.
"""

from __future__ import annotations

import functools
import importlib.util
import re
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import nn
from transformers import AutoModelForCausalLM, AutoModelForImageTextToText, PreTrainedConfig, PreTrainedModel
from transformers.models.auto.configuration_auto import CONFIG_MAPPING
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

DECORATOR = re.compile(r"^@use_experts_implementation", re.MULTILINE)
VOCABULARY, PROMPT_TOKENS = 96, 9
EXPERT_STD, ROUTER_STD = 0.3, 0.5  # large enough that a wrong expert moves the logits by far more than 1e-4

SMALL: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "unpadded_vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "moe_intermediate_size": 16,
    "shared_expert_intermediate_size": 16,
    "moe_shared_expert_intermediate_size": 16,
    "shared_intermediate_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "num_experts": 8,
    "num_local_experts": 8,
    "n_routed_experts": 8,
    "moe_num_experts": 8,
    "num_experts_per_tok": 2,
    "moe_topk": 2,
    "moe_k": 2,
    "top_k_experts": 2,
    "n_shared_experts": 1,
    "num_shared_experts": 1,
    "moe_num_shared_experts": 1,
    "max_position_embeddings": 128,
    "pad_token_id": 0,
    "bos_token_id": 1,
    "eos_token_id": None,
    "first_k_dense_replace": 0,
    "num_dense_layers": 0,
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
    "n_group": 1,
    "topk_group": 1,
    "sliding_window": 16,
    "index_topk": 32,
    "index_n_heads": 2,
    "index_head_dim": 16,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_head_dim": 8,
    "linear_num_heads": 4,
    "mamba_n_heads": 8,
    "mamba_num_heads": 8,
    "mamba_head_dim": 8,
    "mamba_d_state": 8,
    "ssm_state_size": 8,
    "n_groups": 1,
    "router_hidden_size": 16,
}
SMALL_TOWER: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "depth": 1,
    "num_heads": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "head_dim": 8,
    "out_hidden_size": 32,
    "patch_size": 4,
    "image_size": 16,
    "num_position_embeddings": 16,
    "downsample_channels": [16, 16],
    "downsample_hidden_size": 16,
    "d_model": 16,
    "output_channels": 16,
    "encoder_layers": 1,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 16,
    "output_dim": 32,
    "vocab_size": 96,
    "deepstack_visual_indexes": [0],
}
MLA: dict[str, Any] = {"num_key_value_heads": 4, "head_dim": 8}
MROPE: dict[str, Any] = {"rope_type": "default", "rope_theta": 10000.0, "mrope_section": [1, 1, 2]}
LINEAR_AND_FULL = ["linear_attention", "full_attention"]
SPARSE = ["sparse", "sparse"]


@dataclass(frozen=True)
class Tiny:
    """How a family is built: its causal-LM model type and what it needs beyond `SMALL`."""

    model_type: str
    overrides: dict[str, Any] = field(default_factory=dict)
    text: dict[str, Any] | None = None  # overrides of text_config, for models with image or audio towers
    towers: dict[str, Any] = field(default_factory=dict)  # overrides of the other sub-configurations, by name


def _plain(*model_types: str, **overrides: Any) -> dict[str, Tiny]:
    return {model_type: Tiny(model_type, overrides) for model_type in model_types}


FAMILIES: dict[str, Tiny] = {
    **_plain("afmoe", "cohere2_moe", "dots1", "exaone_moe", "flex_olmo", "glm4_moe", "gpt_oss", "granitemoe"),
    **_plain("granitemoe_swa", "granitemoeshared", "hunyuan_v1_moe", "kolibri1", "mellum", "minimax", "minimax_m2"),
    **_plain("mixtral", "olmoe", "phimoe", "qwen2_moe", "qwen3_moe", "solar_open"),
    **_plain("deepseek_v2", "deepseek_v3", "deepseek_v32", "glm_moe_dsa", **MLA),
    **_plain("axk1", "axk2", "glm4_moe_lite", **MLA, mlp_layer_types=SPARSE),
    **_plain("hy_v3", "hy_v4", "laguna", "beam", mlp_layer_types=SPARSE),
    **_plain("qwen3_next", layer_types=LINEAR_AND_FULL),
    "aria": Tiny("aria_text"),
    "bailing_hybrid": Tiny("bailing_hybrid", {**MLA, "layer_types": LINEAR_AND_FULL}),
    "deepseek_v4": Tiny("deepseek_v4", {"mlp_layer_types": ["hash_moe", "moe"]}),
    "dots3_note": Tiny("dots3_note_text", {**MLA, "mlp_layer_types": SPARSE}),
    "ernie4_5_moe": Tiny("ernie4_5_moe", {"moe_layer_start_index": 0}),
    "flint": Tiny("flint", {"mlp_only_layers": []}),
    "gemma4": Tiny(
        "gemma4_text",
        {"enable_moe_block": True, "vocab_size_per_layer_input": VOCABULARY, "hidden_size_per_layer_input": 8},
    ),
    "granitemoehybrid": Tiny("granitemoehybrid", {"layer_types": ["mamba", "attention"]}),
    "inkling": Tiny("inkling_text"),
    "inkling2": Tiny("inkling2_text"),
    "jamba": Tiny(
        "jamba", {"expert_layer_period": 1, "expert_layer_offset": 0, "attn_layer_period": 2, "attn_layer_offset": 1}
    ),
    "kimi_linear": Tiny("kimi_linear", {**MLA, "layer_types": LINEAR_AND_FULL, "mlp_layer_types": SPARSE}),
    "lfm2_moe": Tiny("lfm2_moe", {"layer_types": ["conv", "full_attention"]}),
    "longcat_flash": Tiny("longcat_flash", {**MLA, "num_layers": 2, "zero_expert_num": 4}),
    "mimo_v2_flash": Tiny("mimo_v2_flash", {"mlp_layer_types": SPARSE}),
    "minimax_m3_vl": Tiny("minimax_m3_vl_text"),
    "nemotron_h": Tiny("nemotron_h", {"layers_block_type": ["mamba", "moe", "attention", "moe"]}),
    "qwen3_5_moe": Tiny("qwen3_5_moe_text", {"layer_types": LINEAR_AND_FULL}),
    "qwen4_exp": Tiny(
        "qwen4_exp_text",
        {
            "layer_types": LINEAR_AND_FULL,
            "indexer_n_heads": 2,
            "indexer_kv_heads": 1,
            "indexer_head_dim": 8,
            "indexer_budget": 32,
            "indexer_compress_ratio": 4,
        },
    ),
    "zaya": Tiny("zaya", {"num_experts_per_tok": 1}),
    "llama4": Tiny("llama4_text", {"intermediate_size_mlp": 32, "attention_chunk_size": 64}),
    "step3p7": Tiny("step3p7", text={"mlp_layer_types": SPARSE, "swiglu_limits": [3.0, 3.0]}),
    "deepseek_ocr2": Tiny("deepseek_ocr2", text={"mlp_layer_types": SPARSE}),
    "ernie4_5_vl_moe": Tiny(
        "ernie4_5_vl_moe", text={"moe_intermediate_size": [16, 16], "head_dim": 8, "rope_parameters": MROPE}
    ),
    "glm4v_moe": Tiny("glm4v_moe", text={"head_dim": 16, "rope_parameters": MROPE}),
    "glm5_next": Tiny(
        "glm5_next",
        text={**MLA, "qk_rope_head_dim": 0, "layer_types": LINEAR_AND_FULL, "mlp_layer_types": SPARSE},
    ),
    "mistral_large4": Tiny("mistral_large4", text=MLA, towers={"vision_config": {"model_type": "pixtral"}}),
    "mistral4": Tiny("mistral4", {"num_key_value_heads": 4, "head_dim": 16}),
    "muse_spark": Tiny(
        "muse_spark",
        {"out_hidden_size": 32, "projector_hidden_size": 32},
        text={"moe_hidden_size": 24, "mlp_layer_types": SPARSE},
        towers={"audio_config": {"patch_sizes": [4], "hidden_sizes": [16], "depths": [1]}},
    ),
    "qwen3_omni_moe": Tiny("qwen3_omni_moe_thinker", {"vision_start_token_id": 90}, text={}),
    "qwen3_vl_moe": Tiny("qwen3_vl_moe", text={}),
    "unlimited_ocr": Tiny("unlimited_ocr", text={"mlp_layer_types": SPARSE}),
}
NEWER: dict[str, Tiny] = {
    "hy_v4_vl": Tiny("hy_v4_vl", text={**MLA, "mlp_layer_types": SPARSE, "rope_parameters": MROPE}),
    "inkling2_loop": Tiny("inkling2_loop_text"),
    "lara_mini": Tiny("lara_mini", {"layer_types": LINEAR_AND_FULL}),
}
"""Families of releases after the one that this project is pinned to: tested where such a release is installed."""
FAMILIES |= {name: tiny for name, tiny in NEWER.items() if tiny.model_type in CONFIG_MAPPING}
WRAPPED: dict[str, Tiny] = {
    "aria": Tiny(
        "aria",
        {"projector_patch_to_query_dict": {16: 4}},
        text={},
        towers={"vision_config": {"model_type": "idefics3_vision"}},
    ),
    "dots3_note": Tiny(
        "dots3_note",
        text=FAMILIES["dots3_note"].overrides,
        towers={
            "vision_config": {"adapter_in_dim": 32, "adapter_out_dim": 32, "mlp_layer_types": ["sparse"]},
            "audio_config": {"adapter_input_size": 32, "adapter_out_dim": 32},
        },
    ),
    "gemma4": Tiny("gemma4", text=FAMILIES["gemma4"].overrides),
    "inkling": Tiny("inkling_mm_model", text={}),
    "inkling2": Tiny("inkling2", text={}, towers={"vision_config": {"text_hidden_size": 32}}),
    "llama4": Tiny("llama4", text=FAMILIES["llama4"].overrides),
    "minimax_m3_vl": Tiny("minimax_m3_vl", text={}),
    "qwen3_5_moe": Tiny("qwen3_5_moe", text=FAMILIES["qwen3_5_moe"].overrides),
    "qwen4_exp": Tiny("qwen4_exp", text=FAMILIES["qwen4_exp"].overrides),
}
"""Wrappers, with towers for images and sound, of families that the table runs as language models alone."""
UNDECORATED = ("llama4", "longcat_flash", "step3p7")  # experts without the decorator, which are read all the same
FOREIGN: dict[str, tuple[Tiny, str]] = {
    "dbrx": (Tiny("dbrx", {"attn_config": {"rope_theta": 1e4, "kv_n_heads": 2}}), "DbrxExperts"),
    "jetmoe": (Tiny("jetmoe"), "JetMoeParallelExperts"),
}
"""Causal language models without the decorator that are refused, and the class that the refusal names."""
ENCODER_DECODER = {"nllb_moe": "NllbMoeExperts", "switch_transformers": "SwitchTransformersExperts"}
"""Encoder-decoder models with experts, which are refused, and the class that the refusal names."""
NOT_CAUSAL: dict[str, str] = {
    "diffusion_gemma": "denoises blocks of text (DiffusionGemmaForBlockDiffusion); it has no causal language model",
    "openai_privacy_filter": "classifies tokens (OpenAIPrivacyFilterForTokenClassification); no causal language model",
}


@functools.cache
def decorated_families() -> tuple[str, ...]:
    """Every model folder of the installed transformers whose modelling file decorates an experts class."""
    spec = importlib.util.find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    models = Path(spec.origin).parent / "models"
    files = sorted(models.glob("*/modeling_*.py"))
    return tuple(
        dict.fromkeys(file.parent.name for file in files if DECORATOR.search(file.read_text(encoding="utf-8")))
    )


def tiny_config(tiny: Tiny) -> PreTrainedConfig:
    """The configuration of a family, every size small."""
    config_class = CONFIG_MAPPING[tiny.model_type]
    if tiny.text is None:
        return _small(config_class, SMALL, tiny.overrides)
    parts: dict[str, Any] = {}
    for name, part_class in config_class.sub_configs.items():
        sizes, own = (SMALL, tiny.text) if name == "text_config" else (SMALL_TOWER, tiny.towers.get(name, {}))
        if "model_type" in own:
            part_class = CONFIG_MAPPING[own["model_type"]]
        parts[name] = _small(part_class, sizes, {key: value for key, value in own.items() if key != "model_type"})
    return config_class(**parts, **tiny.overrides)


def _small(config_class: type[PreTrainedConfig], sizes: dict[str, Any], overrides: dict[str, Any]) -> PreTrainedConfig:
    known = set(config_class.__dataclass_fields__) | set(config_class.attribute_map)
    chosen = {name: value for name, value in sizes.items() if name in known}
    nested = {name: _small(part, SMALL_TOWER, {}) for name, part in config_class.sub_configs.items()}
    return config_class(**chosen | nested | overrides)


def tiny_model(family: str, seed: int = 0, **overrides: Any) -> PreTrainedModel:
    """The family's model with seeded random float32 weights, in evaluation mode; overrides: of its configuration."""
    tiny = FAMILIES[family]
    return built(replace(tiny, overrides={**tiny.overrides, **overrides}), seed)


def built(tiny: Tiny, seed: int = 0, *, whole: bool = False) -> PreTrainedModel:
    """The model of such a configuration, as `tiny_model` makes it. whole: with its towers, where transformers also has
    its language model alone."""
    torch.manual_seed(seed)
    causal = tiny.model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES and not whole
    auto = AutoModelForCausalLM if causal else AutoModelForImageTextToText
    model: PreTrainedModel = auto.from_config(tiny_config(tiny), dtype=torch.float32).eval()
    _enlarge(model)
    return model


def _enlarge(model: nn.Module) -> None:
    """Redraws experts, routers and hash tables: routing gets clear winners, and experts matter for the logits."""
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            if name.endswith("tid2eid"):
                buffer.copy_(torch.rand(len(buffer), SMALL["num_experts"]).argsort(dim=-1)[:, : buffer.shape[1]])
        for name, parameter in model.named_parameters():
            if ".experts." in name:
                parameter.normal_(std=EXPERT_STD)
                if getattr(model.config, "zero_expert_num", None):
                    parameter[SMALL["num_experts"] :] = 0  # of identity experts: nothing reads them
            elif re.search(r"\.(gate|router)(\.|$)", name) and parameter.dim() >= 2:
                parameter.normal_(std=ROUTER_STD)


def prompt(batch: int = 1, seed: int = 0) -> torch.Tensor:
    """Token ids int64 [batch, PROMPT_TOKENS], none of them special."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(3, VOCABULARY, (batch, PROMPT_TOKENS), generator=generator)


class Letters:
    """A tokenizer for a tiny model: one letter a token, no file."""

    chat_template = None
    all_special_ids: tuple[int, ...] = ()

    def convert_ids_to_tokens(self, token_id: int) -> str:
        return chr(0x100 + token_id)

    def decode(self, token_ids: list[int], **kwargs: Any) -> str:
        return "".join(map(self.convert_ids_to_tokens, token_ids))

    def __call__(self, text: str, **kwargs: Any) -> dict[str, list[int]]:
        return {"input_ids": [ord(letter) % 90 + 3 for letter in text]}

    def apply_chat_template(self, messages: list[dict[str, str]], **kwargs: Any) -> str:
        return "".join(f"{message['role']}:{message['content']};" for message in messages)
