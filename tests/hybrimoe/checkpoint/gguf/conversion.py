"""A saved model as a GGUF file, in the layout that llama.cpp's conversion scripts give, written by the package gguf.

Nothing here is shared with what reads such files: names come from the package's own table, and what the scripts do to
tensors (permuting, splitting, stacking) and which metadata they write is told again.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from gguf import MODEL_ARCH, ExpertGatingFuncType, GGMLQuantizationType, GGUFWriter
from safetensors.torch import load_file

from .latent_scripts import LATENT
from .recurrent_scripts import RECURRENT
from .scripts import describe_latent, describe_rotation
from .streamed_scripts import STREAMED
from .windowed_scripts import WINDOWED

SCRIPTS = LATENT | RECURRENT | STREAMED | WINDOWED
ARCHITECTURES = {
    "mixtral": gguf.MODEL_ARCH_NAMES[MODEL_ARCH.LLAMA],
    "olmoe": gguf.MODEL_ARCH_NAMES[MODEL_ARCH.OLMOE],
    "qwen2_moe": gguf.MODEL_ARCH_NAMES[MODEL_ARCH.QWEN2MOE],
    "qwen3_moe": gguf.MODEL_ARCH_NAMES[MODEL_ARCH.QWEN3MOE],
    "deepseek_v2": gguf.MODEL_ARCH_NAMES[MODEL_ARCH.DEEPSEEK2],
    "deepseek_v3": gguf.MODEL_ARCH_NAMES[MODEL_ARCH.DEEPSEEK2],
    "glm4_moe": gguf.MODEL_ARCH_NAMES[MODEL_ARCH.GLM4_MOE],
    "dots1": gguf.MODEL_ARCH_NAMES[MODEL_ARCH.DOTS1],
    "gpt_oss": gguf.MODEL_ARCH_NAMES[MODEL_ARCH.GPT_OSS],
    "granitemoe": gguf.MODEL_ARCH_NAMES[MODEL_ARCH.GRANITE_MOE],
    "granitemoeshared": gguf.MODEL_ARCH_NAMES[MODEL_ARCH.GRANITE_MOE],
    "ernie4_5_moe": gguf.MODEL_ARCH_NAMES[MODEL_ARCH.ERNIE4_5_MOE],
    "hunyuan_v1_moe": gguf.MODEL_ARCH_NAMES[MODEL_ARCH.HUNYUAN_MOE],
    "qwen3_vl_moe": gguf.MODEL_ARCH_NAMES[MODEL_ARCH.QWEN3VLMOE],
    "afmoe": gguf.MODEL_ARCH_NAMES[MODEL_ARCH.AFMOE],
    "exaone_moe": gguf.MODEL_ARCH_NAMES[MODEL_ARCH.EXAONE_MOE],
    "lfm2_moe": gguf.MODEL_ARCH_NAMES[MODEL_ARCH.LFM2MOE],
    "hy_v3": "hy_v3",
    "mellum": "mellum",
    "minimax_m2": gguf.MODEL_ARCH_NAMES[MODEL_ARCH.MINIMAXM2],
    **{family: script.architecture for family, script in SCRIPTS.items()},
}
"""transformers' model type, or a family that has more than one -> llama.cpp's architecture."""
NAMES = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
NAMED_AS = {
    "hy_v3": MODEL_ARCH.DOTS1,
    "mellum": MODEL_ARCH.QWEN3MOE,
    **{script.architecture: NAMES[script.named_as or script.architecture] for script in SCRIPTS.values()},
}
"""Architectures that are newer than the package, and those whose tensors have the same names."""
STACKED: dict[str, Callable[[str], str]] = {
    "lfm2_moe": lambda key: key.removeprefix("model."),
    "jamba": lambda key: key.replace("feed_forward", "mlp"),
}
"""Names of stacked experts that the script chooses."""
ONE_EXPERT = re.compile(r"(.*\.experts)\.(\d+)\.(\w+)\.weight$")
SIGMOID = ("deepseek_v3", "glm4_moe", "dots1", "minimax_m2", "exaone_moe", "lfm2_moe", "hy_v3")
WINDOWED = ("gpt_oss", "afmoe", "exaone_moe", "mellum")
N_LAYERS = 4
"""Of a configuration that names kinds of layers only."""
F32 = GGMLQuantizationType.F32
OWN_NAMES = ("blk.", "rope_", "output", "token_embd", "per_layer_")
"""How names begin that a script gives itself."""


def to_gguf(
    directory: Path, path: Path, kind: GGMLQuantizationType = F32, *, split: int = 0, tokenizer: Any = None,
    architecture: str | None = None,
    encode: Callable[[np.ndarray, GGMLQuantizationType], np.ndarray] = gguf.quants.quantize,
) -> Path:  # fmt: skip
    """Writes the model of `directory` to `path`; gives the (first) file.

    architecture: llama.cpp's name, by default as the model's type has it. kind: of all matrices but routers. split:
    tensors a file, 0 for one file. tokenizer: called with the writer. encode: what makes blocks of a kind of a matrix.
    """
    config = json.loads((directory / "config.json").read_text())
    architecture = architecture or ARCHITECTURES[config["model_type"]]
    config = config | config.get("text_config", {})  # of a model that sees the part that is written
    tensors = {key: value for file in sorted(directory.glob("*.safetensors")) for key, value in load_file(file).items()}
    writer = GGUFWriter(str(path), architecture, split_max_tensors=split)
    script = next((script for script in SCRIPTS.values() if script.architecture == architecture), None)
    (script.describe if script else describe)(writer, config)
    if script:
        script.numbers(writer, tensors)
    if architecture == "qwen3vlmoe":
        writer.add_rope_dimension_sections([2, 1, 1, 0])  # of half a head
        writer.add_num_deepstack_layers(0)
    (tokenizer or (lambda writer: writer.add_tokenizer_model("no_vocab")))(writer)
    names = gguf.get_tensor_name_map((NAMES | NAMED_AS)[architecture], config.get("num_hidden_layers", N_LAYERS))
    for key, tensor in converted(tensors, config, script.modified if script else modified):
        name = key if key.startswith(OWN_NAMES) else names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name is not None, f"llama.cpp has no name for {key}"
        small = tensor.dim() == 1 or ".ssm_" in name or "ffn_gate_inp" in name
        if not tensor.is_floating_point():
            writer.add_tensor(name, tensor.to(torch.int32).contiguous().numpy())
            continue
        values = tensor.float().contiguous().numpy()
        if small or kind == F32:
            writer.add_tensor(name, values, raw_dtype=F32)
        else:
            writer.add_tensor(name, np.ascontiguousarray(encode(values, kind)), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return next(iter(sorted(path.parent.glob(f"{path.stem}-00001-of-*.gguf"))), path)


def converted(
    tensors: dict[str, torch.Tensor],
    config: dict[str, Any],
    modified: Callable[..., Iterator[tuple[str, torch.Tensor]]],
) -> Iterator[tuple[str, torch.Tensor]]:
    """(name, tensor) as the scripts hand them to the writer: experts stacked, then what `modify_tensors` does."""
    stacks: dict[str, dict[int, torch.Tensor]] = {}
    for key, tensor in tensors.items():
        expert = ONE_EXPERT.match(key)
        if expert is None:
            yield from modified(key, tensor, config)
        else:
            stacks.setdefault(f"{expert[1]}.{expert[3]}.weight", {})[int(expert[2])] = tensor
    for key, experts in stacks.items():
        name = STACKED.get(config["model_type"], str)(key)
        yield from modified(name, torch.stack([experts[index] for index in range(len(experts))]), config)


def modified(key: str, tensor: torch.Tensor, config: dict[str, Any]) -> Iterator[tuple[str, torch.Tensor]]:
    """One tensor as the script of its architecture changes it."""
    kind, layer = config["model_type"], re.search(r"layers\.(\d+)\.", key)
    block = f"blk.{layer[1]}" if layer else ""
    if kind in ("mixtral", "granitemoe", "granitemoeshared") and re.search(r"\.[qk]_proj\.", key):
        heads = config["num_attention_heads" if ".q_proj." in key else "num_key_value_heads"]
        yield key, permuted(tensor, heads)
    elif key.endswith("kv_b_proj.weight"):
        keys = config["qk_nope_head_dim"]
        parts = tensor.view(config["num_attention_heads"], keys + config["v_head_dim"], -1)
        yield f"{block}.attn_k_b.weight", parts[:, :keys].transpose(1, 2)
        yield f"{block}.attn_v_b.weight", parts[:, keys:]
    elif key.endswith("input_linear.weight"):
        gate, up = tensor.chunk(2, dim=-2)
        end = "shexp" if "shared_mlp" in key else "exps"
        yield f"{block}.ffn_gate_{end}.weight", gate
        yield f"{block}.ffn_up_{end}.weight", up
    elif kind == "gpt_oss" and "mlp.experts" in key:
        yield from gpt_oss_experts(block, key, tensor)
    elif key.endswith("sinks"):
        yield key + ".weight", tensor
    elif kind == "hy_v3" and key.endswith("expert_bias"):
        yield f"{block}.exp_probs_b", tensor
    elif key.endswith("expert_bias"):
        yield key + ".bias", tensor
    elif key.endswith("conv.conv.weight"):
        yield key, tensor.squeeze(1)
    elif key.endswith("e_score_correction_bias"):
        yield key.replace("_correction_bias", "_correction.bias"), tensor.squeeze()
    else:
        yield key, tensor


def gpt_oss_experts(block: str, key: str, tensor: torch.Tensor) -> Iterator[tuple[str, torch.Tensor]]:
    """Gate and up taken apart, matrices with rows of their own outputs."""
    end = "bias" if key.endswith("_bias") else "weight"
    rows = tensor if end == "bias" else tensor.transpose(-1, -2)
    if "down_proj" in key:
        yield f"{block}.ffn_down_exps.{end}", rows
    else:
        yield f"{block}.ffn_gate_exps.{end}", rows[:, ::2]
        yield f"{block}.ffn_up_exps.{end}", rows[:, 1::2]


def permuted(weights: torch.Tensor, heads: int) -> torch.Tensor:
    """Rows of each head from two halves to neighbours that are rotated together."""
    return (
        weights.reshape(heads, 2, weights.shape[0] // heads // 2, *weights.shape[1:])
        .swapaxes(1, 2)
        .reshape(weights.shape)
    )


def describe(writer: GGUFWriter, config: dict[str, Any]) -> None:
    """The metadata that the scripts write: what all have, then those of the architecture."""
    latent = config["model_type"].startswith("deepseek")
    head_dim = config.get("head_dim") or config["hidden_size"] // config["num_attention_heads"]
    writer.add_block_count(config["num_hidden_layers"])
    writer.add_context_length(config["max_position_embeddings"])
    writer.add_embedding_length(config["hidden_size"])
    writer.add_feed_forward_length(config["intermediate_size"])
    writer.add_head_count(config["num_attention_heads"])
    writer.add_head_count_kv(1 if latent else _key_value_heads(config))
    writer.add_layer_norm_rms_eps(config.get("rms_norm_eps") or config["norm_eps"])
    writer.add_vocab_size(config["vocab_size"])
    rotary = config["rope_parameters"]
    if "sliding_attention" in rotary:
        writer.add_rope_freq_base_swa(rotary["sliding_attention"]["rope_theta"])
        rotary = rotary["full_attention"]
    describe_rotation(writer, rotary)
    if not latent:
        writer.add_key_length(head_dim)
        writer.add_value_length(head_dim)
        writer.add_rope_dimension_count(int(head_dim * rotary.get("partial_rotary_factor", 1)))
    _describe_experts(writer, config)
    if latent:
        describe_latent(writer, config)
    if "granite" in config["model_type"]:
        writer.add_attention_scale(config["attention_multiplier"])
        writer.add_embedding_scale(config["embedding_multiplier"])
        writer.add_residual_scale(config["residual_multiplier"])
        writer.add_logit_scale(config["logits_scaling"])
    if config["model_type"] in WINDOWED:
        writer.add_sliding_window(config["sliding_window"])
    if config["model_type"] in ("exaone_moe", "mellum"):
        writer.add_sliding_window_pattern([kind == "sliding_attention" for kind in config["layer_types"]])
    if config["model_type"] == "lfm2_moe":
        writer.add_shortconv_l_cache(config["conv_L_cache"])


def _key_value_heads(config: dict[str, Any]) -> int | list[int]:
    """None in layers that have a convolution for attention."""
    heads: int = config["num_key_value_heads"]
    if config["model_type"] != "lfm2_moe":
        return heads
    return [heads if kind == "full_attention" else 0 for kind in config["layer_types"]]


def _describe_experts(writer: GGUFWriter, config: dict[str, Any]) -> None:
    kind = config["model_type"]
    counts = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts")
    writer.add_expert_count(next(config[name] for name in counts if name in config))
    writer.add_expert_used_count(
        next(config[name] for name in ("num_experts_per_tok", "moe_topk", "moe_k") if name in config)
    )
    if kind not in ("mixtral", "olmoe", "granitemoe", "granitemoeshared"):
        writer.add_expert_feed_forward_length(config.get("moe_intermediate_size") or config["intermediate_size"])
    if kind == "exaone_moe":
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
        writer.add_expert_shared_count(config["num_shared_experts"])
        writer.add_expert_shared_feed_forward_length(config["num_shared_experts"] * config["moe_intermediate_size"])
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_weights_norm(config["norm_topk_prob"])
    elif "first_k_dense_replace" in config:
        writer.add_leading_dense_block_count(config["first_k_dense_replace"])
        writer.add_expert_shared_count(config["n_shared_experts"])
        writer.add_expert_weights_scale(config["routed_scaling_factor"])
        writer.add_expert_weights_norm(config["norm_topk_prob"])
        writer.add_expert_group_count(config["n_group"])
        writer.add_expert_group_used_count(config["topk_group"])
    if kind in ("afmoe", "lfm2_moe"):
        writer.add_leading_dense_block_count(config["num_dense_layers"])
    if kind == "afmoe":
        writer.add_expert_shared_count(config["num_shared_experts"])
        writer.add_expert_weights_scale(config["route_scale"])
    if kind == "hy_v3":
        shared = config["num_shared_experts"] * config["moe_intermediate_size"]
        writer.add_expert_shared_feed_forward_length(shared)
        writer.add_expert_weights_norm(True)
        writer.add_expert_weights_scale(config["router_scaling_factor"])
    if kind in SIGMOID:
        writer.add_expert_gating_func(ExpertGatingFuncType.SIGMOID)
    if kind == "qwen2_moe":
        writer.add_expert_shared_feed_forward_length(config["shared_expert_intermediate_size"])
    if kind == "granitemoeshared":
        writer.add_expert_shared_feed_forward_length(config["shared_intermediate_size"])
    if kind == "hunyuan_v1_moe":
        writer.add_expert_shared_feed_forward_length(config["intermediate_size"])
        writer.add_expert_shared_count(1)
    if kind == "ernie4_5_moe":
        shared = config["moe_num_shared_experts"]
        writer.add_interleave_moe_layer_step(config["moe_layer_interval"])
        writer.add_leading_dense_block_count(config["moe_layer_start_index"])
        writer.add_expert_shared_count(shared)
        writer.add_expert_shared_feed_forward_length(shared * config["moe_intermediate_size"])
