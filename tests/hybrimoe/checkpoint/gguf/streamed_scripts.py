"""What llama.cpp's conversion scripts do to models with several streams: metadata and tensors. The package gguf does
not know these architectures yet."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from gguf import ExpertGatingFuncType, GGUFValueType, GGUFWriter

from .recurrent_scripts import describe_qwen3_5, kimi, qwen3_5
from .scripts import Script, describe_experts, describe_latent, describe_model, describe_rotation

Named = Iterator[tuple[str, torch.Tensor]]
SQRT_SOFTPLUS = 4
RATIOS = {"sliding_attention": 0, "compressed_sparse_attention": 4, "heavily_compressed_attention": 128}


def _describe_deepseek(writer: GGUFWriter, config: dict[str, Any]) -> None:
    layers, rotary = config["num_hidden_layers"], config["rope_parameters"]
    describe_model(writer, config)
    describe_experts(writer, config)
    describe_rotation(writer, rotary["compress"] | {"rope_theta": rotary["main"]["rope_theta"]})
    writer.add_head_count_kv(1)
    writer.add_key_length(config["head_dim"])
    writer.add_value_length(config["head_dim"])
    writer.add_rope_dimension_count(int(config["head_dim"] * config["partial_rotary_factor"]))
    writer.add_q_lora_rank(config["q_lora_rank"])
    writer.add_sliding_window(config["sliding_window"])
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_swiglu_clamp_exp([config["swiglu_limit"]] * layers)
    writer.add_indexer_head_count(config["index_n_heads"])
    writer.add_indexer_key_length(config["index_head_dim"])
    writer.add_indexer_top_k(config["index_topk"])
    writer.add_nextn_predict_layers(1)  # which the scripts name, and leave out
    hashed = config["mlp_layer_types"].count("hash_moe")
    own = {
        "attention.output_lora_rank": config["o_lora_rank"],
        "attention.output_group_count": config["o_groups"],
        "attention.compress_rope_freq_base": float(rotary["compress"]["rope_theta"]),
        "hash_layer_count": hashed,
        "hyper_connection.count": config["hc_mult"],
        "hyper_connection.sinkhorn_iterations": config["hc_sinkhorn_iters"],
        "hyper_connection.epsilon": config["hc_eps"],
        "expert_gating_func": SQRT_SOFTPLUS,
    }
    _add_all(writer, own)
    ratios = [RATIOS[kind] for kind in config["layer_types"]]
    writer.add_array(f"{writer.arch}.attention.compress_ratios", [*ratios, 0])  # with the layer that is left out


def _add_all(writer: GGUFWriter, values: dict[str, int | float]) -> None:
    for name, value in values.items():
        (writer.add_uint32 if isinstance(value, int) else writer.add_float32)(f"{writer.arch}.{name}", value)


DEEPSEEK = {
    "attn.attn_sink": "attn_sinks.weight",
    "attn.wq_a.weight": "attn_q_a.weight",
    "attn.wq_b.weight": "attn_q_b.weight",
    "attn.q_norm.weight": "attn_q_a_norm.weight",
    "attn.wkv.weight": "attn_kv.weight",
    "attn.norm.weight": "attn_kv_a_norm.weight",  # "kv_norm" in published checkpoints
    "attn.wo_a.weight": "attn_output_a.weight",
    "attn.wo_b.weight": "attn_output_b.weight",
    "attn.compressor.ape": "attn_compressor_ape.weight",
    "attn.compressor.wkv.weight": "attn_compressor_kv.weight",
    "attn.compressor.wgate.weight": "attn_compressor_gate.weight",
    "attn.compressor.norm.weight": "attn_compressor_norm.weight",
    "attn.indexer.wq_b.weight": "indexer.attn_q_b.weight",
    "attn.indexer.weights_proj.weight": "indexer.proj.weight",
    "attn.indexer.compressor.ape": "indexer_compressor_ape.weight",
    "attn.indexer.compressor.wkv.weight": "indexer_compressor_kv.weight",
    "attn.indexer.compressor.wgate.weight": "indexer_compressor_gate.weight",
    "attn.indexer.compressor.norm.weight": "indexer_compressor_norm.weight",
    "attn_norm.weight": "attn_norm.weight",
    "ffn_norm.weight": "ffn_norm.weight",
    "ffn.shared_experts.w1.weight": "ffn_gate_shexp.weight",
    "ffn.shared_experts.w3.weight": "ffn_up_shexp.weight",
    "ffn.shared_experts.w2.weight": "ffn_down_shexp.weight",
    "ffn.gate.weight": "ffn_gate_inp.weight",
    "ffn.gate.bias": "exp_probs_b.bias",
    "ffn.gate.tid2eid": "ffn_gate_tid2eid.weight",
    **{f"ffn.experts.w{n}.weight": f"ffn_{part}_exps.weight" for n, part in ((1, "gate"), (3, "up"), (2, "down"))},
    **{f"hc_{p}_{name}": f"hc_{p}_{name}.weight" for p in ("attn", "ffn") for name in ("base", "fn", "scale")},
}
"""Within a layer, by the names that transformers saves."""
DEEPSEEK_WHOLE = {
    "embed_tokens.weight": "token_embd.weight",
    "norm.weight": "output_norm.weight",
    "head.weight": "output.weight",
    **{f"hc_head.hc_{name}": f"output_hc_{name}.weight" for name in ("base", "fn", "scale")},
}


def _deepseek(key: str, tensor: torch.Tensor, config: dict[str, Any]) -> Named:
    name = key.removeprefix("model.")
    if name in DEEPSEEK_WHOLE:
        yield DEEPSEEK_WHOLE[name], tensor
    else:
        _, layer, rest = name.split(".", 2)
        yield f"blk.{layer}.{DEEPSEEK[rest]}", tensor


def _describe_qwen(writer: GGUFWriter, config: dict[str, Any]) -> None:
    describe_qwen3_5(writer, config)
    writer.add_indexer_head_count(config["indexer_n_heads"])
    writer.add_indexer_key_length(config["indexer_head_dim"])
    writer.add_indexer_top_k(config["indexer_budget"])
    ratio = config["indexer_compress_ratio"]
    kinds = config["layer_types"]
    writer.add_array(
        f"{writer.arch}.attention.compress_ratios", [0 if kind == "linear_attention" else ratio for kind in kinds]
    )
    heads = (config["ngram_size"] - 1) * config["heads_per_ngram"]
    own = {
        "hyper_connection.count": config["hc_count"],
        "hyper_connection.low_rank": config["hc_lowrank"],
        "ple.ngram_size": config["ngram_size"],
        "ple.heads_per_ngram": config["heads_per_ngram"],
        "ple.conv_kernel": config["ple_conv_kernel_size"],
        "ple.eos_token_id": config["eos_token_id"],
        "embedding_length_per_layer_input": config["ple_embed_dim"] // heads,
    }
    _add_all(writer, own)
    writer.add_array(f"{writer.arch}.ple.layers", [layer - 1 for layer in config["ple_layer_ids"]])


NUMBERS = {
    "layer_multipliers": "layer_multipliers",
    "ngram_heads_offsets": "head_offsets",
    "ngram_heads_vocab_sizes": "head_vocab_sizes",
}
"""Of tables of n-grams: what the scripts read from the checkpoint into the metadata."""
QWEN = {
    **{f"ple.{name}_proj.weight": f"ple_{name}.weight" for name in ("key", "value")},
    **{
        f"{part}_hyper_connection.{name}.weight": f"hc_{block}_{end}.weight"
        for part, block in (("attn", "attn"), ("mlp", "ffn"))
        for name, end in (
            ("input_mix_weight_down", "down"), ("input_mix_weight_up", "up"), ("block_inject_weight", "inject"),
        )
    },
}  # fmt: skip
QWEN_PLUS_ONE = {
    **{f"ple.norm_{name}.weight": f"ple_norm_{name}.weight" for name in ("key", "query", "conv")},
    **{f"self_attn.indexer.{name}_layernorm.weight": f"indexer.{name}_norm.weight" for name in "qk"},
    "attn_hyper_connection.hc_norm.weight": "hc_attn_norm.weight",
    "mlp_hyper_connection.hc_norm.weight": "hc_ffn_norm.weight",
}
QWEN_WHOLE = {
    "model.hyper_connection_mixer.input_mix_weight_down.weight": "output_hc_down.weight",
    "model.hyper_connection_mixer.input_mix_weight_up.weight": "output_hc_up.weight",
}


def _qwen(key: str, tensor: torch.Tensor, config: dict[str, Any]) -> Named:
    block, rest = (f"blk.{key.split('.')[2]}", key.split(".", 3)[3]) if ".layers." in key else ("", key)
    if rest in QWEN:
        yield f"{block}.{QWEN[rest]}", tensor
    elif rest in QWEN_PLUS_ONE:
        yield f"{block}.{QWEN_PLUS_ONE[rest]}", tensor + 1
    elif key in QWEN_WHOLE:
        yield QWEN_WHOLE[key], tensor
    elif key == "model.hyper_connection_mixer.hc_norm.weight":
        yield "output_hc_norm.weight", tensor + 1
    elif rest == "self_attn.indexer.index_qk_proj.weight":
        queries = config["indexer_n_heads"] * config["indexer_head_dim"]
        yield f"{block}.indexer.q_proj.weight", tensor[:queries]
        yield f"{block}.indexer.k_proj.weight", tensor[queries:]
    elif rest == "ple.conv1d.weight":
        yield f"{block}.ple_conv1d.weight", tensor.squeeze()
    elif "ngram_embedding" in rest:
        yield "per_layer_token_embd.weight", tensor
    elif rest.rpartition(".")[2] not in NUMBERS:
        yield from qwen3_5(key, tensor, config)


def _numbers(writer: GGUFWriter, tensors: dict[str, torch.Tensor]) -> None:
    for key, tensor in tensors.items():
        if name := NUMBERS.get(key.rpartition(".")[2]):
            key_value = f"{writer.arch}.ple.{name}", tensor.tolist(), GGUFValueType.ARRAY
            writer.add_key_value(*key_value, sub_type=GGUFValueType.UINT64)


def _describe_glm(writer: GGUFWriter, config: dict[str, Any]) -> None:
    layers = config["num_hidden_layers"]
    describe_model(writer, config)
    describe_experts(writer, config)
    describe_latent(writer, config)
    writer.add_head_count_kv([0 if kind == "linear_attention" else 1 for kind in config["layer_types"]])
    writer.add_layer_norm_eps(1e-6)
    writer.add_ssm_conv_kernel(config["linear_conv_kernel_dim"])
    writer.add_kda_head_dim(config["linear_head_dim"])
    if config["linear_lower_bound"] is not None:
        writer.add_float32(f"{writer.arch}.kda.gate_lower_bound", config["linear_lower_bound"])
    writer.add_indexer_head_count(config["index_n_heads"])
    writer.add_indexer_key_length(config["index_head_dim"])
    writer.add_indexer_top_k(config["index_topk"])
    own = {
        "attention.indexer.kpool": config["index_kpool"],
        "hyper_connection.count": config["hc_mult"],
        "hyper_connection.sinkhorn_iterations": config["hc_sinkhorn_iters"],
        "hyper_connection.epsilon": config["hc_eps"],
    }
    _add_all(writer, own)
    indexer = f"{writer.arch}.attention.indexer"
    writer.add_bool(f"{indexer}.kpool_select_tail", config["index_kpool_always_select_tail"])
    writer.add_array(f"{indexer}.types", [kind == "full" for kind in config["indexer_types"]])
    writer.add_leading_dense_block_count(config["mlp_layer_types"].index("sparse"))
    writer.add_expert_shared_count(config["n_shared_experts"])
    writer.add_expert_weights_scale(config["routed_scaling_factor"])
    writer.add_expert_weights_norm(config["norm_topk_prob"])
    writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    writer.add_expert_group_count(config["n_group"])
    writer.add_expert_group_used_count(config["topk_group"])
    writer.add_swiglu_clamp_exp([config["swiglu_limit"]] * layers)
    writer.add_swiglu_clamp_shexp([config["swiglu_limit"]] * layers)


GLM = {
    "self_attn.indexer.wq_b.weight": "indexer.attn_q_b.weight",
    "self_attn.indexer.wk.weight": "indexer.attn_k.weight",
    "self_attn.indexer.k_norm.weight": "indexer.k_norm.weight",
    "self_attn.indexer.k_norm.bias": "indexer.k_norm.bias",
    "self_attn.indexer.weights_proj.weight": "indexer.proj.weight",
    "self_attn.indexer.index_kpool_compress_ape": "indexer_compressor_ape.weight",
    "self_attn.indexer.index_kpool_compress_gate": "indexer_compressor_gate.weight",
    **{f"hc_{p}_{name}": f"hc_{p}_{name}.weight" for p in ("attn", "ffn") for name in ("base", "fn", "scale")},
}
"""Within a layer, by the names that transformers saves."""


def _glm(key: str, tensor: torch.Tensor, config: dict[str, Any]) -> Named:
    if ".visual." in key:
        return
    key = key.replace("model.language_model.", "model.")
    block, rest = (f"blk.{key.split('.')[2]}", key.split(".", 3)[3]) if ".layers." in key else ("", key)
    if rest in GLM:
        yield f"{block}.{GLM[rest]}", tensor
    else:
        yield from kimi(key, tensor, config)


STREAMED = {
    "deepseek_v4": Script("deepseek4", _describe_deepseek, _deepseek, "glm-dsa"),
    "qwen4_exp": Script("qwen4exp", _describe_qwen, _qwen, "qwen35moe", _numbers),
    "glm5_next": Script("glm5-next", _describe_glm, _glm, "kimi-linear"),
}
"""By the family's name in `tiny_families`."""
