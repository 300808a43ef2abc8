"""What the table of architectures is written in: places of parameters, and the metadata that many families share.

Names on the right of a place are those of parameters in transformers' model (its `state_dict`), where the experts of a
layer are one tensor. What llama.cpp's conversion changed (rows of q and k permuted, gate and up taken apart, kv_b
split) is named as an arrangement; `arrangements` undoes it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from hybrimoe.checkpoint.errors import UnsupportedCheckpointError
from hybrimoe.checkpoint.gguf.fields import Fields

Arrangement = Literal[
    "as it is", "rows joined", "rows joined, transposed", "transposed", "interleaved", "interleaved, transposed",
    "a row", "a channel", "channels joined", "flat", "less one", "log of minus", "flat, log of minus",
    "by head, log of minus", "heads of q", "heads of k", "heads of k and v", "by key head", "values by key head",
    "columns of values by key head", "values by key head, log of minus", "last values by key head",
    "channels, last values by key head", "flat, log", "unscaled latents",
]  # fmt: skip
"""How a parameter is made from its tensors; see `hybrimoe.checkpoint.gguf.arrangements`."""

Layers = Literal["alike", "any norm", "some without attention", "own"]
"""Where a layer has no attention, its number of heads of keys and values is 0, or its dense size. Where layers have
their "own" heads, sizes and rotations, the family reads all of them itself. Layers with "any norm" are alike, and have
RMS norms or layer norms."""
SIGMOID, SQRT_SOFTPLUS = 2, 4  # of llama.cpp's gating functions; 1 is softmax


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter, and the tensors that it is made from. Both are names within a layer, or of the whole model."""

    target: str
    parts: tuple[str, ...]
    how: Arrangement = "as it is"


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture of llama.cpp. config: its part of the configuration; places: before those that all share; whole:
    the same of the model. layers: what may differ between them. numbers: int64 parameters that stand in the metadata,
    by target: the metadata's name and the numbers. wrapper: the model type of transformers that has the language model
    only inside a model that sees; `config` is then that of the part, and the model is loaded without its towers."""

    config: Callable[[Fields], dict[str, Any]]
    places: tuple[Place, ...] = ()
    whole: tuple[Place, ...] = ()
    layers: Layers = "alike"
    numbers: Callable[[Fields], dict[str, tuple[str, list[int]]]] = lambda fields: {}
    wrapper: str | None = None


def linear_places(part: str, target: str, how: Arrangement = "as it is") -> tuple[Place, ...]:
    """A linear layer with its bias."""
    return tuple(Place(f"{target}.{kind}", (f"{part}.{kind}",), how) for kind in ("weight", "bias"))


def mlp_places(kind: str, target: str) -> tuple[Place, ...]:
    """Gate, up and down of a dense or shared expert. kind: how its tensors' names end."""
    return tuple(
        Place(f"{target}.{part}_proj.weight", (f"ffn_{part}{kind}.weight",)) for part in ("gate", "up", "down")
    )


def expert_places(target: str) -> tuple[Place, ...]:
    """Experts of one layer in the layout that most families have: gate over up, [E, 2 I, H], and down [E, H, I]."""
    return (
        Place(f"{target}.gate_up_proj", ("ffn_gate_exps.weight", "ffn_up_exps.weight"), "rows joined"),
        Place(f"{target}.gate_up_proj", ("ffn_gate_up_exps.weight",)),
        Place(f"{target}.down_proj", ("ffn_down_exps.weight",)),
    )


WHOLE_MODEL = (
    Place("model.embed_tokens.weight", ("token_embd.weight",)),
    Place("model.norm.weight", ("output_norm.weight",)),
    Place("lm_head.weight", ("output.weight",)),
)
SHARED_PLACES = (
    Place("input_layernorm.weight", ("attn_norm.weight",)),
    Place("post_attention_layernorm.weight", ("ffn_norm.weight",)),
    Place("post_attention_layernorm.weight", ("post_attention_norm.weight",)),
    *linear_places("attn_q", "self_attn.q_proj"),
    *linear_places("attn_k", "self_attn.k_proj"),
    *linear_places("attn_v", "self_attn.v_proj"),
    *linear_places("attn_output", "self_attn.o_proj"),
    Place("self_attn.q_norm.weight", ("attn_q_norm.weight",)),
    Place("self_attn.k_norm.weight", ("attn_k_norm.weight",)),
    *mlp_places("", "mlp"),
    Place("mlp.gate.weight", ("ffn_gate_inp.weight",)),
    Place("mlp.gate.e_score_correction_bias", ("exp_probs_b.bias",)),
    *expert_places("mlp.experts"),
    *mlp_places("_shexp", "mlp.shared_experts"),
)
"""What the layers of a family have unless its own places come first."""
PERMUTED_HEADS = (
    *linear_places("attn_q", "self_attn.q_proj", "heads of q"),
    *linear_places("attn_k", "self_attn.k_proj", "heads of k"),
)
"""llama.cpp rotates neighbours, transformers halves: its conversion permuted the rows of q and k for that."""
GRANITE = (
    *PERMUTED_HEADS,
    Place("block_sparse_moe.router.weight", ("ffn_gate_inp.weight",)),
    *expert_places("block_sparse_moe.experts"),
    Place("shared_mlp.input_linear.weight", ("ffn_gate_shexp.weight", "ffn_up_shexp.weight"), "rows joined"),
    Place("shared_mlp.output_linear.weight", ("ffn_down_shexp.weight",)),
)
LATENT_ATTENTION = (
    Place("self_attn.q_a_proj.weight", ("attn_q_a.weight",)),
    Place("self_attn.q_a_layernorm.weight", ("attn_q_a_norm.weight",)),
    Place("self_attn.q_b_proj.weight", ("attn_q_b.weight",)),
    Place("self_attn.kv_a_proj_with_mqa.weight", ("attn_kv_a_mqa.weight",)),
    Place("self_attn.kv_a_layernorm.weight", ("attn_kv_a_norm.weight",)),
    Place("self_attn.kv_b_proj.weight", ("attn_k_b.weight", "attn_v_b.weight"), "heads of k and v"),
    Place("self_attn.kv_b_proj.weight", ("attn_kv_b.weight",)),
)


LLAMA3 = ((1.0, 4.0, 8192), (1.0, 1.0, 8192), (1.0, 32.0, 131072))
"""(low_freq_factor, high_freq_factor, original_max_position_embeddings) of published models; their factors by
frequency show which it is."""


def rope(fields: Fields) -> dict[str, Any]:
    """`rope_parameters`. Raises UnsupportedCheckpointError for a scaling that the file does not describe in full."""
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": fields.number("rope.freq_base", 10_000.0)}
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 0.0))
    scaling = fields.text("rope.scaling.type", "linear")  # as llama.cpp takes a factor without a type
    if fields.has("rope_factors_long.weight"):
        return found | _two_factors(fields)
    if fields.has("rope_freqs.weight"):
        return found | _by_frequency(fields, found["rope_theta"])
    if scaling == "none" or (scaling == "linear" and factor in (0.0, 1.0)):
        return found
    if scaling == "linear":
        return found | {"rope_type": "linear", "factor": factor}
    if scaling != "yarn":
        raise UnsupportedCheckpointError(
            f"{fields.model.path}: the rotary embedding is scaled by {scaling}, which is not read from GGUF for"
            f" {fields.architecture}; use the model's safetensors"
        )
    found |= {
        "rope_type": "yarn",
        "factor": fields.number("rope.scaling.factor"),
        "original_max_position_embeddings": fields.whole("rope.scaling.original_context_length"),
    }
    optional = {"attention_factor": "yarn_attn_factor", "beta_fast": "yarn_beta_fast", "beta_slow": "yarn_beta_slow"}
    names = {key: f"rope.scaling.{name}" for key, name in optional.items()}
    return found | {key: fields.number(name) for key, name in names.items() if fields.given(name)}


def _two_factors(fields: Fields) -> dict[str, Any]:
    """Of rotations with one factor for each frequency, and others in long contexts."""
    original = fields.whole("rope.scaling.original_context_length")
    return {
        "rope_type": "longrope",
        "original_max_position_embeddings": original,
        "factor": fields.whole("context_length") / original,
        "long_factor": fields.values("rope_factors_long.weight"),
        "short_factor": fields.values("rope_factors_short.weight"),
        "attention_factor": fields.number("rope.scaling.attn_factor", 1.0),
    }


def _by_frequency(fields: Fields, theta: float) -> dict[str, Any]:
    """Llama 3's scaling, where its factors are those of the file."""
    factors = fields.values("rope_freqs.weight")
    factor = _rounded(max(factors))
    if factor == 1.0 == min(factors):
        return {}
    for low, high, context in LLAMA3:
        expected = _llama3_factors(len(factors), theta, factor, low, high, context)
        if all(math.isclose(a, b, rel_tol=1e-4) for a, b in zip(factors, expected, strict=True)):
            return {
                "rope_type": "llama3",
                "factor": factor,
                "low_freq_factor": low,
                "high_freq_factor": high,
                "original_max_position_embeddings": context,
            }
    raise UnsupportedCheckpointError(
        f"{fields.model.path}: the factors by frequency of its rotary embedding (rope_freqs) are not Llama 3's, which"
        f" are read from GGUF for {fields.architecture}; use the model's safetensors"
    )


def _rounded(value: float) -> float:
    """Without the error of float32: of a factor that is a small number."""
    return round(value, 4)


def _llama3_factors(n_pairs: int, theta: float, factor: float, low: float, high: float, context: int) -> list[float]:
    """By which frequency i is divided: 1 where its wave is short, `factor` where it is long, between them smoothly."""
    found = []
    for pair in range(n_pairs):
        waves = context / (2 * math.pi * theta ** (pair / n_pairs))
        if waves > high:
            found.append(1.0)
        elif waves < low:
            found.append(factor)
        else:
            smooth = (waves - low) / (high - low)
            found.append(1 / ((1 - smooth) / factor + smooth))
    return found


def own_heads(fields: Fields) -> dict[str, Any]:
    """Attention with a head dimension of its own."""
    hidden, heads = fields.whole("embedding_length"), fields.whole("attention.head_count")
    return {"head_dim": fields.whole("attention.key_length", hidden // heads or 1)}


def partly_rotated(fields: Fields) -> dict[str, Any]:
    """Attention of which the first dimensions of a head are rotated."""
    head_dim = own_heads(fields)["head_dim"]
    rotated = fields.whole("rope.dimension_count", head_dim)
    if rotated > head_dim:
        raise fields.wrong("rope.dimension_count", rotated, f"at most the {head_dim} dimensions of a head")
    return {"head_dim": head_dim, "rope_parameters": rope(fields) | rotated_part(rotated, head_dim)}


def rotated_part(rotated: int, head_dim: int) -> dict[str, float]:
    """The factor of which `head_dim` times, cut off, is `rotated` again."""
    factor = rotated / head_dim
    return {"partial_rotary_factor": factor if int(head_dim * factor) == rotated else math.nextafter(factor, 1.0)}


def expert_size(fields: Fields) -> int:
    """Rows of an expert's gate: stated, or as its tensor has them (old files do not state it)."""
    if fields.given("expert_feed_forward_length"):
        return fields.whole("expert_feed_forward_length")
    layers = range(fields.whole("block_count"))
    return fields.shape(*(f"blk.{layer}.ffn_up_exps.weight" for layer in layers))[-2]


def expert_counts(fields: Fields, experts: str, used: str = "num_experts_per_tok") -> dict[str, int]:
    """How many experts there are, and a token uses, under the names that the configuration has for them."""
    count, top_k = fields.whole("expert_count"), fields.whole("expert_used_count")
    if top_k > count:
        raise fields.wrong("expert_used_count", top_k, f"at most the {count} experts there are")
    return {experts: count, used: top_k}


def attention_bias(fields: Fields) -> bool:
    """Whether queries have a bias."""
    return fields.has("blk.0.attn_q.bias")


def groups_of_experts(fields: Fields) -> dict[str, int]:
    """Of routers that choose groups of experts first."""
    groups = fields.whole("expert_group_count", 1)
    return {"n_group": groups, "topk_group": fields.whole("expert_group_used_count", 1 if groups == 1 else None)}


def routed_and_shared(fields: Fields) -> dict[str, Any]:
    """DeepSeek's kind of layers: some dense ones first, then routed experts beside shared ones."""
    return {
        "moe_intermediate_size": expert_size(fields),
        "n_shared_experts": fields.whole("expert_shared_count"),
        "first_k_dense_replace": fields.whole("leading_dense_block_count", 0, least=0),
        "routed_scaling_factor": fields.number("expert_weights_scale", 1.0),
        "norm_topk_prob": fields.flag("expert_weights_norm", False),
        **expert_counts(fields, "n_routed_experts"),
        **groups_of_experts(fields),
    }
