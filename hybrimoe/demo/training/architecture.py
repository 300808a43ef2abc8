"""The demo model's shape: a Qwen3-MoE that trains on two cores and still has experts worth scheduling."""

from dataclasses import dataclass

import torch
from transformers import Qwen3MoeConfig, Qwen3MoeForCausalLM

from hybrimoe.demo.training.tokenizer import BOS, EOS, PAD

SPECIAL_TOKEN_IDS = {BOS: 0, EOS: 1, PAD: 2}


@dataclass(frozen=True, slots=True)
class Shape:
    """Sizes of the model; hidden and expert sizes are multiples of 32, the group of int4 weights."""

    vocab_size: int = 4096
    hidden_size: int = 192
    expert_size: int = 64
    num_layers: int = 6
    num_experts: int = 32
    top_k: int = 4
    num_heads: int = 3
    num_kv_heads: int = 1
    head_dim: int = 64
    max_positions: int = 2048
    rope_theta: float = 10_000.0


def model_config(shape: Shape) -> Qwen3MoeConfig:
    """The Hugging Face configuration: every layer sparse, top-k weights normalised, embeddings tied."""
    return Qwen3MoeConfig(
        vocab_size=shape.vocab_size,
        hidden_size=shape.hidden_size,
        intermediate_size=shape.expert_size * shape.top_k,
        moe_intermediate_size=shape.expert_size,
        num_hidden_layers=shape.num_layers,
        num_experts=shape.num_experts,
        num_experts_per_tok=shape.top_k,
        norm_topk_prob=True,
        decoder_sparse_step=1,
        mlp_only_layers=[],
        num_attention_heads=shape.num_heads,
        num_key_value_heads=shape.num_kv_heads,
        head_dim=shape.head_dim,
        max_position_embeddings=shape.max_positions,
        rope_parameters={"rope_type": "default", "rope_theta": shape.rope_theta},
        tie_word_embeddings=True,
        bos_token_id=SPECIAL_TOKEN_IDS[BOS],
        eos_token_id=SPECIAL_TOKEN_IDS[EOS],
        pad_token_id=SPECIAL_TOKEN_IDS[PAD],
    )


def new_model(shape: Shape, seed: int) -> Qwen3MoeForCausalLM:
    """A model with random weights drawn from `seed`, in float32, whose experts run as one grouped product."""
    generator_state = torch.get_rng_state()
    torch.manual_seed(seed)
    try:
        model = Qwen3MoeForCausalLM._from_config(
            model_config(shape), dtype=torch.float32, experts_implementation="grouped_mm"
        )
    finally:
        torch.set_rng_state(generator_state)
    return model
