"""`cpu.attention`: decode steps of bfloat16 attention on the CPU by the kernel of `cpu_kernels.backends.attention`.

PyTorch's own kernel is made for many queries: against a long context it takes ten times as long as reading the keys and
values once does, which is most of a step of long chats. Prompts, other dtypes and other devices stay with PyTorch.
"""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cache, partial
from typing import Any

import torch
from torch import nn
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward

from cpu_kernels import decode_attention, supports_decode_attention
from cpu_kernels.backends.shared import shared_backend

NAME = "hybrimoe"
"""Of the attention implementation in transformers' registry, followed by the number of threads where one is set."""
REPLACED = "sdpa"
UNKNOWN_HERE = ("softcap", "position_bias", "s_aux", "cache")
"""Arguments of an attention call that the kernel does not know: PyTorch's gets the call, or refuses it."""
HEAD_SIZE = 64
"""Of the call that compiles the kernels (about 5 s) or loads them from the cache."""
ASKS_BY_NAME = re.compile(r"_attn_implementation\s*(==|!=|not in|in)\s")
CHOOSES = "get_interface(self.config._attn_implementation"


def attention_forward(
    module: nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    *,
    threads: int | None = None,
    **others: Any,
) -> tuple[torch.Tensor, None]:
    """An attention function as transformers calls it; returns [B, queries, heads, V] and no weights.

    query [B, heads, queries, D], key and value [B, kv_heads, T, D or V]; attention_mask: bool (True is seen) or added.
    """
    if _takes(query, key, value, attention_mask, dropout, others):
        scale = query.shape[-1] ** -0.5 if scaling is None else scaling
        bias = None if attention_mask is None else _bias(attention_mask, query.shape[0], key.shape[2])
        return decode_attention(query, key, value, scale, bias, threads).transpose(1, 2), None
    result: tuple[torch.Tensor, None] = sdpa_attention_forward(
        module, query, key, value, attention_mask, dropout=dropout, scaling=scaling, **others
    )
    return result


def _takes(
    query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, mask: torch.Tensor | None, dropout: float,
    others: dict[str, Any],
) -> bool:  # fmt: skip
    if query.shape[2] != 1 or query.requires_grad or dropout:
        return False
    if any(others.get(name) is not None for name in UNKNOWN_HERE):
        return False
    same_mask = mask is None or (mask.dim() == 4 and mask.shape[1] == mask.shape[2] == 1)
    return same_mask and supports_decode_attention(query, key, value)


def _bias(mask: torch.Tensor, n_batch: int, n_tokens: int) -> torch.Tensor:
    """float32 [B, T] of a mask [B or 1, 1, 1, T or more]."""
    seen = mask[:, 0, 0, :n_tokens]
    if seen.dtype == torch.bool:
        seen = torch.zeros(seen.shape).masked_fill_(~seen, -torch.inf)
    return seen.to(torch.float32).expand(n_batch, n_tokens)


@dataclass(slots=True)
class DecodeAttention:
    """The modules whose attention function was replaced, with the configuration that they had."""

    originals: list[tuple[nn.Module, Any]] = field(default_factory=list)

    def undo(self) -> None:
        """Gives every module its own configuration back."""
        while self.originals:
            module, config = self.originals.pop()
            module.config = config


def use_decode_attention(model: nn.Module, threads: int | None = None) -> DecodeAttention:
    """Lets the attention modules that use PyTorch's scaled_dot_product_attention use `attention_forward`.

    A module finds its function by the name in its configuration: each gets a copy with another name, so that masks,
    other models of the same configuration and the model's own stay as they are. Modules that compare the name stay out.
    The kernels are compiled here where the model will need them.
    Raises ThreadingError where the kernels' threads do not start.
    """
    shared_backend(threads)
    name = NAME if threads is None else f"{NAME}-{threads}"
    AttentionInterface.register(name, partial(attention_forward, threads=threads))
    done = DecodeAttention()
    copies: dict[int, Any] = {}
    for module in model.modules():
        config = module.__dict__.get("config")
        if getattr(config, "_attn_implementation", None) != REPLACED or not _chooses_by_name(type(module).forward):
            continue
        if id(config) not in copies:
            copies[id(config)] = copy.copy(config)
            copies[id(config)].__dict__["_attn_implementation_internal"] = name
        done.originals.append((module, config))
        module.config = copies[id(config)]
    if any(_computes_bfloat16_here(module) for module, _ in done.originals):
        nothing = torch.zeros(1, 1, 1, HEAD_SIZE, dtype=torch.bfloat16)
        decode_attention(nothing, nothing, nothing, 1.0, None, threads)  # now, and not in the first reply
    return done


def _computes_bfloat16_here(module: nn.Module) -> bool:
    return any(weight.dtype == torch.bfloat16 and weight.device.type == "cpu" for weight in module.parameters())


@cache
def _chooses_by_name(forward: Callable[..., Any]) -> bool:
    """Whether a module's forward takes its attention function from the registry, and only that depends on the name."""
    try:
        source = inspect.getsource(forward)
    except (OSError, TypeError):
        return False
    return CHOOSES in re.sub(r"\s+", "", source) and not ASKS_BY_NAME.search(source)
