"""A conversion script of llama.cpp, told again: which metadata it writes, and what it does to the model's tensors."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import torch
from gguf import GGUFWriter, RopeScalingType


@dataclass(frozen=True)
class Script:
    """architecture: llama.cpp's name. describe: writes the metadata. modified: (key, tensor, config) -> what of it is
    written, under transformers' name, or one of the file (`blk.0...`). named_as: the architecture of the package gguf
    that has the names of tensors, by default the one itself. numbers: writes those that the model has as tensors."""

    architecture: str
    describe: Callable[[GGUFWriter, dict[str, Any]], None]
    modified: Callable[[str, torch.Tensor, dict[str, Any]], Iterator[tuple[str, torch.Tensor]]]
    named_as: str | None = None
    numbers: Callable[[GGUFWriter, dict[str, torch.Tensor]], None] = lambda writer, tensors: None


def describe_model(writer: GGUFWriter, config: dict[str, Any]) -> None:
    """Sizes that every script writes."""
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_vocab_size(config["vocab_size"])
    if "intermediate_size" in config:
        writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    if config["rms_norm_eps"] is not None:
        writer.add_layer_norm_rms_eps(config["rms_norm_eps"])


def describe_heads(writer: GGUFWriter, config: dict[str, Any]) -> None:
    """Of attention with rotated heads of one size."""
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    rotary = config["rope_parameters"]
    writer.add_head_count_kv(config["num_key_value_heads"])
    writer.add_rope_freq_base(rotary["rope_theta"])
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(int(head_dim * rotary.get("partial_rotary_factor", 1)))


def describe_experts(writer: GGUFWriter, config: dict[str, Any]) -> None:
    """How many there are, how many are used, and how large they are."""
    counts = ("num_experts", "num_local_experts", "n_routed_experts")
    writer.add_expert_count(next(config[name] for name in counts if name in config))
    writer.add_expert_used_count(config["num_experts_per_tok"])
    if "moe_intermediate_size" in config:
        writer.add_expert_feed_forward_length(config["moe_intermediate_size"])


def describe_latent(writer: GGUFWriter, config: dict[str, Any]) -> None:
    """Of attention whose keys and values are made from one small vector a token."""
    if config["q_lora_rank"] is not None:
        writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_kv_lora_rank(config["kv_lora_rank"])
    writer.add_key_length(config["kv_lora_rank"] + config["qk_rope_head_dim"])
    writer.add_value_length(config["kv_lora_rank"])
    writer.add_key_length_mla(config["qk_nope_head_dim"] + config["qk_rope_head_dim"])
    writer.add_value_length_mla(config["v_head_dim"])
    writer.add_rope_dimension_count(config["qk_rope_head_dim"])


def describe_rotation(writer: GGUFWriter, rotary: dict[str, Any]) -> None:
    """Its base, and how it is stretched for long texts."""
    writer.add_rope_freq_base(rotary["rope_theta"])
    if rotary["rope_type"] == "yarn":
        writer.add_rope_scaling_type(RopeScalingType.YARN)
        writer.add_rope_scaling_factor(rotary["factor"])
        writer.add_rope_scaling_orig_ctx_len(rotary["original_max_position_embeddings"])
        for name in ("beta_fast", "beta_slow"):
            if name in rotary:
                getattr(writer, f"add_rope_scaling_yarn_{name}")(rotary[name])
        if "mscale_all_dim" in rotary:
            writer.add_rope_scaling_yarn_log_mul(0.1 * rotary["mscale_all_dim"])
