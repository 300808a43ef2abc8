"""A dense Llama as a Qwen2-MoE: the same model with all experts on, a cheaper and rougher one with fewer."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from transformers import LlamaForCausalLM

from hybrimoe.cutting.neurons import Cut, FeedForward, cut
from hybrimoe.cutting.samples import Samples
from hybrimoe.errors import ModelError

__all__ = ["Converted", "Recipe", "converted"]

SHARED_SCALE = 2.0
"""The shared expert's gate is a sigmoid of its score, here always 0: one half."""


@dataclass(frozen=True, slots=True)
class Recipe:
    """How many neurons the shared expert has, into how many experts the others go, how many of them a token gets."""

    shared_size: int = 512
    num_experts: int = 32
    top_k: int = 24


@dataclass(frozen=True, slots=True)
class Converted:
    """A Qwen2-MoE: what config.json says, and its weights by their names in a checkpoint."""

    config: dict[str, Any]
    weights: dict[str, torch.Tensor]


def converted(
    dense: LlamaForCausalLM, samples: Samples, recipe: Recipe, dtype: torch.dtype, progress: Callable[[int, int], None]
) -> Converted:
    """The model by `recipe`, its weights in `dtype`. progress: called with layers done, and all.

    Raises ModelError where the neurons beside the shared ones do not divide into the experts.
    """
    config = _config(dense, recipe, dtype)
    inputs = feed_forward_inputs(dense, samples)
    weights = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    if config["tie_word_embeddings"]:
        weights.pop("lm_head.weight", None)
    for number, (layer, x) in enumerate(zip(dense.model.layers, inputs, strict=True)):
        mlp = layer.mlp
        part = FeedForward(mlp.gate_proj.weight.data, mlp.up_proj.weight.data, mlp.down_proj.weight.data)
        found = cut(part, x, recipe.shared_size, recipe.num_experts)
        weights |= {f"model.layers.{number}.mlp.{name}": value for name, value in _experts(part, found).items()}
        progress(number + 1, len(inputs))
    return Converted(config, {name: value.to(dtype).contiguous() for name, value in weights.items()})


def feed_forward_inputs(dense: LlamaForCausalLM, samples: Samples) -> list[torch.Tensor]:
    """What each layer's feed-forward part is called with for the tokens that count: [tokens, H] a layer."""
    counts = samples.mask.flatten().bool()
    found: list[torch.Tensor] = []

    def keep(module: Any, args: tuple[torch.Tensor, ...]) -> None:
        found.append(args[0].flatten(0, 1)[counts])

    handles = [layer.mlp.register_forward_pre_hook(keep) for layer in dense.model.layers]
    positions = (samples.mask.cumsum(dim=1) - 1).clamp(min=0)
    try:
        with torch.no_grad():
            dense.model(samples.token_ids, attention_mask=samples.mask, position_ids=positions, use_cache=False)
    finally:
        for handle in handles:
            handle.remove()
    return found


def _experts(part: FeedForward, found: Cut) -> dict[str, torch.Tensor]:
    """Weights of a layer's mixture. `down` makes up for what the gates multiply with: powers of two, so exactly where
    the number of experts is one."""
    n_experts = len(found.experts)
    weights = {
        "gate.weight": found.router,
        "shared_expert_gate.weight": torch.zeros(1, part.gate.shape[1]),
        **_rows(part, found.shared, "shared_expert", SHARED_SCALE),
    }
    for number, rows in enumerate(found.experts):
        weights |= _rows(part, rows, f"experts.{number}", float(n_experts))
    return weights


def _rows(part: FeedForward, rows: torch.Tensor, name: str, scale: float) -> dict[str, torch.Tensor]:
    return {
        f"{name}.gate_proj.weight": part.gate[rows],
        f"{name}.up_proj.weight": part.up[rows],
        f"{name}.down_proj.weight": part.down[:, rows] * scale,
    }


def _config(dense: LlamaForCausalLM, recipe: Recipe, dtype: torch.dtype) -> dict[str, Any]:
    llama = dense.config
    routed = llama.intermediate_size - recipe.shared_size
    if routed <= 0 or routed % recipe.num_experts or not 1 <= recipe.top_k <= recipe.num_experts:
        raise ModelError(
            f"expected {llama.intermediate_size} neurons a layer without {recipe.shared_size} shared ones to divide"
            f" into {recipe.num_experts} experts, of which a token gets {recipe.top_k}; they do not"
        )
    same = ("vocab_size", "hidden_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads",
            "max_position_embeddings", "rms_norm_eps", "rope_parameters", "tie_word_embeddings", "bos_token_id",
            "eos_token_id", "pad_token_id")  # fmt: skip
    return {
        "architectures": ["Qwen2MoeForCausalLM"],
        "model_type": "qwen2_moe",
        **{name: getattr(llama, name) for name in same},
        "hidden_act": "silu",
        "intermediate_size": llama.intermediate_size,
        "shared_expert_intermediate_size": recipe.shared_size,
        "moe_intermediate_size": routed // recipe.num_experts,
        "num_experts": recipe.num_experts,
        "num_experts_per_tok": recipe.top_k,
        "norm_topk_prob": False,
        "qkv_bias": False,
        "dtype": str(dtype).removeprefix("torch."),
    }
