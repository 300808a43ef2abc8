"""Tiny models of the families that GGUF files are read of, saved by transformers and written as GGUF."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import gguf
import torch
from transformers import PreTrainedModel

from ....families.tiny_families import FAMILIES, tiny_model
from .conversion import ARCHITECTURES, to_gguf

INDEXED: dict[str, Any] = {
    "mlp_layer_types": None, "index_topk": 4, "index_head_dim": 64, "index_n_heads": 16, "rms_norm_eps": 1e-6,
}  # fmt: skip
"""Fewer tokens are seen than there are, by heads that llama.cpp can turn, so many that no two tokens count alike; and
llama.cpp takes one epsilon for all norms."""
OVERRIDES: dict[str, dict[str, Any]] = {
    "qwen3_moe": {"norm_topk_prob": True},  # in every such model, says llama.cpp
    "olmoe": {"num_key_value_heads": 4, "intermediate_size": 64},  # llama.cpp reads no fewer; whole blocks of 32
    "dots1": {"num_key_value_heads": 4},
    "deepseek_v3": {
        "first_k_dense_replace": 1,
        "n_group": 4,
        "topk_group": 2,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 4.0, "original_max_position_embeddings": 32,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0,
        },
    },
    "glm4_moe": {"first_k_dense_replace": 1, "use_qk_norm": True, "attention_bias": True},
    "afmoe": {"mup_enabled": True, "num_dense_layers": 1, "route_scale": 2.0, "sliding_window": 4},
    "exaone_moe": {
        "first_k_dense_replace": 1, "mlp_layer_types": ["dense", "sparse"], "sliding_window": 4,
        "layer_types": ["full_attention", "sliding_attention"],
    },
    "lfm2_moe": {"num_dense_layers": 1},
    "hy_v3": {"mlp_layer_types": ["dense", "sparse"]},
    "mellum": {
        "layer_types": ["sliding_attention", "full_attention"], "sliding_window": 4,
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 500000.0},
            "sliding_attention": {"rope_type": "default", "rope_theta": 500000.0},  # llama.cpp takes one for both
        },
    },
    "kimi_linear": {  # llama.cpp asks for no rank, and takes one epsilon for all norms
        "q_lora_rank": None, "mlp_layer_types": ["dense", "sparse"], "rms_norm_eps": 1e-6,
    },
    "nemotron_h": {"sliding_window": None},
    "granitemoehybrid": {"mamba_n_groups": 2, "attention_multiplier": 0.5, "residual_multiplier": 0.25},
    "jamba": {
        "num_hidden_layers": 4, "expert_layer_period": 2, "expert_layer_offset": 1, "attn_layer_period": 4,
        "attn_layer_offset": 2,
    },
    "llama4": {
        "num_hidden_layers": 4, "interleave_moe_layer_step": 2, "attention_chunk_size": 8192, "rope_parameters": {
            "rope_type": "llama3", "rope_theta": 500000.0, "factor": 8.0, "low_freq_factor": 1.0,
            "high_freq_factor": 4.0, "original_max_position_embeddings": 8192,
        },
    },
    "gemma4": {
        "global_head_dim": 16, "num_global_key_value_heads": 1, "attention_k_eq_v": True,
        "final_logit_softcapping": 30.0,
    },
    "mimo_v2_flash": {"mlp_layer_types": ["dense", "sparse"], "v_head_dim": 16},
    "laguna": {
        "layer_types": ["full_attention", "sliding_attention"], "mlp_layer_types": ["dense", "sparse"],
        "num_attention_heads_per_layer": [4, 2], "moe_routed_scaling_factor": 2.0, "sliding_window": 4,
    },
    "granitemoe_swa": {
        "layer_rope_theta": [10000.0, 0.0], "attention_multiplier": 0.5, "residual_multiplier": 0.25,
        "logits_scaling": 4.0, "sliding_window": 4,
    },
    "phimoe": {
        "sliding_window": None, "attention_bias": True, "lm_head_bias": True, "rope_parameters": {
            "rope_type": "longrope", "rope_theta": 10000.0, "original_max_position_embeddings": 8, "factor": 16.0,
            "long_factor": [1.0, 2.0, 4.0, 8.0], "short_factor": [1.0, 1.5, 2.0, 2.5],
            "short_mscale": 1.243163121016122, "long_mscale": 1.243163121016122,
        },
    },
    "mistral4": {  # texts of 4 tokens when it was trained, so that later queries are scaled
        "first_k_dense_replace": 1, "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 32.0, "original_max_position_embeddings": 4,
            "beta_fast": 32.0, "beta_slow": 1.0, "mscale": 1.0, "mscale_all_dim": 1.0, "llama_4_scaling_beta": 0.1,
        },
    },
    "deepseek_v32": {**INDEXED, "first_k_dense_replace": 1},
    "glm_moe_dsa": {**INDEXED, "first_k_dense_replace": 1, "indexer_types": ["full", "shared"]},
    "hy_v4": {
        **INDEXED, "mlp_layer_types": ["dense", "sparse"], "indexer_types": ["full", "shared"], "swiglu_limit": 1.0,
    },
    "dots3_note": {
        **INDEXED, "mlp_layer_types": ["dense", "sparse"], "layer_types": ["indexed_attention", "sliding_attention"],
        "shared_experts_intermediate_size": 16, "sliding_window": 4, "head_dim": 16, "q_lora_rank": 8,
        "kv_lora_rank": 8,  # whose norms are scaled by 2
        "swa_num_attention_heads": 2, "swa_num_key_value_heads": 2, "swa_q_lora_rank": 8, "swa_kv_lora_rank": 32,
        "swa_head_dim": 24, "swa_qk_nope_head_dim": 16, "swa_v_head_dim": 16, "swa_qk_rope_head_dim": 8,
        "index_topk": 32,  # of all tokens: llama.cpp rotates what chooses them otherwise
    },
    "cohere2_moe": {
        "num_hidden_layers": 3, "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"], "prefix_dense_intermediate_size": 24, "sliding_window": 4,
        "expert_selection_fn": "sigmoid", "logit_scale": 0.5,
    },
    "minimax_m3_vl": {
        "mlp_layer_types": ["dense", "sparse"], "layer_types": ["full_attention", "minimax_m3_sparse"],
        "dense_intermediate_size": 24, "shared_intermediate_size": 48, "index_block_size": 4,
        "index_topk_blocks": 3,  # all there are: llama.cpp chooses others
        "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 0.5},
    },
    "bailing_hybrid": {"mlp_layer_types": ["dense", "sparse"]},
    "deepseek_v4": {
        "num_hidden_layers": 4, "mlp_layer_types": ["hash_moe", "moe", "moe", "moe"], "layer_types": [
            "sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention", "sliding_attention",
        ],
        "num_key_value_heads": 1, "head_dim": 32, "partial_rotary_factor": 0.25, "o_groups": 2, "o_lora_rank": 16,
        "index_head_dim": 64, "index_n_heads": 16, "index_topk": 2, "sliding_window": 4, "swiglu_limit": 0.25,
        "rope_parameters": {
            "rope_type": "yarn", "rope_theta": 10000.0, "factor": 16.0, "original_max_position_embeddings": 8,
            "beta_fast": 32.0, "beta_slow": 1.0,
        },
    },
    "step3p7": {
        "mlp_layer_types": ["dense", "sparse"], "layer_types": ["sliding_attention", "full_attention"],
        "num_attention_heads": 4, "num_sliding_attention_heads": 2, "sliding_window": 4, "share_expert_dim": 16,
        "moe_router_scaling_factor": 2.0, "swiglu_limits": [0.0, 0.5], "swiglu_limits_shared": [0.0, 0.25],
        "rope_parameters": {
            "full_attention": {"rope_type": "default", "rope_theta": 5000000.0, "partial_rotary_factor": 0.5},
            "sliding_attention": {"rope_type": "default", "rope_theta": 10000.0, "partial_rotary_factor": 1.0},
        },
    },
    "deepseek_ocr2": {
        "mlp_layer_types": ["dense", "sparse"], "num_key_value_heads": 4, "n_group": None, "topk_group": None,
        "n_shared_experts": 2, "routed_scaling_factor": 1.5,
    },
    "qwen4_exp": {
        "num_hidden_layers": 3, "layer_types": ["linear_attention", "linear_attention", "full_attention"],
        "hc_lowrank": 16, "output_gate_type": "sigmoid", "indexer_head_dim": 64, "indexer_n_heads": 16,
        "indexer_budget": 32,  # all tokens: beside chosen blocks llama.cpp sees tokens of another one
        "eos_token_id": 5,  # among the tokens, so that n-grams end
        "ple_layer_ids": [2], "ple_embed_dim": 32, "ngram_size": 3, "heads_per_ngram": 2, "ngram_vocab_size_base": 50,
        "split_ngram_parts": 1,
    },
    "glm5_next": {
        "num_hidden_layers": 3, "layer_types": ["linear_attention", "indexed_attention", "indexed_attention"],
        "mlp_layer_types": ["dense", "sparse", "sparse"], "indexer_types": ["full", "full", "shared"],
        "index_topk": 4, "index_kpool": 2, "index_head_dim": 64, "index_n_heads": 16, "swiglu_limit": 0.5,
        "linear_lower_bound": -4.0, "routed_scaling_factor": 1.5, "rms_norm_eps": 1e-6,
    },
    "ernie4_5_moe": {"tie_word_embeddings": True},
    "granitemoe": {
        "attention_multiplier": 0.5, "embedding_multiplier": 2.0, "residual_multiplier": 0.25, "logits_scaling": 4.0,
    },
}  # fmt: skip
"""What a family has beyond `tiny_families`, so that more of its metadata and tensors matter."""
TEXT_OF = {"qwen3_vl_moe": "qwen3_moe"}
"""Families that see, and the one that is their text."""
ENLARGED = {"kimi_linear": ("conv1d", "kv_a_proj")}
"""Weights that are too small in a new model: llama.cpp adds another epsilon to the norms of what they give."""
LARGER = 100.0
ALIKE = ("position_bias", "ple.conv1d.weight", "kpool_compress_ape", "kpool_compress_gate")
"""Matrices that are zeros or ones in a new model."""
NOISE = 0.2  # on norms and biases, which are ones and zeros in a new model


def saved_model(family: str, folder: Path) -> Path:
    """The directory of a new random model, as transformers saves it."""
    family = TEXT_OF.get(family, family)
    tiny = FAMILIES[family]
    changed = {**(tiny.overrides if tiny.text is None else tiny.text), **OVERRIDES.get(family, {})}
    of_text = tiny.text is not None
    FAMILIES[family] = replace(tiny, text=changed) if of_text else replace(tiny, overrides=changed)
    try:
        model = tiny_model(family)
    finally:
        FAMILIES[family] = tiny
    _make_every_vector_matter(model)
    _enlarge(model, ENLARGED.get(family, ()))
    model.save_pretrained(folder / "model")
    return folder / "model"


def gguf_model(family: str, folder: Path, **options: Any) -> Path:
    """The same model as a GGUF file. options: of `to_gguf`."""
    return to_gguf(saved_model(family, folder), folder / "model.gguf", architecture=ARCHITECTURES[family], **options)


def _make_every_vector_matter(model: PreTrainedModel) -> None:
    generator = torch.Generator().manual_seed(1)
    buffers = [(name, buffer) for name, buffer in model.named_buffers() if "e_score" in name]
    with torch.no_grad():
        for name, values in (*model.named_parameters(), *buffers):
            if values.dim() == 1 or "e_score" in name or name.endswith(ALIKE):
                values.add_(NOISE * torch.randn(values.shape, generator=generator))


def _enlarge(model: PreTrainedModel, parts: tuple[str, ...]) -> None:
    with torch.no_grad():
        for name, values in model.named_parameters():
            if any(part in name for part in parts):
                values.mul_(LARGER)


def letters(writer: gguf.GGUFWriter, n_tokens: int = 96) -> None:
    """A byte-level vocabulary of `n_tokens`: three special tokens, single letters, two of two letters."""
    tokens = ["<|bos|>", "<|eos|>", "<|pad|>", *(chr(33 + index) for index in range(n_tokens - 5)), "ab", "cd"]
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("gpt-2")
    writer.add_token_list(tokens)
    writer.add_token_types([3, 3, 3, *[1] * (n_tokens - 3)])
    writer.add_token_merges(["a b", "c d"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_pad_token_id(2)
    writer.add_chat_template("{% for m in messages %}{{ m['content'] }}{% endfor %}")


__all__ = ["ARCHITECTURES", "gguf_model", "letters", "saved_model"]
