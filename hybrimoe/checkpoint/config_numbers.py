"""Numbers of a model's configuration that cannot be: found when the model is opened, and named.

transformers builds a model from most numbers, and fails in the first forward, or answers NaN. Refused is what no
forward can run with, and nothing that transformers runs: real configurations carry entries that nothing reads.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn
from transformers import PreTrainedConfig

from hybrimoe.errors import ModelError

COUNTS = (
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "vocab_size",
    "num_experts_per_tok",
)
"""Of config.json: what is 1 or more in every model."""
EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts")
SIZES = (
    *COUNTS,
    *EXPERT_COUNTS,
    "intermediate_size",
    "moe_intermediate_size",
    "max_position_embeddings",
    "sliding_window",
)
"""What is multiplied, or made in that number, when a model is built."""
CHOSEN = ("num_experts_per_tok", "top_k_experts")
"""How many experts a token takes; families have one of them, or other names that stand for the first."""
CHUNKS = ("mamba_chunk_size", "chunk_size")
"""Tokens that state space layers take at a time: they divide by it."""
DIVISORS = ("logits_scaling",)
EPSILONS = ("rms_norm_eps", "layer_norm_eps", "norm_eps", "layer_norm_epsilon")
FACTORS = ("routed_scaling_factor", "router_scaling_factor", "route_scale", "residual_multiplier", *DIVISORS)
MOST_LAYERS = 10_000
"""A model is built layer by layer before its weights are looked at, and no model has so many."""
MOST = (1 << 31) - 1  # of any other of these numbers: sizes are multiplied, and must fit 64 bits
WINDOWS = {"sliding": "sliding_window", "chunked": "attention_chunk_size"}
"""A word in the types of attention layers, and the entry with their window in tokens."""
UNGROUPED, BY_THE_BEST = "greedy", "group_limited_greedy"
"""topk_method of DeepSeek V2: groups of experts are not looked at, or by their best expert; else by their best two."""


def check_sizes(place: object, config: Mapping[str, Any]) -> None:
    """Raises ModelError for a size or number of a configuration as it lies in a file that is 0 or less (transformers
    divides by some of them), or beyond all measure, and for any that is NaN. place: what the error names."""
    inner = config.get("text_config")
    if not isinstance(inner, Mapping | None):
        raise ModelError(f"{place}: text_config in config.json is {inner!r}; expected an object with the model's sizes")
    for part in (config, inner if isinstance(inner, Mapping) else {}):
        for name in SIZES:
            value, most = part.get(name), MOST_LAYERS if name == "num_hidden_layers" else MOST
            if not isinstance(value, int | float):
                continue
            if value < 1 and name in COUNTS:
                raise _refused(place, name, value, "expected 1 or more")
            if value > most:
                raise _refused(place, name, value, f"expected {most} at most")
    for name in _not_numbers(config):
        raise _refused(place, name, math.nan, "expected a number")


def check_config(place: object, config: PreTrainedConfig) -> None:
    """Raises ModelError for numbers of a language model that fit no forward: sizes, windows of attention, experts and
    groups of them that are chosen for a token. place: what the error names."""
    text = config.get_text_config()
    check_sizes(place, {name: _given(text, name) for name in SIZES})
    _check_windows(place, text)
    _check_factors(place, text)
    n_experts = max(_count(text, name) for name in EXPERT_COUNTS)
    if n_experts:
        _check_choice(place, text, n_experts)


def check_positions(model: nn.Module) -> None:
    """Raises ModelError where the frequencies of rotary positions, computed from config.json, are NaN or infinite, or
    more than what they rotate."""
    _check_rotated(model)
    for path, module in model.named_modules():
        buffers = [buffer for name, buffer in module.named_buffers(recurse=False) if name.endswith("inv_freq")]
        scaling = getattr(module, "attention_scaling", 1.0) if buffers else 1.0
        finite = all(bool(torch.isfinite(buffer).all()) for buffer in buffers if not buffer.is_meta)
        if not finite or (isinstance(scaling, float) and not math.isfinite(scaling)):
            given = getattr(getattr(module, "config", None), "rope_parameters", None)
            raise ModelError(
                f"rope_parameters in config.json gives positions that are NaN or infinite ({path}): {given}; expected a"
                " rope_theta above 0 and factors that are not 0"
            )


def _check_windows(place: object, text: PreTrainedConfig) -> None:
    """Of layers that have one. transformers takes a model without layer_types for one of windows if it has any."""
    kinds = getattr(text, "layer_types", None)
    for word, name in WINDOWS.items():
        window = getattr(text, name, None)
        used = kinds is None or any(word in str(kind) for kind in kinds)
        if used and isinstance(window, int | float) and not window >= 1:
            raise _refused(place, name, window, "expected 1 or more tokens, or null where no layer has a window")


def _check_rotated(model: nn.Module) -> None:
    """Of layers that share the frequencies of one module beside them."""
    sizes: dict[str, set[int]] = defaultdict(set)
    for path, module in model.named_modules():
        rows = [2 * buffer.numel() for name, buffer in module.named_buffers(recurse=False) if name == "inv_freq"]
        sizes[path.rpartition(".")[0]].update(rows)
    for path, module in model.named_modules():
        beside = [
            prefix for prefix, found in sizes.items() if found and path.startswith(f"{prefix}." if prefix else "")
        ]
        if not beside or len(sizes[max(beside, key=len)]) != 1:
            continue
        (rotated,) = sizes[max(beside, key=len)]
        part, whole = getattr(module, "qk_rope_head_dim", None), getattr(module, "head_dim", None)
        if isinstance(part, int) and part and hasattr(module, "kv_lora_rank") and part != rotated:
            raise ModelError(
                f"head_dim in config.json gives positions for {rotated} dimensions of a head, qk_rope_head_dim has"
                f" {part} of them ({path}); expected the same"
            )
        if isinstance(whole, int) and hasattr(module, "o_proj") and part is None and rotated > whole:
            raise ModelError(
                f"partial_rotary_factor in config.json gives positions for {rotated} dimensions of a head, which has"
                f" head_dim {whole} ({path}); expected 1 at most"
            )


def _check_factors(place: object, text: PreTrainedConfig) -> None:
    for name in FACTORS:
        value = getattr(text, name, None)
        if isinstance(value, float) and not math.isfinite(value):
            raise _refused(place, name, value, "expected a finite number")
        if name in DIVISORS and isinstance(value, int | float) and value == 0:
            raise _refused(place, name, value, "expected another number: logits are divided by it")
    for name in EPSILONS:
        value = getattr(text, name, None)
        if isinstance(value, int | float) and value < 0:
            raise _refused(place, name, value, "expected 0 or more")
    has_states = hasattr(text, "mamba_chunk_size") or hasattr(text, "ssm_state_size")
    for name in CHUNKS if has_states else ():
        value = getattr(text, name, None)
        if isinstance(value, int) and value < 1:
            raise _refused(place, name, value, "expected 1 or more tokens")


def _check_choice(place: object, text: PreTrainedConfig, n_experts: int) -> None:
    choices = n_experts + _count(text, "zero_expert_num")
    for name in CHOSEN:
        if (chosen := _count(text, name)) > choices:
            raise _refused(place, name, chosen, f"expected {choices} at most, as many as there are experts")
    groups, kept = getattr(text, "n_group", None), getattr(text, "topk_group", None)
    method = getattr(text, "topk_method", None)
    if groups is None or method == UNGROUPED:
        return
    least = 1 if method == BY_THE_BEST else 2
    if groups < 1 or n_experts % groups or n_experts // groups < least:
        expected = f"expected a number of groups of {least} or more that divides the {n_experts} experts"
        raise _refused(place, "n_group", groups, expected)
    if kept is not None and not 1 <= kept <= groups:
        raise _refused(place, "topk_group", kept, f"expected 1 to {groups}, the groups that there are (n_group)")


def _given(text: PreTrainedConfig, name: str) -> Any:
    """A value of the configuration; None where it has none, or (as Gemma 4's does by raising) none for all layers."""
    try:
        return getattr(text, name, None)
    except RuntimeError:
        return None


def _count(text: PreTrainedConfig, name: str) -> int:
    """A number of the configuration; 0 where it has none."""
    value = getattr(text, name, None)
    return value if isinstance(value, int) and value >= 1 else 0


def _not_numbers(value: Any, name: str = "") -> Iterator[str]:
    """Where in a configuration NaN stands, as a path of names."""
    if isinstance(value, float) and math.isnan(value):
        yield name
    elif isinstance(value, Mapping):
        for key, inner in value.items():
            yield from _not_numbers(inner, f"{name}.{key}" if name else str(key))
    elif isinstance(value, list | tuple):
        for index, inner in enumerate(value):
            yield from _not_numbers(inner, f"{name}[{index}]")


def _refused(place: object, name: str, value: Any, expected: str) -> ModelError:
    where = "its metadata" if str(place).endswith(".gguf") else "config.json"
    return ModelError(f"{place}: {name} in {where} is {value}; {expected}")
