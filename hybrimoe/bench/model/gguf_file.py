"""The random weights of a model shape as a GGUF file, so that llama.cpp runs on the same numbers.

Experts and dense layers are Q4_0, the output layer Q8_0, norms and routers float32: what a user of a "Q4_0" file has;
or all but norms and routers BF16.
Needs the package gguf (llama.cpp's own); the names of tensors are those of its table.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import torch

from hybrimoe.bench.model.gguf_layout import describe_delta_net, laid_out
from hybrimoe.errors import ConfigError, MissingExtraError

ARCHITECTURES = {"olmoe": "OLMOE", "qwen3_moe": "QWEN3MOE", "qwen3_next": "QWEN3NEXT", "qwen3_5_moe_text": "QWEN35MOE"}
"""Model type -> llama.cpp's architecture. It takes tensors as transformers has them, or as `gguf_layout` turns them."""
NORMALISED = ("qwen3_moe", "qwen3_next")
"""Model types whose chosen experts' weights have the sum 1 in llama.cpp, whatever the configuration says."""

WEIGHTS = {"q4_0": ("Q4_0", "Q8_0"), "bf16": ("BF16", "BF16")}
"""Name of a file's weights -> GGUF types of matrices, and of the output layer."""

Experts = Mapping[str, tuple[torch.Tensor, Sequence[int]]]
"""gate, up, down -> (float32 [distinct experts, rows, columns], which of them each expert is), equal in all layers."""


def write_gguf(
    path: Path, config: Any, dense: dict[str, torch.Tensor], experts: Experts,
    progress: Callable[[int, int, str], None], weights: str = "q4_0",
) -> None:  # fmt: skip
    """Writes the model; dense: its state dict without experts, any float dtype. weights: one of WEIGHTS.

    Raises MissingExtraError without the package gguf, ConfigError for a model that llama.cpp computes otherwise or not.
    """
    try:
        import gguf
    except ImportError as error:
        raise MissingExtraError("bench", "llama.cpp beside it needs the packages llama-cpp-python and gguf") from error
    if config.model_type not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise ConfigError(f"a GGUF file of random weights is written for {known}, found {config.model_type}")
    if config.model_type in NORMALISED and not config.norm_topk_prob:
        raise ConfigError(
            f"llama.cpp normalises the weights of {config.model_type}'s experts: set norm_topk_prob: true"
        )
    architecture = gguf.MODEL_ARCH[ARCHITECTURES[config.model_type]]
    writer = gguf.GGUFWriter(str(path), gguf.MODEL_ARCH_NAMES[architecture])
    _describe(writer, config)
    names = gguf.get_tensor_name_map(architecture, config.num_hidden_layers)
    for key, tensor in laid_out(dense, config):
        kind = _type_of(gguf, key, tensor, weights)
        writer.add_tensor(_name(names, key), _values(gguf, tensor, kind), raw_dtype=kind)
    kind = gguf.GGMLQuantizationType[WEIGHTS[weights][0]]
    stored = {part: _values(gguf, distinct, kind)[list(which)] for part, (distinct, which) in experts.items()}
    for layer in range(config.num_hidden_layers):
        for part, values in stored.items():
            writer.add_tensor(f"blk.{layer}.ffn_{part}_exps.weight", values, raw_dtype=kind)
        progress(layer + 1, config.num_hidden_layers, "GGUF file")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _describe(writer: Any, config: Any) -> None:
    """The metadata that llama.cpp needs of a model without a vocabulary."""
    head_dim = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    if hasattr(config, "intermediate_size"):  # not of Qwen3.5, which has no dense layers
        writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    rotation = config.rope_parameters or {}
    writer.add_rope_dimension_count(int(head_dim * rotation.get("partial_rotary_factor", 1)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(float(rotation.get("rope_theta", 10_000.0)))
    writer.add_expert_count(config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if hasattr(config, "moe_intermediate_size"):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
    if hasattr(config, "linear_conv_kernel_dim"):
        describe_delta_net(writer, config)
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("no_vocab")


def _name(names: Any, key: str) -> str:
    if key.startswith("blk."):  # its own already
        return key
    found = names.get_name(key, try_suffixes=(".weight", ".bias"))
    if found is None:
        raise ConfigError(f"llama.cpp has no name for the tensor {key}")
    return str(found)


def _type_of(gguf: Any, key: str, tensor: torch.Tensor, weights: str) -> Any:
    kinds, (matrices, output) = gguf.GGMLQuantizationType, WEIGHTS[weights]
    if tensor.dim() == 1 or key.endswith(("gate.weight", "conv1d.weight")):
        return kinds.F32
    return kinds[output if key.startswith("lm_head") else matrices]


def _values(gguf: Any, tensor: torch.Tensor, kind: Any) -> npt.NDArray[Any]:
    """The tensor as `kind` stores it: float32, or bytes in place of the last dimension's values."""
    values: npt.NDArray[Any] = tensor.detach().float().contiguous().numpy()
    return values if kind == gguf.GGMLQuantizationType.F32 else np.ascontiguousarray(gguf.quants.quantize(values, kind))
