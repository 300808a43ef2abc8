"""What the table of architectures is written in: places of parameters, and the metadata that many families share.

Names on the right of a place are those of parameters in transformers' model (its `state_dict`), where the experts of a
layer are one tensor. What llama.cpp's conversion changed (rows of q and k permuted, gate and up taken apart, kv_b
split) is named as an arrangement; `arrangements` undoes it.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Literal

from hybrimoe.checkpoint.errors import UnsupportedCheckpointError
from hybrimoe.checkpoint.gguf.fields import Fields

Arrangement = Literal[
    "as it is", "rows joined", "transposed", "interleaved", "interleaved, transposed", "a row", "a channel",
    "heads of q", "heads of k", "heads of k and v", "less one", "log of minus", "by key head", "values by key head",
    "columns of values by key head", "values by key head, log of minus", "last values by key head",
    "channels, last values by key head", "channels joined", "flat", "flat, log of minus", "by head, log of minus",
]  # fmt: skip
"""How a parameter is made from its tensors; see `hybrimoe.checkpoint.gguf.arrangements`."""

SIGMOID = 2  # of llama.cpp's gating functions; 1 is softmax


@dataclass(frozen=True, slots=True)
class Place:
    """A parameter, and the tensors that it is made from. Both are names within a layer, or of the whole model."""

    target: str
    parts: tuple[str, ...]
    how: Arrangement = "as it is"


@dataclass(frozen=True, slots=True)
class Family:
    """An architecture of llama.cpp. config: its part of the configuration; places: before those that all share; whole:
    the same of the model. mixed: some layers have no attention, and no heads of keys and values."""

    config: Callable[[Fields], dict[str, Any]]
    places: tuple[Place, ...] = ()
    whole: tuple[Place, ...] = ()
    mixed: bool = False


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


def rope(fields: Fields) -> dict[str, Any]:
    """`rope_parameters`. Raises UnsupportedCheckpointError for a scaling that metadata do not describe in full."""
    found: dict[str, Any] = {"rope_type": "default", "rope_theta": fields.number("rope.freq_base", 10_000.0)}
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 0.0))
    scaling = fields.text("rope.scaling.type", "linear")  # as llama.cpp takes a factor without a type
    if fields.has("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"):
        scaling = "factors by frequency (rope_freqs)"
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
    return {"head_dim": head_dim, "rope_parameters": rope(fields) | {"partial_rotary_factor": rotated / head_dim}}


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
